"""Several tiers as one, filled in order: a fraction on the device, some in host memory, the rest on disk."""

from __future__ import annotations

import math
import weakref
from collections.abc import Sequence

import torch

from unishard.errors import OffloadError
from unishard.sharding.ports import Ticket, Tier


class LayeredTier:
    """Each key rests wholly on one of `layers`, pairs of a tier and the bytes it may hold, and closed with this.

    DeepSpeed's `max_in_cpu` is `[(CpuTier(), bytes), (NvmeTier(path), math.inf)]`; ZeRO-Offload++'s `ratio` is
    `[(DeviceTier(device), share), (CpuTier(), math.inf)]`.

    >>> from unishard.offload.cpu import CpuTier
    >>> tier = LayeredTier([(CpuTier(), 8), (CpuTier(), math.inf)])
    >>> tier.put("first", torch.zeros(2)), tier.put("second", torch.zeros(2))
    (None, None)
    >>> tier.home("first") is tier.home("second")
    False
    """

    def __init__(self, layers: Sequence[tuple[Tier, float]]) -> None:
        if not layers or layers[-1][1] != math.inf:
            raise OffloadError("the last layer has to take whatever is left; give it math.inf bytes")
        self._layers = [tier for tier, _ in layers]
        self._room = [float(room) for _, room in layers]
        self._homes: dict[str, int] = {}
        self._sizes: dict[str, int] = {}
        # A key may be discarded, and rest elsewhere, before its ticket is waited for.
        self._origins: weakref.WeakKeyDictionary[Ticket, Tier] = weakref.WeakKeyDictionary()
        self.name = " + ".join(tier.name for tier in self._layers)

    def home(self, key: str) -> Tier:
        """The tier on which `key` rests. Raises `OffloadError` if it is unknown."""
        if key not in self._homes:
            raise OffloadError(
                f"{self.name} tier: nothing is allocated under {key}; allocate or put it first"
            )
        return self._layers[self._homes[key]]

    def allocate(self, key: str, numel: int, dtype: torch.dtype) -> None:
        if key in self._homes:
            raise OffloadError(f"{self.name} tier: {key} is allocated already; discard it first")
        nbytes = numel * dtype.itemsize
        index = next(i for i, room in enumerate(self._room) if nbytes <= room)
        self._layers[index].allocate(key, numel, dtype)
        self._homes[key], self._sizes[key] = index, nbytes
        self._room[index] -= nbytes

    def spec(self, key: str) -> tuple[int, torch.dtype]:
        return self.home(key).spec(key)

    def put(self, key: str, tensor: torch.Tensor) -> None:
        if key not in self._homes:
            self.allocate(key, tensor.numel(), tensor.dtype)
        self.home(key).put(key, tensor)

    def resident(self, key: str) -> torch.Tensor | None:
        return self.home(key).resident(key)

    def fetch(self, key: str, into: torch.Tensor) -> Ticket:
        return self._remembered(self.home(key), self.home(key).fetch(key, into))

    def store(self, key: str, tensor: torch.Tensor) -> Ticket:
        return self._remembered(self.home(key), self.home(key).store(key, tensor))

    def wait(self, ticket: Ticket) -> torch.Tensor:
        tier = self._origins.get(ticket)
        if tier is None:
            raise OffloadError(f"{self.name} tier: {ticket!r} is not one of its tickets")
        return tier.wait(ticket)

    def _remembered(self, tier: Tier, ticket: Ticket) -> Ticket:
        self._origins[ticket] = tier
        return ticket

    def discard(self, key: str) -> None:
        self.home(key).discard(key)
        self._room[self._homes.pop(key)] += self._sizes.pop(key)

    def keys(self) -> list[str]:
        return list(self._homes)

    def close(self) -> None:
        for tier in self._layers:
            tier.close()
        self._homes.clear()
        self._sizes.clear()
