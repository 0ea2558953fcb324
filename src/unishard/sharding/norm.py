"""Sums of powers of gradients, from which global norms are made."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from unishard.kernels import squared_norm


def power_sum(shards: Sequence[torch.Tensor], norm_type: float, device: torch.device) -> torch.Tensor:
    """The sum of p-th powers, or the largest element, of `shards`: fp64, no dimensions.

    >>> power_sum([torch.tensor([3.0, 4.0])], 2.0, torch.device("cpu"))
    tensor(25., dtype=torch.float64)
    """
    if norm_type == 2.0 and device.type == "cpu" and all(s.dtype != torch.float64 for s in shards):
        return squared_norm(shards) if shards else torch.zeros((), dtype=torch.float64, device=device)
    total = torch.zeros((), dtype=torch.float64, device=device)
    for shard in shards:
        if shard.numel():
            norm = torch.linalg.vector_norm(shard, norm_type, dtype=torch.float32).double()
            total = join_powers(total, norm if math.isinf(norm_type) else norm**norm_type, norm_type)
    return total


def join_powers(one: torch.Tensor, other: torch.Tensor, norm_type: float) -> torch.Tensor:
    """The `power_sum` of two disjoint parts together."""
    return torch.maximum(one, other) if math.isinf(norm_type) else one + other
