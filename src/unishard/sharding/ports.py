"""What the core asks of parts that it does not import: where flat tensors rest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch

Ticket = Any
"""One read or write under way; its tier knows what it is."""


class Tier(Protocol):
    """A place where flat tensors rest: 1-D and contiguous, each under a key, several reads and writes at a time.

    Errors are `OffloadError`s from `wait`, and name key, place and remedy.
    """

    def buffer(self, numel: int, dtype: torch.dtype) -> torch.Tensor:
        """Memory to store from and fetch into, 1-D with undefined values; reused after `recycle`."""
        ...

    def recycle(self, buffer: torch.Tensor) -> None:
        """`buffer` is not needed any more, by anybody."""
        ...

    def store(self, key: str, tensor: torch.Tensor) -> Ticket:
        """Begin to write; `tensor` keeps its values until `wait`. The value before is replaced."""
        ...

    def fetch(self, key: str, into: torch.Tensor) -> Ticket:
        """Begin to read what was stored last under `key` into `into`, of the same length and dtype."""
        ...

    def wait(self, ticket: Ticket) -> None:
        """Return once done. Raises `OffloadError` if what was read is not what was written, or nothing could be."""
        ...

    def close(self) -> None:
        """End everything under way and give the place back. Idempotent."""
        ...


@dataclass(frozen=True)
class Tiers:
    """Where a model's states rest between uses; `None`: where they are computed with."""

    parameter: Tier | None = None
    """Shards in compute dtype, of presets that shard parameters."""
    optimizer: Tier | None = None
    """Optimizer state, and fp32 master weights where parameters compute in another dtype."""
    ratio: float = 1.0
    """The share of elements whose optimizer state goes to `optimizer`; the model's last groups stay."""


ON_DEVICE = Tiers()
