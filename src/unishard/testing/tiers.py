"""A tier in memory that does everything as late as it may, so that whoever does not wait is found out."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch

from unishard.errors import OffloadError
from unishard.sharding.ports import Tiers

Request = tuple[str, str, torch.Tensor]


class LateTier:
    """Copies at `wait` and not before; memory that was given back, and memory that was not read yet, holds NaN."""

    def __init__(self) -> None:
        self.stored: dict[str, torch.Tensor] = {}
        self.calls: list[tuple[str, str]] = []
        """("fetch" or "store", key), in order."""
        self.lent = 0
        """Buffers handed out and not given back."""
        self.most_lent = 0
        self.failing: str | None = None
        """A key whose reads and writes fail."""

    def buffer(self, numel: int, dtype: torch.dtype) -> torch.Tensor:
        self.lent += 1
        self.most_lent = max(self.most_lent, self.lent)
        return _poison(torch.empty(numel, dtype=dtype))

    def recycle(self, buffer: torch.Tensor) -> None:
        self.lent -= 1
        _poison(buffer)

    def store(self, key: str, tensor: torch.Tensor) -> Request:
        self.calls.append(("store", key))
        return "store", key, tensor

    def fetch(self, key: str, into: torch.Tensor) -> Request:
        self.calls.append(("fetch", key))
        _poison(into)
        return "fetch", key, into

    def wait(self, ticket: Request) -> None:
        kind, key, tensor = ticket
        if key == self.failing:
            raise OffloadError(f"{kind} {key}: failing as told; tell the test tier otherwise")
        if kind == "store":
            self.stored[key] = tensor.clone()
        else:
            tensor.copy_(self.stored[key])

    def close(self) -> None:
        self.stored.clear()


def _poison(buffer: torch.Tensor) -> torch.Tensor:
    return buffer.fill_(float("nan") if buffer.dtype.is_floating_point else 1)


@contextmanager
def resting_late(parts: str, ratio: float = 1.0) -> Iterator[LateTier]:
    """Models that `initialize` shards inside the block rest on one late tier: "optimizer", "parameter", or both
    joined by "+"."""
    # `unishard.engine.initialize` is also the name of the function inside.
    initialize = importlib.import_module("unishard.engine.initialize")
    tier = LateTier()
    chosen = Tiers(tier if "parameter" in parts else None, tier if "optimizer" in parts else None, ratio)
    with mock.patch.object(initialize, "build_tiers", return_value=chosen):
        yield tier
