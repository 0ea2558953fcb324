"""Host memory as a tier (ZeRO-Offload): page-locked under a budget where an accelerator copies from and to it."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch

from unishard.errors import OffloadError
from unishard.offload.aligned import PinnedBudget, aligned_empty
from unishard.offload.memory import MemoryEntry, MemoryTier

_log = logging.getLogger("unishard")
_SMALL = 65536  # bytes, below which pages of their own are not worth having


@dataclass(slots=True)
class _HostEntry(MemoryEntry):
    pinned: int = 0


class CpuTier(MemoryTier):
    """State rests in host memory.

    With a budget, memory is page-locked until the budget is used up, so that an accelerator's copies run beside the
    work; what is beyond it is ordinary memory, and the log says so once. Without an accelerator nothing is page-locked:
    torch refuses it, and nothing would be gained.

    >>> tier = CpuTier(PinnedBudget(1 << 20))
    >>> tier.allocate("exp_avg", 4, torch.float32)
    >>> tier.resident("exp_avg").add_(1)
    tensor([1., 1., 1., 1.])
    """

    name = "cpu"

    def __init__(self, pinned: PinnedBudget | None = None) -> None:
        super().__init__()
        self._pinned = pinned if pinned is not None and torch.accelerator.is_available() else None
        self._warned = False

    def _reserve(self, key: str, numel: int, dtype: torch.dtype) -> MemoryEntry:
        nbytes = numel * dtype.itemsize
        if self._pinned is not None and self._pinned.take(nbytes):
            try:
                memory = torch.zeros(numel, dtype=dtype, pin_memory=True)
            except RuntimeError as error:
                self._pinned.give(nbytes)
                raise OffloadError(
                    f"cpu tier: {nbytes} bytes for {key} cannot be page-locked ({error}); lower the budget of pinned "
                    f"memory ({self._pinned.limit} bytes), or set pin_memory to false"
                ) from error
            return _HostEntry(numel, dtype, memory=memory, pinned=nbytes)
        if self._pinned is not None and not self._warned:
            self._warned = True
            _log.warning(
                "cpu tier: the budget of %s bytes of pinned memory is used up at %s; it and what follows rest in "
                "ordinary memory, and copies of it wait for the host",
                self._pinned.limit,
                key,
            )
        if nbytes < _SMALL:
            return _HostEntry(numel, dtype, memory=torch.zeros(numel, dtype=dtype))
        # Fresh pages of the system are zero, and take no memory until they are written.
        return _HostEntry(numel, dtype, memory=aligned_empty(numel, dtype))

    def _release(self, key: str, entry: MemoryEntry) -> None:
        if isinstance(entry, _HostEntry) and entry.pinned and self._pinned is not None:
            self._pinned.give(entry.pinned)

    def _shut(self) -> None:
        return None
