"""`fully_shard`: the code door's entry, light to import. DTensors and torch's FSDP classes come with the first call."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import nn

from unishard.sharding.placement import ZERO3, Sharding

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import Shard


def fully_shard(
    module: Any,
    *,
    mesh: DeviceMesh | None = None,
    sharding: Sharding | str = ZERO3,
    reshard_after_forward: bool | int | None = None,
    shard_placement_fn: Callable[[nn.Parameter], Shard | None] | None = None,
    mp_policy: Any = None,
    offload_policy: Any = None,
    ignored_params: set[nn.Parameter] | None = None,
    dp_mesh_dims: Any = None,
) -> Any:
    """Shard the parameters of `module` that no sharded module below it holds, and return the module.

    The contract is that of `torch.distributed.fsdp.fully_shard`: apply it to blocks first and to the root last; the
    module's class becomes `FSDP<Name>`; its parameters are DTensors between uses. `sharding` adds ZeRO-1, ZeRO-2 and
    plain data parallelism behind the same call.

    Args:
        module: a module, or a list of modules that are gathered as one and run one after another.
        mesh: 1-D (dp_shard) or 2-D (dp_replicate, dp_shard); default: all ranks.
        sharding: a preset or its name.
        reshard_after_forward: release parameters after forward? Default: as the preset says, except for the root. An
            int keeps 1/int of them on each rank of subgroups of that size (ZeRO++ hpZ, arXiv 2306.10209, section 3.2).
        shard_placement_fn: parameter -> `Shard(dim)`, or None for dim 0.
        mp_policy: unishard's or torch's mixed-precision policy.
        offload_policy: `unishard.NVMeOffloadPolicy`, or a `CPUOffloadPolicy` of unishard or torch.
        ignored_params: parameters to leave alone.
        dp_mesh_dims: unishard's or torch's `DataParallelMeshDims`: `mesh` is then the one mesh that all parameters are
            DTensors on, whole along the named dims.

    Raises:
        ShardingError: (a ValueError) for a module sharded twice, a container without forward, a mesh that does not fit.

    >>> block = nn.Linear(4, 4)
    >>> type(fully_shard(block)).__name__
    'FSDPLinear'
    """
    from unishard.sharding.api import shard_modules
    from unishard.sharding.policies import MixedPrecisionPolicy, OffloadPolicy

    return shard_modules(
        module,
        mesh=mesh,
        sharding=sharding,
        reshard_after_forward=reshard_after_forward,
        shard_placement_fn=shard_placement_fn,
        mp_policy=MixedPrecisionPolicy() if mp_policy is None else mp_policy,
        offload_policy=OffloadPolicy() if offload_policy is None else offload_policy,
        ignored_params=ignored_params,
        dp_mesh_dims=dp_mesh_dims,
    )


def _state(module: nn.Module) -> Any:
    """The unit that `fully_shard` made of `module`, or None; `fully_shard.state(module)` as torch's function has it."""
    from unishard.sharding.unit import unit_of

    return unit_of(module)


fully_shard.state = _state  # pyright: ignore[reportFunctionMemberAccess]
