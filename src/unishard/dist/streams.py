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
