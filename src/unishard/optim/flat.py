"""Whole shards stepped at once: known optimizers as kernel rules, one pass over memory and few calls.

An optimizer whose update is a rule of `unishard.kernels` need not see one small tensor for each parameter: neighbours
in a shard that share a parameter group and a step number form one range. Unscaling, clipping and the 16-bit copy of the
parameters happen in the same pass. `state` and `param_groups` stay the optimizer's own: state tensors are views of flat
ones, so schedulers, checkpoints and users find what they expect.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.optim import Optimizer

from unishard.errors import StateError
from unishard.kernels import AdagradRule, AdamRule, LionRule, Rule, SgdRule, Target, update
from unishard.optim.adam import UncorrectedAdam
from unishard.optim.lion import Lion
from unishard.sharding.group import ShardGroup

Used = Mapping[ShardGroup, Set[int]]
"""Which parameters of each group received a gradient on some rank."""


@dataclass(frozen=True)
class Piece:
    """This rank's part of one parameter: a 1-D view of its group's shard, as a torch optimizer sees it."""

    group: ShardGroup
    index: int
    param: nn.Parameter


class Range(NamedTuple):
    """Elements [start, stop) of a group's shard that take the same step."""

    group: ShardGroup
    start: int
    stop: int


def rule_of(optimizer: Optimizer, options: Mapping[str, Any]) -> Rule | None:
    """The kernel rule for one parameter group of `optimizer`, or `None` where no rule does exactly the same.

    >>> weight = nn.Parameter(torch.ones(2))
    >>> optimizer = torch.optim.SGD([weight], lr=0.5)
    >>> rule_of(optimizer, optimizer.param_groups[0])
    SgdRule(lr=0.5, momentum=0, dampening=0, weight_decay=0, nesterov=False)
    """
    if any(options.get(name) for name in ("amsgrad", "maximize", "capturable", "differentiable", "foreach")):
        return None
    make = _RULES.get(type(optimizer))
    return None if make is None else make(float(options["lr"]), options)


def _adam(lr: float, options: Mapping[str, Any], corrected: bool = True, decoupled: bool = False) -> Rule:
    return AdamRule(
        lr=lr,
        betas=tuple(map(float, options["betas"])),  # pyright: ignore[reportArgumentType]
        eps=options["eps"],
        weight_decay=options["weight_decay"],
        decoupled=options.get("decoupled_weight_decay", decoupled),
        bias_correction=corrected,
    )


_RULES: dict[type, Any] = {
    torch.optim.Adam: _adam,
    torch.optim.AdamW: lambda lr, options: _adam(lr, options, decoupled=True),
    UncorrectedAdam: lambda lr, options: _adam(lr, options, corrected=False),
    Lion: lambda lr, o: LionRule(lr=lr, betas=tuple(o["betas"]), weight_decay=o["weight_decay"]),
    torch.optim.Adagrad: lambda lr, o: AdagradRule(
        lr=lr, lr_decay=o["lr_decay"], eps=o["eps"], weight_decay=o["weight_decay"]
    ),
    torch.optim.SGD: lambda lr, o: SgdRule(
        lr=lr,
        momentum=o["momentum"],
        dampening=o["dampening"],
        weight_decay=o["weight_decay"],
        nesterov=o["nesterov"],
    ),
}


_COUNTED: set[type] = {torch.optim.Adam, torch.optim.AdamW, torch.optim.Adagrad}
"""Optimizers that keep the number of steps in their state."""


def register_rule_like(ours: type[Optimizer], known: type[Optimizer]) -> None:
    """Let `ours`, a subclass of `known` with the same update, states and options, step by its kernel rule."""
    _RULES[ours] = _RULES[known]
    if known in _COUNTED:
        _COUNTED.add(ours)


@dataclass
class Cohort:
    """Pieces of one shard group and one parameter group that have taken equally many steps."""

    position: int
    """Of the parameter group."""
    count: int
    params: list[nn.Parameter]
    ranges: list[Range]
    counter: torch.Tensor | None
    """`count` as the optimizer's state shows it, the same tensor for every piece."""

    def advance(self) -> None:
        self.count += 1
        if self.counter is not None:
            self.counter.fill_(self.count)


@dataclass(frozen=True)
class Division:
    """How one shard group falls into cohorts, for one set of used parameters."""

    used: Set[int]
    positions: Mapping[int, int]
    cohorts: list[Cohort]


class FlatSteps:
    """Carries out the steps of `inner` range by range."""

    def __init__(self, inner: Optimizer, pieces: Iterable[Piece]) -> None:
        self._inner = inner
        self._pieces: dict[ShardGroup, list[Piece]] = {}
        for piece in pieces:
            self._pieces.setdefault(piece.group, []).append(piece)
        self._flats: dict[tuple[ShardGroup, str], torch.Tensor] = {}
        self._divisions: dict[ShardGroup, Division] = {}
        self._positions: dict[int, int] = {}

    @staticmethod
    def can_step(inner: Optimizer, pieces: Iterable[Piece]) -> bool:
        """Whether every parameter group has a rule. GPUs keep torch's kernels: none of ours has run on one yet."""
        on_cpu = all(piece.param.device.type == "cpu" for piece in pieces)
        return on_cpu and all(rule_of(inner, group) is not None for group in inner.param_groups)

    def step(self, used: Used, grad_scale: float) -> None:
        """Step the pieces that received a gradient, by their groups' reduced gradients times `grad_scale`."""
        rules = [rule_of(self._inner, options) for options in self._inner.param_groups]
        self._find_positions()
        calls: dict[tuple[int, int], list[Target]] = {}
        for group, indices in used.items():
            for cohort in self._cohorts(group, indices):
                rule = rules[cohort.position]
                if rule is None:
                    raise StateError(
                        f"{type(self._inner).__name__}: options changed to some that kernels do not know"
                    )
                cohort.advance()
                targets = [self._target(found, rule) for found in cohort.ranges]
                calls.setdefault((cohort.position, cohort.count), []).extend(targets)
        for (position, count), targets in calls.items():
            rule = rules[position]
            if rule is not None:
                update(targets, rule, step=count, grad_scale=grad_scale)

    def _find_positions(self) -> None:
        """Where parameters stand in the optimizer's groups, looked up again when a group has grown or shrunk."""
        groups = self._inner.param_groups
        if len(self._positions) != sum(len(options["params"]) for options in groups):
            self._positions = {id(p): i for i, options in enumerate(groups) for p in options["params"]}

    def _target(self, found: Range, rule: Rule) -> Target:
        group, start, stop = found
        gradient = group.gradients.shard
        if gradient is None:
            raise StateError(f"{group.name}: nothing was reduced for the parameters about to be stepped")
        copy = group.buffer.copy_of_shard
        if copy is not None:
            group.buffer.copied = True
        return Target(
            group.buffer.shard[start:stop],
            gradient[start:stop],
            tuple(self._flats[group, name][start:stop] for name in rule.state_names),
            None if copy is None else copy[start:stop],
        )

    def release(self) -> None:
        """Let the optimizer step by itself again, or its state be replaced: the next step here takes it over anew."""
        self.separate()
        self._flats = {key: flat for key, flat in self._flats.items() if key[0].resting is not None}

    def forget(self) -> None:
        """The optimizer's state is gone."""
        self._divisions.clear()
        self._flats.clear()

    def separate(self) -> None:
        """Give every piece a step counter of its own; the next step here reads them anew."""
        for division in self._divisions.values():
            self._separate(division.cohorts)
        self._divisions.clear()

    def state_names(self) -> tuple[str, ...] | None:
        """What the optimizer keeps for each parameter; `None` where no rule says so."""
        rules = [rule_of(self._inner, options) for options in self._inner.param_groups]
        if any(rule is None for rule in rules):
            return None
        names = dict.fromkeys(name for rule in rules if rule is not None for name in rule.state_names)
        counted = ("step",) if type(self._inner) in _COUNTED else ()
        return (*counted, *names)

    def slot(self, piece: Piece, name: str, dtype: torch.dtype) -> torch.Tensor:
        """The state tensor of one piece: its own if it has one, else a view of the group's flat one, or zeros."""
        state = self._inner.state[piece.param]
        if name not in state:
            if dtype == piece.param.dtype and name in (self.state_names() or ()):
                self._show_in(state, name, piece)
            else:
                state[name] = torch.zeros_like(piece.param, dtype=dtype)
        return state[name]

    def names(self, group: ShardGroup) -> list[str]:
        """The kinds of state that `group` has flat."""
        return [name for owner, name in self._flats if owner is group]

    def of(self, group: ShardGroup, name: str, like: torch.Tensor | None = None) -> torch.Tensor:
        """The flat state of one kind; with `like`, made of zeros in its dtype if there is none."""
        if like is not None and (group, name) not in self._flats:
            self._flats[group, name] = _zeros(group, like.dtype)
        return self._flats[group, name]

    # cohorts -----------------------------------------------------------------------------------------------

    def _cohorts(self, group: ShardGroup, used: Set[int]) -> list[Cohort]:
        known = self._divisions.get(group)
        if known is not None and known.used == used and known.positions is self._positions:
            return known.cohorts
        counts: dict[int, int] = {}
        if known is not None:
            # Whoever is not stepped now must not count with the others.
            self._separate(known.cohorts)
            counts = {id(param): cohort.count for cohort in known.cohorts for param in cohort.params}
        members: dict[tuple[int, int], list[Piece]] = {}
        for piece in self._pieces.get(group, ()):
            position = self._positions.get(id(piece.param))
            if position is not None and piece.index in used:
                count = counts.get(id(piece.param))
                key = position, self._taken(piece.param) if count is None else count
                members.setdefault(key, []).append(piece)
        cohorts = [self._cohort(position, count, pieces) for (position, count), pieces in members.items()]
        self._divisions[group] = Division(used, self._positions, cohorts)
        return cohorts

    def _separate(self, cohorts: Iterable[Cohort]) -> None:
        for cohort in cohorts:
            for param in cohort.params if cohort.counter is not None else ():
                self._inner.state[param]["step"] = torch.tensor(float(cohort.count))

    def _taken(self, param: nn.Parameter) -> int:
        """Steps that the optimizer's state says a piece has taken; where it does not count, whether it has any."""
        state = self._inner.state.get(param) or {}
        return int(state["step"]) if "step" in state else min(len(state), 1)

    def _cohort(self, position: int, count: int, pieces: Sequence[Piece]) -> Cohort:
        options = self._inner.param_groups[position]
        rule = rule_of(self._inner, options)
        counter = torch.tensor(float(count)) if type(self._inner) in _COUNTED else None
        names = rule.state_names if rule is not None else ()
        for piece in pieces if names else ():
            state = self._inner.state[piece.param]
            for name in names:
                self._show_in(state, name, piece)
            if counter is not None:
                state["step"] = counter
        return Cohort(position, count, [p.param for p in pieces], list(_ranges(pieces)), counter)

    def _show_in(self, state: dict[str, Any], name: str, piece: Piece) -> None:
        """Make a state tensor a view of the group's flat one, with the value it has."""
        key = piece.group, name
        if key not in self._flats:
            self._flats[key] = _zeros(piece.group, piece.param.dtype)
        view = piece.group.buffer.local(piece.index, self._flats[key])
        known = state.get(name)
        if known is not None and known.data_ptr() != view.data_ptr():
            view.copy_(known)
        state[name] = view


def _zeros(group: ShardGroup, dtype: torch.dtype) -> torch.Tensor:
    shard = group.buffer.shard
    return torch.zeros(shard.numel(), dtype=dtype, device=shard.device)


def _ranges(pieces: Sequence[Piece]) -> Iterable[Range]:
    """Neighbours in a shard joined, padding between them included."""
    by_group: dict[ShardGroup, set[int]] = {}
    for piece in pieces:
        by_group.setdefault(piece.group, set()).add(piece.index)
    for group, indices in by_group.items():
        start = stop = -1
        for index, _, target, numel in group.buffer.shard_spans(group.axes.shard.rank) or ():
            if index in indices:
                start, stop = (target if start < 0 else start), target + numel
            elif start >= 0:
                yield Range(group, start, stop)
                start = -1
        if start >= 0:
            yield Range(group, start, stop)
