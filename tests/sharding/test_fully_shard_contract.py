"""What scripts written for torch's `fully_shard` rely on, beyond a plain training step."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from unishard import MixedPrecisionPolicy, fully_shard
from unishard.errors import MisuseError, ShardingError, StateError, UnevenShardingError

Ranks = Callable[..., list[Any]]


class Body(nn.Module):
    """An embedding, a norm and a head; `skip_head` leaves the head to the caller, as chunked losses do."""

    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(12, 8)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 12, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, tokens: torch.Tensor, skip_head: bool = False) -> torch.Tensor:
        hidden = self.norm(self.embed(tokens))
        return hidden if skip_head else self.head(hidden)


def _chunked_step(model: Body, tokens: torch.Tensor) -> None:
    hidden = model(tokens, skip_head=True)
    grads = []
    for piece in hidden.detach().chunk(2, dim=1):
        piece = piece.contiguous().requires_grad_()
        model.head(piece).square().mean().backward()
        grads.append(piece.grad)
    hidden.backward(torch.cat(grads, dim=1))


def _chunked_head(reshard: bool) -> float:
    torch.manual_seed(0)
    reference = Body()
    model = copy.deepcopy(reference)
    fully_shard([model.norm, model.head], reshard_after_forward=reshard)
    fully_shard(model)
    worst = 0.0
    for step in range(3):
        tokens = torch.randint(12, (2, 6), generator=torch.Generator().manual_seed(step))
        for each in (reference, model):
            each.zero_grad()
            _chunked_step(each, tokens)
        ours: Any
        theirs: Any
        for ours, theirs in zip(model.parameters(), reference.parameters(), strict=True):
            worst = max(worst, (ours.grad.full_tensor() - theirs.grad).abs().max().item())
    return worst


@pytest.mark.parametrize("reshard", [True, False])
def test_a_list_of_modules_may_run_in_part_and_piece_by_piece(ranks: Ranks, reshard: bool) -> None:
    assert max(ranks(_chunked_head, reshard)) < 1e-6


def _partial_output_dtype() -> torch.dtype:
    model = Body()
    policy = MixedPrecisionPolicy(output_dtype=torch.bfloat16)
    fully_shard([model.norm, model.head], mp_policy=policy)
    fully_shard(model)
    return model(torch.zeros(1, 2, dtype=torch.long), skip_head=True).dtype


def test_a_list_that_ran_in_part_still_casts_its_output(ranks: Ranks) -> None:
    assert ranks(_partial_output_dtype) == [torch.bfloat16] * 2


def _tied_apart() -> str:
    model = Body(tied=True)
    fully_shard(model.embed)
    fully_shard(model.head)
    fully_shard(model)
    with pytest.raises(ShardingError, match="already managed by another") as caught:
        model(torch.zeros(1, 2, dtype=torch.long))
    return str(caught.value)


def test_a_parameter_tied_across_two_calls_is_refused_at_the_first_forward(ranks: Ranks) -> None:
    assert all("fully_shard([a, b])" in message for message in ranks(_tied_apart))


def _on_meta() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    fully_shard(model[0])
    fully_shard(model)
    with pytest.raises(StateError, match=r"still on meta device: \['1.weight', '1.bias'\]"):
        model(torch.ones(2, 4))


def test_parameters_left_on_meta_are_named_from_the_root(ranks: Ranks) -> None:
    ranks(_on_meta)


def _replaced() -> float:
    model = nn.Linear(4, 4, bias=False)
    fully_shard(model)
    with torch.no_grad():
        model.weight = nn.Parameter(model.weight * 0 + 2)
    return model(torch.ones(1, 4))[0, 0].item()


def test_a_parameter_replaced_before_the_first_forward_is_the_one_that_trains(ranks: Ranks) -> None:
    assert ranks(_replaced) == [8.0, 8.0]


def _refusals() -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard

    shard1 = lambda param: Shard(1)  # noqa: E731
    with pytest.raises(MisuseError, match="Shard dim 1 is invalid for 1D tensors"):
        fully_shard(nn.LayerNorm(4), shard_placement_fn=shard1)
    with pytest.raises(UnevenShardingError, match="FSDP does not support uneven sharding on dim 1"):
        fully_shard(nn.Linear(3, 4, bias=False), shard_placement_fn=shard1)
    with pytest.raises(ShardingError, match="1D or 2D DeviceMesh"):
        fully_shard(nn.Linear(2, 2), mesh=init_device_mesh("cpu", (2, 1, 1)))
    with pytest.raises(MisuseError, match="mesh_dim_names"):
        fully_shard(nn.Linear(2, 2), mesh=init_device_mesh("cpu", (1, 2)))
    module = nn.Linear(2, 2)
    module.register_parameter("scale", nn.Parameter(torch.tensor(1.0)))
    with pytest.raises(ShardingError, match="Change scale to a 1D tensor"):
        fully_shard(module)


def test_misuse_raises_torchs_types_and_names_the_remedy(ranks: Ranks) -> None:
    assert issubclass(MisuseError, AssertionError)
    assert issubclass(UnevenShardingError, NotImplementedError)
    ranks(_refusals)


def _default_mesh() -> bool:
    from torch.distributed.device_mesh import init_device_mesh

    weight: Any = fully_shard(nn.Linear(4, 4)).weight
    return weight.device_mesh == init_device_mesh("cpu", (dist.get_world_size(),))


def test_the_default_mesh_equals_torchs(ranks: Ranks) -> None:
    assert ranks(_default_mesh) == [True, True]


def _cast_after_sharding() -> tuple[torch.dtype, ...]:
    model = nn.Linear(4, 4, dtype=torch.bfloat16)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.bfloat16)
    fully_shard(model, mp_policy=policy)
    model.to(torch.float32)
    output = model(torch.ones(2, 4))
    output.sum().backward()
    grad: Any = model.weight.grad
    return output.dtype, model.weight.dtype, grad.dtype


def test_a_policy_outlives_a_cast_of_the_sharded_module(ranks: Ranks) -> None:
    assert ranks(_cast_after_sharding)[0] == (torch.bfloat16, torch.float32, torch.float32)


def _inside_jvp() -> float:
    model = nn.Linear(4, 4, bias=False)
    fully_shard(model, reshard_after_forward=False)
    source = torch.ones(4)
    primal, tangent = torch.zeros(4), torch.ones(4)
    moved = torch.func.jvp(lambda ignored: model(source), (primal,), (tangent,))[1]
    return moved.abs().sum().item()


def test_the_first_forward_may_run_inside_a_functional_transform(ranks: Ranks) -> None:
    assert ranks(_inside_jvp) == [0.0, 0.0]


def _equal_meshes() -> list[tuple[int, ...]]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    shapes = []
    for _ in range(2):
        mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("dp", "tp"))
        model = nn.Linear(4, 6)
        parallelize_module(model, mesh["tp"], ColwiseParallel())
        fully_shard(model, mesh=mesh["dp"])
        shapes.append(tuple(model.weight.shape))
    return shapes


def test_meshes_that_are_equal_need_not_be_one_object(ranks: Ranks) -> None:
    assert ranks(_equal_meshes)[0] == [(6, 4), (6, 4)]


def _copied_states() -> None:
    model: Any = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2))
    fully_shard(model)
    model(torch.ones(1, 3)).sum().backward()
    before = copy.deepcopy(model.state_dict())
    grads = copy.deepcopy([param.grad for param in model.parameters()])
    with torch.no_grad():
        for param in model.parameters():
            param.zero_()
    assert all(value.full_tensor().abs().sum() > 0 for value in before.values())
    model.load_state_dict(before)
    assert model.state_dict().keys() == before.keys()
    for param, kept, grad in zip(model.parameters(), before.values(), grads, strict=True):
        assert torch.equal(param.full_tensor(), kept.full_tensor())
        assert torch.equal(param.grad.full_tensor(), grad.full_tensor())


def test_a_state_dict_can_be_deepcopied(ranks: Ranks) -> None:
    ranks(_copied_states)


def _written_locally(sharding: str) -> float:
    model: Any = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    fully_shard(model, sharding=sharding)
    model(torch.ones(1, 2)).sum().backward()
    with torch.no_grad():
        for param in model.parameters():
            param.to_local().fill_(1.0)
    return model(torch.ones(1, 2)).sum().item()


@pytest.mark.parametrize("sharding", ["NO_SHARD", "ZERO2", "ZERO3"])
def test_writes_to_local_tensors_are_seen(ranks: Ranks, sharding: str) -> None:
    assert ranks(_written_locally, sharding) == [8.0, 8.0]
