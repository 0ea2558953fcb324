"""Optimizer state that rests on a tier: groups are stepped one after the other, each in memory only for its own step.

The next group is read and the one before is written back while one is updated (ZeRO-Infinity, Rajbhandari et al. 2021,
section 5.2.2).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch

from unishard.optim.flat import FlatSteps, Piece
from unishard.sharding.group import ShardGroup
from unishard.sharding.resting import Resting, absent, is_absent


class RestingSteps:
    """Shows the optimizer what it steps, and takes it away again."""

    def __init__(self, inner: torch.optim.Optimizer, flat: FlatSteps, pieces: Iterable[Piece]) -> None:
        self._inner = inner
        self._flat = flat
        self._pieces: dict[ShardGroup, list[Piece]] = {}
        self._reserved: set[ShardGroup] = set()
        """Groups that are read ahead."""
        self._leaving: ShardGroup | None = None
        """The group that is being written."""
        for piece in pieces:
            if piece.group.resting is not None and piece.param.numel():
                self._pieces.setdefault(piece.group, []).append(piece)
        for group in self._pieces:
            self._hide(group)
            self._rest_new_kinds(group)

    @property
    def active(self) -> bool:
        """Whether anything rests on a tier."""
        return bool(self._pieces)

    def split(self, groups: Sequence[ShardGroup]) -> tuple[list[ShardGroup], list[ShardGroup]]:
        """Those that rest nowhere, and those that are stepped one by one."""
        return (
            [g for g in groups if g not in self._pieces],
            [g for g in groups if g in self._pieces],
        )

    def run(
        self,
        groups: Sequence[ShardGroup],
        update: Callable[[ShardGroup], None],
        upcoming: Sequence[ShardGroup] = (),
    ) -> None:
        """Call `update` with each group while it is in memory. A failure leaves the groups before it updated.

        The first of `upcoming`, groups of later calls, is read meanwhile, and the last one is being written when this
        returns; `finish` ends both.
        """
        line = [*groups, *(group for group in upcoming if group in self._pieces)]
        for position, group in enumerate(groups):
            group.gradients.prefetch()
            self._bring(group)
            for ahead in line[position + 1 : position + 2]:
                self._reserve(ahead)
            try:
                self._show(group)
                with group.gradients.in_memory():
                    update(group)
                group.buffer.carry_over()
            finally:
                self._hide(group)
                _resting(group).close(changed=True)
            self._rest_new_kinds(group)
            self._settle_behind(group)

    def _reserve(self, group: ShardGroup) -> None:
        if group not in self._reserved:
            _resting(group).reserve()
            self._reserved.add(group)
            group.gradients.prefetch()

    def _bring(self, group: ShardGroup) -> None:
        resting = _resting(group)
        if group not in self._reserved:
            resting.open()
            return
        self._reserved.remove(group)
        try:
            resting.arrive()
        except BaseException:
            resting.give_up()
            raise

    def _settle_behind(self, group: ShardGroup | None) -> None:
        """One group at a time is being written: `group`, from now on."""
        if self._leaving is not None:
            _resting(self._leaving).settle()
        self._leaving = group

    def finish(self) -> None:
        """Return once everything is stored, and out of memory."""
        self._settle_behind(None)
        while self._reserved:
            _resting(self._reserved.pop()).give_up()

    @contextmanager
    def shown(self, group: ShardGroup, *, changed: bool) -> Iterator[None]:
        """Weights and state of `group` in memory, and in the optimizer's `state`, inside the block."""
        if group not in self._pieces:
            yield
            return
        with group.in_memory(changed=changed):
            self._show(group)
            try:
                yield
            finally:
                self._hide(group)
        self._rest_new_kinds(group)

    def _show(self, group: ShardGroup) -> None:
        names = self._flat.names(group)
        for piece in self._pieces[group]:
            piece.param.data = group.buffer.local(piece.index, group.buffer.shard)
            state = self._inner.state[piece.param] if names else {}
            for name in names:
                if name in state:
                    state[name] = group.buffer.local(piece.index, self._flat.of(group, name))

    def _hide(self, group: ShardGroup) -> None:
        """Collect what the optimizer keeps, and leave placeholders."""
        for piece in self._pieces[group]:
            state = self._inner.state.get(piece.param) or {}
            for name, value in state.items():
                if isinstance(value, torch.Tensor) and _is_flat(value, piece):
                    self._collect(piece, name, value)
                    state[name] = absent(value)
            if group.resting is not None and "shard" in group.resting.kinds:
                piece.param.data = absent(piece.param.detach())

    def _rest_new_kinds(self, group: ShardGroup) -> None:
        """State appears at the first step."""
        resting, tier = _resting(group), group.tiers.optimizer
        for name in self._flat.names(group) if tier is not None else ():
            if tier is not None and name not in resting.kinds:
                resting.add(name, self._flat.of(group, name), tier)

    def _collect(self, piece: Piece, name: str, value: torch.Tensor) -> None:
        """Optimizers may replace their tensors, and make them at their first step."""
        if is_absent(value):
            return
        flat = self._flat.of(piece.group, name, like=value)
        local = piece.group.buffer.local(piece.index, flat)
        if local.data_ptr() != value.data_ptr():
            local.copy_(value)


def _is_flat(value: torch.Tensor, piece: Piece) -> bool:
    return value.dim() == 1 and value.numel() == piece.param.numel()


def _resting(group: ShardGroup) -> Resting:
    assert group.resting is not None  # only such groups are kept here
    return group.resting
