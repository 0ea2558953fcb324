"""DTensor tensor parallelism first, `fully_shard` second, on a (dp, tp) mesh: the order FSDP2's users know."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import unishard

RATE, EPS, STEPS = 1e-2, 1e-3, 3
PLAN = {"up": ColwiseParallel(), "down": RowwiseParallel()}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(6)
        self.up = nn.Linear(6, 12)
        self.down = nn.Linear(12, 6)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(self.norm(x))))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def inputs(step: int, replica: int) -> Tensor:
    return torch.randn(5, 6, generator=torch.Generator().manual_seed(31 * step + replica))


def mesh_2d() -> DeviceMesh:
    return init_device_mesh("cpu", (dist.get_world_size() // 2, 2), mesh_dim_names=("dp", "tp"))


def shard_2d(model: Model, mesh: DeviceMesh, **kwargs: Any) -> Model:
    for block in model.blocks:
        parallelize_module(block, mesh["tp"], PLAN)
        unishard.fully_shard(block, mesh=mesh["dp"], **kwargs)
    unishard.fully_shard(model, mesh=mesh["dp"], **kwargs)
    return model


def step_alone(model: Model, optimizer: torch.optim.Optimizer, step: int, replicas: int) -> Tensor:
    for replica in range(replicas):
        (model(inputs(step, replica)).pow(2).mean() / replicas).backward()
    norm = nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    optimizer.step()
    optimizer.zero_grad()
    return norm


def trains(sharding: str, clip: str) -> None:
    mesh = mesh_2d()
    torch.manual_seed(0)
    alone = Model()
    model = shard_2d(copy.deepcopy(alone), mesh, sharding=sharding)
    before = {n: p.detach().clone() for n, p in alone.named_parameters()}
    make = lambda m: torch.optim.AdamW(m.parameters(), lr=RATE, eps=EPS)  # noqa: E731
    ours, reference = make(model), make(alone)
    clips: dict[str, Callable[..., Any]] = {
        "torch": nn.utils.clip_grad_norm_, "unishard": unishard.clip_grad_norm_,
    }  # fmt: skip
    for step in range(STEPS):
        expected = step_alone(alone, reference, step, mesh.size(0))
        model(inputs(step, mesh.get_local_rank("dp"))).pow(2).mean().backward()
        norm: Any = clips[clip](model.parameters(), 0.1)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        torch.testing.assert_close(norm.float(), expected, rtol=2e-5, atol=0)
        ours.step()
        ours.zero_grad()
    for name, param in model.named_parameters():
        assert isinstance(param, DTensor)
        whole = param.detach().full_tensor()
        wanted = dict(alone.named_parameters())[name].detach()
        update = (wanted - before[name]).norm()
        assert (whole - wanted).norm() <= 1e-4 * update + 1e-7, f"{sharding} {name}"


@pytest.mark.parametrize("sharding", ["ZERO3", "SHARD_GRAD_OP", "ZERO2"])
def test_updates_equal_one_process(sharding: str, ranks: Callable[..., Any]) -> None:
    ranks(trains, sharding, "unishard", world_size=4, timeout=120)


def test_torchs_clipping_on_what_one_mesh_holds(ranks: Callable[..., Any]) -> None:
    """`clip_grad_norm_` of torch needs one mesh; with all parameters tensor-parallel there is one."""
    ranks(clips_on_one_mesh, world_size=4, timeout=120)


def clips_on_one_mesh() -> None:
    mesh = mesh_2d()
    torch.manual_seed(0)
    alone = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 6, bias=False))
    model: Any = copy.deepcopy(alone)
    parallelize_module(model, mesh["tp"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
    unishard.fully_shard(model, mesh=mesh["dp"])
    for replica in range(2):
        (alone(inputs(0, replica)).pow(2).mean() / 2).backward()
    model(inputs(0, mesh.get_local_rank("dp"))).pow(2).mean().backward()
    expected = nn.utils.clip_grad_norm_(alone.parameters(), 0.1)
    norm: Any = nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    torch.testing.assert_close(norm.full_tensor(), expected, rtol=2e-5, atol=0)
    for (name, param), other in zip(model.named_parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(param.grad.full_tensor(), other.grad, rtol=2e-5, atol=1e-7, msg=name)


def whole_values_survive() -> None:
    """Colwise weights are cut along dim 0 by both axes; the whole must come back in its own order."""
    mesh = mesh_2d()
    torch.manual_seed(0)
    alone = Model()
    model = shard_2d(copy.deepcopy(alone), mesh)
    for (name, param), other in zip(model.named_parameters(), alone.parameters(), strict=True):
        assert torch.equal(param.full_tensor(), other), name  # pyright: ignore[reportAttributeAccessIssue]
    up: Any = model.blocks[0].up.weight  # pyright: ignore[reportAttributeAccessIssue]
    assert up.device_mesh.mesh_dim_names == ("dp", "tp")
    assert up.placements[1] == Shard(0)
    state = model.state_dict()
    assert all(isinstance(value, DTensor) for value in state.values())


def test_whole_values_survive_both_cuts(ranks: Callable[..., Any]) -> None:
    ranks(whole_values_survive, world_size=4, timeout=120)
