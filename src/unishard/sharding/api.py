"""The code door: `fully_shard(module)`, with FSDP2's contract over unishard's core."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from unishard.dist.agree import agree
from unishard.dist.collectives import Communicator
from unishard.dist.mesh import Axes, axes_of, ensure_process_group, subgroup
from unishard.errors import MisuseError, ShardingError, UnsupportedError
from unishard.sharding.build import ShardPlan, build_unit, start_schedule_with
from unishard.sharding.composable import is_replicated, note_sharded
from unishard.sharding.dtensor import PlacementFn, deliver, swapped_group
from unishard.sharding.first_run import prepare_first_run
from unishard.sharding.fsdp_module import FSDPModule, UnshardHandle, as_fsdp_class, share_comm_ctx
from unishard.sharding.hooks import StateDictHooks, watch_optimizers, watch_resting_optimizers
from unishard.sharding.in_place import broadcast_buffers
from unishard.sharding.parameter import ParameterRecord, find_parameters, taken_by
from unishard.sharding.placement import NO_SHARD, ZERO3, Placement, Sharding, preset
from unishard.sharding.policies import (
    MixedPrecisionPolicy,
    OffloadPolicy,
    as_mesh_dims,
    as_mixed_precision,
    tiers_of,
)
from unishard.sharding.ports import ON_DEVICE
from unishard.sharding.schedule import Schedule
from unishard.sharding.spmd import WholeMesh
from unishard.sharding.unit import ShardUnit, unit_of, units_under

__all__ = ["FSDPModule", "UnshardHandle", "shard_modules", "share_comm_ctx", "register_fsdp_forward_method"]


_FULL_PRECISION = MixedPrecisionPolicy()
_NO_OFFLOAD = OffloadPolicy()


def shard_modules(
    module: Any,
    *,
    mesh: DeviceMesh | None = None,
    sharding: Sharding | str = ZERO3,
    reshard_after_forward: bool | int | None = None,
    shard_placement_fn: PlacementFn | None = None,
    mp_policy: Any = _FULL_PRECISION,
    offload_policy: Any = _NO_OFFLOAD,
    ignored_params: set[nn.Parameter] | None = None,
    dp_mesh_dims: Any = None,
) -> Any:
    """What `unishard.fully_shard` does, with everything heavy imported; see there."""
    modules: list[nn.Module] = list(module) if isinstance(module, list | tuple) else [module]
    _check_modules(modules)
    whole_mesh = None
    if dp_mesh_dims is not None:
        whole_mesh = _whole_mesh(mesh, dp_mesh_dims, reshard_after_forward)
        mesh = whole_mesh.data_parallel_mesh()
        if not whole_mesh.dims.shard_names:
            sharding, reshard_after_forward = _copies_only(sharding), None
    shard_records(
        modules,
        _records(modules, ignored_params or set()),
        mesh=mesh,
        whole_mesh=whole_mesh,
        sharding=sharding,
        reshard_after_forward=reshard_after_forward,
        shard_placement_fn=shard_placement_fn,
        mp_policy=mp_policy,
        offload_policy=offload_policy,
    )
    return module


def shard_records(
    modules: Sequence[nn.Module],
    records: Sequence[ParameterRecord],
    *,
    mesh: DeviceMesh | None = None,
    whole_mesh: WholeMesh | None = None,
    sharding: Sharding | str = ZERO3,
    reshard_after_forward: bool | int | None = None,
    shard_placement_fn: PlacementFn | None = None,
    mp_policy: Any = _FULL_PRECISION,
    offload_policy: Any = _NO_OFFLOAD,
) -> ShardUnit:
    """Make one unit of `modules` that gathers exactly `records`: `fully_shard` without the search."""
    sharding = preset(sharding) if isinstance(sharding, str) else sharding
    plan, mesh = _plan(modules, mesh, sharding, mp_policy, offload_policy)
    name = type(modules[0]).__name__
    tied = [(r.fqn, taken) for r in records if (taken := taken_by(r.param)) is not None]
    make = swapped_group(plan, mesh, shard_placement_fn, whole_mesh)
    unit = build_unit(name, modules, records, plan, make, _start)
    unit.tied_elsewhere = tied
    if sharding.parameter is Placement.REPLICATE:
        watch_optimizers()
    _set_resharding(unit, plan.axes, reshard_after_forward)
    for each in modules:
        StateDictHooks(unit, each)
        note_sharded(each)
        each.__class__ = as_fsdp_class(type(each))
    return unit


def _check_modules(modules: Sequence[nn.Module]) -> None:
    if not modules:
        raise ShardingError("fully_shard got an empty list; pass a module or a non-empty list of modules")
    for module in modules:
        if not isinstance(module, nn.Module):
            raise ShardingError(f"fully_shard shards nn.Modules, not {type(module).__name__}")
        if unit_of(module) is not None:
            raise MisuseError(
                f"fully_shard has already been applied to this {type(module).__name__}, and a parameter cannot be "
                "sharded twice: apply it once to each module, inner ones first"
            )
        if isinstance(module, nn.ModuleList | nn.ModuleDict) and type(module).forward is nn.Module.forward:
            raise ShardingError(
                f"fully_shard does not support containers that do not implement forward, as {type(module).__name__} "
                "does not; apply it to the modules inside, or to all of them as one unit: fully_shard([*blocks])"
            )


def _whole_mesh(mesh: DeviceMesh | None, dims: Any, reshard_after_forward: bool | int | None) -> WholeMesh:
    if not isinstance(mesh, DeviceMesh):
        raise ShardingError(f"dp_mesh_dims={dims} needs the mesh whose dims it names; pass mesh=")
    if not isinstance(reshard_after_forward, bool | None):
        raise UnsupportedError(
            f"reshard_after_forward as int ({reshard_after_forward}) is not available with dp_mesh_dims; pass True or "
            "False, or the data-parallel sub-mesh as mesh="
        )
    return WholeMesh(mesh, as_mesh_dims(dims))


def _copies_only(sharding: Sharding | str) -> Sharding:
    sharding = preset(sharding) if isinstance(sharding, str) else sharding
    if sharding is not ZERO3 and sharding.sharded_anywhere:
        raise ShardingError(
            f"{sharding} needs a dim to shard along, and dp_mesh_dims names only dims to replicate along; name one: "
            "DataParallelMeshDims(shard=...), or use sharding=NO_SHARD"
        )
    return NO_SHARD


def _plan(
    modules: Sequence[nn.Module],
    mesh: DeviceMesh | None,
    sharding: Sharding,
    mp_policy: Any,
    offload_policy: Any,
) -> tuple[ShardPlan, DeviceMesh]:
    if mesh is None:
        if sharding.needs_replicas:
            raise ShardingError(
                f"{sharding} needs a 2-D mesh (dp_replicate, dp_shard); pass "
                'mesh=init_device_mesh(device, (replicas, shards), mesh_dim_names=("dp_replicate", "dp_shard"))'
            )
        device_type = _device_type(modules)
        ensure_process_group(torch.device(device_type))
        # Without dim names, as torch's default is: meshes with other names are not equal.
        mesh = init_device_mesh(device_type, (dist.get_world_size(),))
    if not isinstance(mesh, DeviceMesh):
        raise ShardingError(
            f"mesh must be a DeviceMesh, not {type(mesh).__name__}; build one with init_device_mesh"
        )
    _check_dims(mesh, sharding)
    axes = axes_of(mesh, replicate_only=not sharding.sharded_anywhere)
    device = torch.device(mesh.device_type)
    if device.type == "cuda":
        device = torch.device("cuda", torch.cuda.current_device())
    tiers = ON_DEVICE
    with agree(axes.shard, "fully_shard: open the tiers of offload_policy"):
        tiers = tiers_of(offload_policy, device, sharding)
    if tiers is not ON_DEVICE:
        watch_resting_optimizers()
    broadcast = _materialized_everywhere(modules, axes)
    return ShardPlan(sharding, axes, as_mixed_precision(mp_policy), device, broadcast, tiers), mesh


def _check_dims(mesh: DeviceMesh, sharding: Sharding) -> None:
    if mesh.ndim not in (1, 2):
        raise ShardingError(
            f"fully_shard expects a 1D or 2D DeviceMesh but got {mesh}; pass the data-parallel sub-mesh, for example "
            'mesh["dp_replicate", "dp_shard"]'
        )
    if sharding.needs_replicas and mesh.ndim != 2:
        raise ShardingError(
            f"{sharding} needs a 2-D mesh (dp_replicate, dp_shard), not one of {mesh.ndim} dimensions"
        )
    if mesh.ndim == 2 and mesh.mesh_dim_names is None:
        raise MisuseError(
            f"{mesh} does not say which of its two dims replicates and which one shards; build it with "
            'mesh_dim_names=("dp_replicate", "dp_shard")'
        )


def _device_type(modules: Sequence[nn.Module]) -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _materialized_everywhere(modules: Sequence[nn.Module], axes: Axes) -> bool:
    """Whether every rank holds real weights; if some build on the meta device, nobody waits for a broadcast."""
    real = all(not p.is_meta for module in modules for p in module.parameters())
    device = "cuda" if axes.shard.native_device or axes.replicate.native_device else "cpu"
    flag = torch.tensor([1 if real else 0], dtype=torch.int32, device=device)
    return bool(axes.all_reduce_control(flag, "min").item())


def _records(modules: Sequence[nn.Module], ignored: set[nn.Parameter]) -> list[ParameterRecord]:
    """Parameters not below a module that is already sharded, or that DDP replicates."""
    tops = {top for root in modules for unit in units_under(root) for top in unit.modules}
    tops |= {m for root in modules for m in root.modules() if m is not root and is_replicated(m)}
    skip = {m for top in tops for m in top.modules()}
    prefixes = {} if len(modules) == 1 else {m: f"{i}." for i, m in enumerate(modules)}
    return find_parameters(list(modules), prefixes, ignored, skip)


def _set_resharding(unit: ShardUnit, axes: Axes, reshard_after_forward: bool | int | None) -> None:
    if reshard_after_forward is None:
        return
    if unit.sharding.parameter is Placement.REPLICATE:
        if reshard_after_forward is not False:
            raise ShardingError(
                f"reshard_after_forward={reshard_after_forward} with {unit.sharding}: its parameters rest whole and "
                "are never resharded; use sharding=ZERO3, or leave reshard_after_forward out"
            )
        return
    unit.keep_if_root = False
    unit.keep_within = None
    if isinstance(reshard_after_forward, bool):
        unit.reshard_after_forward = reshard_after_forward
        return
    # Groups of one rank keep everything: that is not resharding at all.
    unit.reshard_after_forward = reshard_after_forward != 1
    unit.keep_within = _subgroup(axes.shard, reshard_after_forward)


def _subgroup(comm: Communicator, size: int) -> Communicator | None:
    if size == comm.size or size == 1:
        return None
    if comm.group is None:
        return None
    cached = _subgroups.setdefault(comm.group, {})
    if size not in cached:
        cached[size] = subgroup(comm, size)
    return cached[size]


# Process groups are expensive; every unit of a model asks for the same few.
_subgroups: weakref.WeakKeyDictionary[dist.ProcessGroup, dict[int, Communicator]] = (
    weakref.WeakKeyDictionary()
)


def _start(unit: ShardUnit) -> Schedule:
    schedule = start_schedule_with(deliver)(unit)
    prepare_first_run(schedule)
    for axes in schedule.axes[:1]:
        for module in unit.modules:
            broadcast_buffers(module, axes)
    return schedule


def register_fsdp_forward_method(module: nn.Module, method_name: str) -> None:
    """Let `module.<method_name>` gather and release parameters as `forward` does.

    Does nothing to a module that is not sharded. Raises `ShardingError` if it has no such method.
    """
    unit = unit_of(module)
    if unit is None:
        return
    method = getattr(module, method_name, None)
    if method is None:
        raise ShardingError(f"{type(module).__name__} does not have a method {method_name!r}")
    hooks = unit.hooks

    @functools.wraps(method)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        args, kwargs = hooks.pre_forward(module, args, kwargs)
        return hooks.post_forward(module, args, method(*args, **kwargs))

    setattr(module, method_name, wrapped)
