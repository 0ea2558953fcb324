"""State that a torch optimizer keeps of resting parameters rests beside them, in `optimizer.state` itself.

State that an optimizer makes as `zeros_like(parameter)` in its step rests from the start. What it makes otherwise, or
puts in the place of what rests, is in memory until the step ends: a step may hold on to the tensors it began with.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from unishard.sharding.host_memory import trim_after_step
from unishard.sharding.resting import Resting, desk
from unishard.sharding.resting_dtensor import Place, RestingDTensor

_serials = itertools.count()
_known: weakref.WeakKeyDictionary[torch.optim.Optimizer, int] = weakref.WeakKeyDictionary()


class _Step:
    """One optimizer's step under way.

    Its state lies in slots: flat tensors of a group, as long as its shard, in which each parameter has its part.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, members: dict[Resting, list[RestingDTensor]], serial: int
    ) -> None:
        self.optimizer = optimizer
        self._members = members
        self._order = list(members)
        self._seen: set[Resting] = set()
        self._prefix = f"optimizer{serial}."
        self._given: dict[int, set[str]] = {}
        """By id of a parameter, the slots that it was given in this step."""
        self._new: set[tuple[Resting, str]] = set()
        """Slots made in this step; parts that were not given yet hold zeros."""

    def arrive(self, resting: Resting) -> None:
        """Read what the step will want of this group, and of the next one meanwhile."""
        if resting in self._members:
            self._seen.add(resting)
            position = self._order.index(resting)
            ahead = [r for r in self._order[position + 1 : position + 2] if r not in self._seen]
            for each in [resting, *ahead]:
                each.prefetch([k for k in each.kinds if k == "shard" or k.startswith(self._prefix)])
                self._members[each][0].place.group.gradients.prefetch()

    def zeros_like(self, param: RestingDTensor, dtype: torch.dtype) -> RestingDTensor | None:
        """State of zeros for `param`, at rest; `None` if it is not one of this step's parameters."""
        mine = next((p for p in self._members.get(param.place.resting, ()) if p.place == param.place), None)
        if mine is None:
            return None
        slots = set(param.place.resting.kinds)
        place = self._free_slot(mine, dtype)
        if place.kind not in slots:
            self._new.add((place.resting, place.kind))
        made = RestingDTensor.at(place, mine._spec)
        if (place.resting, place.kind) not in self._new:
            made.zero_()
        return made

    def _free_slot(self, param: RestingDTensor, dtype: torch.dtype) -> Place:
        """A part of a slot that none of the parameter's state lies in; the slot is made if there is none."""
        resting, group = param.place.resting, param.place.group
        given = self._given.setdefault(id(param), set())
        state: Any = self.optimizer.state.get(param) or {}
        taken = given | {v.place.kind for v in state.values() if isinstance(v, RestingDTensor)}
        kind = next(
            name
            for name in (f"{self._prefix}{n}.{dtype}".replace("torch.", "") for n in itertools.count())
            if name not in taken
        )
        if kind not in resting.kinds and group.tiers.optimizer is not None:
            resting.add_zeros(kind, group.buffer.layout.shard_numel, dtype, group.tiers.optimizer)
        given.add(kind)
        return Place(group, resting, kind, param.place.index)

    @torch.no_grad()
    def collect(self) -> None:
        """Let rest what the optimizer keeps in memory, and drop slots that nothing is in."""
        for resting, params in self._members.items():
            used: set[str] = set()
            for param in params:
                state: Any = self.optimizer.state.get(param) or {}
                for name, value in _plain_state(state, param):
                    place = self._free_slot(param, value.dtype)
                    with resting.opened([place.kind], changed=True):
                        place.local().copy_(value._local_tensor)
                    state[name] = RestingDTensor.at(place, value._spec)
                used |= {v.place.kind for v in state.values() if isinstance(v, RestingDTensor)}
            resting.settle()
            resting.forget_prefetched()
            beside = params[0].place.group.gradients.resting
            if beside is not None:
                beside.forget_prefetched()
            for kind in [k for k in resting.kinds if k.startswith(self._prefix) and k not in used]:
                resting.discard(kind)


def _plain_state(state: Any, param: RestingDTensor) -> Iterator[tuple[str, Any]]:
    """What lies in memory and is laid out as the parameter is."""
    for name, value in list(state.items()):
        if (
            isinstance(value, DTensor)
            and not isinstance(value, RestingDTensor)
            and value.placements == param.placements
            and value._local_tensor.shape == param._local_tensor.shape
        ):
            yield name, value


_under_way: list[_Step] = []


def begin_step(optimizer: torch.optim.Optimizer) -> None:
    """Before `optimizer.step()`."""
    members: dict[Resting, list[RestingDTensor]] = {}
    for options in optimizer.param_groups:
        for param in options["params"]:
            if isinstance(param, RestingDTensor) and param.place.group.tiers.optimizer is not None:
                members.setdefault(param.place.resting, []).append(param)
    if not members:
        return
    serial = _known.get(optimizer)
    if serial is None:
        serial = _known[optimizer] = next(_serials)
    desk.clear()
    for resting in members:
        _forget_the_gone(resting)
    step = _Step(optimizer, members, serial)
    _under_way[:] = [step]
    desk.on_arrival, desk.zeros_like = step.arrive, step.zeros_like


def end_step(optimizer: torch.optim.Optimizer) -> None:
    """After it: everything is stored, and its memory is free."""
    steps, _under_way[:] = [s for s in _under_way if s.optimizer is optimizer], []
    desk.on_arrival = desk.zeros_like = None
    desk.clear()
    for step in steps:
        step.collect()
        trim_after_step()


def _forget_the_gone(resting: Resting) -> None:
    """Give back the room of what optimizers kept that are no more."""
    living = tuple(f"optimizer{serial}." for serial in _known.values())
    for kind in [k for k in resting.kinds if k.startswith("optimizer") and not k.startswith(living)]:
        resting.discard(kind)
