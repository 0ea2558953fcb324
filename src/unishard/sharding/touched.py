"""Which parameters received a gradient on any rank: an optimizer must leave the others alone, as one process does."""

from __future__ import annotations

from collections.abc import Sequence, Set
from functools import lru_cache
from itertools import accumulate

import torch

from unishard.dist.mesh import Axes
from unishard.sharding.group import ShardGroup


def agree_on_touched(groups: Sequence[ShardGroup], axes: Axes) -> list[Set[int]]:
    """For each group, the indices of parameters used on any rank of `axes`. One all-reduce of a byte a parameter."""
    counts = [len(group.registrations) for group in groups]
    flags = torch.zeros(sum(counts), dtype=torch.uint8, device="cpu")
    start = 0
    for group, count in zip(groups, counts, strict=True):
        touched = group.gradients.touched
        if len(touched) == count:
            flags[start : start + count] = 1
        else:
            flags[[start + index for index in touched]] = 1
        start += count
    if groups and axes.world_size > 1:
        flags = axes.all_reduce_control(flags.to(groups[0].buffer.device), "max").cpu()
    if bool(flags.all()):
        return [range_set(count) for count in counts]
    used = flags.tolist()
    starts = [0, *accumulate(counts)]
    return [{i for i in range(n) if used[s + i]} for n, s in zip(counts, starts, strict=False)]


@lru_cache(maxsize=1024)
def range_set(count: int) -> frozenset[int]:
    """Every parameter of a group of `count`."""
    return frozenset(range(count))
