"""Collectives that read peers' memory in place: what each rank copies, and the reads and sums that do it.

A *span* is a contiguous run of elements that two ranks hold in different places. Plans are made once for a buffer and
hold offsets only, since buffers move when they are released and gathered again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch

from unishard.kernels import sum_pieces
from unishard.dist.labels import labelled
from unishard.dist.memory_window import MAX_VECTORS, MemoryWindow, copy_from

# Measured: single reads of 1 to 4 MB are the fastest, longer ones a third slower.
_READ_BYTES = 1 << 21
# What is read from all ranks for one sum. Measured: longer chunks leave the second-level cache, shorter ones spend more
# time on starting than on summing.
_SUM_BYTES, _LEAST_SUM_BYTES = 1 << 21, 1 << 18


class Span(NamedTuple):
    """`numel` elements at `source` of published tensor `index`, which belong at `target` here. Counts are elements."""

    index: int
    source: int
    target: int
    numel: int


@dataclass(frozen=True)
class Batch:
    """Spans copied by one system call: column arrays of equal length. `start` and `numel` bound their targets."""

    index: np.ndarray
    source: np.ndarray
    target: np.ndarray
    sizes: np.ndarray
    start: int
    numel: int
    bytes: int
    """The sum of `sizes`."""


def _split(spans: Iterable[Span], limit: int) -> Iterable[Span]:
    for index, source, target, numel in spans:
        for offset in range(0, numel, limit):
            yield Span(index, source + offset, target + offset, min(limit, numel - offset))


def plan_batches(spans: Iterable[Span], itemsize: int, limit_bytes: int) -> list[Batch]:
    """Group `spans`, in order of target, into batches of at most `limit_bytes`; longer spans are split.

    >>> [batch.numel for batch in plan_batches([Span(0, 0, 0, 5), Span(1, 0, 5, 2)], itemsize=4, limit_bytes=16)]
    [4, 3]
    """
    batches: list[Batch] = []
    members: list[Span] = []

    def close() -> None:
        if members:
            start, stop = members[0].target, members[-1].target + members[-1].numel
            index, source, target, numel = np.array(members, np.uint64).reshape(-1, 4).T.copy()
            size = np.uint64(itemsize)
            batch = Batch(index.astype(np.intp), source * size, target * size, numel * size, start, stop - start, int(numel.sum()) * itemsize)
            batches.append(batch)
            members.clear()

    limit = max(limit_bytes // itemsize, 1)
    for span in _split(sorted(spans, key=lambda s: s.target), limit):
        if members and (span.target + span.numel - members[0].target > limit or len(members) == MAX_VECTORS):
            close()
        members.append(span)
    close()
    return batches


def _read(pid: int, batch: Batch, bases: np.ndarray, local: int) -> None:
    """Copy a batch to `local`, the address of target 0. Nothing is read of spans whose base is 0."""
    theirs = bases[batch.index]
    vectors = np.empty((2, len(theirs), 2), np.uint64)
    np.add(batch.target, np.uint64(local), out=vectors[0, :, 0])
    np.add(batch.source, theirs, out=vectors[1, :, 0])
    vectors[:, :, 1] = batch.sizes
    size = batch.bytes
    if not theirs.all():
        kept = theirs != 0
        vectors = np.ascontiguousarray(vectors[:, kept])
        size = int(batch.sizes[kept].sum())
    copy_from(pid, vectors[0], vectors[1], size)


@lru_cache(maxsize=4096)
def encode_label(op: str, label: str) -> bytes:
    """What an operation is called in the page that ranks share."""
    return f"{op} {label}".encode()[:112]


GatherPlan = Sequence[Sequence[Batch]]
"""For each rank, how its published shard comes into the gathered memory here; this rank's own entry is not read."""


def plan_gather(spans: Sequence[Sequence[Span]], itemsize: int) -> GatherPlan:
    """One list of spans for each rank: from its shard (index 0) to the gathered memory."""
    return [plan_batches(each, itemsize, _READ_BYTES) for each in spans]


class GatherPart(NamedTuple):
    """One shard of this rank, and the gathered memory that holds it already and wants the other ranks'."""

    source: torch.Tensor
    full: torch.Tensor
    plan: GatherPlan


class InPlaceGather:
    """Peers' shards on their way into gathered memory."""

    def __init__(self, window: MemoryWindow, parts: Sequence[GatherPart], label: bytes) -> None:
        self._window: MemoryWindow | None = None
        self._owner = window
        self._parts, self._label = parts, label
        # A gather may be left for long, or for good: parameters that nobody uses before they change again.
        self._ticket = window.publish([part.source for part in parts], label, self.wait)
        self._window = window

    def __del__(self) -> None:
        if self._window is not None:
            self._window.give_up(self._ticket)

    def wait(self) -> None:
        window, self._window = self._window, None
        if window is not None:
            with labelled("unishard::gather"):
                self._read_all(window)

    def _read_all(self, window: MemoryWindow) -> None:
        for step in range(1, window.size):
            peer = (window.rank + step) % window.size
            bases = window.addresses(peer, self._ticket, self._label)
            for position, (_, full, plan) in enumerate(self._parts):
                local = full.data_ptr()
                for batch in plan[peer]:
                    _read(window.pids[peer], batch, bases[position : position + 1], local)
        window.finish(self._ticket)

    def release(self) -> None:
        """Return once peers have read this rank's shard."""
        self._owner.await_readers(self._ticket)


class Target(NamedTuple):
    """Where a sum goes: `out` (1-D), whether to add to what it holds, and what to multiply the sum by."""

    out: torch.Tensor
    accumulate: bool
    scale: float


class Chunk(NamedTuple):
    """One piece of a sum: where it comes from in tensors published one by one, and in one packed tensor."""

    start: int
    numel: int
    single: Batch | None
    packed: Batch


ReducePlan = Sequence[Chunk]


def plan_packed_reduce(start: int, numel: int, itemsize: int, ranks: int) -> ReducePlan:
    """For sums over `ranks` of [start, start + numel) of one packed tensor."""
    batches = plan_batches([Span(0, start, 0, numel)], itemsize, _chunk_bytes(ranks))
    return [Chunk(batch.start, batch.numel, None, batch) for batch in batches]


def plan_reduce(spans: Sequence[Span], packed_start: int, itemsize: int, ranks: int) -> ReducePlan:
    """For sums over `ranks` of `spans`; the packed tensor holds the same elements from `packed_start` on, in order of target."""
    chunks, limit = [], _chunk_bytes(ranks)
    for batch in plan_batches(spans, itemsize, limit):
        whole = Span(0, packed_start + batch.start, batch.start, batch.numel)
        [packed] = plan_batches([whole], itemsize, limit)
        chunks.append(Chunk(batch.start, batch.numel, batch, packed))
    return chunks


def _chunk_bytes(ranks: int) -> int:
    return max(_SUM_BYTES // ranks, _LEAST_SUM_BYTES)


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """What sums of `dtype` are kept in: fp32 for 16 bits."""
    return torch.float32 if dtype.itemsize < 4 else dtype


class Sources(NamedTuple):
    """What one rank publishes for a sum: one packed tensor, or one for each parameter (`None`: zeros)."""

    tensors: Sequence[torch.Tensor | None]
    packed: bool
    dtype: torch.dtype


class Contribution(NamedTuple):
    """One shard's part in a reduction. `target` is asked for at the end, when it is known whether to add to a sum."""

    sources: Sources
    plan: ReducePlan
    parameters: int
    """How many tensors a rank publishes if it does not pack, the same on all ranks."""
    target: Callable[[], Target]
    finish: Callable[[], None]

    def published(self) -> list[torch.Tensor | None]:
        """A packed tensor or nothing, then one entry for each parameter: ranks may differ in which they use."""
        tensors = self.sources.tensors
        return [*tensors, *([None] * self.parameters)] if self.sources.packed else [None, *tensors]


class InPlaceReduce:
    """Sums over ranks of what each rank published for some shards, in rank order and in fp32.

    Addition in a fixed order makes every layout of ranks round alike.
    """

    def __init__(self, window: MemoryWindow, contributions: Sequence[Contribution], label: bytes) -> None:
        self._window: MemoryWindow | None = None
        self._owner = window
        self._contributions = contributions
        self._label = label
        published = [tensor for each in contributions for tensor in each.published()]
        self._ticket = window.publish(published, label)
        self._window = window

    def __del__(self) -> None:
        if self._window is not None:  # a backward that failed
            self._window.give_up(self._ticket)

    def wait(self) -> None:
        window, self._window = self._window, None
        if window is not None:
            with labelled("unishard::reduce"):
                self._sum_all(window)

    def _sum_all(self, window: MemoryWindow) -> None:
        everyone = [window.addresses(rank, self._ticket, self._label) for rank in range(window.size)]
        contributions, self._contributions = self._contributions, ()
        start = 0
        for each in contributions:
            stop = start + 1 + each.parameters
            with torch.no_grad():
                _sum(window, each, [bases[start:stop] for bases in everyone])
            start = stop
        window.finish(self._ticket)
        for each in contributions:
            each.finish()

    def release(self) -> None:
        """Return once peers have read this rank's part."""
        self._owner.await_readers(self._ticket)


def _sum(window: MemoryWindow, contribution: Contribution, everyone: Sequence[np.ndarray]) -> None:
    sources, target = contribution.sources, contribution.target()
    largest = max((chunk.numel for chunk in contribution.plan), default=0)
    raw = torch.empty(window.size, largest, dtype=sources.dtype, device="cpu")
    for chunk in contribution.plan:
        parts = [_part(window, sources, chunk, rank, bases, raw[rank]) for rank, bases in enumerate(everyone)]
        _add(target, chunk, parts)


def _part(
    window: MemoryWindow, sources: Sources, chunk: Chunk, rank: int, bases: np.ndarray, raw: torch.Tensor
) -> torch.Tensor:
    """What `rank` adds to a chunk: a view of this rank's own tensor, or a copy in `raw`."""
    if bases[0] or chunk.single is None:
        batch = chunk.packed
    else:
        batch, bases = chunk.single, bases[1:]
    if rank == window.rank and len(batch.index) == 1:
        source = sources.tensors[int(batch.index[0])]
        if source is not None:
            start = int(batch.source[0]) // source.element_size()
            return source.view(-1)[start : start + batch.numel]
    part = raw[: batch.numel]
    covered = batch.bytes == batch.numel * part.element_size()
    if not (covered and bases[batch.index].all()):
        part.zero_()
    _read(window.pids[rank], batch, bases, part.data_ptr() - batch.start * part.element_size())
    return part


def _add(target: Target, chunk: Chunk, parts: Sequence[torch.Tensor]) -> None:
    """Sum `parts`, in order, where `target` wants the chunk; `target.out` may be one of them."""
    out = target.out[chunk.start : chunk.start + chunk.numel]
    if out.dtype == torch.float32 and parts[0].dtype != torch.float64:
        sum_pieces(out, parts, scale=target.scale, beta=1.0 if target.accumulate else 0.0)
        return
    total = parts[0].to(sum_dtype(parts[0].dtype), copy=True)
    for part in parts[1:]:
        total.add_(part)
    if target.accumulate:
        out.add_(total, alpha=target.scale)
    else:
        torch.mul(total, target.scale, out=out)


class InPlaceAllReduce:
    """A sum in place, in two phases: each rank sums its slice, then reads the other slices' sums."""

    def __init__(
        self,
        window: MemoryWindow,
        flat: torch.Tensor,
        plans: tuple[ReducePlan, GatherPlan],
        scale: float,
        label: bytes,
    ) -> None:
        reduce_plan, gather_plan = plans
        own = flat[slice(*slice_bounds(flat.numel(), window.size, window.rank))]
        self._gather: InPlaceGather | None = None
        self._second: InPlaceGather | None = None

        def publish_sum() -> None:
            self._gather = InPlaceGather(window, [GatherPart(own, flat, gather_plan)], label)

        target = Target(own, accumulate=False, scale=scale)
        sources = Sources([flat], packed=True, dtype=flat.dtype)
        whole = Contribution(sources, reduce_plan, 0, lambda: target, publish_sum)
        self._reduce = InPlaceReduce(window, [whole], label)

    def wait(self) -> None:
        self._reduce.wait()
        gather, self._gather = self._gather, None
        self._second = gather
        if gather is not None:
            gather.wait()

    def release(self) -> None:
        """Return once peers have read this rank's sum."""
        if self._second is not None:
            self._second.release()


def slice_bounds(numel: int, size: int, rank: int) -> tuple[int, int]:
    """Start and stop of `rank`'s slice when `numel` elements are cut into `size` slices, the last ones shorter.

    >>> [slice_bounds(5, 3, rank) for rank in range(3)]
    [(0, 2), (2, 4), (4, 5)]
    """
    length = -(-numel // size)
    return min(rank * length, numel), min((rank + 1) * length, numel)


@lru_cache(maxsize=1024)
def plan_flat(numel: int, size: int, rank: int, itemsize: int) -> tuple[ReducePlan, GatherPlan]:
    """Plans for one flat tensor of `numel` elements cut into slices: to sum the own one, to read the others."""
    bounds = [slice_bounds(numel, size, each) for each in range(size)]
    start, stop = bounds[rank]
    reduce = plan_packed_reduce(start, stop - start, itemsize, size)
    return reduce, plan_gather([[Span(0, 0, first, last - first)] for first, last in bounds], itemsize)


def reduce_small(window: MemoryWindow, tensor: torch.Tensor, reduce: str, label: bytes) -> None:
    """Reduce a small tensor over ranks in place, `reduce` in {"sum", "max", "min"}; blocks. May be written at once."""
    numel, size = tensor.numel(), tensor.numel() * tensor.element_size()
    ticket = window.publish([tensor.detach().clone()], label)
    parts = torch.empty(window.size, numel, dtype=tensor.dtype, device="cpu")
    for rank in range(window.size):
        [base] = window.addresses(rank, ticket, label)
        local, remote = np.array([[[parts[rank].data_ptr(), size]], [[base, size]]], np.uint64)
        copy_from(window.pids[rank], local, remote, size)
    window.finish(ticket)
    reducers = {"sum": torch.sum, "max": torch.amax, "min": torch.amin}
    tensor.view(-1).copy_(reducers[reduce](parts, dim=0))
