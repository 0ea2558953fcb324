"""Tiers whose state rests in memory that a processor uses in place."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from unishard.dist.streams import Copy, start_copy
from unishard.offload.base import BaseTier, Entry, Transfer


@dataclass(slots=True)
class MemoryEntry(Entry):
    """A key that rests in `memory`, shape (numel,)."""

    memory: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    last_read: Copy | None = None
    """A device may still be reading `memory` when its stream, and not the host, has waited for the copy."""

    def changes(self) -> None:
        """Return once the memory may change."""
        read, self.last_read = self.last_read, None
        if read is not None:
            read.synchronize()


class _CopyTransfer(Transfer):
    def __init__(self, key: str, tensor: torch.Tensor, copy: Copy, *, writes: bool) -> None:
        super().__init__(key, tensor, writes=writes)
        self._copy = copy

    def done(self) -> bool:
        return self.ended or self._copy.done()

    def finish(self) -> None:
        self._copy.wait()


class MemoryTier(BaseTier[MemoryEntry]):
    """Copies between the tensors it holds and those it is given, which may be on other devices."""

    def _start(self, key: str, entry: MemoryEntry, tensor: torch.Tensor, *, writes: bool) -> Transfer:
        if writes:
            entry.changes()
            return _CopyTransfer(key, tensor, start_copy(entry.memory, tensor.detach()), writes=True)
        entry.last_read = start_copy(tensor.detach(), entry.memory)
        return _CopyTransfer(key, tensor, entry.last_read, writes=False)

    def _memory(self, entry: MemoryEntry) -> torch.Tensor | None:
        entry.changes()
        return entry.memory

    def _shut(self) -> None:
        return None
