"""What sharding expects of the memories that state may rest in. `unishard.offload` has the implementations."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch


class Ticket(Protocol):
    """A transfer under way. Its memory belongs to the tier until `Tier.wait(ticket)` has returned."""

    @property
    def key(self) -> str: ...

    @property
    def tensor(self) -> torch.Tensor:
        """What is read into, or written from."""
        ...

    def done(self) -> bool:
        """Whether `wait` would return, or raise, at once."""
        ...


@runtime_checkable
class Tier(Protocol):
    """A memory that holds flat tensors by name.

    A key is allocated once, with its length and dtype, and holds zeros until something is stored. Transfers of one key
    happen in the order of the calls; those of different keys at the same time. Every method raises
    `unishard.errors.OffloadError` naming the key if the memory fails or a key is unknown; nothing returns a value other
    than the one stored last.
    """

    @property
    def name(self) -> str:
        """`device`, `cpu` or `nvme`, or how several are combined."""
        ...

    def allocate(self, key: str, numel: int, dtype: torch.dtype) -> None:
        """Reserve room for `numel` elements; raises if there is none, before anything changed."""
        ...

    def spec(self, key: str) -> tuple[int, torch.dtype]:
        """Length and dtype of `key`."""
        ...

    def put(self, key: str, tensor: torch.Tensor) -> None:
        """Allocate `key` if it is new, and store `tensor`, shape (numel,). Returns when it is stored."""
        ...

    def resident(self, key: str) -> torch.Tensor | None:
        """The memory in which `key` itself rests, shape (numel,), where a processor can use it in place: writing it
        changes the stored value. `None` where it has to be fetched.
        """
        ...

    def fetch(self, key: str, into: torch.Tensor) -> Ticket:
        """Start reading `key` into `into`, shape (numel,), contiguous, of the key's dtype."""
        ...

    def store(self, key: str, tensor: torch.Tensor) -> Ticket:
        """Start writing `tensor`, shape (numel,), contiguous, of the key's dtype; it may change once waited for."""
        ...

    def wait(self, ticket: Ticket) -> torch.Tensor:
        """Return `ticket.tensor` once the transfer has ended; raise what went wrong in it. May be called again."""
        ...

    def discard(self, key: str) -> None:
        """Forget `key` and reuse its room."""
        ...

    def keys(self) -> Iterable[str]:
        """Every allocated key, in order of allocation."""
        ...

    def close(self) -> None:
        """Wait for what is under way and give everything back. May be called again; other methods then raise."""
        ...


def _unaligned(numel: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(numel, dtype=dtype)


@dataclass(frozen=True)
class Tiers:
    """Where a model's states rest between uses; `None`: where they are computed with."""

    parameter: Tier | None = None
    """Shards in compute dtype, of presets that shard parameters."""
    optimizer: Tier | None = None
    """Optimizer state, and fp32 master weights where parameters compute in another dtype."""
    gradient: Tier | None = None
    """Reduced gradients, from their reduction to the update."""
    ratio: float = 1.0
    """The share of elements whose optimizer state and gradients go to their tiers; the model's last groups stay."""
    buffer: Callable[[int, torch.dtype], torch.Tensor] = _unaligned
    """Makes memory to fetch into, shape (numel,), that the tiers reach without a copy on the way."""


ON_DEVICE = Tiers()
