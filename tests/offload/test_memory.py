"""Memory for buffers: pages that are used again, and how much there is of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from unishard.offload.aligned import PAGE, RecycledPages
from unishard.sharding import heap


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
    heap.trim_heap()
    assert not pages._free
    assert pages.empty(0, torch.float32).shape == (0,)


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
    monkeypatch.setattr(heap, "_HIERARCHIES", {kind: (tmp_path, name)})
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert heap.memory_share() == 1024000
    (tmp_path / "jobs/one" / name).write_text("400\n")
    assert heap.memory_share() == 100


def test_only_what_does_not_fit_keeps_the_heap_small(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[bool] = []
    monkeypatch.setattr(heap, "keep_heap_small", lambda: kept.append(True))
    monkeypatch.setattr(heap, "memory_share", lambda: 3200)
    assert not heap.prepare_heap(100)
    assert not kept
    assert heap.prepare_heap(101)
    assert kept == [True]
