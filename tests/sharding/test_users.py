"""What users do to a sharded model besides training it: hooks, copies, compilation, accumulation by hand."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tests.sharding.step_harness import LR, check_parity, full, inputs_for
from tests.sharding.test_cost import shard
from tests.sharding.test_step import UNITS, Stack, plain, squared
from torch import Tensor, nn

from unishard import fully_shard
from unishard.errors import ShardingError, StateError


def hooked(model: nn.Module, x: Tensor) -> Tensor:
    """The user doubles one gradient and sees another after it was accumulated."""
    param: Any = model.get_submodule("blocks.1").get_parameter("up.weight")
    if not hasattr(model, "seen"):
        model.seen = []  # pyright: ignore[reportAttributeAccessIssue]
        param.register_hook(lambda grad: grad * 2)
        param.register_post_accumulate_grad_hook(lambda p: model.seen.append(p.grad.norm()))  # pyright: ignore
    return squared(model, x)


def case_hooks_on_parameters_config() -> None:
    check_parity(plain, hooked, UNITS, doors=["config"])


def case_post_accumulate_hook_sees_the_gradient_config() -> None:
    sharded = shard(Stack(), "ZERO3")
    seen = []
    sharded.module.first.weight.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad is not None))  # pyright: ignore
    sharded.module(inputs_for(0, 0)).sum().backward()
    assert seen == [True]


def case_post_accumulate_hook_sees_the_sharded_gradient_code() -> None:
    model = Stack()
    fully_shard(model)
    seen = []
    for name, param in model.named_parameters():
        param.register_post_accumulate_grad_hook(
            lambda p, n=name: seen.append((n, p is not None, p.grad.shape))
        )
    model(inputs_for(dist.get_rank(), 0)).sum().backward()
    assert sorted(n for n, _, _ in seen) == sorted(n for n, _ in model.named_parameters())
    assert all(shape == model.get_parameter(name).shape for name, _, shape in seen)


def case_no_sync_code() -> None:
    """Accumulation without communication, then one backward with it."""
    torch.manual_seed(1)
    model, alone = Stack(), Stack()
    alone.load_state_dict(model.state_dict())
    for block in model.blocks:
        fully_shard(block)
    fully_shard(model)
    world = dist.get_world_size()
    for micro in range(3):
        model.set_requires_gradient_sync(micro == 2)  # pyright: ignore[reportCallIssue]
        squared(model, inputs_for(dist.get_rank(), micro)).backward()
        assert (next(model.parameters()).grad is not None) == (micro == 2)
        for rank in range(world):
            (squared(alone, inputs_for(rank, micro)) / world).backward()
    for (name, param), other in zip(model.named_parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(full(param.grad), other.grad, rtol=2e-5, atol=1e-6, msg=name)


def case_user_accumulates_code() -> None:
    """Several backwards before one step; `zero_grad` alone resets (trap 4)."""

    def micro(model: nn.Module, x: Tensor) -> None:
        for factor in (1, 2, 3):
            squared(model, x * factor).backward()

    check_parity(plain, micro, UNITS, doors=["code"])


def case_deepcopy_code() -> None:
    model = Stack()
    for block in model.blocks:
        fully_shard(block)
    fully_shard(model)
    x = inputs_for(dist.get_rank(), 0)
    twin = copy.deepcopy(model)
    optimizer = torch.optim.SGD(twin.parameters(), lr=LR)
    before = {name: full(p) for name, p in model.named_parameters()}
    torch.testing.assert_close(twin(x), model(x))
    twin(x).sum().backward()
    optimizer.step()
    model.reshard()  # a root stays whole from forward to backward
    for name, param in model.named_parameters():
        assert param.grad is None, name
        assert torch.equal(full(param), before[name]), name
    assert any(not torch.equal(full(p), before[n]) for n, p in twin.named_parameters())


def case_deepcopy_config() -> None:
    sharded = shard(Stack(), "ZERO3")
    with pytest.raises(StateError, match=r"deepcopy .* released .* unishard\.gather"):
        copy.deepcopy(sharded.module)
    whole = shard(Stack(), "ZERO1").module
    twin = copy.deepcopy(whole)
    x = inputs_for(dist.get_rank(), 0)
    torch.testing.assert_close(twin(x), whole(x))
    twin(x).sum().backward()
    assert all(p.grad is not None for p in twin.parameters()), "the copy is an ordinary module"


def compiled() -> nn.Module:
    model = Stack()
    for index, block in enumerate(model.blocks):
        model.blocks[index] = torch.compile(block, backend="aot_eager", fullgraph=True)  # pyright: ignore
    return model


def case_compile_per_block() -> None:
    torch._dynamo.reset()
    check_parity(compiled, squared, UNITS, presets=["ZERO2", "ZERO3"])


def case_compile_in_place() -> None:
    torch._dynamo.reset()

    def build() -> nn.Module:
        model = Stack()
        for block in model.blocks:
            block.compile(backend="aot_eager")
        return model

    check_parity(build, squared, UNITS, presets=["ZERO3"])


def case_several_models_in_one_process() -> None:
    teacher, student, critic = shard(Stack(), "ZERO3"), shard(Stack(), "ZERO2"), Stack()
    fully_shard(critic)
    x = inputs_for(dist.get_rank(), 0)
    with torch.no_grad():
        target = teacher.module(x)
    ((student.module(x) - target) * critic(x)).pow(2).mean().backward()
    assert all(g.gradients.shard is not None for g in student.groups)
    assert all(g.gradients.shard is None for g in teacher.groups)
    assert all(p.grad is not None for p in critic.parameters())


def case_sharded_twice() -> None:
    model = Stack()
    fully_shard(model.blocks[0])
    with pytest.raises(ShardingError, match=r"already been applied .* cannot be sharded twice"):
        fully_shard(model.blocks[0])
    with pytest.raises(ShardingError, match="already sharded"):
        shard(model, "ZERO1")
    tied = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
    tied[1].weight = tied[0].weight
    fully_shard(tied[0])
    fully_shard(tied[1])
    with pytest.raises(ShardingError, match=r"weight is tied to weight.*one call"):
        tied[1](torch.ones(2, 4))


def case_mesh_that_does_not_fit() -> None:
    from unishard.dist.mesh import build_mesh

    with pytest.raises(ShardingError, match="needs 6 ranks, but the world has 2"):
        build_mesh("cpu", dp_shard=3, dp_replicate=2)
    with pytest.raises(ShardingError, match="HYBRID_SHARD needs a 2-D mesh"):
        fully_shard(Stack(), sharding="HYBRID_SHARD")
    with pytest.raises(ShardingError, match="unknown sharding 'ZERO4'; choose one of NO_SHARD"):
        fully_shard(Stack(), sharding="ZERO4")
    with pytest.raises(ShardingError, match="cannot split 2 ranks into groups of 3"):
        fully_shard(Stack(), reshard_after_forward=3)
    with pytest.raises(ShardingError, match="containers that do not implement forward"):
        fully_shard(nn.ModuleList([nn.Linear(2, 2)]))
    with pytest.raises(ShardingError, match="ZERO1: its parameters rest whole"):
        fully_shard(Stack(), sharding="ZERO1", reshard_after_forward=True)


def case_reshard_to_a_subgroup() -> None:
    """ZeRO++'s hpZ: after forward half of the parameters stay, and backward gathers between two ranks only."""
    from unishard.dist.traffic import record_traffic

    torch.manual_seed(3)
    model, alone = Stack(), Stack()
    alone.load_state_dict(model.state_dict())
    for block in model.blocks:
        fully_shard(block, reshard_after_forward=2)
    fully_shard(model, reshard_after_forward=False)
    squared(model, inputs_for(dist.get_rank(), 0)).backward()
    for rank in range(4):
        (squared(alone, inputs_for(rank, 0)) / 4).backward()
    for (name, param), other in zip(model.named_parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(full(param.grad), other.grad, rtol=2e-5, atol=1e-6, msg=name)
    with record_traffic() as halves:
        squared(model, inputs_for(0, 0)).backward()
    for module in model.modules():
        if hasattr(module, "set_reshard_after_forward"):
            module.set_reshard_after_forward(module is not model)  # pyright: ignore[reportCallIssue]
    with record_traffic() as whole:
        squared(model, inputs_for(0, 0)).backward()
    assert halves.data["all_gather"] < 0.9 * whole.data["all_gather"]


WORLD = {"reshard_to_a_subgroup": 4}
CASES = {
    name.removeprefix("case_"): case for name, case in list(globals().items()) if name.startswith("case_")
}


@pytest.mark.parametrize("name", CASES)
def test_users(name: str, ranks: Callable[..., Any]) -> None:
    ranks(CASES[name], world_size=WORLD.get(name, 2), timeout=120)
