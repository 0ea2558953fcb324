"""torch's state dict helpers on our modules: whatever ran before, whole or sharded, from one rank or all."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions
from torch.distributed.checkpoint.state_dict import get_state_dict as torchs_get
from torch.distributed.checkpoint.state_dict import set_state_dict as torchs_set
from torch.distributed.tensor import DTensor

import unishard
from unishard import checkpoint
from unishard.errors import UnsupportedError
from unishard.fsdp import FSDP
from unishard.fsdp.wrap import ModuleWrapPolicy
from unishard.testing.models import Block, tied_transformer

Ranks = Callable[..., Any]


def build(door: str, seed: int = 0) -> tuple[Any, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model: Any = tied_transformer()
    model.positions.requires_grad_(False)
    if door == "FSDP":
        model = FSDP(model, auto_wrap_policy=ModuleWrapPolicy({Block}))
    else:
        from torch.distributed.fsdp import fully_shard as torchs

        shard: Any = torchs if door == "torch" else unishard.fully_shard
        for block in model.blocks:
            shard(block)
        shard(model)
    return model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)


def train(model: Any, optimizer: torch.optim.Optimizer, steps: range) -> list[float]:
    losses = []
    for step in steps:
        batch = tied_transformer().example_batch(step, 2)  # the same on all ranks
        loss = tied_transformer().loss(model(batch.inputs), batch.targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def writes(folder: str, door: str) -> list[float]:
    model, optimizer = build(door)
    train(model, optimizer, range(3))
    with torch.no_grad():
        model(tied_transformer().example_batch(0, 2).inputs)  # leaves the outermost module whole
    state, optim = checkpoint.get_state_dict(model, optimizer)
    assert all(isinstance(value, DTensor) for value in state.values())
    unishard.checkpoint.save({"model": state, "optim": optim}, folder)
    return train(model, optimizer, range(3, 6))


def continues(folder: str, door: str) -> list[float]:
    model, optimizer = build(door, seed=7)
    train(model, optimizer, range(1))
    get, put = (
        (torchs_get, torchs_set)
        if door == "torch"
        else (checkpoint.get_state_dict, checkpoint.set_state_dict)
    )
    state, optim = get(model, optimizer)
    content: Any = {"model": state, "optim": optim}
    if door == "torch":
        dcp.load(content, checkpoint_id=folder)
    else:
        checkpoint.load(content, folder)
    report = put(model, optimizer, model_state_dict=content["model"], optim_state_dict=content["optim"])
    assert not any(report)
    return train(model, optimizer, range(3, 6))


@pytest.mark.parametrize("door", ["fully_shard", "FSDP"])
def test_saved_on_two_ranks_and_loaded_on_others(door: str, tmp_path: Any, ranks: Ranks) -> None:
    folder = str(tmp_path / "one")
    expected = ranks(writes, folder, door)[0]
    for reader, count in ((door, 3), (door, 1), ("torch", 3)):
        for losses in ranks(continues, folder, reader, world_size=count):
            assert losses == pytest.approx(expected, rel=1e-5), (reader, count)


def options(door: str) -> None:
    model, optimizer = build(door)
    train(model, optimizer, range(2))
    with torch.no_grad():
        model(tied_transformer().example_batch(0, 2).inputs)
    everywhere = StateDictOptions(full_state_dict=True)
    first = checkpoint.StateDictOptions(full_state_dict=True, cpu_offload=True, broadcast_from_rank0=True)
    whole, whole_optim = checkpoint.get_state_dict(model, optimizer, options=everywhere)
    assert {type(value) for value in whole.values()} == {torch.Tensor}
    state = checkpoint.get_model_state_dict(
        model, options=StateDictOptions(full_state_dict=True, cpu_offload=True)
    )
    optim = checkpoint.get_optimizer_state_dict(
        model, optimizer, options=StateDictOptions(full_state_dict=True, cpu_offload=True)
    )
    assert bool(state) == bool(optim) == (dist.get_rank() == 0)
    if door == "FSDP":
        with pytest.raises(UnsupportedError, match="select entries by name"):
            checkpoint.get_model_state_dict(model, submodules={model.blocks})
    else:
        blocks = checkpoint.get_model_state_dict(model, submodules={model.blocks})
        assert len(blocks) == 24
    # As torch's, they alias what training changes.
    copied, whole_optim = copy.deepcopy((whole, whole_optim))
    state, optim = copy.deepcopy((state, optim))
    moments = whole_optim["state"]["norm.bias"]["exp_avg"].clone()
    expected = train(model, optimizer, range(2, 4))
    for given, given_optim, how in ((copied, whole_optim, everywhere), (state, optim, first)):
        twin, other = build(door, seed=7)
        report = checkpoint.set_state_dict(
            twin, other, model_state_dict=given, optim_state_dict=given_optim, options=how
        )
        assert not any(report)
        found = other.state[dict(twin.named_parameters())["norm.bias"]]["exp_avg"]
        torch.testing.assert_close(found.full_tensor(), moments)
        assert train(twin, other, range(2, 4)) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("door", ["fully_shard", "FSDP"])
def test_whole_values_and_the_first_ranks(door: str, ranks: Ranks) -> None:
    ranks(options, door)


def engines() -> None:
    config = {"train_micro_batch_size_per_gpu": 1, "optimizer": {"type": "AdamW", "params": {}}}
    for stage in (1, 3):
        engine = unishard.initialize(
            model=nn.Linear(4, 4), config={**config, "zero_optimization": {"stage": stage}}
        ).engine
        with pytest.raises(UnsupportedError, match=r"belongs to an engine.*use engine.save_checkpoint"):
            checkpoint.get_model_state_dict(engine.module)


def test_engines_save_themselves(ranks: Ranks) -> None:
    ranks(engines)


def test_the_package_is_loaded_when_it_is_touched() -> None:
    code = (
        "import sys, unishard; assert 'unishard.checkpoint' not in sys.modules; unishard.checkpoint.save; "
        "assert 'torch.distributed.tensor' not in sys.modules; "
        "assert 'torch.distributed.checkpoint.state_dict' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
