"""One process on one CUDA device: presets against plain PyTorch, memory against the formula, Triton's kernels.

`scripts/gpu_check.sh` runs these; without a device they are skipped.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import unishard
from unishard.kernels import AdamRule, Target, reference, squared_norm, update
from unishard.testing.models import TinyTransformer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

PRESETS = ["NO_SHARD", "ZERO1", "ZERO2", "SHARD_GRAD_OP", "ZERO3"]
STEPS = 4


@pytest.fixture(autouse=True)
def group() -> Iterator[None]:
    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def batch(step: int) -> Tensor:
    draw = torch.Generator().manual_seed(step)
    return torch.randint(37, (4, 7), generator=draw).cuda()


def loss_of(model: Any, step: int) -> Tensor:
    return model(batch(step)).float().pow(2).mean()


def alone(model: nn.Module, dtype: torch.dtype) -> list[Tensor]:
    """fp32 masters, compute in `dtype`."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-3, weight_decay=0.1)
    for step in range(STEPS):
        compute = copy.deepcopy(model).to(dtype)
        loss_of(compute, step).backward()
        for master, param in zip(model.parameters(), compute.parameters(), strict=True):
            master.grad = None if param.grad is None else param.grad.float()
        optimizer.step()
    return [p.detach() for p in model.parameters()]


@pytest.mark.parametrize(("dtype", "bound"), [("fp32", 2e-5), ("bf16", 0.1)])
@pytest.mark.parametrize("door", ["config", "code"])
@pytest.mark.parametrize("preset", PRESETS)
def test_updates_equal_plain_pytorch(preset: str, door: str, dtype: str, bound: float) -> None:
    torch.manual_seed(0)
    initial = TinyTransformer().cuda()
    before = [p.detach().clone() for p in initial.parameters()]
    compute = torch.bfloat16 if dtype == "bf16" else torch.float32
    expected = alone(copy.deepcopy(initial), compute)
    found = through(door, initial, preset, dtype)
    wanted = torch.cat([(a - b).flatten() for a, b in zip(expected, before, strict=True)])
    error = torch.cat([(a - b).flatten() for a, b in zip(found, expected, strict=True)])
    assert error.norm() <= bound * wanted.norm()


def through(door: str, model: Any, preset: str, dtype: str) -> list[Tensor]:
    if door == "config":
        config: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": 4,
            "sharding": preset,
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "eps": 1e-3, "weight_decay": 0.1}},
            "bf16": {"enabled": dtype == "bf16"},
        }
        engine = unishard.initialize(model=model, config=config).engine
        for step in range(STEPS):
            engine.backward(loss_of(engine, step))
            engine.step()
        return [group.buffer.local(i, group.buffer.shard).view(shape).clone()
                for group in engine.schedule.groups for i, shape in enumerate(group.buffer.layout.shapes)]  # fmt: skip
    policy = unishard.MixedPrecisionPolicy(param_dtype=torch.bfloat16 if dtype == "bf16" else None)
    for block in model.blocks:
        unishard.fully_shard(block, sharding=preset, mp_policy=policy)
    unishard.fully_shard(model, sharding=preset, mp_policy=policy)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-3, weight_decay=0.1)
    for step in range(STEPS):
        loss_of(model, step).backward()
        optimizer.step()
        optimizer.zero_grad()
    return [p.detach().full_tensor().clone() for p in model.parameters()]


@pytest.mark.parametrize("pin_memory", [False, True])
def test_host_memory_trains_as_the_device_does(pin_memory: bool) -> None:
    def trained(policy: Any) -> list[Tensor]:
        torch.manual_seed(0)
        model = TinyTransformer().cuda()
        for module in (*model.blocks, model):
            unishard.fully_shard(module, offload_policy=policy)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        for step in range(STEPS):
            loss_of(model, step).backward()
            optimizer.step()
            optimizer.zero_grad()
        return [p.detach().full_tensor().clone() for p in model.parameters()]

    expected = trained(None)
    assert all(map(torch.equal, trained(unishard.CPUOffloadPolicy(pin_memory)), expected))


def test_memory_at_rest_is_the_formulas() -> None:
    torch.cuda.synchronize()
    start = torch.cuda.memory_allocated()
    model = nn.Sequential(*(nn.Linear(1024, 1024) for _ in range(8)))
    parameters = sum(p.numel() for p in model.parameters())
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "optimizer": {"type": "AdamW", "params": {}},
        "zero_optimization": {"stage": 3},
        "bf16": {"enabled": True},
    }
    engine = unishard.initialize(model=model, config=config).engine
    engine.backward(engine(torch.ones(1, 1024, device="cuda")).sum())
    engine.step()
    torch.cuda.synchronize()
    held = torch.cuda.memory_allocated() - start
    # fp32 masters and two moments; padding and the last activations are small beside them.
    assert held <= 1.05 * 12 * parameters


def test_tritons_kernels_equal_the_reference() -> None:
    pytest.importorskip("triton")
    draw = torch.Generator(device="cuda").manual_seed(0)
    w, g, m, v = (torch.randn(100_003, generator=draw, device="cuda") for _ in range(4))
    v = v.abs()
    mine = Target(w.clone(), g.bfloat16(), (m.clone(), v.clone()), torch.empty_like(w, dtype=torch.bfloat16))
    theirs = Target(
        w.clone(), g.bfloat16(), (m.clone(), v.clone()), torch.empty_like(w, dtype=torch.bfloat16)
    )
    rule = AdamRule(lr=1e-2, weight_decay=0.1)
    update([mine], rule, step=3, grad_scale=0.5)
    reference.adam([theirs], rule, 3, 0.5)
    for a, b in zip((mine.param, *mine.state), (theirs.param, *theirs.state), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(squared_norm([g]).float(), g.double().pow(2).sum().float(), rtol=1e-6, atol=0)
