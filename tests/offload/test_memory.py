"""Memory for buffers: pages that are used again, and how much there is of it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

import unishard
from unishard.offload import aligned
from unishard.offload.aligned import RecycledPages
from unishard.sharding import host_memory
from unishard.sharding.host_memory import PAGE

Ranks = Callable[..., Any]


def test_memory_is_used_again_only_when_no_view_of_it_is_left() -> None:
    pages = RecycledPages()
    first = pages.empty(PAGE, torch.float32)
    view, address = first[5:], first.data_ptr()
    del first
    other = pages.empty(PAGE, torch.float32)
    assert other.data_ptr() != address, "a view still shows it"
    view.fill_(1)
    other.fill_(2)
    assert view.eq(1).all()
    del view
    assert pages.empty(PAGE, torch.float32).data_ptr() == address


def test_memory_beyond_the_limit_and_after_a_trim_is_the_systems() -> None:
    pages = RecycledPages(limit=2 * PAGE)
    tensors = [pages.empty(PAGE, torch.uint8) for _ in range(3)]
    tensors.clear()
    assert [len(memory) for memory in pages._free] == [PAGE, PAGE]
    host_memory.trim_heap()
    assert not pages._free
    assert pages.empty(0, torch.float32).shape == (0,)


def fresh_pages(folder: str, scarce: bool) -> list[int]:
    """How often each of five steps asks the system for pages to read state into."""
    model = torch.nn.Sequential(*(torch.nn.Linear(64, 64) for _ in range(3)))
    tier = {"device": "nvme", "nvme_path": folder}
    engine = unishard.initialize(
        model=model,
        config={
            "train_micro_batch_size_per_gpu": 1,
            "optimizer": {"type": "AdamW", "params": {}},
            "zero_optimization": {"stage": 3, "offload_optimizer": tier, "offload_param": tier},
        },
    ).engine
    counts = []
    with (
        mock.patch.object(aligned, "map_pages", wraps=aligned.map_pages) as mapped,
        mock.patch.object(host_memory, "_keeps_little", scarce),
    ):
        for _ in range(5):
            engine.backward(engine(torch.ones(1, 64)).sum())
            engine.step()
            counts.append(mapped.call_count)
            mapped.reset_mock()
    engine.destroy()
    return counts


@pytest.mark.parametrize("scarce", [False, True])
def test_state_is_read_into_the_pages_of_the_step_before(scarce: bool, tmp_path: Path, ranks: Ranks) -> None:
    [counts] = ranks(fresh_pages, str(tmp_path), scarce, world_size=1)
    assert (counts[-1] > 0) == scarce, counts


@pytest.mark.parametrize(
    ("kind", "name", "text"),
    [("", "memory.max", "0::/jobs/one\n"), ("memory", "memory.limit_in_bytes", "4:memory:/jobs/one\n")],
)
def test_a_control_group_limits_what_ranks_share(
    kind: str, name: str, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "jobs/one").mkdir(parents=True)
    (tmp_path / "jobs" / name).write_text("4096000\n")
    (tmp_path / "jobs/one" / name).write_text("max\n")
    read = Path.read_text
    monkeypatch.setattr(Path, "read_text", lambda p: text if str(p) == "/proc/self/cgroup" else read(p))
    monkeypatch.setattr(host_memory, "_HIERARCHIES", {kind: (tmp_path, name)})
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert host_memory.memory_share() == 1024000
    (tmp_path / "jobs/one" / name).write_text("400\n")
    assert host_memory.memory_share() == 100


@pytest.fixture
def bounds(monkeypatch: pytest.MonkeyPatch) -> dict[int, int]:
    """What the heap is told, by parameter of mallopt; nothing reaches it."""
    told: dict[int, int] = {}
    monkeypatch.setattr(host_memory, "_set", told.__setitem__)
    monkeypatch.setattr(host_memory, "_keeps_little", False)
    monkeypatch.setattr(host_memory, "memory_share", lambda: 3200)
    return told


def test_freed_memory_stays_unless_memory_is_scarce(bounds: dict[int, int]) -> None:
    assert not host_memory.prepare_heap(100)
    assert bounds == {host_memory._M_MMAP_THRESHOLD: 32 << 20, host_memory._M_TRIM_THRESHOLD: 2**31 - 1}
    assert host_memory.prepare_heap(101)
    assert bounds == {host_memory._M_MMAP_THRESHOLD: 1 << 20, host_memory._M_TRIM_THRESHOLD: 1 << 20}
    assert not host_memory.prepare_heap(0)
    assert bounds[host_memory._M_MMAP_THRESHOLD] == 1 << 20, (
        "another model in the process is still short of it"
    )
    host_memory.reset_heap()
    assert bounds == {host_memory._M_MMAP_THRESHOLD: 32 << 20, host_memory._M_TRIM_THRESHOLD: 64 << 20}


@pytest.mark.parametrize(
    ("name", "value"), [("MALLOC_TRIM_THRESHOLD_", "1000"), ("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")]
)
def test_what_users_said_of_the_heap_stands(
    name: str, value: str, bounds: dict[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    assert not host_memory.prepare_heap(1)
    assert not bounds
    assert host_memory.prepare_heap(101)
    assert bounds, "without it the run would end"


STEPS = """
import resource, sys
import torch, unishard
torch.set_num_threads(1)
model = torch.nn.Sequential(*(torch.nn.Linear(256, 256) for _ in range(8)))
if sys.argv[1] == "unishard":
    config = {"train_micro_batch_size_per_gpu": 1, "optimizer": {"type": "AdamW", "params": {}}}
    model = unishard.initialize(model=model, config=config).engine
    backward, step = model.backward, model.step
else:
    optimizer = torch.optim.AdamW(model.parameters())
    backward, step = torch.Tensor.backward, lambda: (optimizer.step(), optimizer.zero_grad())
inputs = torch.ones(8192, 256)  # activations of 8 MiB
faults = []
for _ in range(9):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    backward(model(inputs).sum())
    step()
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(sorted(faults[4:])[2])  # a block that finds its old place taken gets a new one, now and then
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's heap")
def test_a_step_gets_no_pages_that_the_one_before_had() -> None:
    def pages(which: str) -> int:
        done = subprocess.run(
            [sys.executable, "-c", STEPS, which], capture_output=True, text=True, timeout=100
        )
        assert done.returncode == 0, done.stderr
        return int(done.stdout.splitlines()[-1])

    assert pages("unishard") < 200
    assert pages("plain") > 2000, "or this shows nothing"
