"""The device's own memory as a tier: state that is not offloaded, behind the same port."""

from __future__ import annotations

import torch

from unishard.offload.memory import MemoryEntry, MemoryTier


class DeviceTier(MemoryTier):
    """State rests on `device`.

    >>> tier = DeviceTier(torch.device("cpu"))
    >>> tier.put("weight", torch.arange(3.0))
    >>> tier.wait(tier.fetch("weight", into=torch.empty(3)))
    tensor([0., 1., 2.])
    """

    name = "device"

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device

    def _reserve(self, key: str, numel: int, dtype: torch.dtype) -> MemoryEntry:
        return MemoryEntry(numel, dtype, memory=torch.zeros(numel, dtype=dtype, device=self.device))

    def _release(self, key: str, entry: MemoryEntry) -> None:
        return None
