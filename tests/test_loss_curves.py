"""A hundred steps: each preset's loss stays within 0.5 % of DDP's at each step, in fp32, through both doors."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import unishard
from unishard.sharding.placement import PRESETS
from unishard.testing.models import TinyTransformer

STEPS, RATE, BOUND = 100, 3e-3, 0.005
FLAT = [name for name, preset in PRESETS.items() if not preset.needs_replicas]


def batch(step: int) -> tuple[Tensor, Tensor]:
    """A text that can be learnt: each token is a fixed function of the one before, with a little noise."""
    draw = torch.Generator().manual_seed(1000 * step + dist.get_rank())
    tokens = [torch.randint(37, (8,), generator=draw)]
    for _ in range(7):
        noise = torch.randint(2, (8,), generator=draw)
        tokens.append((5 * tokens[-1] + 3 + noise) % 37)
    text = torch.stack(tokens, dim=1)
    return text[:, :-1], text[:, 1:]


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


def mean_over_ranks(losses: list[Tensor]) -> Tensor:
    total = torch.stack(losses)
    dist.all_reduce(total)
    return total / dist.get_world_size()


def plain_loop(model: nn.Module) -> list[Tensor]:
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=RATE), []
    for step in range(STEPS):
        inputs, targets = batch(step)
        loss = cross_entropy(model(inputs), targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return losses


def code_door(model: TinyTransformer, preset: str) -> list[Tensor]:
    for unit in [*model.blocks, model]:
        unishard.fully_shard(unit, sharding=preset)
    return plain_loop(model)


def config_door(model: TinyTransformer, preset: str) -> list[Tensor]:
    config = {
        "train_micro_batch_size_per_gpu": 8,
        "sharding": preset,
        "optimizer": {"type": "AdamW", "params": {"lr": RATE, "weight_decay": 0.01}},
    }
    engine, losses = unishard.initialize(model=model, config=config).engine, []
    for step in range(STEPS):
        inputs, targets = batch(step)
        loss = cross_entropy(engine(inputs), targets)
        engine.backward(loss)
        engine.step()
        losses.append(loss.detach())
    return losses


DOORS: dict[str, Callable[[TinyTransformer, str], list[Tensor]]] = {"config": config_door, "code": code_door}


def curves(door: str) -> None:
    torch.manual_seed(0)
    initial = TinyTransformer(width=16)
    reference = mean_over_ranks(plain_loop(DistributedDataParallel(copy.deepcopy(initial))))
    assert reference[-1] < 0.5 * reference[0], "the curve must fall, or it tells nothing"
    for preset in FLAT:
        found = mean_over_ranks(DOORS[door](copy.deepcopy(initial), preset))
        deviation = ((found - reference).abs() / reference).max().item()
        assert deviation <= BOUND, f"{door} {preset}: {deviation:.2%} off DDP's loss at some step"


@pytest.mark.slow
@pytest.mark.parametrize("door", list(DOORS))
def test_a_hundred_steps_follow_ddp(door: str, ranks: Callable[..., Any]) -> None:
    ranks(curves, door, world_size=2, timeout=240)
