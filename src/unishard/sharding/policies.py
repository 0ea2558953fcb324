"""FSDP2's policy objects under their usual names; torch's own instances are accepted wherever these are."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch

from unishard.errors import ShardingError
from unishard.sharding.placement import Placement, Sharding
from unishard.sharding.ports import ON_DEVICE, Tiers
from unishard.sharding.precision import MixedPrecision


@dataclass(frozen=True)
class MixedPrecisionPolicy:
    """Dtypes of a sharded module, with the fields and defaults of `torch.distributed.fsdp.MixedPrecisionPolicy`.

    `None` keeps the parameter's own dtype; `reduce_dtype` then follows `param_dtype`. Parameters rest, and gradients
    accumulate, in the dtype that the parameters were created with.

    >>> MixedPrecisionPolicy(param_dtype=torch.bfloat16).cast_forward_inputs
    True
    """

    param_dtype: torch.dtype | None = None
    reduce_dtype: torch.dtype | None = None
    output_dtype: torch.dtype | None = None
    cast_forward_inputs: bool = True


@dataclass(frozen=True)
class OffloadPolicy:
    """Nothing is offloaded."""


@runtime_checkable
class TierPolicy(Protocol):
    """An offload policy that says itself where states rest, such as `unishard.NVMeOffloadPolicy`."""

    def open_tiers(self, device: torch.device) -> Tiers:
        """The same tiers for equal policies, as long as somebody uses them."""
        ...


@dataclass(frozen=True)
class DataParallelMeshDims:
    """Which dims of one mesh for everything are data-parallel, as `torch.distributed.fsdp.DataParallelMeshDims`.

    Each is a dim name or several names, which are then flattened into one: states are sharded along `shard` and
    copied along `replicate`.

    >>> DataParallelMeshDims(shard=("dp_shard", "cp")).shard_names
    ('dp_shard', 'cp')
    """

    shard: str | tuple[str, ...] | None = None
    replicate: str | tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if self.shard is None and self.replicate is None:
            raise ShardingError(
                "At least one of shard or replicate must name a mesh dim, for example "
                'DataParallelMeshDims(shard="dp_shard")'
            )

    @property
    def shard_names(self) -> tuple[str, ...]:
        return _names(self.shard)

    @property
    def replicate_names(self) -> tuple[str, ...]:
        return _names(self.replicate)


def _names(dims: str | tuple[str, ...] | None) -> tuple[str, ...]:
    if dims is None:
        return ()
    return (dims,) if isinstance(dims, str) else tuple(dims)


def as_mesh_dims(dims: Any) -> DataParallelMeshDims:
    """Read unishard's or torch's object. Raises `ShardingError` for anything else."""
    try:
        return DataParallelMeshDims(shard=dims.shard, replicate=dims.replicate)
    except AttributeError:
        raise ShardingError(
            f"dp_mesh_dims={dims!r} does not name mesh dims; pass unishard.DataParallelMeshDims(shard=...) with one or "
            "more names of mesh_dim_names"
        ) from None


def as_mixed_precision(policy: Any) -> MixedPrecision:
    """Read unishard's or torch's policy object. Raises `ShardingError` for anything else."""
    if isinstance(policy, MixedPrecision):
        return policy
    try:
        return MixedPrecision(
            param_dtype=policy.param_dtype,
            reduce_dtype=policy.reduce_dtype,
            output_dtype=policy.output_dtype,
            cast_forward_inputs=policy.cast_forward_inputs,
        )
    except AttributeError as missing:
        raise ShardingError(
            f"mp_policy={policy!r} is not a mixed-precision policy ({missing}); pass unishard.MixedPrecisionPolicy or "
            "torch.distributed.fsdp.MixedPrecisionPolicy"
        ) from None


def tiers_of(policy: Any, device: torch.device, sharding: Sharding) -> Tiers:
    """Open the tiers that an offload policy asks for; on a CPU, states in host memory are where they would be anyway.

    Raises `ShardingError` for what is no policy or does not go with `sharding`, `OffloadError` for a tier that fails to
    open.
    """
    if type(policy).__name__ == "CPUOffloadPolicy" and not isinstance(policy, TierPolicy):
        # Torch's. Tiers lie above sharding, which knows the policy by its public name only.
        policy = importlib.import_module("unishard").CPUOffloadPolicy(pin_memory=policy.pin_memory)
    if isinstance(policy, TierPolicy):
        tiers = policy.open_tiers(device)
        if tiers.parameter is not None and sharding.parameter is Placement.REPLICATE:
            raise ShardingError(
                f"offload_policy={policy!r} with {sharding}: every rank computes with parameters that it holds whole "
                "between steps; pass parameters=False, or use sharding=ZERO3 or SHARD_GRAD_OP"
            )
        return tiers
    if type(policy).__name__ != "OffloadPolicy":
        raise ShardingError(
            f"offload_policy={policy!r} is unknown; pass unishard.NVMeOffloadPolicy, CPUOffloadPolicy or OffloadPolicy"
        )
    return ON_DEVICE
