"""Which parameters received a gradient on any rank: an optimizer must leave the others alone, as one process does."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from unishard.dist.mesh import Axes
from unishard.sharding.group import ShardGroup


def agree_on_touched(groups: Sequence[ShardGroup], axes: Axes) -> list[set[int]]:
    """For each group, the indices of parameters used on any rank of `axes`. One all-reduce of a byte a parameter."""
    counts = [len(group.registrations) for group in groups]
    flags = torch.zeros(sum(counts), dtype=torch.uint8)
    start = 0
    for group, count in zip(groups, counts, strict=True):
        for index in group.gradients.touched:
            flags[start + index] = 1
        start += count
    if groups and axes.world_size > 1:
        flags = axes.all_reduce_control(flags.to(groups[0].buffer.device), "max").cpu()
    used = flags.tolist()
    touched, start = [], 0
    for count in counts:
        touched.append({i for i in range(count) if used[start + i]})
        start += count
    return touched
