"""Work on streams that users bring."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def on_stream(call: Callable[[torch.Tensor], Any], stream: Any, device: torch.device) -> Callable[[torch.Tensor], None]:
    """`call` on `stream`: after what the current stream has queued, and before what it queues next.

    The CPU's streams are torch's stand-ins: they can be current, and there is nothing to wait for.
    """
    streams = torch.get_device_module(device)

    def run(tensor: torch.Tensor) -> None:
        current = streams.current_stream()
        if device.type != "cpu":
            stream.wait_stream(current)
        with streams.stream(stream):
            call(tensor)
        if device.type != "cpu":
            current.wait_stream(stream)

    return run


class Copy:
    """A copy under way between two memories."""

    def __init__(self, target: torch.Tensor, source: torch.Tensor, event: Any = None) -> None:
        self._target, self._event = target, event
        self._source: torch.Tensor | None = source  # held until the copy has ended

    def done(self) -> bool:
        """Whether the copy has ended."""
        return self._event is None or self._event.query()

    def wait(self) -> None:
        """Return once the target may be read: by the host if it is host memory, else by the current stream."""
        if self._event is not None:
            if self._target.device.type == "cpu":
                self._event.synchronize()
            else:
                # Memory of either tensor that is freed now is used again by the stream that waits here.
                device = self._target.device
                torch.get_device_module(device).current_stream(device).wait_event(self._event)
        self._source = None

    def synchronize(self) -> None:
        """Return once the host may change the source. After `wait()` only a stream has waited, if the target is its."""
        if self._event is not None:
            self._event.synchronize()


_side_streams: dict[torch.device, Any] = {}


def start_copy(target: torch.Tensor, source: torch.Tensor) -> Copy:
    """Start `target.copy_(source)`: on a stream of its own if either is on an accelerator, at once between host memories.

    It begins after what the current stream has queued. Neither tensor may change, nor the target be read, until
    `wait()` has returned. Page-locked host memory lets it run beside the host's work.
    """
    device = next((t.device for t in (target, source) if t.device.type != "cpu"), None)
    if device is None:
        target.copy_(source)
        return Copy(target, source)
    streams = torch.get_device_module(device)
    if device not in _side_streams:
        _side_streams[device] = streams.Stream(device)
    side = _side_streams[device]
    side.wait_stream(streams.current_stream(device))
    with streams.stream(side):
        target.copy_(source, non_blocking=True)
    return Copy(target, source, side.record_event())
