"""The only caller of `torch.distributed` collectives: chosen by backend, counted in bytes, named by tag.

CPU ranks on one host read each other's memory in place (`memory_window`). Otherwise, on gloo, an all-gather is
point-to-point straight into place and a reduce-scatter is an exchange followed by a local sum: gloo's own
reduce-scatter is an all-reduce inside (1.5 times the traffic), and its all-gather copies.
The local sum runs in fp32 whatever travelled, so 16-bit wires do not round once per rank. Other backends get
their native collectives, under the names of torch 2.11 (`all_gather_into_tensor`) or 2.13 (`all_gather_single`).
"""

from __future__ import annotations

import itertools
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import Any, Protocol

import torch
import torch.distributed as dist

from unishard.dist.in_place import (
    Contribution,
    GatherPart,
    InPlaceAllReduce,
    InPlaceGather,
    InPlaceReduce,
    Sources,
    Target,
    encode_label,
    plan_flat,
    reduce_small,
    sum_dtype,
)
from unishard.dist.memory_window import MemoryWindow, open_window
from unishard.dist.traffic import count
from unishard.errors import StateError

# Above the tags that user code plausibly picks for its own sends on the same process group.
_FIRST_TAG = 1 << 24
_TAG_SPAN = 1 << 28

_all_gather: Callable[..., Any] = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter: Callable[..., Any] = (
    getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
)


# Point-to-point messages are numbered per process group: two numberings on one group would cross. The group is held
# weakly, since a process group that outlives `destroy_process_group` aborts the interpreter at exit.
_tags: weakref.WeakKeyDictionary[dist.ProcessGroup, Iterator[int]] = weakref.WeakKeyDictionary()
_tags_lock = threading.Lock()


def _tags_of(group: dist.ProcessGroup) -> Iterator[int]:
    with _tags_lock:
        return _tags.setdefault(group, itertools.count())


class Pending(Protocol):
    """A collective under way. `wait()` is idempotent and returns once its result is there."""

    def wait(self) -> None: ...

    def release(self) -> None:
        """After `wait()`: return once peers no longer need what this rank contributed."""
        ...


class Done:
    """A collective with nothing to do: one rank."""

    def wait(self) -> None:
        return None

    def release(self) -> None:
        return None


DONE = Done()


class Works:
    """Several `torch.distributed` works that complete together, then an optional local finish."""

    def __init__(self, works: Sequence[Any], finish: Callable[[], None] | None = None) -> None:
        self._works = list(works)
        self._finish = finish

    def wait(self) -> None:
        works, self._works = self._works, []
        for work in works:
            work.wait()
        finish, self._finish = self._finish, None
        if finish is not None:
            finish()

    def release(self) -> None:
        """Nothing to wait for: sockets and devices copy."""


class Communicator:
    """The collectives of one mesh axis. All ranks of the axis call the same methods in the same order."""

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self._group = None if group is None else weakref.ref(group)
        self.size = 1 if group is None else dist.get_world_size(group)
        self.rank = 0 if group is None else dist.get_rank(group)
        self.point_to_point = group is not None and self._backend() == "gloo"
        self._tags = itertools.count() if group is None else _tags_of(group)

    @property
    def group(self) -> dist.ProcessGroup | None:
        """The process group; torch's registry owns it until `destroy_process_group`."""
        if self._group is None:
            return None
        group = self._group()
        if group is None:
            raise StateError(
                "the process group of this sharded model was destroyed; keep it until training is over"
            )
        return group

    def _backend(self) -> str:
        return str(dist.get_backend(self.group)).lower()

    @property
    def native_device(self) -> bool:
        """Whether this axis communicates device memory only (NCCL)."""
        return self._group is not None and self._backend() == "nccl"

    # in place ----------------------------------------------------------------------------------------------

    @cached_property
    def window(self) -> MemoryWindow | None:
        """Peers' memory, where all of them are on this host; opened by the first collective, on all ranks together."""
        if self.size == 1 or self.group is None or not self.point_to_point:
            return None
        return open_window(self.group)

    def gather_in_place(self, parts: Sequence[GatherPart], op: str, label: str) -> Pending:
        """Read every peer's shards into this rank's gathered memory.

        Sources must keep their values until `drain()`. Sends (size - 1) times each source.
        """
        if self.window is None:
            raise StateError(f"{label}: peers' memory cannot be read; ask `window` first")
        count(op, (self.size - 1) * sum(p.source.numel() * p.source.element_size() for p in parts))
        return InPlaceGather(self.window, parts, encode_label(op, label))

    def reduce_in_place(
        self, contributions: Sequence[Contribution], op: str, label: str, sent: int
    ) -> Pending:
        """Sum what every rank published for some shards; `wait()` ends with their `finish()`.

        Sources are contiguous and stay alive until peers have read them. `sent` is what one peer reads, in bytes.
        """
        if self.window is None:
            raise StateError(f"{label}: peers' memory cannot be read; ask `window` first")
        count(op, (self.size - 1) * sent)
        return InPlaceReduce(self.window, contributions, encode_label(op, label))

    @property
    def in_flight(self) -> int:
        """How many reductions may be under way. Sockets move data meanwhile; reading in place happens in `wait`, and a
        second one would hold a second group's gradients for nothing."""
        return 1 if self.window is not None else 2

    def drain(self) -> None:
        """Return once peers have read what they were shown, so that it may change. Sockets copy, and need no wait."""
        if self.size > 1 and self.window is not None:
            self.window.drain()

    def tidy(self) -> None:
        """Let go of memory that was shown to peers and that they have read by now. Waits for nobody."""
        if self.size > 1 and "window" in vars(self) and self.window is not None:
            self.window.tidy()

    # collectives -------------------------------------------------------------------------------------------

    def _own_slice(self, full: torch.Tensor) -> torch.Tensor:
        length = full.numel() // self.size
        return full.narrow(0, self.rank * length, length)

    def _exchange(self, sends: dict[int, torch.Tensor], receives: dict[int, torch.Tensor]) -> list[Any]:
        """Post every send and receive at once; peers are ranks of this group. Bytes travel as they are."""
        tag = _FIRST_TAG + next(self._tags) % _TAG_SPAN
        group = self.group
        if group is None:
            return []
        works = [group.recv([buffer], peer, tag) for peer, buffer in receives.items()]
        works += [group.send([buffer], peer, tag) for peer, buffer in sends.items()]
        return works

    def _peers(self) -> Iterator[int]:
        # Each rank starts at its right neighbour, so that not all ranks talk to rank 0 first.
        for step in range(1, self.size):
            yield (self.rank + step) % self.size

    def all_gather(
        self,
        full: torch.Tensor,
        op: str = "all_gather",
        label: str = "",
        source: torch.Tensor | None = None,
    ) -> Pending:
        """Fill `full`, shape (size * n,), whose own slice [rank * n : (rank + 1) * n] already holds this rank's.

        The caller keeps `full` alive until `wait()`. `source`, by default that slice, is a second place where this
        rank's n elements lie; it stays alive and keeps its values until `drain()`. Sends (size - 1) * n elements.
        """
        if self.size == 1:
            return DONE
        own = self._own_slice(full)
        if self.window is not None:
            plan = plan_flat(full.numel(), self.size, self.rank, full.element_size())[1]
            part = GatherPart(own if source is None else source, full, plan)
            return self.gather_in_place([part], op, label)
        count(op, (self.size - 1) * own.numel() * own.element_size())
        if self.point_to_point:
            slices, peers = full.chunk(self.size), list(self._peers())
            return Works(self._exchange(dict.fromkeys(peers, own), {p: slices[p] for p in peers}))
        return Works([_all_gather(full, own, group=self.group, async_op=True)])

    def reduce_scatter(
        self,
        full: torch.Tensor,
        finish: Callable[[torch.Tensor], None],
        op: str = "reduce_scatter",
        label: str = "",
    ) -> Pending:
        """Sum `full`, shape (size * n,), over ranks; `wait()` calls `finish` with this rank's sum, shape (n,), fp32
        (fp64 stays fp64).

        The sum may alias `full`, which belongs to the collective from here on. Sends (size - 1) * n elements.
        """
        own = self._own_slice(full)
        if self.size == 1:
            return Works([], lambda: finish(_widen(own)))
        count(op, (self.size - 1) * own.numel() * own.element_size())
        if self.window is not None:
            plan = plan_flat(full.numel(), self.size, self.rank, full.element_size())[0]
            total = torch.empty(own.numel(), dtype=sum_dtype(own.dtype), device="cpu")
            target = Target(total, accumulate=False, scale=1.0)
            sources = Sources([full], packed=True, dtype=full.dtype)
            whole = Contribution(sources, plan, 0, lambda: target, lambda: finish(total))
            return InPlaceReduce(self.window, [whole], encode_label(op, label))
        if self.point_to_point:
            slices, received = full.chunk(self.size), {p: torch.empty_like(own) for p in self._peers()}
            works = self._exchange({p: slices[p] for p in received}, received)
            # Summed in rank order, so that every layout of ranks rounds the same way.
            return Works(
                works, lambda: finish(_sum([received.get(r, own) for r in range(self.size)], self.rank))
            )
        if own.element_size() < 4:
            # The backend would sum in the wire dtype; an all-to-all sends the same bytes and leaves the sum to us.
            out = torch.empty_like(full)
            work = dist.all_to_all_single(out, full, group=self.group, async_op=True)
            return Works([work], lambda: (full, finish(_sum(out.chunk(self.size))))[1])
        out = torch.empty_like(own)
        work = _reduce_scatter(out, full, op=dist.ReduceOp.SUM, group=self.group, async_op=True)
        # `full` is held by the closure: the backend reads it until the work is done.
        return Works([work], lambda: (full, finish(_widen(out)))[1])

    def all_reduce(
        self, tensor: torch.Tensor, op: str = "all_reduce", label: str = "", scale: float = 1.0
    ) -> Pending:
        """Sum `tensor` times `scale` over ranks in place, any shape; it keeps its values until `drain()`.

        Sends 2 (size - 1) / size of it, rounded up to whole slices.
        """
        if self.size == 1:
            return DONE
        flat = tensor.view(-1)
        if self.window is not None:
            count(op, 2 * (self.size - 1) * flat.numel() * flat.element_size() // self.size)
            plans = plan_flat(flat.numel(), self.size, self.rank, flat.element_size())
            return InPlaceAllReduce(self.window, flat, plans, scale, encode_label(op, label))
        if not (self.point_to_point and flat.element_size() < 4):
            count(op, 2 * (self.size - 1) * flat.numel() * flat.element_size() // self.size)
            work = dist.all_reduce(flat, group=self.group, async_op=True)
            return Works([work], lambda: _scale(flat, scale))
        return self._all_reduce_16bit(flat, op, scale)

    def _all_reduce_16bit(self, flat: torch.Tensor, op: str, scale: float) -> Pending:
        # gloo sums in the wire dtype; two exchanges with an fp32 sum between them send the same bytes.
        length = -(-flat.numel() // self.size)
        padded = flat.new_zeros(length * self.size)
        padded[: flat.numel()].copy_(flat)

        def gather_back(total: torch.Tensor) -> None:
            padded.chunk(self.size)[self.rank].copy_(total.mul_(scale))
            self.all_gather(padded, op).wait()
            flat.copy_(padded[: flat.numel()])

        return self.reduce_scatter(padded, gather_back, op)

    def all_reduce_control(self, tensor: torch.Tensor, reduce: str = "sum") -> torch.Tensor:
        """Reduce a small flag or scalar tensor in place, `reduce` in {"sum", "max", "min"}; blocks; returns it."""
        if self.size > 1:
            count(
                "control",
                2 * (self.size - 1) * tensor.numel() * tensor.element_size() // self.size,
                control=True,
            )
            if self.window is not None and tensor.is_contiguous():
                reduce_small(self.window, tensor, reduce, b"control")
                return tensor
            ops = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX, "min": dist.ReduceOp.MIN}
            dist.all_reduce(tensor, op=ops[reduce], group=self.group)
        return tensor

    def broadcast(self, tensor: torch.Tensor, source: int = 0, op: str = "broadcast") -> None:
        """Copy `tensor` from rank `source` of this axis to all, in place; blocks."""
        if self.size > 1:
            count(op, tensor.numel() * tensor.element_size() if self.rank == source else 0, control=True)
            # Backends do not know floats of a byte; their bytes travel as well.
            narrow = tensor.is_floating_point() and tensor.dtype.itemsize == 1
            dist.broadcast(tensor.view(torch.uint8) if narrow else tensor, group=self.group, group_src=source)

    def broadcast_object(self, value: Any, source: int = 0) -> Any:
        """Return rank `source`'s picklable `value` on every rank; blocks."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, group=self.group, group_src=source)
        return box[0]

    def all_gather_object(self, value: Any) -> list[Any]:
        """Every rank's picklable `value`, in rank order; blocks."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values


def _scale(flat: torch.Tensor, scale: float) -> None:
    if scale != 1.0:
        flat.mul_(scale)


def _widen(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.element_size() >= 4 else tensor.float()


def _sum(pieces: Sequence[torch.Tensor], own: int = 0) -> torch.Tensor:
    """Sum in the given order into fresh or received memory, never into piece `own`: that one is a slice of a whole
    group's buffer, which would stay alive with it."""
    if pieces[0].element_size() < 4:
        total = pieces[0].float().add_(pieces[1])
    else:
        total = torch.add(pieces[0], pieces[1], out=pieces[1 if own == 0 else 0])
    for piece in pieces[2:]:
        total.add_(piece)
    return total


SOLO = Communicator(None)


# One for each group, so that units of one model compare equal in what they communicate over.
_communicators: weakref.WeakKeyDictionary[dist.ProcessGroup, Communicator] = weakref.WeakKeyDictionary()


def communicator(group: dist.ProcessGroup | None) -> Communicator:
    """The communicator of `group`, always the same; `None` stands for a single rank with nobody to talk to."""
    if group is None:
        return SOLO
    return _communicators.setdefault(group, Communicator(group))


def known_communicators() -> list[Communicator]:
    """Every communicator of a living process group."""
    return list(_communicators.values())
