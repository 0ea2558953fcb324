"""One parameter's states, whole: masters, gradients and optimizer states rest as shards, and users look at all of one.

A diagnostic path: it costs an all-reduce for each parameter asked for.
"""

from __future__ import annotations

from math import prod
from typing import NamedTuple

import torch

from unishard.errors import ShardingError
from unishard.sharding.group import ShardGroup
from unishard.sharding.unit import all_units


class ParameterHome(NamedTuple):
    """Where a parameter lives: number `index` of `group`."""

    group: ShardGroup
    index: int

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the whole parameter."""
        return tuple(self.group.buffer.layout.shapes[self.index])

    def local(self, flat: torch.Tensor) -> torch.Tensor:
        """This rank's part of the parameter in `flat`, laid out like the group's shard; a view, perhaps empty."""
        return self.group.buffer.local(self.index, flat)


def home_of(param: torch.Tensor) -> ParameterHome | None:
    """Where `param`, as users see it, lives; `None` if it is not sharded here."""
    for unit in all_units():
        for group in unit.groups:
            for index, registration in enumerate(group.registrations):
                if registration.visible is param or registration.whole is param:
                    return ParameterHome(group, index)
    return None


def require_home(param: torch.Tensor) -> ParameterHome:
    """As `home_of`; raises `ShardingError` for a parameter that is not sharded here."""
    home = home_of(param)
    if home is None:
        raise ShardingError(
            f"a parameter of shape {tuple(param.shape)} is not part of a sharded model; pass a parameter of the model "
            "that initialize() returned"
        )
    return home


@torch.no_grad()
def whole_state(home: ParameterHome, local: torch.Tensor) -> torch.Tensor:
    """The whole of what `local` is this rank's part of: fresh, in the parameter's shape and `local`'s dtype.

    `local` is 1-D. All ranks of the group call together.
    """
    comm = home.group.axes.shard
    whole = local.new_zeros(prod(home.shape))
    start = _start(home)
    whole[start : start + local.numel()].copy_(local)
    comm.all_reduce(whole, label=home.group.name).wait()
    comm.drain()
    return whole.view(home.shape)


@torch.no_grad()
def write_state(home: ParameterHome, local: torch.Tensor, value: torch.Tensor) -> None:
    """Put this rank's part of `value`, a whole tensor of the parameter's shape, into `local`."""
    if tuple(value.shape) != home.shape:
        raise ShardingError(
            f"{home.group.registrations[home.index].fqn}: a value of shape {tuple(value.shape)} does not fit the "
            f"parameter's shape {home.shape}"
        )
    start = _start(home)
    local.copy_(value.reshape(-1)[start : start + local.numel()])


def _start(home: ParameterHome) -> int:
    """Where this rank's part begins in the flattened parameter."""
    spans = home.group.buffer.shard_spans(home.group.axes.shard.rank)
    if spans is None:
        raise ShardingError(
            f"{home.group.name}: parts are not contiguous here; use full_tensor() of the parameter"
        )
    return next((start for index, start, _, _ in spans if index == home.index), 0)
