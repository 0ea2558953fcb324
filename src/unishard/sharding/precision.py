"""Dtypes of parameters, gradients, buffers and outputs, and the casts at module boundaries."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree as pytree

from unishard.errors import ShardingError

_NAMES = {
    "fp32": torch.float32, "float32": torch.float32, "float": torch.float32,
    "bf16": torch.bfloat16, "bfloat16": torch.bfloat16,
    "fp16": torch.float16, "float16": torch.float16, "half": torch.float16,
    "fp64": torch.float64, "float64": torch.float64, "double": torch.float64,
}  # fmt: skip


def as_dtype(name: str | torch.dtype) -> torch.dtype:
    """A floating dtype by any of its usual names. Raises `ShardingError` for others.

    >>> as_dtype("bf16")
    torch.bfloat16
    """
    if isinstance(name, torch.dtype):
        if not name.is_floating_point:
            raise ShardingError(f"{name} is not a floating dtype; use float32, bfloat16 or float16")
        return name
    found = _NAMES.get(str(name).lower().removeprefix("torch."))
    if found is None:
        raise ShardingError(f"unknown dtype {name!r}; use one of {', '.join(_NAMES)}")
    return found


@dataclass(frozen=True)
class MixedPrecision:
    """Which dtype each state computes, travels and accumulates in; `None` keeps the parameter's own.

    - `param_dtype`: gathered parameters and compute. - `reduce_dtype`: gradients on the wire (sums are fp32).
    - `grad_dtype`: gradients at rest between micro-batches. - `master_dtype`: parameters at rest, what the optimizer
    updates. - `output_dtype`: floating outputs of the module. - `cast_forward_inputs`: cast floating inputs to
    `param_dtype`.

    >>> MixedPrecision(param_dtype=torch.bfloat16, reduce_dtype=torch.float32).param_dtype
    torch.bfloat16
    """

    param_dtype: torch.dtype | None = None
    reduce_dtype: torch.dtype | None = None
    grad_dtype: torch.dtype | None = None
    master_dtype: torch.dtype | None = None
    output_dtype: torch.dtype | None = None
    cast_forward_inputs: bool = True

    def __post_init__(self) -> None:
        for name in ("param_dtype", "reduce_dtype", "grad_dtype", "master_dtype", "output_dtype"):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, torch.dtype) and value.is_floating_point):
                raise ShardingError(
                    f"MixedPrecision.{name} must be a floating torch.dtype or None, not {value!r}"
                )


@dataclass(frozen=True)
class GroupPrecision:
    """A policy resolved for one group: no `None` left."""

    compute: torch.dtype
    reduce: torch.dtype
    grad: torch.dtype
    master: torch.dtype


def resolve_precision(policy: MixedPrecision, original: torch.dtype) -> GroupPrecision:
    """Fill the gaps of `policy` for parameters of dtype `original`.

    Integer parameters, and quantized ones (floats of a byte and less), keep theirs throughout.
    """
    if not original.is_floating_point or original.itemsize == 1:
        return GroupPrecision(original, original, original, original)
    compute = policy.param_dtype or original
    master = policy.master_dtype or original
    return GroupPrecision(compute, policy.reduce_dtype or compute, policy.grad_dtype or master, master)


def cast_floating(tree: Any, dtype: torch.dtype | None) -> Any:
    """Cast every floating tensor in a tree of arguments to `dtype`; everything else passes unchanged."""
    if dtype is None:
        return tree

    def cast(leaf: Any) -> Any:
        if isinstance(leaf, torch.Tensor) and leaf.is_floating_point() and leaf.dtype != dtype:
            return leaf.to(dtype)
        return leaf

    return pytree.tree_map(cast, tree)
