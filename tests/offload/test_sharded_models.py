"""Activations offloaded and recomputed under sharding, through both doors: same losses, and no parameter travels."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import nn

WIDTH, BATCH = 64, 2


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.tanh(self.up(x)))


class Model(nn.Module):
    def __init__(self, recompute: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.recompute = recompute

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        from unishard import checkpointing

        x = x.requires_grad_()
        for block in self.blocks:
            x = checkpointing.checkpoint(block, x) if self.recompute else block(x)
        return x.square().mean()


def train(door: str, way: str) -> tuple[list[float], int]:
    import unishard
    from unishard.checkpointing import settings
    from unishard.offload import offload_activations

    torch.manual_seed(0)
    model: Any = Model(recompute=way == "recomputed")
    losses, sent = [], 0
    if door == "config":
        config = {
            "train_micro_batch_size_per_gpu": BATCH,
            "zero_optimization": {"stage": 3},
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-2}},
            "activation_checkpointing": {"cpu_checkpointing": True},
        }
        model = unishard.initialize(model=model, config=config).engine
        optimizer = None
    else:
        for block in model.blocks:
            unishard.fully_shard(block)
        unishard.fully_shard(model)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    try:
        for step in range(3):
            x = torch.randn(BATCH, WIDTH, generator=torch.Generator().manual_seed(step))
            with offload_activations(min_bytes=512) if way == "offloaded" else nullcontext() as store:
                loss = model(x)
            losses.append(loss.item())
            if optimizer is None:
                model.backward(loss)
                model.step()
            else:
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
            sent += store.offloaded_bytes if store is not None else 0
    finally:
        settings._current = None
    return losses, sent


@pytest.mark.parametrize("door", ["config", "code"])
def test_same_losses_and_no_parameter_travels(ranks: Callable[..., Any], door: str) -> None:
    plain = ranks(train, door, "plain", world_size=2)
    for way in ("offloaded", "recomputed"):
        for (expected, _), (losses, sent) in zip(plain, ranks(train, door, way, world_size=2), strict=True):
            assert losses == pytest.approx(expected, rel=1e-6)
            assert losses[2] < losses[0]
            if way == "offloaded":
                # In each block its input (saved once) and the result of tanh, in three steps.
                assert sent == 3 * 3 * BATCH * (WIDTH + 4 * WIDTH) * 4
