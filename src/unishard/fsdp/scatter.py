"""A dict that only the first rank has, for all ranks, one tensor at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from unishard.dist.collectives import Communicator


class _Coming(NamedTuple):
    """Stands for a tensor that travels on its own."""

    shape: torch.Size
    dtype: torch.dtype


Keep = Callable[[str, torch.Tensor], Any]
"""Told of each key and its whole tensor: what a rank keeps of it."""


@torch.no_grad()
def from_first_rank(
    values: Mapping[str, Any], axes: Sequence[Communicator], device: torch.device, keep: Keep
) -> dict[str, Any]:
    """The first rank's `values` on every rank of a mesh with `axes`. All ranks call together.

    Tensors of at least one dim are held whole by a rank one after the other only: what stays is what `keep` returns.
    """
    first = all(axis.rank == 0 for axis in axes)
    plan: Any = {key: _announce(value) for key, value in values.items()} if first else None
    for axis in axes:
        plan = axis.broadcast_object(plan)
    found: dict[str, Any] = {}
    for key, value in plan.items():
        if isinstance(value, _Coming):
            whole = values[key].detach().to(device).contiguous() if first else _room(value, device)
            for axis in axes:
                axis.broadcast(whole)
            value = keep(key, whole)
        found[key] = value
    return found


def _room(value: _Coming, device: torch.device) -> torch.Tensor:
    return torch.empty(value.shape, dtype=value.dtype, device=device)


def _announce(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return _Coming(value.shape, value.dtype) if value.dim() else value.detach().cpu()
    return value
