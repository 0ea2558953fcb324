"""The only builder of device meshes, and the reading of a mesh as data-parallel axes."""

from __future__ import annotations

import atexit
import os
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from unishard.dist.collectives import SOLO, Communicator, communicator
from unishard.errors import ShardingError

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


@dataclass(frozen=True)
class Axes:
    """The two data-parallel axes: states are sharded along `shard` and copied along `replicate`."""

    shard: Communicator
    replicate: Communicator

    @property
    def world_size(self) -> int:
        """Data-parallel size: what gradients are averaged over."""
        return self.shard.size * self.replicate.size

    def all_reduce_control(self, tensor: torch.Tensor, reduce: str = "sum") -> torch.Tensor:
        """Reduce a small tensor over both axes."""
        return self.replicate.all_reduce_control(self.shard.all_reduce_control(tensor, reduce), reduce)

    def broadcast(self, tensor: torch.Tensor) -> None:
        """Copy `tensor` from the first rank of the mesh to all, in place."""
        # Down the first column, then along every row: after both each rank has rank (0, 0)'s values.
        self.replicate.broadcast(tensor)
        self.shard.broadcast(tensor)


def ensure_process_group(device: torch.device | None = None) -> None:
    """Create the default process group when there is none, from the launcher's environment or for one rank."""
    if dist.is_initialized():
        return
    backend = "nccl" if device is not None and device.type == "cuda" else "gloo"
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        dist.init_process_group(backend)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    leave_process_group_at_exit()


def leave_process_group_at_exit() -> None:
    """Destroy the default process group when the interpreter ends, if it still exists then."""
    atexit.register(_destroy_process_group)


def _destroy_process_group() -> None:
    if dist.is_initialized():
        if dist.get_backend() == "gloo":
            # gloo's threads may still be handling the last message; destroying under them aborts the interpreter.
            time.sleep(0.3)
        dist.destroy_process_group()


def build_mesh(device_type: str, *, dp_shard: int | None = None, dp_replicate: int = 1) -> DeviceMesh:
    """A mesh over the whole world: (dp_shard,) or, with replicas, (dp_replicate, dp_shard).

    Raises `ShardingError` if the product of the sizes is not the world size.
    """
    from torch.distributed.device_mesh import init_device_mesh

    world = dist.get_world_size()
    shard = dp_shard if dp_shard is not None else max(world // dp_replicate, 1)
    if shard < 1 or dp_replicate < 1 or shard * dp_replicate != world:
        raise ShardingError(
            f"mesh dp_replicate={dp_replicate} x dp_shard={shard} needs {shard * dp_replicate} ranks, but the world "
            f"has {world}; choose sizes whose product is {world}"
        )
    if dp_replicate == 1:
        return init_device_mesh(device_type, (shard,), mesh_dim_names=("dp_shard",))
    return init_device_mesh(device_type, (dp_replicate, shard), mesh_dim_names=("dp_replicate", "dp_shard"))


def axes_of(mesh: DeviceMesh, *, replicate_only: bool = False) -> Axes:
    """Read a 1-D mesh as (shard,) and a 2-D mesh as (replicate, shard).

    `replicate_only` keeps whole copies along every dimension (NO_SHARD). Raises `ShardingError` on other meshes.
    """
    if mesh.ndim not in (1, 2):
        raise ShardingError(
            f"a data-parallel mesh has 1 dimension (shard) or 2 (replicate, shard), not {mesh.ndim}; pass "
            "the sub-mesh, for example mesh['dp_replicate', 'dp_shard']"
        )
    if mesh.get_coordinate() is None:
        raise ShardingError(
            f"rank {dist.get_rank()} is not part of the mesh {mesh}; call this on the mesh's ranks only"
        )
    last = communicator(mesh.get_group(mesh.ndim - 1))
    first = communicator(mesh.get_group(0)) if mesh.ndim == 2 else SOLO
    if not replicate_only:
        return Axes(shard=last, replicate=first)
    if mesh.ndim == 2:
        raise ShardingError(
            "NO_SHARD takes a 1-D mesh: every rank is a replica; flatten it (mesh._flatten()) or pass no mesh"
        )
    return Axes(shard=SOLO, replicate=last)


def subgroup(comm: Communicator, size: int) -> Communicator:
    """Split `comm` into consecutive runs of `size` ranks and return this rank's run.

    Every rank of `comm` calls this together. Raises `ShardingError` unless `size` divides the axis.
    """
    if size == comm.size:
        return comm
    if size < 1 or comm.size % size:
        raise ShardingError(
            f"cannot split {comm.size} ranks into groups of {size}; choose a divisor of {comm.size}"
        )
    if size == 1 or comm.group is None:
        return SOLO
    members = dist.get_process_group_ranks(comm.group)
    start = comm.rank // size * size
    # Local synchronization: other rows of a 2-D mesh create theirs without this row.
    group = dist.new_group(members[start : start + size], use_local_synchronization=True)
    return communicator(group)  # pyright: ignore[reportArgumentType]
