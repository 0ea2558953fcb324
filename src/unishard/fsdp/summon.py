"""`summon_full_params`: a while in which modules show whole plain parameters where they rest."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from unishard.errors import StateError, UnsupportedError
from unishard.fsdp.state_dict import cut_like
from unishard.sharding.dtensor import ShardedParameter, sharded_parameters
from unishard.sharding.group import ShardGroup
from unishard.sharding.schedule import in_backward
from unishard.sharding.unit import Phase, ShardUnit

Shown = list[tuple[ShardedParameter, nn.Parameter]]


@contextmanager
def summoned(
    units: Sequence[ShardUnit], writeback: bool, rank0_only: bool, offload_to_cpu: bool, with_grads: bool
) -> Iterator[None]:
    """See `FullyShardedDataParallel.summon_full_params`."""
    if writeback and rank0_only:
        raise UnsupportedError(
            "summon_full_params(writeback=True, rank0_only=True) is not available; pass writeback=False, or let rank 0 "
            "write inside `with unishard.gather(model, modifier_rank=0):`"
        )
    groups = [group for unit in units for group in unit.groups]
    _check(units, groups)
    shown: list[tuple[ShardGroup, Shown]] = []
    try:
        for group in groups:
            group.reshard()
            made = [(r, _whole(r, offload_to_cpu, with_grads)) for r in sharded_parameters(group)]
            if not rank0_only or (group.axes.shard.rank == 0 and group.axes.replicate.rank == 0):
                shown.append((group, made))
                for registration, whole in made:
                    registration.rest_as(whole)
        yield
        for group, members in shown if writeback else ():
            _write_back(group, members, with_grads)
    finally:
        for _, members in shown:
            for registration, whole in members:
                registration.sharded.requires_grad_(whole.requires_grad)
                registration.rest_as(None)


def _check(units: Sequence[ShardUnit], groups: Sequence[ShardGroup]) -> None:
    if in_backward() or any(unit.phase is not Phase.RESTING for unit in units):
        raise StateError(
            "summon_full_params() during forward or backward; enter it before forward, or after backward has returned"
        )
    for group in groups:
        if any(r.resting is not r.sharded for r in sharded_parameters(group)):
            raise StateError(
                f"summon_full_params() inside summon_full_params(): {group.name} is whole already; leave the outer "
                "block, or enter it with recurse=False"
            )


@torch.no_grad()
def _whole(registration: ShardedParameter, offload_to_cpu: bool, with_grads: bool) -> nn.Parameter:
    sharded: Any = registration.sharded
    whole = nn.Parameter(_fresh(sharded, offload_to_cpu), requires_grad=sharded.requires_grad)
    if with_grads and sharded.grad is not None:
        if whole.dtype != sharded.grad.dtype:
            whole.grad_dtype = sharded.grad.dtype  # pyright: ignore[reportAttributeAccessIssue]
        whole.grad = _fresh(sharded.grad, offload_to_cpu)
    return whole


def _fresh(value: Any, offload_to_cpu: bool) -> torch.Tensor:
    """The whole of a DTensor in memory of its own."""
    full = value.detach().full_tensor()
    if offload_to_cpu and full.device.type != "cpu":
        return full.cpu()
    return full.clone() if full.data_ptr() == value.to_local().data_ptr() else full


@torch.no_grad()
def _write_back(group: ShardGroup, members: Shown, with_grads: bool) -> None:
    replicas = group.axes.replicate
    for registration, whole in members:
        target: Any = registration.sharded
        target.to_local().copy_(cut_like(target, whole.detach()).to_local())
        if with_grads and target.grad is not None and whole.grad is not None:
            grad = target.grad.to_local()
            grad.copy_(cut_like(target.grad, whole.grad).to_local())
            if replicas.size > 1:
                replicas.broadcast(grad)
    # Each rank keeps its own part, but copies of a part must not come apart.
    replicas.broadcast(group.buffer.shard)
    torch.autograd.graph.increment_version([group.buffer.shard])
    group.forget_gathered()
