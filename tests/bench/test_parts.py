"""The instruments: memory, the network's counter, attribution of time, rank processes, data."""

from __future__ import annotations

import os
from dataclasses import dataclass, field

import pytest
import torch
import torch.distributed as dist

from unishard.bench import memory
from unishard.bench.contestant import Held
from unishard.bench.data import global_batches, micro_batches
from unishard.bench.model import build_model
from unishard.bench.network import sent_on_loopback
from unishard.bench.plan import Plan
from unishard.bench.ranks import RankFault, Ranks
from unishard.bench.spent import KINDS, attribute

MB = 1_000_000


def peak_of_an_allocation() -> tuple[int, int]:
    torch.ones(75 * MB)  # 300 MB before the reset do not count
    memory.trim()
    base = memory.resident()
    memory.reset_peak()
    torch.ones(25 * MB)  # 100 MB, gone at once
    return memory.peak_resident() - base, memory.resident() - base


def send_megabytes(count: int) -> float:
    dist.barrier()
    before = sent_on_loopback()
    dist.barrier()
    dist.broadcast(torch.ones(count * MB // 4), src=0)
    dist.barrier()
    return sent_on_loopback() - before


def fail_on_one() -> None:
    if dist.get_rank() == 1:
        raise KeyError("weights")
    dist.barrier()


def wait_for_nobody() -> None:
    if dist.get_rank() == 0:
        dist.barrier()


def one_of_each() -> int:
    return torch.get_num_threads()


def test_the_kernel_keeps_the_peak():
    with Ranks(1, threads=1, timeout=60, log=os.devnull) as ranks:
        [(peak, after)] = ranks.call(peak_of_an_allocation)
    assert 95 * MB < peak < 120 * MB
    assert after < 20 * MB


def test_the_counter_sees_this_run_only():
    with Ranks(2, threads=1, timeout=60, log=os.devnull, private_network=True) as ranks:
        if not ranks.own_network:
            pytest.skip("network namespaces are not allowed here")
        sent = ranks.call(send_megabytes, 20)
    # Headers, and what TCP sends again when the other side is late to read.
    assert 20 * MB <= sent[0] < 27 * MB


def test_a_rank_that_raises_is_named_and_all_are_ended():
    ranks = Ranks(2, threads=2, timeout=60, log=os.devnull)
    assert ranks.call(one_of_each) == [2, 2]
    processes = list(ranks._processes)
    with pytest.raises(RankFault, match="rank 1: KeyError: 'weights'") as caught:
        ranks.call(fail_on_one)
    assert "in fail_on_one" in caught.value.trace
    assert [p.is_alive() for p in processes] == [False, False]


def test_a_rank_that_hangs_is_reported_with_its_stack(tmp_path):
    log = tmp_path / "log"
    ranks = Ranks(2, threads=1, timeout=4, log=str(log))
    with pytest.raises(RankFault, match="rank 0 did not answer in 4 s"):
        ranks.call(wait_for_nobody)
    assert "in wait_for_nobody" in log.read_text()


def test_a_storage_counts_once_and_for_the_first_kind():
    flat = torch.zeros(10)
    held = Held([flat, flat[:5]], [flat[5:], torch.zeros(2)], [torch.zeros(0), torch.zeros(3)])
    assert memory.bytes_by_kind(held) == {"parameters": 40, "gradients": 8, "optimizer": 12}


def test_live_bytes_include_gradients_that_nobody_has_looked_at():
    memory.trim()
    before = memory.live_bytes()
    weight = torch.nn.Parameter(torch.ones(1000))
    (weight * 2).sum().backward()
    assert memory.live_bytes() - before == 8000


@dataclass
class Event:
    name: str
    self_cpu_time_total: float
    cpu_children: list[Event] = field(default_factory=list)


def test_every_microsecond_of_a_step_has_one_kind():
    tree = Event(
        "bench.step",
        1,
        [
            Event("aten::linear", 2, [Event("aten::addmm", 40), Event("aten::copy_", 3)]),
            Event("bench.backward", 5, [Event("c10d::allreduce_", 6, [Event("aten::empty", 7)])]),
            Event("bench.wait", 8),
            Event("Optimizer.step#AdamW.step", 9, [Event("aten::copy_", 10), Event("c10d::broadcast_", 11)]),
            Event("fsdp::chunk_cat", 12, [Event("aten::empty", 13)]),
        ],
    )
    python = dict.fromkeys(KINDS, 0.0)
    attribute(tree, "python", False, python)
    assert python == {"compute": 42, "copies": 28, "communication": 32, "optimizer": 19, "python": 6}
    waiting = dict.fromkeys(KINDS, 0.0)
    attribute(tree, "python", True, waiting)
    assert waiting == {**python, "communication": 37, "python": 1}


def test_data_follow_from_the_seed_and_differ_by_step_rank_and_micro_batch():
    plan = Plan(size="tiny", accumulation=2)
    seen = [micro_batches(plan, step, rank) for step in (0, 1) for rank in (0, 1)]
    flat = [x for batches in seen for x, _ in batches]
    assert len(flat) == 8
    assert len({tuple(x.flatten().tolist()) for x in flat}) == 8
    again = micro_batches(plan, 1, 1)
    assert all(
        torch.equal(a, b)
        for pair, other in zip(again, seen[3], strict=True)
        for a, b in zip(pair, other, strict=True)
    )
    whole = global_batches(plan, 0)
    assert torch.equal(whole[1][0], torch.cat([seen[0][1][0], seen[1][1][0]]))


def test_the_sizes_are_what_their_names_say():
    counts = {
        size: sum(p.numel() for p in build_model(Plan(size=size)).parameters()) for size in ("30m", "124m")
    }
    assert counts["30m"] == pytest.approx(30e6, rel=0.02)
    assert counts["124m"] == pytest.approx(124e6, rel=0.01)


def test_recomputation_gives_the_same_gradients():
    losses, gradients = [], []
    for recompute in (False, True):
        plan = Plan(size="tiny", recompute=recompute)
        model = build_model(plan)
        loss = model(*micro_batches(plan, 0, 0)[0])
        loss.backward()
        losses.append(loss.item())
        gradients.append([p.grad for p in model.parameters()])
    assert losses[0] == losses[1]
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
