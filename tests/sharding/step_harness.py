"""Train a small model through the core of either door, with plain SGD, and alone in one process."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from unishard import fully_shard
from unishard.dist.mesh import axes_of, build_mesh
from unishard.sharding.build import ShardPlan
from unishard.sharding.in_place import shard_in_place
from unishard.sharding.placement import PRESETS
from unishard.sharding.precision import MixedPrecision

LR = 0.1
Micro = Callable[[nn.Module, Tensor], Tensor | None]
"""Runs one micro-batch up to its loss; backward follows unless it returns None (then it called backward itself)."""


def inputs_for(rank: int, step: int, width: int = 6) -> Tensor:
    """One more sample in odd steps: models may tell steps apart by it, on all ranks alike."""
    return torch.randn(4 + step % 2, width, generator=torch.Generator().manual_seed(100 * rank + step))


def train_alone(model: nn.Module, micro: Micro, steps: int, world: int) -> dict[str, Tensor]:
    """The reference: every rank's batch through one model, losses averaged over ranks."""
    for step in range(steps):
        for rank in range(world):
            loss = micro(model, inputs_for(rank, step))
            if loss is not None:
                loss.backward()
        with torch.no_grad():
            for param in model.parameters():
                if param.grad is not None:
                    param -= LR * param.grad / world
                param.grad = None
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def train_config(
    model: nn.Module, micro: Micro, steps: int, preset: str, units: Sequence[str]
) -> dict[str, Tensor]:
    sharding = PRESETS[preset]
    axes = axes_of(build_mesh("cpu"), replicate_only=not sharding.sharded_anywhere)
    names = {id(p): name for name, p in model.named_parameters()}
    plan = ShardPlan(sharding, axes, MixedPrecision(), torch.device("cpu"))
    sharded = shard_in_place(model, plan, [(u, model.get_submodule(u)) for u in units])
    for step in range(steps):
        loss = micro(model, inputs_for(dist.get_rank(), step))
        if loss is not None:
            loss.backward()
        for group in sharded.groups:
            if group.gradients.shard is not None:
                with torch.no_grad():
                    group.buffer.shard -= LR * group.gradients.shard
            group.gradients.clear()
            group.refresh()
            group.wait() if group.resident else None
    result = {}
    for group in sharded.groups:
        group.unshard()
        group.wait()
        for registration in group.registrations:
            result[names[id(registration.visible)]] = registration.whole.detach().clone()
        group.reshard()
    return result


def train_code(
    model: nn.Module, micro: Micro, steps: int, preset: str, units: Sequence[str]
) -> dict[str, Tensor]:
    for unit in units:
        fully_shard(model.get_submodule(unit), sharding=preset)
    fully_shard(model, sharding=preset)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    for step in range(steps):
        loss = micro(model, inputs_for(dist.get_rank(), step))
        if loss is not None:
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name: full(p) for name, p in model.named_parameters()}


def full(param: Any) -> Tensor:
    return param.detach().full_tensor().clone()


TRAIN = {"config": train_config, "code": train_code}


def check_parity(
    build: Callable[[], nn.Module],
    micro: Micro,
    units: Sequence[str],
    *,
    presets: Sequence[str] = ("NO_SHARD", "ZERO1", "ZERO2", "SHARD_GRAD_OP", "ZERO3"),
    doors: Sequence[str] = ("config", "code"),
    steps: int = 3,
    tolerance: float = 2e-5,
) -> None:
    """Raise unless every preset through every door ends with the weights of one process (relative L2 of the update)."""
    torch.manual_seed(7)
    initial = build()
    before = {name: p.detach().clone() for name, p in initial.named_parameters()}
    expected = train_alone(copy.deepcopy(initial), micro, steps, dist.get_world_size())
    for preset in presets:
        for door in doors:
            torch.manual_seed(
                7 + dist.get_rank()
            )  # other ranks start elsewhere and must get rank 0's weights
            found = TRAIN[door](build(), micro, steps, preset, units)
            assert set(found) == set(expected), (preset, door)
            wanted = {name: value - before[name] for name, value in expected.items()}
            error = {name: found[name] - before[name] - value for name, value in wanted.items()}
            for name, value in wanted.items():
                # Rounding of the weights themselves shows in small updates; a wrong gradient shows far more.
                bound = 2e-3 * value.norm() + 1e-7
                assert error[name].norm() <= bound, (
                    f"{preset} {door} {name}: {error[name].norm() / value.norm():.1e}"
                )
            relative = _norm(error.values()) / _norm(wanted.values())
            assert relative <= tolerance, f"{preset} {door}: {relative:.1e}"


def _norm(tensors: Iterable[Tensor]) -> Tensor:
    return torch.stack([t.double().pow(2).sum() for t in tensors]).sum().sqrt()
