from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from unishard.errors import StateError, UnsupportedError
from unishard.fsdp import FSDP, MixedPrecision, ShardingStrategy
from unishard.fsdp.wrap import ModuleWrapPolicy
from unishard.testing.models import Block, TinyTransformer

STRATEGIES = [ShardingStrategy.FULL_SHARD, ShardingStrategy.SHARD_GRAD_OP, ShardingStrategy.NO_SHARD]
BF16 = MixedPrecision(torch.bfloat16)


def wrapped(**options: Any) -> Any:
    torch.manual_seed(0)
    return FSDP(TinyTransformer(), auto_wrap_policy=ModuleWrapPolicy({Block}), **options)


def case_read_and_write(strategy: ShardingStrategy, mixed: MixedPrecision | None) -> None:
    model = wrapped(sharding_strategy=strategy, mixed_precision=mixed)
    batch = model.example_batch(dist.get_rank(), 2)
    model.loss(model(batch.inputs), batch.targets).backward()
    before = model.state_dict()
    with FSDP.summon_full_params(model, with_grads=True):
        weight = model.blocks[0].up.weight
        assert type(weight) is nn.Parameter
        assert weight.shape == weight.grad.shape == (48, 12)
        assert torch.equal(weight, before["blocks.0.up.weight"]), "in full precision"
        assert [n for n, _ in model.named_parameters()] == list(before)
        with torch.no_grad():
            weight.add_(1.0)
            weight.grad.fill_(3.0)
        assert torch.equal(model.state_dict()["blocks.0.up.weight"], before["blocks.0.up.weight"] + 1)
    assert isinstance(model.blocks[0].up.weight, DTensor)
    assert torch.equal(model.blocks[0].up.weight.grad.full_tensor(), torch.full((48, 12), 3.0))
    after = model.state_dict()
    assert torch.equal(after["blocks.0.up.weight"], before["blocks.0.up.weight"] + 1)
    assert torch.equal(after["head.weight"], before["head.weight"])
    alone = TinyTransformer()
    alone.load_state_dict(after)
    tolerance = {} if mixed is None else {"rtol": 0.1, "atol": 0.1}
    torch.testing.assert_close(model(batch.inputs).float(), alone(batch.inputs), **tolerance)


@pytest.mark.parametrize("mixed", [None, BF16])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_read_and_write(ranks, strategy, mixed):
    ranks(case_read_and_write, strategy, mixed)


def case_options() -> None:
    model = wrapped()
    before = model.state_dict()
    with FSDP.summon_full_params(model, writeback=False), torch.no_grad():
        model.head.weight.zero_()
    assert torch.equal(model.state_dict()["head.weight"], before["head.weight"])
    with FSDP.summon_full_params(model, recurse=False, offload_to_cpu=True):
        assert type(model.head.weight) is nn.Parameter
        assert isinstance(model.blocks[0].up.weight, DTensor)
    with FSDP.summon_full_params(model, writeback=False, rank0_only=True):
        assert isinstance(model.head.weight, DTensor) == (dist.get_rank() > 0)
    with FSDP.summon_full_params(model.blocks[0]):
        assert type(model.blocks[0].up.weight) is nn.Parameter
        assert isinstance(model.head.weight, DTensor)
    with FSDP.summon_full_params(model):
        model.load_state_dict({name: value + 1 for name, value in before.items()})
    assert torch.equal(model.state_dict()["head.weight"], before["head.weight"] + 1)
    with pytest.raises(ZeroDivisionError), FSDP.summon_full_params(model):
        _ = 1 / 0
    assert isinstance(model.head.weight, DTensor)


def test_options(ranks):
    ranks(case_options)


def case_forward_inside() -> None:
    """Generation loops summon the root so that methods may use its parameters outside forward."""
    model = wrapped()
    ids = model.example_batch(0, 2).inputs
    expected = model(ids).detach()
    with torch.no_grad(), FSDP.summon_full_params(model, recurse=False, writeback=False):
        for _ in range(2):
            torch.testing.assert_close(model(ids), expected)
            assert type(model.head.weight) is nn.Parameter
            assert model.head(torch.zeros(1, 12)).shape == (1, 37)


def test_forward_inside(ranks):
    ranks(case_forward_inside)


def case_ranks_write_differently(strategy: ShardingStrategy) -> torch.Tensor:
    """Each rank keeps its part; copies of a part never come apart."""
    model = wrapped(sharding_strategy=strategy)
    model.apply(
        lambda m: nn.init.constant_(m.weight, 1.0 + dist.get_rank()) if isinstance(m, nn.Linear) else None
    )
    return model.state_dict()["blocks.1.up.weight"]


def test_ranks_write_differently(ranks):
    sharded = ranks(case_ranks_write_differently, ShardingStrategy.FULL_SHARD)[0]
    assert sharded[:24].eq(1).all()
    assert sharded[24:].eq(2).all()
    for replica in ranks(case_ranks_write_differently, ShardingStrategy.NO_SHARD):
        assert replica.eq(1).all()


def case_refusals() -> None:
    model = wrapped()
    with pytest.raises(UnsupportedError, match=r"rank0_only=True.*pass writeback=False.*modifier_rank=0"):
        FSDP.summon_full_params(model, rank0_only=True).__enter__()
    with FSDP.summon_full_params(model), pytest.raises(StateError, match="leave the outer block"):
        FSDP.summon_full_params(model).__enter__()

    def inside(*args: Any) -> None:
        with pytest.raises(StateError, match="during forward or backward"):
            FSDP.summon_full_params(model).__enter__()

    model.blocks[0].module.register_forward_hook(inside)
    model(model.example_batch(0, 2).inputs)


def test_refusals(ranks):
    ranks(case_refusals)
