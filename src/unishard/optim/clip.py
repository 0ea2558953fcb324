"""Global gradient norms and clipping, every element counted once whatever the mesh."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from unishard.errors import NonFiniteError, ShardingError
from unishard.kernels import join_powers, power_sum
from unishard.sharding.group import ShardGroup
from unishard.sharding.parameter import is_dtensor, place_of


def check_norm_type(norm_type: float) -> float:
    """A positive number or infinity. Raises `ShardingError` otherwise."""
    value = float(norm_type)
    if not value > 0:
        raise ShardingError(f"norm_type must be positive or infinity, not {norm_type}; the usual norm is 2.0")
    return value


def shard_norm(groups: Sequence[ShardGroup], norm_type: float = 2.0) -> float:
    """The p-norm of all reduced gradients of `groups`: one pass over local shards, one scalar all-reduce an axis.

    Shards are summed along dp_shard alone: replicas hold the same ones. NaN and infinity come through on all ranks.
    """
    total = 0.0
    for axes in dict.fromkeys(g.axes for g in groups):
        members = [g for g in groups if g.axes == axes and g.gradients.shard is not None]
        device = members[0].buffer.device if members else groups[0].buffer.device
        here = [g.gradients.shard for g in members if g.gradients.power is None]
        part = power_sum([shard for shard in here if shard is not None], norm_type, device)
        for group in members:
            if group.gradients.power is not None:
                # Summed when the gradient landed: it rests on a tier now.
                part = join_powers(part, group.gradients.power, norm_type)
        reduced = axes.shard.all_reduce_control(
            part.view(1), "max" if math.isinf(norm_type) else "sum"
        ).item()
        total = max(total, reduced) if math.isinf(norm_type) else total + reduced
        if math.isnan(reduced):
            return math.nan
    return total if math.isinf(norm_type) else total ** (1.0 / norm_type)


def clip_factor(norm: float, max_norm: float) -> float:
    """What to multiply gradients by so that their norm is at most `max_norm`; 0 or less means no clipping.

    >>> clip_factor(norm=4.0, max_norm=1.0)  # doctest: +ELLIPSIS
    0.2499...
    """
    if max_norm <= 0:
        return 1.0
    # The summand is torch's: a norm of zero divides by something. min() lets a NaN norm through as NaN.
    factor = max_norm / (norm + 1e-6)
    return 1.0 if factor > 1.0 else factor


@torch.no_grad()
def clip_grad_norm_(
    parameters: Any,
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
) -> torch.Tensor:
    """Scale gradients in place so that their global norm is at most `max_norm`; return the norm before that.

    Gradients may be plain tensors, DTensors, or both, on different meshes (data, tensor and expert parallelism side by
    side); each element counts once. All ranks call together.

    Args:
        parameters: a tensor or an iterable of tensors whose `.grad` is clipped.
        max_norm: the bound. norm_type: p of the p-norm, may be infinity.
        error_if_nonfinite: raise `NonFiniteError` if the norm is NaN or infinite.
        foreach: accepted as torch's function has it; local tensors are always scaled together.

    >>> weight = torch.nn.Parameter(torch.zeros(2))
    >>> weight.grad = torch.tensor([3.0, 4.0])
    >>> clip_grad_norm_([weight], max_norm=1.0).item()
    5.0
    """
    norm_type = check_norm_type(norm_type)
    params: Iterable[Any] = [parameters] if isinstance(parameters, torch.Tensor) else parameters
    grads = [p.grad for p in params if p.grad is not None]
    norm = _global_norm(grads, norm_type)
    if error_if_nonfinite and not torch.isfinite(norm):
        raise NonFiniteError(
            f"the gradient norm is {norm.item()}; it cannot be clipped. Pass error_if_nonfinite=False to scale anyway"
        )
    factor = (float(max_norm) / (norm + 1e-6)).clamp(max=1.0)
    local = [_local(g) for g in grads if place_of(g) is None]
    for grad in filter(place_of, grads):
        grad.mul_(float(factor))
    for device, dtype in {(t.device, t.dtype) for t in local}:
        members = [t for t in local if t.device == device and t.dtype == dtype and t.numel()]
        if members:
            torch._foreach_mul_(members, factor.to(device=device, dtype=dtype))
    return norm


def _global_norm(grads: Sequence[torch.Tensor], norm_type: float) -> torch.Tensor:
    """Sum p-th powers within each set of mesh axes that shard gradients, reduce over those axes, then join the sets."""
    # Norms and not parts are collected: what rests on a tier is in memory one group at a time.
    by_axes: dict[tuple[Any, ...], list[torch.Tensor]] = {}
    devices: dict[tuple[Any, ...], torch.device] = {}
    meshes: dict[tuple[Any, ...], tuple[Any, tuple[int, ...]]] = {}
    for grad in grads:
        mesh, dims, local = _sharded_dims(grad)
        key = (id(mesh), dims) if dims else ()
        meshes[key] = (mesh, dims)
        devices[key] = local.device
        norms = by_axes.setdefault(key, [])
        if local.numel():
            norms.append(torch.linalg.vector_norm(local, norm_type, dtype=torch.float32))
        del local
    total = torch.zeros((), dtype=torch.float32, device=grads[0].device if grads else None)
    for key, norms in by_axes.items():
        part = torch.zeros((), dtype=torch.float32, device=devices[key])
        if norms:
            stacked = torch.stack(norms)
            part = stacked.max() if math.isinf(norm_type) else (stacked**norm_type).sum()
        mesh, dims = meshes[key]
        part = _reduce(part, mesh, dims, norm_type).to(total.device)
        total = torch.maximum(total, part) if math.isinf(norm_type) else total + part
    return total if math.isinf(norm_type) else total ** (1.0 / norm_type)


def _sharded_dims(grad: Any) -> tuple[Any, tuple[int, ...], torch.Tensor]:
    """The mesh dims over which `grad` is split, and this rank's part; partial sums are completed first."""
    if not is_dtensor(grad):
        return None, (), grad
    from torch.distributed.tensor import Partial, Replicate

    if any(isinstance(p, Partial) for p in grad.placements):
        grad = grad.redistribute(
            placements=[Replicate() if isinstance(p, Partial) else p for p in grad.placements]
        )
    dims = tuple(i for i, p in enumerate(grad.placements) if not isinstance(p, Replicate))
    return grad.device_mesh, dims, (grad if place_of(grad) is None else grad.seen()).to_local()


def _reduce(part: torch.Tensor, mesh: Any, dims: Sequence[int], norm_type: float) -> torch.Tensor:
    from unishard.dist.collectives import communicator

    for dim in dims:
        comm = communicator(mesh.get_group(dim))
        part = comm.all_reduce_control(part.view(1), "max" if math.isinf(norm_type) else "sum").view(())
    return part


def _local(grad: Any) -> torch.Tensor:
    return grad.to_local() if is_dtensor(grad) else grad
