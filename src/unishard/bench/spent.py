"""Where a step's time goes: the torch profiler's events of one thread, each attributed to one of five kinds."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile, record_function

KINDS: tuple[str, ...] = ("compute", "communication", "copies", "optimizer", "python")

ATTRIBUTION = {
    "compute": "operators of forward and backward that are not copies (self time)",
    "communication": "launching collectives and waiting for them: c10d, gloo and functional-collective operators, "
    "every Work.wait(); unishard's waits, reads of peers' memory and sums; for DDP the part of backward that no "
    "operator accounts for, where its reducer waits in C++",
    "copies": "aten::copy_, fill_, zero_, cat, clone and FSDP2's packing operators, with all they call; the model's "
    "own few are in here for every contestant, plain included",
    "optimizer": "everything inside a torch optimizer's step() that is not communication",
    "python": "the rest of the step: Python of the loop, of hooks and of the library, and the autograd engine; the "
    "profiler itself makes it larger than it is",
}

_COMMUNICATION = (
    "c10d::",
    "gloo:",
    "_c10d_functional::",
    "nccl:",
    "unishard::",
    "bench.wait",
    "DistributedDataParallel.wait",
)
_COPIES = {
    "aten::copy_",
    "aten::_to_copy",
    "aten::fill_",
    "aten::zero_",
    "aten::cat",
    "aten::clone",
    "aten::_foreach_copy_",
    "aten::split_with_sizes_copy",
    "aten::_chunk_cat",
    "fsdp::all_gather_copy_in",
    "fsdp::split_with_sizes_copy",
    "fsdp::chunk_cat",
    "torch::distributed::reducer::mul_out",
}
_OPERATORS = ("aten::", "torch::distributed::", "deepspeed::")


class Event(Protocol):
    """What is read of a profiler event. Times are in microseconds."""

    name: str
    cpu_children: Sequence[Any]
    self_cpu_time_total: float


def time_by_kind(
    step: Callable[[], Any], settle: Callable[[], None], repeats: int, waits_in_backward: bool
) -> dict[str, float]:
    """Seconds a step by kind, averaged over `repeats` profiled calls of `step` on this thread.

    `settle` finishes what a step leaves under way: torch 2.13 writes into freed memory when a collective ends after the
    profiler that saw its start.
    """
    with _marked_waits(), profile(activities=[ProfilerActivity.CPU]):
        step()  # the profiler's own first-use costs stay out of what is counted
        settle()
    with _marked_waits(), profile(activities=[ProfilerActivity.CPU]) as profiled:
        step()  # leaves to the next what each step leaves to its next
        for _ in range(repeats):
            with record_function("bench.step"):
                step()
        settle()
    totals: dict[str, float] = dict.fromkeys(KINDS, 0.0)
    for event in profiled.events() or []:
        if event.name == "bench.step" and event.cpu_parent is None:
            attribute(event, "python", waits_in_backward, totals)
    return {kind: microseconds / 1e6 / repeats for kind, microseconds in totals.items()}


def attribute(event: Event, inside: str, waits_in_backward: bool, totals: dict[str, float]) -> None:
    """Add the self time of `event` and of all below it to `totals`; `inside` is the kind of what encloses it."""
    kind = kind_of(event.name, inside)
    waits = event.name == "bench.backward" and waits_in_backward
    totals["communication" if waits else kind] += event.self_cpu_time_total
    for child in event.cpu_children:
        attribute(child, kind, waits_in_backward, totals)


def kind_of(name: str, inside: str) -> str:
    """The kind of an event called `name` within one of kind `inside`.

    >>> kind_of("aten::addmm", "python"), kind_of("aten::copy_", "optimizer"), kind_of("aten::empty", "copies")
    ('compute', 'optimizer', 'copies')
    """
    if name.startswith(_COMMUNICATION) or inside == "communication":
        return "communication"
    if name.startswith("Optimizer.step#") or inside == "optimizer":
        return "optimizer"
    if name in _COPIES or inside == "copies":
        return "copies"
    return "compute" if name.startswith(_OPERATORS) else "python"


@contextmanager
def _marked_waits() -> Iterator[None]:
    """Let every `Work.wait()` that Python calls show in the profile: it is no operator."""
    original = dist.Work.wait

    def wait(self: Any, *args: Any, **kwargs: Any) -> Any:
        with record_function("bench.wait"):
            return original(self, *args, **kwargs)

    dist.Work.wait = wait
    try:
        yield
    finally:
        dist.Work.wait = original
