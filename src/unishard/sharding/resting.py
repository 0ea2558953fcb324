"""Flat tensors of one group that rest on a tier between uses, and are in memory only while somebody uses them.

A resting tensor stays the same Python object. Away, it shows NaN in every element and has no memory of its own, so that
whoever reads it without opening it first cannot take it for data.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch

from unishard.errors import OffloadError, StateError
from unishard.sharding.ports import Ticket, Tier, Tiers


def absent(like: torch.Tensor) -> torch.Tensor:
    """What a resting tensor shows while it is away: as many elements over the memory of one.

    >>> absent(torch.zeros(3))
    tensor([nan, nan, nan])
    """
    fill = float("nan") if like.dtype.is_floating_point else 0
    one = torch.full((1,), fill, dtype=like.dtype, device=like.device)
    return one.as_strided((like.numel(),), (0,))


def is_absent(tensor: torch.Tensor) -> bool:
    """Whether `tensor` has elements and no memory of their own."""
    return tensor.dim() == 1 and tensor.numel() > 0 and tensor.stride(0) == 0


@dataclass
class _Item:
    """One flat tensor. `memory` is its buffer while it is here, is being read, or is being written."""

    tensor: torch.Tensor
    tier: Tier
    key: str
    memory: torch.Tensor | None = None
    in_place: bool = False
    """Whether `memory` is where the tier itself keeps it."""
    reading: Ticket | None = None
    writing: Ticket | None = None
    users: int = 0
    changed: bool = False


_serials = itertools.count()
# Seconds.
_PATIENCE = 1.0


class Resting:
    """The resting tensors of one group, by kind: `shard`, `compute`, and the optimizer's kinds of state.

    `open` and `close` are counted: a tensor leaves when its last user closes it.
    """

    def __init__(self, name: str, tiers: Tiers, beside: Resting | None = None) -> None:
        """`beside`: what else rests of the same group; the two come and go together."""
        self.name = name
        self.unit: Resting = beside or self
        self.epochs: dict[tuple[str, int], int] = {}
        """How often a parameter's part of a kind became another tensor; what was made before must not be used."""
        self._buffer = tiers.buffer
        self._items: dict[str, _Item] = {}

    @property
    def kinds(self) -> Collection[str]:
        return self._items.keys()

    def add(self, kind: str, tensor: torch.Tensor, tier: Tier) -> None:
        """Store `tensor` (1-D, contiguous) and take it out of memory; returns once it is stored."""
        if kind in self._items:
            raise StateError(f"{self.name}: {kind} rests on a tier already")
        item = _Item(tensor, tier, self._new_key(kind))
        tier.put(item.key, tensor.detach())
        self._items[kind] = item
        tensor.data = absent(tensor)

    def add_zeros(self, kind: str, numel: int, dtype: torch.dtype, tier: Tier) -> None:
        """As `add` with zeros, without memory for them."""
        item = _Item(absent(self._buffer(1, dtype)).expand(numel), tier, self._new_key(kind))
        tier.allocate(item.key, numel, dtype)
        self._items[kind] = item

    def _new_key(self, kind: str) -> str:
        # A module's groups of several dtypes have one name, and kinds are renamed.
        return f"{self.name}/{kind}#{next(_serials)}"

    def rename(self, kind: str, to: str) -> None:
        """Call a tensor by another kind, wherever it is."""
        self._items[to] = self._items.pop(kind)

    def replace(self, kind: str, memory: torch.Tensor) -> None:
        """Give a tensor that nobody uses the values of `memory`, which is the tier's until `settle` returns."""
        item = self._items[kind]
        if item.users:
            raise StateError(
                f"{self.name}: {kind} would be overwritten while somebody has a view of it; clone() what is to be kept"
            )
        self._arrive(item)
        item.tensor.data = absent(item.tensor)
        here = item.tier.resident(item.key)
        if here is not None and here.device == memory.device:
            here.copy_(memory)
            item.memory = None
            return
        item.memory = memory
        item.writing = item.tier.store(item.key, memory)

    def discard(self, kind: str) -> None:
        """Forget a tensor that nobody uses, and give its room back."""
        item = self._items[kind]
        if item.users:
            raise StateError(f"{self.name}: {kind} is in use; close it before it is discarded")
        self._arrive(item)
        item.tier.discard(item.key)
        del self._items[kind]

    def flat(self, kind: str) -> torch.Tensor:
        """The tensor of one kind, here or away."""
        return self._items[kind].tensor

    def aliases(self, kind: str) -> int:
        """How many tensors share the memory of one that is here; grows by what others make of it. 0 if it may stay."""
        item = self._items[kind]
        if item.in_place or item.memory is None:
            return 0
        return torch._C._storage_Use_Count(item.memory.untyped_storage()._cdata)

    def prefetch(self, kinds: Iterable[str] | None = None) -> None:
        """Begin to read what is away; `open` then waits less."""
        for item in self._of(kinds):
            if item.memory is None:
                here = item.tier.resident(item.key)
                item.in_place = here is not None and here.device == item.tensor.device
                item.memory = here if item.in_place else None
            if item.memory is None:
                item.memory = self._buffer(item.tensor.numel(), item.tensor.dtype)
                item.reading = item.tier.fetch(item.key, item.memory)

    def open(self, kinds: Iterable[str] | None = None) -> None:
        """Bring tensors into memory. Raises `OffloadError` if what is read is not what was written."""
        wanted = list(self._of(kinds))
        self.prefetch(kinds)
        for item in wanted:
            self._arrive(item)
        for item in wanted:
            item.users += 1

    def reserve(self) -> None:
        """Begin to read everything, and keep what comes, whoever opens and closes it meanwhile, until `arrive` and
        `close`, or `give_up`."""
        self.prefetch()
        for item in self._items.values():
            item.users += 1

    def arrive(self) -> None:
        """Make a reservation an `open`. Raises `OffloadError` if what is read is not what was written."""
        for item in self._items.values():
            self._arrive(item)

    def give_up(self) -> None:
        """End a reservation that nobody uses."""
        for item in self._items.values():
            with suppress(OffloadError):  # whoever needs the values meets it again
                self._arrive(item)
        self.close(changed=False)

    def _arrive(self, item: _Item) -> None:
        """Finish a read; a write under way may go on, it reads the same memory."""
        if item.reading is not None:
            ticket, item.reading = item.reading, None
            try:
                item.tier.wait(ticket)
            except BaseException:
                item.memory = None
                raise
        self._settle_write(item)
        if item.memory is not None and is_absent(item.tensor):
            item.tensor.data = item.memory

    def close(self, kinds: Iterable[str] | None = None, *, changed: bool) -> None:
        """End a use; the last one sends tensors that changed back, and drops the others."""
        for item in self._of(kinds):
            item.users -= 1
            item.changed |= changed
            if item.users == 0:
                self._leave(item)

    def _leave(self, item: _Item) -> None:
        item.tensor.data = absent(item.tensor)
        if item.in_place:
            item.memory, item.changed = None, False
        if item.memory is None:
            return
        if item.changed:
            item.writing = item.tier.store(item.key, item.memory)
            item.changed = False
        else:
            item.memory = None

    def forget_prefetched(self) -> None:
        """Drop what was read ahead and is not used after all."""
        for item in self._items.values():
            if item.users == 0 and item.reading is not None:
                self._arrive(item)
                item.memory = None
                item.tensor.data = absent(item.tensor)

    def settle(self) -> None:
        """Return once everything that left is stored, and its memory is free."""
        for item in self._items.values():
            self._settle_write(item)
            if item.users == 0 and item.reading is None and item.memory is not None and not item.changed:
                item.memory = None

    def _settle_write(self, item: _Item) -> None:
        if item.writing is not None:
            ticket, item.writing = item.writing, None
            try:
                item.tier.wait(ticket)
            except BaseException:
                # Memory has the only copy of these values now: the next close tries again.
                item.changed = True
                raise

    @contextmanager
    def opened(self, kinds: Iterable[str] | None = None, *, changed: bool) -> Iterator[None]:
        """Tensors in memory inside the block. What was written in a block that raises is written back all the same."""
        known = list(self._names(kinds))
        self.open(known)
        try:
            yield
        finally:
            self.close(known, changed=changed)

    def _names(self, kinds: Iterable[str] | None) -> Iterable[str]:
        return [k for k in (self._items if kinds is None else kinds) if k in self._items]

    def _of(self, kinds: Iterable[str] | None) -> Iterator[_Item]:
        for kind in self._names(kinds):
            yield self._items[kind]

    @property
    def idle(self) -> bool:
        """Whether nothing is in memory, in use or under way."""
        return all(i.memory is None and not i.users and i.writing is None for i in self._items.values())

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors here, wherever they are."""
        return sum(i.tensor.numel() * i.tensor.element_size() for i in self._items.values())


@dataclass
class _Brought:
    aliases: int
    """How many tensors shared the memory when it came."""
    changed: bool = False


class Desk:
    """What is in memory for operations on resting tensors outside of a step.

    Whoever reads or writes a resting parameter names no block in which it does so. What an operation needs is therefore
    brought before it, and stays until an operation needs another group: an optimizer that goes from parameter to
    parameter reads and writes every group once, whatever number of operations it takes.
    """

    def __init__(self) -> None:
        self._brought: dict[Resting, dict[str, _Brought]] = {}
        self._writing: list[Resting] = []
        self.on_arrival: Callable[[Resting], None] | None = None
        """Called before tensors of a group are brought."""
        self.zeros_like: Callable[[Any, torch.dtype], Any] | None = None
        """Makes zeros of a resting tensor's shape that rest too, or nothing; set while an optimizer steps."""

    def bring(self, wanted: Mapping[Resting, Iterable[str]]) -> None:
        """Put `wanted` kinds into memory, and everything of other groups away."""
        units = {resting.unit for resting in wanted}
        for other in [resting for resting in self._brought if resting.unit not in units]:
            self.put_away(other)
        for resting, kinds in wanted.items():
            if resting not in self._brought:
                self._brought[resting] = {}
                if self.on_arrival is not None:
                    self.on_arrival(resting)
            self.add(resting, kinds)

    def add(self, resting: Resting, kinds: Iterable[str]) -> None:
        """Bring more kinds of a group that is here."""
        brought = self._brought[resting]
        new = [kind for kind in dict.fromkeys(kinds) if kind not in brought and kind in resting.kinds]
        resting.open(new)
        brought.update({kind: _Brought(resting.aliases(kind)) for kind in new})

    def note_change(self, resting: Resting, kind: str) -> None:
        """A tensor that is here was written."""
        found = self._brought.get(resting, {}).get(kind)
        if found is not None:
            found.changed = True

    def keep_one(self) -> None:
        """After an operation on several groups: all but the last leave."""
        brought = list(self._brought)
        for resting in brought:
            if resting.unit is not brought[-1].unit:
                self.put_away(resting)

    def put_away(self, resting: Resting) -> None:
        """Send a group back. What somebody still has a view of stays, and is written back when nobody does."""
        brought = self._brought[resting]
        for kind, state in list(brought.items()):
            if resting.aliases(kind) > state.aliases:
                # Views do not say whether they were written.
                state.changed = True
                continue
            del brought[kind]
            resting.close([kind], changed=state.changed)
        if not brought:
            del self._brought[resting]
        self._settle_before(resting)

    def vacate(self, resting: Resting) -> None:
        """Send a group back that is about to get other values; what users have a view of stays.

        The thread of a collective lets go of its input some time after whoever waited for the result went on.
        """
        deadline = time.monotonic() + _PATIENCE
        while resting in self._brought and time.monotonic() < deadline:
            time.sleep(0.001)
            self.put_away(resting)

    def _settle_before(self, resting: Resting) -> None:
        """The group that left last is written while others work; those before it are waited for."""
        for other in self._writing:
            other.settle()
        self._writing = [resting]

    def clear(self) -> None:
        """Everything leaves, and is stored when this returns."""
        if not (self._brought or self._writing):
            return
        for resting in list(self._brought):
            self.put_away(resting)
        for resting in self._writing:
            resting.settle()
        self._writing = []


desk = Desk()
"""Operations come one after the other, whichever model they are on."""
