"""Activations that rest on a tier between forward and backward, and come back before backward needs them."""

from __future__ import annotations

import itertools
import weakref
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from unishard.errors import OffloadError
from unishard.offload.aligned import aligned_empty
from unishard.offload.cpu import CpuTier
from unishard.sharding.ports import Ticket, Tier

_names = itertools.count()


@dataclass
class _Reading:
    """An activation on its way back."""

    ticket: Ticket
    memory: torch.Tensor


class SavedActivation:
    """What autograd keeps in an activation's place. The tier forgets the activation when this is no longer needed."""

    def __init__(self, owner: ActivationStore, tensor: torch.Tensor, dense: torch.Tensor) -> None:
        self._owner = owner
        self.key = f"activation{next(_names)}"
        self.shape, self.strides = tensor.shape, tensor.stride()
        self.dtype, self.device = tensor.dtype, tensor.device
        self.numel = dense.numel()
        self.reading: _Reading | None = None
        self.uses = 1
        """How many operations saved it; backward asks for it as often."""
        self._given = 0
        self._kept: torch.Tensor | None = None
        self._back: weakref.ref[torch.Tensor] | None = None

    def back(self) -> torch.Tensor | None:
        """The tensor that came back, while somebody uses it or is going to."""
        return self._back() if self._back is not None else None

    def give(self, tensor: torch.Tensor) -> torch.Tensor:
        """Count one use, and keep the tensor until the last."""
        self._given += 1
        self._kept = tensor if self._given % self.uses else None
        self._back = weakref.ref(tensor)
        return tensor

    def __del__(self) -> None:
        # The collector may run anywhere, inside the tier too: whoever calls the store next discards.
        self._owner.unneeded.append(self.key)


@dataclass
class _Storing:
    """An activation on its way to the tier, kept alive and unchanged until it is there."""

    ticket: Ticket
    tensor: torch.Tensor
    version: int
    saved: weakref.ref[SavedActivation]


class ActivationStore:
    """The hooks of `offload_activations`: `pack` in forward, `unpack` in backward."""

    def __init__(self, tier: Tier, min_bytes: int, prefetch: int, in_flight: int) -> None:
        self.tier = tier
        self.unneeded: deque[str] = deque()
        self.offloaded_bytes = 0
        """All that was ever sent to the tier."""
        self._min_bytes, self._prefetch, self._in_flight = min_bytes, prefetch, in_flight
        self._storing: deque[_Storing] = deque()
        self._order: list[weakref.ref[SavedActivation]] = []
        self._positions: weakref.WeakKeyDictionary[SavedActivation, int] = weakref.WeakKeyDictionary()

    # forward -----------------------------------------------------------------------------------------------

    def pack(self, tensor: torch.Tensor) -> Any:
        """Start moving `tensor` to the tier, or keep it as it is if it is small, a parameter, or of no plain layout."""
        self._discard_unneeded()
        dense = None if _stays(tensor, self._min_bytes) else _flat(tensor)
        if dense is None:
            return tensor
        for storing in self._storing:
            # Several operations saved the same activation: it travels once.
            known = storing.saved()
            if known is not None and _same(storing, tensor):
                known.uses += 1
                return known
        while len(self._storing) >= self._in_flight:
            self._end_oldest()
        saved = SavedActivation(self, tensor, dense)
        self.tier.allocate(saved.key, dense.numel(), dense.dtype)
        ticket = self.tier.store(saved.key, dense)
        self.offloaded_bytes += dense.numel() * dense.element_size()
        # Detached, so that the graph is not kept; versions are shared with the original.
        self._storing.append(_Storing(ticket, tensor.detach(), tensor._version, weakref.ref(saved)))
        self._positions[saved] = len(self._order)
        self._order.append(weakref.ref(saved))
        return saved

    def _end_oldest(self) -> None:
        storing = self._storing.popleft()
        saved = storing.saved()
        try:
            self.tier.wait(storing.ticket)
        except OffloadError:
            if saved is not None:
                raise
        if saved is not None and storing.tensor._version != storing.version:
            raise OffloadError(
                f"an activation of shape {tuple(storing.tensor.shape)} was changed in place while it was being "
                "offloaded, so what backward would read is not what forward saved. Use the operation that is not in "
                "place, or raise min_bytes above this activation's size"
            )

    # backward ----------------------------------------------------------------------------------------------

    def unpack(self, packed: Any) -> torch.Tensor:
        """The activation, from wherever it is; those that were saved before it start on their way."""
        if not isinstance(packed, SavedActivation):
            return packed
        self._discard_unneeded()
        back = self._at_hand(packed)
        if back is None:
            self._start_reading(packed)
        position = self._positions[packed]
        for earlier in self._order[max(0, position - self._prefetch) : position][::-1]:
            saved = earlier()
            if saved is not None and self._at_hand(saved) is None:
                self._start_reading(saved)
        return packed.give(self._finish(packed) if back is None else back)

    def _at_hand(self, saved: SavedActivation) -> torch.Tensor | None:
        """The activation itself, if it has not left yet or is back for another operation."""
        while any(storing.saved() is saved for storing in self._storing):
            oldest = self._storing[0]
            self._end_oldest()  # whatever was sent before is there as well
            if oldest.saved() is saved:
                return oldest.tensor
        return saved.back()

    def _start_reading(self, saved: SavedActivation) -> None:
        if saved.reading is None:
            on_host = saved.device.type == "cpu"
            memory = (
                aligned_empty(saved.numel, saved.dtype)
                if on_host
                else torch.empty(saved.numel, dtype=saved.dtype, device=saved.device)
            )
            saved.reading = _Reading(self.tier.fetch(saved.key, memory), memory)

    def _finish(self, saved: SavedActivation) -> torch.Tensor:
        reading, saved.reading = saved.reading, None
        assert reading is not None  # started above
        self.tier.wait(reading.ticket)
        return reading.memory.as_strided(saved.shape, saved.strides)

    def _discard_unneeded(self) -> None:
        while self.unneeded:
            self.tier.discard(self.unneeded.popleft())
        if len(self._order) > 2 * len(self._positions) + 64:
            self._forget_old_order()

    def _forget_old_order(self) -> None:
        alive = [(ref, saved) for ref in self._order if (saved := ref()) is not None]
        self._order = [ref for ref, _ in alive]
        for position, (_, saved) in enumerate(alive):
            self._positions[saved] = position

    def settle(self) -> None:
        """Return once nothing is on its way to the tier, so that activations may change in place again."""
        while self._storing:
            self._end_oldest()
        self._discard_unneeded()


@contextmanager
def offload_activations(
    tier: Tier | None = None, *, min_bytes: int = 1 << 20, prefetch: int = 2, in_flight: int = 4
) -> Iterator[ActivationStore]:
    """Inside, what autograd saves for backward rests on `tier`; backward may run inside or after.

    Args:
        tier: host memory by default. It stays open, and outlives every graph that was made inside.
        min_bytes: smaller tensors stay where they are, as do parameters and their views.
        prefetch: how many activations are read ahead in backward, in reverse order of saving.
        in_flight: how many are on their way to the tier at most; these still take memory.

    Gradients are the same bits as without. An activation that several operations save travels once.

    >>> layer = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Tanh())
    >>> with offload_activations(min_bytes=1024) as store:
    ...     loss = layer(torch.ones(8, 64)).sum()
    >>> loss.backward()
    >>> store.offloaded_bytes
    4096
    """
    if prefetch < 0 or in_flight < 1:
        raise OffloadError(f"prefetch={prefetch}, in_flight={in_flight}: at least 0 and 1")
    store = ActivationStore(CpuTier() if tier is None else tier, min_bytes, prefetch, in_flight)
    with torch.autograd.graph.saved_tensors_hooks(store.pack, store.unpack):
        yield store
    store.settle()


def _stays(tensor: torch.Tensor, min_bytes: int) -> bool:
    if type(tensor) is not torch.Tensor or tensor.layout is not torch.strided:
        return True  # parameters, DTensors and other subclasses, sparse tensors
    if tensor.numel() * tensor.element_size() < max(min_bytes, 1):
        return True
    base = tensor._base if tensor._is_view() else None
    # A linear layer saves its transposed weight; the weight is there anyway, and may be gathered and released.
    return isinstance(base, nn.Parameter) or (tensor.is_leaf and tensor.requires_grad)


def _flat(tensor: torch.Tensor) -> torch.Tensor | None:
    """The elements in the order of memory, shape (numel,), if they are contiguous in some order of dims."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and stride != expected:
            return None
        expected *= size if size > 1 else 1
    return tensor.detach().as_strided((tensor.numel(),), (1,))


def _same(storing: _Storing, tensor: torch.Tensor) -> bool:
    other = storing.tensor
    return (
        other.data_ptr() == tensor.data_ptr()
        and storing.version == tensor._version
        and other.dtype == tensor.dtype
        and other.shape == tensor.shape
        and other.stride() == tensor.stride()
    )
