"""The inputs of one checkpointed call: given to the function twice, and elsewhere in between."""

from __future__ import annotations

import itertools
from collections import deque
from contextlib import suppress
from typing import Any, Protocol, TypeGuard

import torch
from torch.utils import _pytree as pytree

from unishard.checkpointing.settings import ContiguousSlots, Settings
from unishard.dist.collectives import Communicator
from unishard.errors import OffloadError
from unishard.sharding.ports import Ticket, Tier

_names = itertools.count()


class Resting(Protocol):
    """A flat tensor that waits for backward."""

    def back(self) -> torch.Tensor: ...


class _OnTier:
    def __init__(self, tier: Tier, flat: torch.Tensor) -> None:
        _discard_unneeded()
        self._tier, self._device = tier, flat.device
        self._key = f"checkpoint{next(_names)}"
        tier.allocate(self._key, flat.numel(), flat.dtype)
        self._storing: Ticket | None = tier.store(self._key, flat)

    def back(self) -> torch.Tensor:
        _discard_unneeded()
        storing, self._storing = self._storing, None
        if storing is not None:
            self._tier.wait(storing)
        numel, dtype = self._tier.spec(self._key)
        into = torch.empty(numel, dtype=dtype, device=self._device)
        return self._tier.wait(self._tier.fetch(self._key, into))

    def __del__(self) -> None:
        # The collector may run anywhere, inside the tier too: the next checkpoint discards.
        _unneeded.append((self._tier, self._key))


_unneeded: deque[tuple[Tier, str]] = deque()


def _discard_unneeded() -> None:
    while _unneeded:
        tier, key = _unneeded.popleft()
        with suppress(OffloadError):  # the tier may have been closed
            tier.discard(key)


class _InSlot:
    def __init__(self, slots: ContiguousSlots, flat: torch.Tensor) -> None:
        self._slots, self._device = slots, flat.device
        self._slot, memory = slots.take(flat.numel() * flat.element_size())
        self._memory = memory.view(flat.dtype)
        self._memory.copy_(flat)

    def back(self) -> torch.Tensor:
        # A copy: the slot may be another checkpoint's before autograd has let go of this one's tensors.
        return self._memory.to(self._device, copy=True)

    def __del__(self) -> None:
        if hasattr(self, "_slot"):
            self._slots.give(self._slot)


class _Kept:
    def __init__(self, flat: torch.Tensor) -> None:
        self._flat = flat

    def back(self) -> torch.Tensor:
        return self._flat


class _Input:
    """One tensor, or this rank's part of it, at rest."""

    def __init__(self, tensor: torch.Tensor, position: int, settings: Settings, ranks: Communicator) -> None:
        self._shape, self._requires_grad = tensor.shape, tensor.requires_grad
        self._ranks = ranks
        flat = tensor.detach().reshape(-1)
        if ranks.size > 1:
            length = -(-flat.numel() // ranks.size)
            own = flat[ranks.rank * length : (ranks.rank + 1) * length]
            flat = own.new_zeros(length)
            flat[: own.numel()].copy_(own)
        self._resting = _rest(flat, position, settings)

    def back(self) -> torch.Tensor:
        flat = self._resting.back()
        if self._ranks.size > 1:
            length, rank = flat.numel(), self._ranks.rank
            whole = flat.new_empty(self._ranks.size * length)
            whole[rank * length : (rank + 1) * length].copy_(flat)
            self._ranks.all_gather(whole, label="checkpointed activation").wait()
            self._ranks.drain()
            flat = whole[: self._shape.numel()]
        return flat.view(self._shape).requires_grad_(self._requires_grad)


def _rest(flat: torch.Tensor, position: int, settings: Settings) -> Resting:
    if settings.contiguous:
        device = torch.device("cpu") if settings.in_cpu else flat.device
        return _InSlot(settings.slots_for(position, device), flat)
    if settings.tier is not None:
        return _OnTier(settings.tier, flat)
    return _Kept(flat)


class Inputs:
    """Arguments in any nesting of tuples, lists and dicts.

    What moves is what gradients flow to. The rest (masks, positions, numbers) is the caller's, shared between calls and
    alive anyway.
    """

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._leaves, self._spec = pytree.tree_flatten((args, kwargs))
        self.at_rest = False

    def tensors(self) -> list[torch.Tensor]:
        return [leaf for leaf in self._leaves if isinstance(leaf, torch.Tensor)]

    def leave(self, settings: Settings) -> None:
        """Go to rest. Inputs that stay on the device in whole stay as they are."""
        self.at_rest = True
        ranks = settings.ranks()
        if settings.contiguous or settings.tier is not None or ranks.size > 1:
            self._leaves = [
                _Input(leaf, position, settings, ranks) if _moves(leaf) else leaf
                for position, leaf in enumerate(self._leaves)
            ]

    def back(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments. At rest, tensors are new ones with the same values, apart from the first call's graph."""
        leaves = [leaf.back() if isinstance(leaf, _Input) else self._apart(leaf) for leaf in self._leaves]
        return pytree.tree_unflatten(leaves, self._spec)

    def _apart(self, leaf: Any) -> Any:
        if not (self.at_rest and type(leaf) is torch.Tensor):
            return leaf
        return leaf.detach().requires_grad_(leaf.requires_grad)


def _moves(leaf: Any) -> TypeGuard[torch.Tensor]:
    return (
        type(leaf) is torch.Tensor
        and leaf.requires_grad
        and leaf.layout is torch.strided
        and leaf.numel() > 0
    )
