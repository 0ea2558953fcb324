"""FSDP1's option objects under their usual names, and their reading as unishard's. torch's own are accepted too."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Enum, auto
from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from unishard.errors import ShardingError, UnsupportedError
from unishard.sharding import placement, precision
from unishard.sharding.placement import Sharding

log = logging.getLogger("unishard")


class ShardingStrategy(Enum):
    """FSDP1's strategies. `SHARD_GRAD_OP` keeps parameters sharded between steps; ZeRO-2 keeps them whole."""

    FULL_SHARD = auto()
    SHARD_GRAD_OP = auto()
    NO_SHARD = auto()
    HYBRID_SHARD = auto()
    _HYBRID_SHARD_ZERO2 = auto()


class BackwardPrefetch(Enum):
    """When backward gathers the next unit: before its own gradients (`PRE`), or after (`POST`: less memory)."""

    BACKWARD_PRE = auto()
    BACKWARD_POST = auto()


@dataclass(frozen=True)
class MixedPrecision:
    """FSDP1's dtypes. Parameters rest, and the optimizer updates them, in the dtype they were created with.

    - `param_dtype`: compute. - `reduce_dtype`: gradients on the wire (default: `param_dtype`); sums are fp32.
    - `buffer_dtype`: floating buffers, cast when the module is wrapped. - `keep_low_precision_grads`: leave gradients
    in `reduce_dtype` for an optimizer that can use them. - `cast_forward_inputs`, `cast_root_forward_inputs`: whether
    floating inputs become `param_dtype`, for wrapped modules inside another and for the outermost one.
    - `_module_classes_to_ignore`: with an `auto_wrap_policy`, modules of these classes compute in full precision.
    Outputs keep the dtype they were computed in.

    >>> MixedPrecision(param_dtype=torch.bfloat16).cast_root_forward_inputs
    True
    """

    param_dtype: torch.dtype | None = None
    reduce_dtype: torch.dtype | None = None
    buffer_dtype: torch.dtype | None = None
    keep_low_precision_grads: bool = False
    cast_forward_inputs: bool = False
    cast_root_forward_inputs: bool = True
    _module_classes_to_ignore: Sequence[type[nn.Module]] = (_BatchNorm,)

    def __post_init__(self) -> None:
        for name in ("param_dtype", "reduce_dtype", "buffer_dtype"):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, torch.dtype) and value.is_floating_point):
                raise ShardingError(f"MixedPrecision.{name} must be a floating torch.dtype, not {value!r}")


@dataclass(frozen=True)
class CPUOffload:
    """Whether sharded parameters, and with them gradients and optimizer state, rest in host memory."""

    offload_params: bool = False


_SHARDINGS: dict[ShardingStrategy, Sharding] = {
    ShardingStrategy.FULL_SHARD: placement.FULL_SHARD,
    ShardingStrategy.SHARD_GRAD_OP: placement.SHARD_GRAD_OP,
    ShardingStrategy.NO_SHARD: placement.NO_SHARD,
    ShardingStrategy.HYBRID_SHARD: placement.HYBRID_SHARD,
    ShardingStrategy._HYBRID_SHARD_ZERO2: placement.HYBRID_SHARD_GRAD_OP,
}

_E = TypeVar("_E", bound=Enum)


def _member(kind: type[_E], argument: str, value: Any) -> _E:
    """A member of `kind` by itself, by its name, or by torch's member of that name."""
    name = value if isinstance(value, str) else getattr(value, "name", None)
    found = kind.__members__.get(name) if isinstance(name, str) else None
    if found is None:
        raise ShardingError(
            f"FSDP: {argument}={value!r} is not one of {', '.join(f'{kind.__name__}.{n}' for n in kind.__members__)}"
        )
    return found


def as_strategy(value: Any) -> ShardingStrategy:
    """Read a strategy; `None` means FULL_SHARD. Raises `ShardingError`.

    >>> as_strategy("NO_SHARD")
    <ShardingStrategy.NO_SHARD: 3>
    """
    return (
        ShardingStrategy.FULL_SHARD
        if value is None
        else _member(ShardingStrategy, "sharding_strategy", value)
    )


def sharding_of(strategy: ShardingStrategy) -> Sharding:
    """The preset behind a strategy."""
    return _SHARDINGS[strategy]


def as_backward_prefetch(value: Any) -> BackwardPrefetch | None:
    """Read a prefetch mode; `None` means no prefetch in backward. Raises `ShardingError`."""
    return None if value is None else _member(BackwardPrefetch, "backward_prefetch", value)


def as_mixed_precision(value: Any) -> MixedPrecision | None:
    """Read unishard's or torch's FSDP1 policy object. Raises `ShardingError` for anything else."""
    if value is None or isinstance(value, MixedPrecision):
        return value
    try:
        return MixedPrecision(
            param_dtype=value.param_dtype,
            reduce_dtype=value.reduce_dtype,
            buffer_dtype=value.buffer_dtype,
            keep_low_precision_grads=value.keep_low_precision_grads,
            cast_forward_inputs=value.cast_forward_inputs,
            cast_root_forward_inputs=value.cast_root_forward_inputs,
            _module_classes_to_ignore=value._module_classes_to_ignore,
        )
    except AttributeError as missing:
        raise ShardingError(
            f"FSDP: mixed_precision={value!r} is not a MixedPrecision ({missing}); pass unishard.fsdp.MixedPrecision or"
            " torch.distributed.fsdp.MixedPrecision"
        ) from None


def core_precision(policy: MixedPrecision | None, *, outermost: bool) -> precision.MixedPrecision:
    """The core's dtypes for one wrapped module."""
    if policy is None:
        return precision.MixedPrecision()
    reduce_dtype = policy.reduce_dtype or policy.param_dtype
    return precision.MixedPrecision(
        param_dtype=policy.param_dtype,
        reduce_dtype=reduce_dtype,
        grad_dtype=reduce_dtype if policy.keep_low_precision_grads else None,
        cast_forward_inputs=policy.cast_root_forward_inputs if outermost else policy.cast_forward_inputs,
    )


def full_precision_island(policy: MixedPrecision) -> precision.MixedPrecision:
    """Dtypes of a module that computes in fp32 between others in `policy.param_dtype`."""
    return precision.MixedPrecision(
        param_dtype=torch.float32, reduce_dtype=torch.float32, output_dtype=policy.param_dtype
    )


def check_offload(value: Any, device: torch.device) -> None:
    """Raise unless parameters may stay where they are. On a CPU, offloaded and not is the same."""
    if value is None:
        return
    offload = getattr(value, "offload_params", None)
    if not isinstance(offload, bool):
        raise ShardingError(
            f"FSDP: cpu_offload={value!r} is not a CPUOffload; pass CPUOffload(offload_params=...)"
        )
    if offload and device.type != "cpu":
        raise UnsupportedError(
            f"FSDP: cpu_offload=CPUOffload(offload_params=True) on {device.type}: flat parameters are not offloaded in "
            "this version; use unishard.fully_shard(module, offload_policy=unishard.CPUOffloadPolicy())"
        )
    if offload:
        log.info(
            "unishard: CPUOffload(offload_params=True) changes nothing: parameters are in host memory already"
        )


@dataclass(frozen=True)
class Settings:
    """What one wrapped module was asked for, with every option read."""

    strategy: ShardingStrategy
    mixed_precision: MixedPrecision | None
    cpu_offload: Any
    backward_prefetch: BackwardPrefetch | None
    param_init_fn: Any

    def __deepcopy__(self, memo: dict[int, Any]) -> Settings:
        return self

    def override(self, changes: dict[str, Any]) -> Settings:
        """With the constructor arguments a `CustomPolicy` returned for one module. Raises `UnsupportedError`."""
        readers = {
            "sharding_strategy": ("strategy", as_strategy),
            "mixed_precision": ("mixed_precision", as_mixed_precision),
            "cpu_offload": ("cpu_offload", lambda value: value),
            "backward_prefetch": ("backward_prefetch", as_backward_prefetch),
            "param_init_fn": ("param_init_fn", lambda value: value),
        }
        unknown = [key for key in changes if key not in readers and key not in _COMMON]
        if unknown:
            raise UnsupportedError(
                f"FSDP: a policy asked for {', '.join(unknown)} on one module; a policy can set "
                f"{', '.join(readers)}. Wrap that module by hand first, with its own arguments"
            )
        read = {readers[k][0]: readers[k][1](v) for k, v in changes.items() if k in readers}
        return replace(self, **read)


# Arguments that mean nothing for one module alone: torch's scripts repeat them in a policy's dict.
_COMMON = (
    "use_orig_params",
    "limit_all_gathers",
    "forward_prefetch",
    "sync_module_states",
    "auto_wrap_policy",
)
