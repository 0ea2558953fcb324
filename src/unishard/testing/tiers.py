"""A tier in memory that does everything as late as it may, so that whoever does not wait is found out."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch

from unishard.errors import OffloadError
from unishard.offload.base import Transfer
from unishard.offload.memory import MemoryEntry, MemoryTier
from unishard.sharding.policies import OffloadPolicy
from unishard.sharding.ports import Tiers


class _LateTransfer(Transfer):
    def __init__(self, key: str, tensor: torch.Tensor, entry: MemoryEntry, tier: LateTier, *, writes: bool):
        super().__init__(key, tensor, writes=writes)
        self._entry, self._tier = entry, tier

    def done(self) -> bool:
        return self.ended

    def finish(self) -> None:
        if self.key == self._tier.failing:
            raise OffloadError(f"{self.key}: failing as told; tell the test tier otherwise")
        if self.writes:
            self._entry.memory = self.tensor.detach().clone()
        else:
            self.tensor.copy_(self._entry.memory)


class LateTier(MemoryTier):
    """Copies at `wait` and not before; memory that was not read yet holds NaN."""

    name = "late"

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, str]] = []
        """("fetch" or "store", key), in order."""
        self.failing: str | None = None
        """A key whose reads and writes fail."""

    def _reserve(self, key: str, numel: int, dtype: torch.dtype) -> MemoryEntry:
        return MemoryEntry(numel, dtype, memory=torch.zeros(numel, dtype=dtype))

    def _start(self, key: str, entry: MemoryEntry, tensor: torch.Tensor, *, writes: bool) -> Transfer:
        self.calls.append(("store" if writes else "fetch", key))
        if not writes:
            tensor.fill_(float("nan") if tensor.dtype.is_floating_point else 1)
        return _LateTransfer(key, tensor, entry, self, writes=writes)

    def _memory(self, entry: MemoryEntry) -> torch.Tensor | None:
        return None

    def _release(self, key: str, entry: MemoryEntry) -> None:
        return None


class LatePolicy(OffloadPolicy):
    """What `fully_shard` takes for models whose states rest on one late tier: "optimizer", "gradient", "parameter",
    or several joined by "+"."""

    def __init__(self, parts: str) -> None:
        self.tier = LateTier()
        self._tiers = _late(self.tier, parts)

    def open_tiers(self, device: torch.device) -> Tiers:
        return self._tiers


def _late(tier: LateTier, parts: str, ratio: float = 1.0) -> Tiers:
    return Tiers(*(tier if p in parts else None for p in ("parameter", "optimizer", "gradient")), ratio=ratio)


@contextmanager
def resting_late(parts: str, ratio: float = 1.0) -> Iterator[LateTier]:
    """Models that `initialize` shards inside the block rest on one late tier: "optimizer", "gradient",
    "parameter", or several joined by "+"."""
    # `unishard.engine.initialize` is also the name of the function inside.
    initialize = importlib.import_module("unishard.engine.initialize")
    tier = LateTier()
    chosen = _late(tier, parts, ratio)
    with mock.patch.object(initialize, "_tiers", return_value=chosen):
        yield tier
