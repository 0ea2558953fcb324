"""A model that nobody refers to any more is gone, with its shards."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import nn

import unishard
from unishard.sharding.unit import all_units


def model() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))


def config_door(preset: str) -> weakref.ref[nn.Module]:
    net = model()
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "sharding": preset,
        "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
    }
    engine, *_ = unishard.initialize(model=net, config=config)
    for _ in range(2):
        engine.backward(engine(torch.ones(1, 4)).sum())
        engine.step()
    return weakref.ref(net)


def code_door(preset: str) -> weakref.ref[nn.Module]:
    net = model()
    unishard.fully_shard(net[0], sharding=preset)
    unishard.fully_shard(net, sharding=preset)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for _ in range(2):
        net(torch.ones(1, 4)).sum().backward()
        optimizer.step()
    return weakref.ref(net)


def survives(door: str, preset: str) -> tuple[bool, int]:
    before = len(list(all_units()))
    left = (config_door if door == "config" else code_door)(preset)
    gc.collect()
    return left() is not None, len(list(all_units())) - before


@pytest.mark.parametrize("preset", ["NO_SHARD", "ZERO1", "ZERO2", "SHARD_GRAD_OP", "ZERO3"])
@pytest.mark.parametrize("door", ["config", "code"])
def test_a_dropped_model_is_collected(ranks, door, preset):
    assert ranks(survives, door, preset) == [(False, 0)] * 2
