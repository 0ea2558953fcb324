"""`gather`: a while in which sharded parameters are plain whole tensors, to read or to change."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from unishard.dist.mesh import Axes
from unishard.errors import ShardingError, StateError
from unishard.sharding.group import WEIGHTS, ShardGroup
from unishard.sharding.schedule import in_backward
from unishard.sharding.single import SingleShard, single_of
from unishard.sharding.unit import Phase, all_units, units_under


@contextmanager
def gather(params: Any, modifier_rank: int | None = None, enabled: bool = True) -> Iterator[None]:
    """Make whole parameters of `params` inside the block. All ranks enter together.

    Through the config door the same `Parameter` objects hold whole tensors; through the code door the modules show
    plain parameters. Memory for every group that holds one of `params` is needed at once.

    Args:
        params: a module, a parameter, or parameters (sharded or whole).
        modifier_rank: the data-parallel rank whose changes everybody takes over on leaving. With `None`, changes to
            sharded parameters are dropped; parameters that rest whole (NO_SHARD, ZERO1, ZERO2 through the config door)
            are the real ones, and what is written to them stays on this rank: do not.
        enabled: `False` makes this do nothing.

    Raises:
        StateError: during backward. ShardingError: `modifier_rank` is not a rank of the mesh.

    >>> model = nn.Linear(2, 2)
    >>> with gather(model, modifier_rank=0):
    ...     _ = model.weight.data.fill_(1.0)
    """
    if not isinstance(params, nn.Module | torch.Tensor):
        params = list(params)
    groups = _groups(params) if enabled else []
    if groups and (
        in_backward() or any(u.phase is not Phase.RESTING for u in all_units() if _holds(u, groups))
    ):
        raise StateError(
            "gather() during forward or backward; enter it before forward, or after backward has returned"
        )
    for group in groups:
        _check_rank(group, modifier_rank)
    singles = _singles(params) if enabled else []
    for param, single in singles:
        single.reopen(param)
    # Inside another gather() of the same parameters, that one takes care of them.
    before = [(group, group.shown_whole, group.held) for group in groups]
    users: list[int] = []
    for group in groups:
        group.unshard()
    for group in groups:
        group.wait()
        group.axes.shard.drain()
        group.held = True
        users.append(group.buffer.users)
    try:
        yield
    finally:
        for param, single in singles:
            if modifier_rank is not None:
                broadcast_from(param.data, single.axes, modifier_rank)
                single.close(param)
            else:
                single.drop(param)
        for (group, was_whole, was_held), sharing in zip(before, users, strict=True):
            group.held = was_held
            if modifier_rank is not None:
                _take_over(group, modifier_rank)
            if was_whole:
                continue
            if not group.resident and group.buffer.users > sharing:
                # Somebody keeps a state dict, or `param.detach()`: those values are theirs.
                group.part_with_memory()
            group.reshard()


def _groups(params: Any) -> list[ShardGroup]:
    if isinstance(params, nn.Module):
        return [group for unit in units_under(params) for group in unit.groups]
    items: Iterable[Any] = [params] if isinstance(params, torch.Tensor) else params
    wanted = {id(p) for p in items}
    return [
        group
        for unit in all_units()
        for group in unit.groups
        if any(id(r.visible) in wanted or id(r.whole) in wanted for r in group.registrations)
    ]


def _singles(params: Any) -> list[tuple[nn.Parameter, SingleShard]]:
    """Parameters that `init_sharded` released and no group has taken yet."""
    items: list[Any] = [params] if isinstance(params, torch.Tensor) else list(_parameters(params))
    found = [(p, single_of(p)) for p in items]
    return [(p, single) for p, single in found if single is not None]


def _parameters(params: Any) -> Iterable[Any]:
    return params.parameters() if isinstance(params, nn.Module) else params


def _holds(unit: Any, groups: list[ShardGroup]) -> bool:
    return any(group in groups for group in unit.groups)


def _check_rank(group: ShardGroup, rank: int | None) -> None:
    if rank is not None and not 0 <= rank < group.axes.world_size:
        raise ShardingError(
            f"gather: modifier_rank={rank} is not one of the {group.axes.world_size} ranks of {group.name}"
        )


@torch.no_grad()
def _take_over(group: ShardGroup, rank: int) -> None:
    """Give every rank what `rank` wrote, and carry it into the shards."""
    broadcast_from(group.buffer.full, group.axes, rank)
    with group.in_memory(WEIGHTS, changed=True):
        group.buffer.absorb()
    torch.autograd.graph.increment_version([group.buffer.shard])
    if group.resident:
        group.mark_current()
    else:
        group.forget_secondary()


def broadcast_from(tensor: torch.Tensor, axes: Axes, rank: int) -> None:
    """Copy data-parallel rank `rank`'s `tensor` to all ranks of the mesh."""
    row, column = divmod(rank, axes.shard.size)
    # Along the row of `rank` first; from there every column gets it.
    if axes.replicate.rank == row:
        axes.shard.broadcast(tensor, column)
    axes.replicate.broadcast(tensor, row)
