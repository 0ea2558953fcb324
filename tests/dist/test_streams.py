"""The order of copies on a device whose work waits until someone waits for it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from unishard.dist import streams
from unishard.dist.streams import Copy, start_copy


class LazyEvent:
    """Its work happens when it is waited for, by the host or by a stream."""

    def __init__(self, work: Any) -> None:
        self._work, self.waiters = work, []

    def query(self) -> bool:
        return self._work is None

    def synchronize(self) -> None:
        work, self._work = self._work, None
        self.waiters.append("host")
        if work is not None:
            work()


def test_between_host_memories_a_copy_is_done_at_once() -> None:
    target = torch.zeros(3)
    copy = start_copy(target, torch.ones(3))
    assert copy.done()
    copy.wait()
    copy.synchronize()
    assert target.tolist() == [1, 1, 1]


def test_the_host_waits_for_copies_into_its_memory() -> None:
    target, source = torch.zeros(3), torch.ones(3)
    event = LazyEvent(lambda: target.copy_(source))
    copy = Copy(target, source, event)
    assert not copy.done()
    copy.wait()
    assert copy.done()
    assert target.tolist() == [1, 1, 1]


def test_a_stream_waits_for_copies_into_a_devices_memory_and_the_host_when_asked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    event = LazyEvent(lambda: None)
    stream = SimpleNamespace(wait_event=lambda event: event.waiters.append("stream"))
    module = SimpleNamespace(current_stream=lambda device: stream)
    monkeypatch.setattr(streams.torch, "get_device_module", lambda device: module)
    copy = Copy(torch.empty(3, device="meta"), torch.ones(3), event)
    copy.wait()
    assert event.waiters == ["stream"], "the host goes on"
    copy.synchronize()
    assert event.waiters == ["stream", "host"]
