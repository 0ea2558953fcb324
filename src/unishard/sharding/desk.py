"""Resting tensors that users compute with outside of a step: one group is in memory at a time.

Whoever reads or writes a resting parameter names no block in which it does so. What an operation needs is therefore
brought before it, and stays until an operation needs another group: an optimizer that goes from parameter to parameter
reads and writes every group once, whatever number of operations it takes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from unishard.sharding.resting import Resting


@dataclass
class _Brought:
    aliases: int
    """How many tensors shared the memory when it came."""
    changed: bool = False


class Desk:
    """What is in memory for operations on resting tensors."""

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
