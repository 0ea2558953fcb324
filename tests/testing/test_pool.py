from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import torch
import torch.distributed as dist

from unishard.testing import RankFailure, RankPool, RankTimeout
from unishard.testing.worker import RankFault


@dataclass(frozen=True)
class Report:
    rank: int
    mean: torch.Tensor


def identity(value):
    return value


def all_reduced(value: float) -> float:
    total = torch.tensor(value * (dist.get_rank() + 1))
    dist.all_reduce(total)
    return total.item()


def report(inputs: torch.Tensor) -> Report:
    return Report(dist.get_rank(), inputs.requires_grad_().mean() * dist.get_rank())


def big_view() -> torch.Tensor:
    return torch.zeros(1_000_000)[:3]


def rank_one_raises() -> None:
    if dist.get_rank() == 1:
        raise ValueError("boom 41")
    dist.barrier()


def all_raise() -> None:
    raise KeyError(f"rank {dist.get_rank()}")


def rank_one_raises_while_rank_zero_sleeps() -> None:
    if dist.get_rank() == 1:
        raise ValueError("boom 42")
    time.sleep(60)


def rank_one_dies() -> None:
    if dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()


def rank_zero_sleeps_in_a_named_function() -> None:
    if dist.get_rank() == 0:
        a_function_to_find_in_the_stack()


def a_function_to_find_in_the_stack() -> None:
    time.sleep(60)


def bare_assert() -> None:
    answer = 41
    assert answer == 42


def random_draws() -> tuple[float, float]:
    return torch.rand(()).item(), float(torch.get_num_threads())


def disturb() -> None:
    torch.manual_seed(99)
    torch.set_default_dtype(torch.float64)
    torch.set_grad_enabled(False)
    os.environ["UNISHARD_LEFTOVER"] = "1"


def environment(*names: str) -> list[str | None]:
    return [os.environ.get(name) for name in names]


def without_group() -> tuple[bool, str]:
    before = dist.is_initialized()
    dist.init_process_group("gloo")  # from torchrun's variables
    total = torch.ones(())
    dist.all_reduce(total)
    return before, f"{total.item():g}"


def process_id() -> int:
    return os.getpid()


def make_groups(count: int) -> int:
    for _ in range(count):
        dist.new_group([0, 1])
    return len(dist.distributed_c10d._world.pg_map)


def test_results_come_back_in_rank_order(ranks):
    assert ranks(all_reduced, 2.0) == [6.0, 6.0]
    reports = ranks(report, torch.arange(4.0))
    assert [type(r) for r in reports] == [Report, Report]
    assert [r.rank for r in reports] == [0, 1]
    assert reports[1].mean == 1.5
    assert not reports[1].mean.requires_grad


def test_tensors_return_without_the_storage_they_view(ranks):
    assert ranks(big_view, world_size=1)[0].untyped_storage().nbytes() == 12


@pytest.mark.parametrize("order", [(1, 2, 3, 4, 2), (4, 1, 4)])
def test_world_size_may_change_between_calls(ranks, order):
    for world_size in order:
        expected = float(world_size * (world_size + 1) // 2)
        assert ranks(all_reduced, 1.0, world_size=world_size) == [expected] * world_size


def test_a_failing_rank_is_named_and_those_that_waited_for_it_fail_at_once(ranks):
    pids = ranks(process_id)
    started = time.monotonic()
    with pytest.raises(RankFailure) as caught:
        ranks(rank_one_raises)
    assert time.monotonic() - started < 3
    first, fault = next(iter(caught.value.faults.items()))
    assert (first, fault.kind, fault.message) == (1, "ValueError", "boom 41")
    assert "in rank_one_raises" in fault.traceback
    assert "boom 41" in str(caught.value)
    assert ranks(all_reduced, 1.0) == [3.0, 3.0]
    assert ranks(process_id) == pids, "a failure that every rank survives must not restart processes"


def test_every_failing_rank_is_listed(ranks):
    with pytest.raises(RankFailure, match="rank 0, 1, 2 of 3 failed") as caught:
        ranks(all_raise, world_size=3)
    assert sorted(caught.value.faults) == [0, 1, 2]
    assert ranks(all_reduced, 1.0, world_size=3) == [6.0] * 3


def test_a_rank_that_never_returns_is_killed_after_the_grace_and_shown():
    with RankPool(2, grace=0.5) as pool:
        with pytest.raises(RankFailure, match="boom 42") as caught:
            pool.run(rank_one_raises_while_rank_zero_sleeps)
        assert not isinstance(caught.value, RankTimeout)
        assert "rank_one_raises_while_rank_zero_sleeps" in caught.value.stacks[0]
        assert pool.run(all_reduced, 1.0) == [3.0, 3.0]


def test_a_killed_process_is_a_failure_and_the_pool_recovers(ranks):
    with pytest.raises(RankFailure, match="killed by signal 9"):
        ranks(rank_one_dies)
    assert ranks(all_reduced, 1.0) == [3.0, 3.0]


def test_a_timeout_shows_where_each_late_rank_was(ranks):
    started = time.monotonic()
    with pytest.raises(RankTimeout, match=r"rank 0 of 2 did not finish in 0\.5 s") as caught:
        ranks(rank_zero_sleeps_in_a_named_function, timeout=0.5)
    assert time.monotonic() - started < 5
    assert "a_function_to_find_in_the_stack" in str(caught.value)
    assert list(caught.value.stacks) == [0]
    assert ranks(all_reduced, 1.0) == [3.0, 3.0]


def test_a_bare_assert_shows_the_local_values(ranks):
    with pytest.raises(RankFailure, match="answer = 41"):
        ranks(bare_assert, world_size=1)


def test_each_call_starts_from_the_same_state(ranks, monkeypatch):
    before = ranks(random_draws)
    ranks(disturb)
    assert ranks(random_draws) == before == [before[0]] * 2
    assert before[0][1] == 1
    monkeypatch.setenv("UNISHARD_FROM_TEST", "yes")
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "UNISHARD_FROM_TEST", "UNISHARD_LEFTOVER")
    assert ranks(environment, *names) == [[str(r), str(r), "2", "yes", None] for r in range(2)]


def test_backend_none_leaves_the_process_group_to_the_function(ranks):
    assert ranks(without_group, backend=None) == [(False, "2"), (False, "2")]
    assert ranks(all_reduced, 1.0) == [3.0, 3.0]


def test_leftover_groups_are_dropped_before_they_pile_up(ranks):
    ranks(make_groups, 20)
    assert ranks(make_groups, 1) == [2, 2]


def test_misuse_is_refused_with_a_remedy(ranks):
    with pytest.raises(TypeError, match="not a module-level function"):
        ranks(lambda: None)
    with pytest.raises(ValueError, match=r"world_size=9 is outside 1\.\.4"):
        ranks(process_id, world_size=9)
    with pytest.raises((AttributeError, TypeError), match="pickle"):
        ranks(identity, lambda: None)


def test_close_ends_the_processes():
    with RankPool(1) as pool:
        [pid] = pool.run(process_id, world_size=1)
        assert psutil.pid_exists(pid)
    assert not psutil.pid_exists(pid)


def test_ranks_die_with_the_process_that_owns_them(tmp_path: Path):
    script = tmp_path / "owner.py"
    script.write_text(
        "import os, time\n"
        "from unishard.testing import RankPool\n"
        "if __name__ == '__main__':\n"
        "    pool = RankPool(2)\n"
        "    print(*pool.run(os.getpid), flush=True)\n"
        "    pool.run(time.sleep, 60)\n"
    )
    with subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None
        line = owner.stdout.readline()
        while line.startswith("[Gloo]"):
            line = owner.stdout.readline()
        pids = [int(word) for word in line.split()]
        time.sleep(0.2)  # so that the ranks are busy, not reading their pipes
        owner.kill()
        owner.wait()
    assert len(pids) == 2
    deadline = time.monotonic() + 10
    while any(psutil.pid_exists(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(psutil.pid_exists(pid) for pid in pids)


def test_a_failure_reads_well():
    text = str(
        RankFailure("rank 1 of 2 failed", {1: RankFault("ValueError", "boom", "Traceback")}, {0: "File x"})
    )
    assert text.splitlines()[:3] == ["rank 1 of 2 failed", "--- rank 1: ValueError: boom", "Traceback"]
    assert "rank 0 was still running here" in text
