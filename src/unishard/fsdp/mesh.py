"""From FSDP1's `process_group`, `device_mesh` and `device_id` to a device mesh."""

from __future__ import annotations

import os
import weakref
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from unishard.dist.collectives import communicator
from unishard.dist.mesh import ensure_process_group
from unishard.errors import ShardingError
from unishard.sharding.placement import Sharding

_AXES = ("dp_replicate", "dp_shard")


def compute_device(device_id: Any, device_mesh: DeviceMesh | None, process_group: Any) -> torch.device:
    """Where the model computes: `device_id` if given, else what the mesh or the process group communicates.

    Raises `ShardingError` for a device this host does not have.
    """
    if device_id is not None:
        return _named_device(device_id)
    if device_mesh is not None:
        kind = device_mesh.device_type
    else:
        group = process_group[0] if isinstance(process_group, tuple | list) else process_group
        kind = _kind_of(group if isinstance(group, dist.ProcessGroup) else None)
    return torch.device("cuda", torch.cuda.current_device()) if kind == "cuda" else torch.device(kind)


def _kind_of(group: dist.ProcessGroup | None) -> str:
    if not dist.is_initialized():
        return "cuda" if torch.cuda.is_available() else "cpu"
    return "cuda" if "nccl" in str(dist.get_backend(group)).lower() else "cpu"


def _named_device(device_id: Any) -> torch.device:
    if isinstance(device_id, bool) or not isinstance(device_id, int | str | torch.device):
        raise ShardingError(f"FSDP: device_id={device_id!r} is neither an index nor a torch.device")
    device = torch.device("cuda", device_id) if isinstance(device_id, int) else torch.device(device_id)
    if device.type == "cpu":
        return device
    count = torch.cuda.device_count() if device.type == "cuda" else 0
    if (device.index or 0) >= count:
        raise ShardingError(
            f"FSDP: device_id={device_id!r} names {device}, but this host has {count or 'no'} CUDA device"
            f"{'' if count == 1 else 's'}; on a CPU leave device_id out or pass torch.device('cpu')"
        )
    return torch.device("cuda", torch.cuda.current_device()) if device.index is None else device


def build_fsdp_mesh(
    sharding: Sharding, process_group: Any, device_mesh: DeviceMesh | None, device: torch.device
) -> DeviceMesh:
    """A 1-D mesh (dp_shard), or 2-D (dp_replicate, dp_shard) for a hybrid strategy. All ranks call together.

    Raises `ShardingError` for groups or meshes that do not fit the strategy.
    """
    if process_group is not None and device_mesh is not None:
        raise ShardingError(
            "FSDP: process_group and device_mesh were both given; pass one, usually device_mesh"
        )
    if device_mesh is not None:
        return _checked(sharding, device_mesh)
    ensure_process_group(device)
    hybrid = sharding.needs_replicas
    if process_group is None:
        size = _ranks_per_node() if hybrid else dist.get_world_size()
        return _cached(
            dist.group.WORLD, (device.type, hybrid, size), lambda: _world_mesh(hybrid, size, device)
        )
    if isinstance(process_group, tuple | list):
        if not hybrid or len(process_group) != 2:
            raise ShardingError(
                f"FSDP: process_group is a tuple of {len(process_group)}; {sharding} takes "
                f"{'(shard group, replicate group)' if hybrid else 'one group'}"
            )
        shard, replicate = process_group
        for group in (shard, replicate):
            _require_group(group)
        return _cached(shard, (device.type, id(replicate)), lambda: _mesh_of_pair(shard, replicate, device))
    _require_group(process_group)
    if hybrid:
        raise ShardingError(
            f"FSDP: {sharding} needs two groups; pass process_group=(shard group, replicate group), or a device_mesh"
        )
    name = _AXES[1:]
    return _cached(
        process_group,
        device.type,
        lambda: DeviceMesh.from_group(process_group, device.type, mesh_dim_names=name),
    )


def _require_group(group: Any) -> None:
    if not isinstance(group, dist.ProcessGroup):
        raise ShardingError(
            f"FSDP: process_group={group!r} is not a ProcessGroup that this rank belongs to; make one with "
            "torch.distributed.new_group, or pass device_mesh"
        )


def _checked(sharding: Sharding, mesh: Any) -> DeviceMesh:
    if not isinstance(mesh, DeviceMesh):
        raise ShardingError(
            f"FSDP: device_mesh={mesh!r} is not a DeviceMesh; build one with init_device_mesh"
        )
    wanted = 2 if sharding.needs_replicas else 1
    if mesh.ndim != wanted:
        axes = "(dp_replicate, dp_shard)" if wanted == 2 else "(dp_shard,), or the sub-mesh of a larger one,"
        raise ShardingError(
            f"FSDP: {sharding} takes a {wanted}-D device_mesh {axes} not one of {mesh.ndim} dimensions; for a 2-D mesh "
            "use ShardingStrategy.HYBRID_SHARD"
        )
    return mesh


def _ranks_per_node() -> int:
    world = dist.get_world_size()
    local = os.environ.get("LOCAL_WORLD_SIZE")
    if local is None:
        raise ShardingError(
            "FSDP: a hybrid strategy shards within a node, but LOCAL_WORLD_SIZE is not set; launch with torchrun, or "
            'pass device_mesh=init_device_mesh(device, (replicas, shards), mesh_dim_names=("dp_replicate", "dp_shard"))'
        )
    size = int(local)
    if size < 1 or world % size:
        raise ShardingError(
            f"FSDP: a hybrid strategy shards within nodes of LOCAL_WORLD_SIZE={size} ranks, which does not divide the "
            f"{world} ranks; pass a 2-D device_mesh"
        )
    return size


def _world_mesh(hybrid: bool, size: int, device: torch.device) -> DeviceMesh:
    if hybrid:
        return init_device_mesh(device.type, (dist.get_world_size() // size, size), mesh_dim_names=_AXES)
    return init_device_mesh(device.type, (size,), mesh_dim_names=_AXES[1:])


def _mesh_of_pair(shard: dist.ProcessGroup, replicate: dist.ProcessGroup, device: torch.device) -> DeviceMesh:
    """Rows of the mesh are shard groups; each rank learns the others' rows from its replicas."""
    rows = communicator(replicate).all_gather_object(dist.get_process_group_ranks(shard))
    return DeviceMesh.from_group([replicate, shard], device.type, torch.tensor(rows), mesh_dim_names=_AXES)


# Modules wrapped one by one ask for the same mesh; process groups are expensive, and units share what they agree on.
_meshes: weakref.WeakKeyDictionary[Any, dict[Any, DeviceMesh]] = weakref.WeakKeyDictionary()


def _cached(group: Any, key: Any, build: Any) -> DeviceMesh:
    known = _meshes.setdefault(group, {})
    if key not in known:
        known[key] = build()
    return known[key]
