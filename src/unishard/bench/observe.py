"""One contestant in fresh processes of its own: memory, traffic, time by kind, loss curve, start-up."""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from unishard.bench import memory
from unishard.bench.contestant import Contestant, Trainer
from unishard.bench.network import sent_on_loopback
from unishard.bench.plan import Plan
from unishard.bench.spent import time_by_kind
from unishard.bench.timing import batches_of
from unishard.dist.traffic import record_traffic

PROFILED_STEPS = 2


@dataclass
class RankObservation:
    """One rank's findings. Bytes and seconds; peaks are growth over what was resident before the model was built."""

    import_seconds: float = 0.0
    import_growth: int = 0
    setup_seconds: float = 0.0
    first_step_seconds: float = 0.0
    peak_setup: int = 0
    peak: int = 0
    resident_before_update: int = 0
    live_before_update: int = 0
    held: dict[str, int] = field(default_factory=dict)
    sent_on_wire: float = 0.0
    sent_counted: float | None = None
    losses: list[float] = field(default_factory=list)
    spent: dict[str, float] = field(default_factory=dict)


def observe_contestant(contestant: Contestant, plan: Plan) -> RankObservation:
    """Everything but throughput. All ranks call together, in processes that have run nothing else."""
    _load_torch()
    memory.trim()
    seen, before = RankObservation(), memory.resident()
    seen.import_seconds = _import(contestant)
    memory.trim()
    base = memory.resident()
    seen.import_growth = base - before
    memory.reset_peak()
    started = time.perf_counter()
    trainer = contestant.build(plan)
    seen.setup_seconds = time.perf_counter() - started
    seen.peak_setup = memory.peak_resident() - base

    def step(index: int) -> None:
        seen.losses.append(trainer.step(batches_of(contestant, plan, index)))

    started = time.perf_counter()
    step(0)
    seen.first_step_seconds = time.perf_counter() - started
    step(1)
    _measure_traffic(contestant, step, range(2, plan.curve - 1), seen)
    seen.peak = memory.peak_resident() - base
    with _look_before_update(trainer, seen, base):
        step(plan.curve - 1)
    profiled = batches_of(contestant, plan, plan.curve)
    seen.spent = time_by_kind(
        lambda: trainer.step(profiled), trainer.settle, PROFILED_STEPS, contestant.waits_in_backward
    )
    trainer.close()
    return seen


def _load_torch() -> None:
    """Train one layer once: what torch itself loads on first use is not a contestant's memory."""
    layer = torch.nn.Linear(8, 8)
    optimizer = torch.optim.AdamW(layer.parameters(), fused=True)
    layer(torch.ones(1, 8)).sum().backward()
    optimizer.step()


def _import(contestant: Contestant) -> float:
    started = time.perf_counter()
    for module in contestant.imports:
        importlib.import_module(module)
    return time.perf_counter() - started


def _measure_traffic(
    contestant: Contestant, step: Callable[[int], None], indices: range, seen: RankObservation
) -> None:
    """Bytes a rank and step: the interface's counter divided by ranks, and for unishard also what it counted."""
    size = 1 if contestant.alone else dist.get_world_size()
    before = _sent_by_all()
    with record_traffic() if contestant.ours else nullcontext() as traffic:
        for index in indices:
            step(index)
    seen.sent_on_wire = (_sent_by_all() - before) / size / len(indices)
    if traffic is not None:
        seen.sent_counted = traffic.data_bytes / len(indices)


def _sent_by_all() -> int:
    """The loopback counter at a moment when no rank sends."""
    dist.barrier()
    sent = sent_on_loopback()
    dist.barrier()
    return sent


@contextmanager
def _look_before_update(trainer: Trainer, seen: RankObservation, base: int) -> Iterator[None]:
    """At the first update inside: what is alive, what persists, what is resident."""

    def look(*_: object) -> None:
        if seen.live_before_update:
            return  # DeepSpeed updates in several parts
        seen.held = memory.bytes_by_kind(trainer.held())
        seen.live_before_update = memory.live_bytes()
        memory.trim()
        seen.resident_before_update = memory.resident() - base

    handle = trainer.optimizer.register_step_pre_hook(look)
    try:
        yield
    finally:
        handle.remove()
