"""From modules to units: records become laid-out buffers, groups and registrations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import nn

from unishard.dist.mesh import Axes
from unishard.sharding.buffer import FlatBuffer, GroupBuffer
from unishard.sharding.group import ShardGroup
from unishard.sharding.hooks import StartSchedule, UnitHooks
from unishard.sharding.layout import plan_layout
from unishard.sharding.parameter import InPlaceParameter, ParameterRecord
from unishard.sharding.placement import Placement, Sharding
from unishard.sharding.ports import ON_DEVICE, Tiers
from unishard.sharding.precision import GroupPrecision, MixedPrecision, resolve_precision
from unishard.sharding.schedule import Schedule
from unishard.sharding.single import adopted
from unishard.sharding.unit import ShardUnit, forget_unit, units_under

MakeGroup = Callable[[str, list[ParameterRecord], GroupPrecision], ShardGroup]


@dataclass(frozen=True)
class ShardPlan:
    """What every group of a model is built with."""

    sharding: Sharding
    axes: Axes
    policy: MixedPrecision
    device: torch.device
    broadcast: bool = True
    """Start every rank from the first rank's weights; ranks with other seeds must not train a patchwork."""
    tiers: Tiers = ON_DEVICE


def split_by_kind(records: Sequence[ParameterRecord]) -> list[list[ParameterRecord]]:
    """One list for each (dtype, requires_grad), in order of first appearance: frozen weights get no gradient memory."""
    kinds: dict[tuple[Any, ...], list[ParameterRecord]] = {}
    for record in records:
        # Wrapper subclasses gather in ways of their own.
        kind = type(record.param) if hasattr(record.param, "__tensor_flatten__") else nn.Parameter
        kinds.setdefault((record.param.dtype, record.param.requires_grad, kind), []).append(record)
    return list(kinds.values())


def build_unit(
    name: str,
    modules: Sequence[nn.Module],
    records: Sequence[ParameterRecord],
    plan: ShardPlan,
    make_group: MakeGroup,
    start: StartSchedule,
) -> ShardUnit:
    """Shard `records`, which belong to `modules`, and hook them. All ranks call together."""
    unit = ShardUnit(name, modules, plan.sharding, plan.policy)
    try:
        for members in split_by_kind(records):
            precision = resolve_precision(plan.policy, members[0].param.dtype)
            group = make_group(name, members, precision)
            group.policy = plan.policy
            unit.groups.append(group)
    except Exception:
        # Refused: the module is not sharded, and may be once the caller has mended what was wrong.
        forget_unit(unit)
        raise
    UnitHooks(unit, start)
    return unit


def in_place_group(plan: ShardPlan) -> MakeGroup:
    """Groups of the config door: zero-copy layout, the user's own parameter objects."""

    def make(name: str, records: list[ParameterRecord], precision: GroupPrecision) -> ShardGroup:
        resident = plan.sharding.parameter is Placement.REPLICATE
        layout = plan_layout([tuple(r.shape) for r in records], plan.axes.shard.size)
        buffer = FlatBuffer(
            layout,
            plan.axes.shard,
            compute=precision.compute,
            master=precision.master,
            device=plan.device,
            resident=resident,
        )
        fill(buffer, records, plan)
        registrations = [InPlaceParameter(r, view) for r, view in zip(records, buffer.views, strict=True)]
        group = ShardGroup(name, plan.sharding, plan.axes, precision, buffer, registrations)
        group.adopt()
        group.rest(plan.tiers)
        return group

    return make


def fill(buffer: GroupBuffer, records: Sequence[ParameterRecord], plan: ShardPlan) -> None:
    """Load a buffer from the parameters' present values, rank 0's if the plan broadcasts."""
    # In master precision: a 16-bit detour would round the weights before the first step.
    whole = torch.zeros(buffer.layout.numel, dtype=buffer.master, device=buffer.device)
    with torch.no_grad():
        for record, view in zip(records, buffer.whole_views(whole), strict=True):
            if prod(view.shape):
                view.copy_(record.local)
            adopted(record.param)
    if plan.broadcast:
        plan.axes.broadcast(whole)
    buffer.load(whole)


def start_schedule_with(deliver: Callable[[Sequence[ShardGroup]], None]) -> StartSchedule:
    """A starter for `UnitHooks`: the first unit to run becomes the root of everything below it."""

    def start(unit: ShardUnit) -> Schedule:
        units: dict[int, ShardUnit] = {}
        for module in unit.modules:
            for found in units_under(module):
                units.setdefault(id(found), found)
        schedule = Schedule(unit, list(units.values()), deliver)
        for member in schedule.units:
            member.schedule = schedule
        return schedule

    return start
