"""`optimizer_in_backward`: the same updates, and gradients that never exist beyond a group or two."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tests.sharding.step_harness import inputs_for
from tests.sharding.test_step import Stack
from torch import Tensor, nn

import unishard
from unishard.errors import StateError
from unishard.sharding.gradient import GroupGradients
from unishard.testing.transport import through_sockets

Ranks = Callable[..., Any]
PRESETS = ["NO_SHARD", "ZERO1", "ZERO2", "SHARD_GRAD_OP", "ZERO3"]


class Sometimes(nn.Module):
    """A branch that only the second rank takes in the second step, and nobody in the third."""

    def __init__(self) -> None:
        super().__init__()
        self.stack = Stack()
        self.branch = nn.Linear(6, 6)
        self.step = 0

    def forward(self, x: Tensor) -> Tensor:
        out = self.stack(x)
        taken = self.step < 3 or (self.step < 6 and dist.get_rank() == 1)
        self.step += 1
        return out + (self.branch(x).sum() if taken else 0.0)


def train(preset: str, in_backward: bool, optimizer: str, dtype: str) -> tuple[list[Tensor], list[float]]:
    torch.manual_seed(0)
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": 3,
        "sharding": preset,
        "optimizer": {"type": optimizer, "params": {"lr": 1e-2, "eps": 1e-3}},
        "optimizer_in_backward": in_backward,
    }
    if dtype != "fp32":
        config[dtype] = {"enabled": True}
    engine = unishard.initialize(model=Sometimes(), config=config).engine
    norms = []
    for step in range(9):
        engine.backward(engine(inputs_for(dist.get_rank(), step)).pow(2).mean())
        engine.step()
        if engine.was_step_applied():
            norms.append(engine.get_global_grad_norm())
    with unishard.gather(engine.module):
        weights = [p.detach().clone() for p in engine.module.parameters()]
    return weights, norms


def same_updates(preset: str, transport: str) -> None:
    with through_sockets() if transport == "sockets" else nullcontext():
        for optimizer, dtype in (("AdamW", "fp32"), ("torch.optim.RMSprop", "fp32"), ("AdamW", "bf16")):
            expected, norms = train(preset, False, optimizer, dtype)
            found, found_norms = train(preset, True, optimizer, dtype)
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)
            assert found_norms == pytest.approx(norms, rel=1e-6)


@pytest.mark.parametrize("transport", ["memory", "sockets"])
@pytest.mark.parametrize("preset", PRESETS)
def test_updates_and_norms_are_the_same(preset: str, transport: str, ranks: Ranks) -> None:
    ranks(same_updates, preset, transport)


def most_shards(in_backward: bool) -> int:
    """Most groups whose reduced gradient was alive at once, when groups are not coalesced."""
    from unishard.sharding import group as group_module

    small, group_module.COALESCE_BYTES = group_module.COALESCE_BYTES, 1
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "optimizer": {"type": "AdamW", "params": {}},
        "zero_optimization": {"stage": 3},
        "optimizer_in_backward": in_backward,
    }
    engine = unishard.initialize(model=Stack(depth=6), config=config).engine
    most, target = 0, GroupGradients.target

    def note(self: GroupGradients) -> Any:
        nonlocal most
        found = target(self)
        most = max(most, sum(g.gradients.shard is not None for g in engine.schedule.groups))
        return found

    GroupGradients.target = note
    try:
        for step in range(2):
            engine.backward(engine(inputs_for(dist.get_rank(), step)).sum())
            engine.step()
    finally:
        GroupGradients.target, group_module.COALESCE_BYTES = target, small
    return most


def test_gradients_live_for_one_group_at_a_time(ranks: Ranks) -> None:
    assert ranks(most_shards, True) == [1, 1]
    assert ranks(most_shards, False) == [7, 7]


def token_sums() -> None:
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "optimizer": {"type": "AdamW", "params": {}},
        "optimizer_in_backward": True,
    }
    engine = unishard.initialize(model=Stack(), config=config).engine
    with pytest.raises(StateError, match=r"tokens=.*optimizer_in_backward does not wait"):
        engine.backward(engine(inputs_for(0, 0)).sum(), tokens=3)


def test_token_sums_are_refused(ranks: Ranks) -> None:
    ranks(token_sums, world_size=1)
