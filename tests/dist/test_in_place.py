"""Collectives that read peers' memory: values, order, what may change when, and ranks that disagree or leave."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from unishard.dist.collectives import Communicator, communicator
from unishard.dist.in_place import Span, plan_batches, plan_reduce, slice_bounds
from unishard.dist.traffic import record_traffic
from unishard.testing import RankFailure
from unishard.testing.transport import through_sockets

Ranks = Callable[..., Any]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
SIZES = [1, 7, 513, 200_000]  # elements a rank; the last takes several chunks


def world() -> Communicator:
    return communicator(dist.group.WORLD)


def part(rank: int, numel: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(numel, generator=torch.Generator().manual_seed(rank)).to(dtype)


def exact_values(transport: str) -> None:
    with through_sockets() if transport == "sockets" else nullcontext():
        comm = world()
        assert (comm.window is None) == (transport == "sockets")
        for dtype in DTYPES:
            for numel in SIZES:
                gathers(comm, numel, dtype)
                reduces(comm, numel, dtype)


def gathers(comm: Communicator, numel: int, dtype: torch.dtype) -> None:
    full = torch.full((comm.size * numel,), -1.0, dtype=dtype)
    full.chunk(comm.size)[comm.rank].copy_(part(comm.rank, numel, dtype))
    with record_traffic() as traffic:
        comm.all_gather(full, label="x").wait()
    assert torch.equal(full, torch.cat([part(r, numel, dtype) for r in range(comm.size)]))
    assert traffic.data_bytes == (comm.size - 1) * numel * dtype.itemsize


def reduces(comm: Communicator, numel: int, dtype: torch.dtype) -> None:
    wide = torch.float32 if dtype.itemsize < 4 else dtype
    flat = comm.size * numel
    parts = [part(r, flat, dtype) for r in range(comm.size)]
    expected = parts[0].to(wide)
    for other in parts[1:]:
        expected = expected + other  # in rank order, in fp32: bit for bit
    found: list[torch.Tensor] = []
    comm.reduce_scatter(parts[comm.rank].clone(), found.append, label="x").wait()
    assert torch.equal(found[0], expected.chunk(comm.size)[comm.rank])
    odd = parts[comm.rank].clone()
    with record_traffic() as traffic:
        comm.all_reduce(odd, label="x", scale=0.5).wait()
    comm.drain()
    torch.testing.assert_close(
        odd, (0.5 * expected).to(dtype), rtol=1e-6 if dtype.itemsize >= 4 else 1e-2, atol=1e-6
    )
    assert (
        abs(traffic.data_bytes - 2 * (comm.size - 1) * numel * dtype.itemsize)
        <= 4 * comm.size * dtype.itemsize
    )


@pytest.mark.parametrize("transport", ["memory", "sockets"])
@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_values_and_bytes(transport: str, world_size: int, ranks: Ranks) -> None:
    ranks(exact_values, transport, world_size=world_size)


def many_rounds() -> None:
    """More operations than the page has slots, with several open at once."""
    comm = world()
    for first in range(0, 600, 3):
        fulls = [torch.zeros(comm.size * 5) for _ in range(3)]
        for k, full in enumerate(fulls):
            full.chunk(comm.size)[comm.rank].fill_(first + k + 0.1 * comm.rank)
        pending = [comm.all_gather(full) for full in fulls]
        for k in (2, 0, 1):  # waited for in another order than begun
            pending[k].wait()
            for rank, chunk in enumerate(fulls[k].chunk(comm.size)):
                assert torch.all(chunk == torch.tensor(first + k + 0.1 * rank)), (first, k, rank)


def test_slots_are_reused(ranks: Ranks) -> None:
    ranks(many_rounds, world_size=3)


def gather_after(unread: str) -> None:
    """Gathers that nobody reads, as of an engine that is dropped or idle, and more others than a page has slots."""
    comm = world()
    idle = []
    for _ in range(300 if unread == "many" else 3):  # a page has 256 slots
        full = torch.zeros(2 * comm.size)
        full.chunk(comm.size)[comm.rank].fill_(comm.rank + 1)
        pending = comm.all_gather(full, label="unread")
        if unread != "dropped":
            idle.append((full, pending))
    kept = weakref.ref(full)
    del full, pending
    for step in range(600):
        full = torch.full((2 * comm.size,), float(step))
        comm.all_gather(full, label="x").wait()
    comm.drain()
    if unread == "dropped":
        assert kept() is None, "memory of a dropped gather is kept"
    for whole, late in idle:
        late.wait()
        assert whole.tolist() == [1 + i // 2 for i in range(2 * comm.size)]


@pytest.mark.timeout(30)
@pytest.mark.parametrize("unread", ["dropped", "idle", "many"])
def test_gathers_that_nobody_reads_stop_nobody(unread: str, ranks: Ranks) -> None:
    ranks(gather_after, unread, world_size=3, timeout=20)


def drains() -> None:
    """After `drain` a rank may write what it published, however late its peers read."""
    comm = world()
    for round_ in range(4):
        slow = round_ % comm.size == comm.rank
        shard = torch.full((50_000,), float(10 * round_ + comm.rank))
        full = torch.empty(comm.size * len(shard))
        full.chunk(comm.size)[comm.rank].copy_(shard)
        pending = comm.all_gather(full, source=shard)
        if slow:
            time.sleep(0.15)
        pending.wait()
        comm.drain()
        shard.fill_(-1.0)
        for rank, chunk in enumerate(full.chunk(comm.size)):
            assert torch.all(chunk == 10 * round_ + rank), (round_, rank)


def test_what_was_published_may_change_after_drain(ranks: Ranks) -> None:
    ranks(drains, world_size=3)


def sums_late_readers() -> None:
    """An all-reduced tensor may change after `drain`, although peers read the sum from it."""
    comm = world()
    for round_ in range(4):
        flat = torch.full((50_001,), 1.0 + comm.rank)
        pending = comm.all_reduce(flat)
        if round_ % comm.size == comm.rank:
            time.sleep(0.1)
        pending.wait()
        assert torch.all(flat == sum(range(1, comm.size + 1)))
        comm.drain()
        flat.zero_()


def test_all_reduced_sums_may_change_after_drain(ranks: Ranks) -> None:
    ranks(sums_late_readers, world_size=3)


def disagree() -> None:
    comm = world()
    full = torch.zeros(comm.size * 4)
    comm.all_gather(full, label=f"block {comm.rank}").wait()


def test_ranks_that_do_different_things_are_told(ranks: Ranks) -> None:
    with pytest.raises(RankFailure, match=r"'all_gather block 0' and rank 1 does 'all_gather block 1'"):
        ranks(disagree)


def one_leaves() -> None:
    comm = world()
    assert comm.window is not None
    if comm.rank == 1:
        raise ValueError("out of data")
    full = torch.zeros(comm.size * 4)
    comm.all_gather(full, label="blocks.3").wait()


def test_a_rank_that_leaves_is_named_at_once(ranks: Ranks) -> None:
    started = time.monotonic()
    with pytest.raises(RankFailure, match=r"rank 1 left while rank 0 waited for it in 'all_gather blocks.3'"):
        ranks(one_leaves)
    assert time.monotonic() - started < 10


def late() -> None:
    comm = world()
    window = comm.window
    assert window is not None
    window._patience = 0.2
    if comm.rank == 1:
        time.sleep(2.0)
    comm.all_gather(torch.zeros(comm.size * 4), label="blocks.3").wait()


def test_a_rank_that_does_not_come_is_named_after_the_timeout(ranks: Ranks) -> None:
    with pytest.raises(RankFailure, match=r"for rank 1 in 'all_gather blocks.3'.*is alive and did not come"):
        ranks(late)


@given(
    st.lists(st.integers(0, 40), min_size=1, max_size=8),
    st.integers(1, 64),
    st.sampled_from([2, 4, 8]),
)
def test_batches_cover_every_span_once(lengths: list[int], limit: int, itemsize: int) -> None:
    spans, position = [], 0
    for index, numel in enumerate(lengths):
        position += index % 3  # gaps
        spans.append(Span(index, 100 * index, position, numel))
        position += numel
    covered: dict[int, tuple[int, int]] = {}
    for batch in plan_batches(spans, itemsize, limit):
        assert batch.numel <= max(limit // itemsize, 1)
        for index, source, target, size in zip(
            batch.index, batch.source, batch.target, batch.sizes, strict=True
        ):
            for k in range(int(size) // itemsize):
                place = int(target) // itemsize + k
                assert place not in covered
                covered[place] = (int(index), int(source) // itemsize + k)
    wanted = {s.target + k: (s.index, s.source + k) for s in spans for k in range(s.numel)}
    assert covered == wanted


@given(st.integers(0, 100), st.integers(1, 9))
def test_slices_partition(numel: int, size: int) -> None:
    bounds = [slice_bounds(numel, size, rank) for rank in range(size)]
    assert bounds[0][0] == 0
    assert bounds[-1][1] == numel
    assert all(a[1] == b[0] for a, b in pairwise(bounds))


def test_packed_chunks_match_single_ones() -> None:
    spans = [Span(0, 3, 0, 90_000), Span(2, 0, 90_000, 10), Span(1, 5, 90_020, 40)]
    for chunk in plan_reduce(spans, 1000, 4, 2):
        assert chunk.single is not None
        assert (chunk.single.start, chunk.single.numel) == (chunk.packed.start, chunk.packed.numel)
        assert int(chunk.packed.source[0]) == 4 * (1000 + chunk.start)
