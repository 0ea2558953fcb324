"""Sharding a whole model with the user's own parameter objects: what the config door stands on."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from math import prod

import torch
from torch import nn

from unishard.dist.mesh import Axes
from unishard.errors import ShardingError
from unishard.sharding.build import ShardPlan, build_unit, in_place_group
from unishard.sharding.group import WEIGHTS, ShardGroup
from unishard.sharding.hooks import StrayCallHooks
from unishard.sharding.init import ParamInit, fill_module, materialize, require_initializable
from unishard.sharding.schedule import Schedule
from unishard.sharding.unit import ShardUnit, forget_unit, units_under
from unishard.sharding.wrap import ChosenUnit, assign_parameters, choose_modules


@dataclass(frozen=True)
class ShardedModel:
    """A model sharded in place: its root, and every unit and group below, root first."""

    module: nn.Module
    schedule: Schedule

    @property
    def units(self) -> list[ShardUnit]:
        return self.schedule.units

    @property
    def groups(self) -> list[ShardGroup]:
        return self.schedule.groups


def shard_in_place(
    model: nn.Module,
    plan: ShardPlan,
    modules: Iterable[tuple[str, nn.Module]] | None = None,
    param_init_fn: ParamInit | None = None,
) -> ShardedModel:
    """Shard every parameter of `model` under `plan`, one unit for each of `modules` and one for the rest.

    `modules` defaults to `choose_modules(model)`. All ranks call together. Raises `ShardingError` if part of the model
    is sharded already, or cannot be materialized from the meta device. Meta parameters are made and sharded unit by
    unit, by `param_init_fn(module)` or the modules' own `reset_parameters()`.
    """
    for unit in units_under(model):
        raise ShardingError(
            f"module {unit.name or type(unit.modules[0]).__name__!r} is already sharded; a parameter cannot be sharded "
            "twice: build a fresh model, or continue with the one that was sharded"
        )
    require_initializable(model, param_init_fn)
    chosen = assign_parameters(model, choose_modules(model) if modules is None else modules)
    units: list[ShardUnit] = []

    def started(unit: ShardUnit) -> Schedule:
        return schedule

    # Inputs and outputs are cast once, at the root; blocks pass compute dtypes among themselves.
    inner = replace(plan, policy=replace(plan.policy, cast_forward_inputs=False, output_dtype=None))
    total = sum(_elements(choice) for choice in chosen)
    placed = 0
    for choice in chosen:
        name, its = (choice.name, inner) if choice.name else (type(model).__name__, plan)
        if placed >= plan.tiers.ratio * total:
            its = replace(its, tiers=replace(plan.tiers, optimizer=None, gradient=None))
        placed += _elements(choice)
        materialize(choice.records, plan.device, param_init_fn)
        units.append(build_unit(name, [choice.module], choice.records, its, in_place_group(its), started))
    for module in model.modules():
        if any(b is not None and b.is_meta for b in module._buffers.values()):
            fill_module(module, plan.device, param_init_fn)
    holders = dict.fromkeys(home.module for record in chosen[0].records for home in record.homes)
    for holder in (module for module in holders if module is not model):
        StrayCallHooks(units[0], holder)
    schedule = Schedule(units[0], units)
    for unit in units:
        unit.schedule = schedule
    broadcast_buffers(model, plan.axes)
    return ShardedModel(model, schedule)


@torch.no_grad()
def restore_in_place(model: nn.Module) -> None:
    """Undo `shard_in_place`: every parameter is whole again, in its master dtype, and nothing listens any more.

    Whatever was built over the shards (an engine, an optimizer) is of no use afterwards. All ranks call together.
    Raises `ShardingError` for a model that `fully_shard` sharded.
    """
    from unishard.sharding.whole_state import ParameterHome, whole_state

    for unit in list(units_under(model)):
        for group in unit.groups:
            if not all(registration.in_place for registration in group.registrations):
                raise ShardingError(
                    f"module {unit.name!r} was sharded by fully_shard; build a fresh model, or continue with this one"
                )
            with group.in_memory(WEIGHTS, changed=False):
                for index, registration in enumerate(group.registrations):
                    home = ParameterHome(group, index)
                    whole = whole_state(home, home.local(group.buffer.shard))
                    registration.visible.grad = None
                    registration.visible.data = whole
        unit.hooks.remove()
        forget_unit(unit)


def _elements(choice: ChosenUnit) -> int:
    return sum(prod(record.shape) for record in choice.records)


@torch.no_grad()
def broadcast_buffers(model: nn.Module, axes: Axes) -> None:
    """Give every rank the first rank's buffers, non-persistent ones included."""
    seen: set[int] = set()
    for buffer in model.buffers():
        if id(buffer) not in seen and not buffer.is_meta:
            seen.add(id(buffer))
            value = buffer.contiguous()
            axes.broadcast(value)
            if value is not buffer:
                buffer.copy_(value)


def groups_holding(model: nn.Module, params: Sequence[nn.Parameter]) -> list[ShardGroup]:
    """The groups that hold any of `params`, in schedule order."""
    wanted = {id(p) for p in params}
    return [
        group
        for unit in units_under(model)
        for group in unit.groups
        if any(id(r.visible) in wanted or id(r.whole) in wanted for r in group.registrations)
    ]
