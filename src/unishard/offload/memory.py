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
        target, source = (entry.memory, tensor) if writes else (tensor, entry.memory)
        return _CopyTransfer(key, tensor, start_copy(target, source.detach()), writes=writes)

    def _memory(self, entry: MemoryEntry) -> torch.Tensor | None:
        return entry.memory

    def _shut(self) -> None:
        return None
