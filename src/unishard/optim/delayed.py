"""The one-step delayed update: gradients of one step are applied while the next step computes with the old parameters.

Ren et al. 2021, "ZeRO-Offload: Democratizing Billion-Scale Model Training", section 5.2. Here the update of a group
runs in the next backward, when no rank computes with the group any more: until then all parameters are those before
the update, and no second copy of them is kept.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.optim import Optimizer

from unishard.sharding.group import ShardGroup

Options = Sequence[Mapping[str, Any]]
"""Of each parameter group of an optimizer, everything but its parameters."""


@dataclass
class DelayedUpdate:
    """An update whose gradients wait in `group.gradients.aside`."""

    waiting: dict[ShardGroup, Set[int]]
    """Groups that are not updated yet, each with the parameters that are to be."""
    factor: float
    """Of the gradients: unscales and clips."""
    options: Options
    """As they were when the update was due; a scheduler has moved on since."""
    carried_out: list[ShardGroup] = field(default_factory=list)


def options_of(optimizer: Optimizer) -> Options:
    """What the optimizer's parameter groups say now."""
    return [
        {name: _kept(value) for name, value in group.items() if name != "params"}
        for group in optimizer.param_groups
    ]


def _kept(value: Any) -> Any:
    """Schedulers write into a learning rate that is a tensor."""
    return value.clone() if isinstance(value, torch.Tensor) else value


@contextmanager
def options_shown(optimizer: Optimizer, options: Options) -> Iterator[None]:
    """The optimizer's parameter groups say `options` inside the block, and afterwards what they said before.

    >>> optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.5)
    >>> earlier = options_of(optimizer)
    >>> optimizer.param_groups[0]["lr"] = 0.25
    >>> with options_shown(optimizer, earlier):
    ...     optimizer.param_groups[0]["lr"]
    0.5
    >>> optimizer.param_groups[0]["lr"]
    0.25
    """
    current = [{name: group[name] for name in group if name != "params"} for group in optimizer.param_groups]
    _set(optimizer, options)
    try:
        yield
    finally:
        _set(optimizer, current)


def _set(optimizer: Optimizer, options: Options) -> None:
    for group, said in zip(optimizer.param_groups, options, strict=True):
        group.update(said)
