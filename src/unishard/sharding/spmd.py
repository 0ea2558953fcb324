"""One mesh for everything: data-parallel dims picked by name out of the mesh that all parameters live on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.placement_types import Placement

from unishard.errors import ShardingError
from unishard.sharding.parameter import ParameterRecord, is_dtensor
from unishard.sharding.policies import DataParallelMeshDims


@dataclass(frozen=True)
class WholeMesh:
    """The mesh that parameters are DTensors on, and which of its dims are data-parallel."""

    mesh: DeviceMesh
    dims: DataParallelMeshDims

    def __post_init__(self) -> None:
        names = self.mesh.mesh_dim_names
        if names is None:
            raise ShardingError(
                f"dp_mesh_dims={self.dims} names dims of a mesh without names; build it with mesh_dim_names="
            )
        for name in (*self.dims.shard_names, *self.dims.replicate_names):
            if name not in names:
                raise ShardingError(
                    f"dp_mesh_dims: {name!r} not found in mesh.mesh_dim_names {names}; use one of these"
                )

    @property
    def data_parallel(self) -> frozenset[int]:
        """Dims along which our own reduction averages gradients."""
        return frozenset(map(self._index, (*self.dims.shard_names, *self.dims.replicate_names)))

    def data_parallel_mesh(self) -> DeviceMesh:
        """(shard,), (replicate, shard), or (replicate,) if nothing is sharded; several names become one dim."""
        parts = [self._flat(names) for names in (self.dims.replicate_names, self.dims.shard_names) if names]
        return parts[0] if len(parts) == 1 else DeviceMesh._concatenate(parts)

    def _flat(self, names: tuple[str, ...]) -> DeviceMesh:
        return self.mesh[names[0]] if len(names) == 1 else self.mesh[names]._flatten("_".join(names))

    def _index(self, name: str) -> int:
        return (self.mesh.mesh_dim_names or ()).index(name)

    def spec(
        self, record: ParameterRecord, data_parallel: DeviceMesh, dim: int
    ) -> tuple[DeviceMesh, tuple[Placement, ...]]:
        """Where the sharded parameter lives. Raises `ShardingError` for one that is not whole along our dims."""
        param = self._checked(record)
        placements: list[Placement] = list(param.placements)
        for name in self.dims.shard_names:
            placements[self._index(name)] = self._chunks(placements, self._index(name), dim)
        if len(self.dims.shard_names) <= 1:
            return self.mesh, tuple(placements)
        return self._with_flat_shard_dim(placements, data_parallel)

    def _checked(self, record: ParameterRecord) -> Any:
        param: Any = record.param
        if not is_dtensor(param):
            raise ShardingError(
                f"{record.fqn}: with dp_mesh_dims all parameters must be DTensors on mesh={self.mesh}, and this one is "
                "plain; call torch.distributed.tensor.distribute_module(model, mesh) first"
            )
        # Equal, not identical: DTensor's caches hand out the first of several equal meshes.
        if param.device_mesh != self.mesh:
            raise ShardingError(
                f"{record.fqn} lives on {param.device_mesh}, and fully_shard was given {self.mesh}; distribute and "
                "shard on the same mesh"
            )
        for index in self.data_parallel:
            if not isinstance(param.placements[index], Replicate):
                raise ShardingError(
                    f"{record.fqn}: Expected Replicate() along data-parallel dim {self.mesh.mesh_dim_names[index]!r}, "  # pyright: ignore[reportOptionalSubscript]
                    f"not {param.placements[index]}; fully_shard is what cuts parameters along it"
                )
        return param

    def _chunks(self, placements: list[Placement], index: int, dim: int) -> Placement:
        """`Shard(dim)`, interleaved with the pieces that later dims of the mesh cut from the same dim."""
        from torch.distributed.tensor.placement_types import _StridedShard

        pieces = 1
        for later in range(index + 1, self.mesh.ndim):
            placement = placements[later]
            named = self.mesh.mesh_dim_names[later] in self.dims.shard_names  # pyright: ignore[reportOptionalSubscript]
            if not named and isinstance(placement, Shard | _StridedShard) and placement.dim == dim:
                pieces *= self.mesh.size(later)
        return _StridedShard(dim, split_factor=pieces) if pieces > 1 else Shard(dim)

    def _with_flat_shard_dim(
        self, placements: list[Placement], data_parallel: DeviceMesh
    ) -> tuple[DeviceMesh, tuple[Placement, ...]]:
        """The data-parallel mesh in the place of the first shard dim; every other dim as it was."""
        parts: list[DeviceMesh] = []
        kept: list[Placement] = []
        for index, name in enumerate(self.mesh.mesh_dim_names or ()):
            if name == self.dims.shard_names[0]:
                parts.append(data_parallel)
                kept += [*([Replicate()] if data_parallel.ndim == 2 else []), placements[index]]
            elif index not in self.data_parallel:
                parts.append(self.mesh[name])
                kept.append(placements[index])
        return parts[0] if len(parts) == 1 else DeviceMesh._concatenate(parts), tuple(kept)
