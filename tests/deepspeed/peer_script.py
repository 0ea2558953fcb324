"""Training runs written for DeepSpeed, one function a case. Run once under the real package and once under unishard.

    python -m torch.distributed.run --nproc_per_node 2 peer_script.py OUTPUT_FOLDER

Rank 0 writes losses and final weights of every case to OUTPUT_FOLDER/results.pt. Nothing here knows of unishard.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import deepspeed
import deepspeed.accelerator
import torch
from torch import nn

STEPS, BATCH, WIDTH, CLASSES = 4, 2, 16, 6
Case = Callable[[int, Path], dict[str, Any]]
CASES: dict[str, Case] = {}


STAGES: dict[str, tuple[int, ...]] = {}


def case(*stages: int) -> Callable[[Case], Case]:
    def add(function: Case) -> Case:
        CASES[function.__name__] = function
        STAGES[function.__name__] = stages
        return function

    return add


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTH, 2 * WIDTH)
        self.outer = nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.outer(torch.tanh(self.inner(x)))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return nn.functional.cross_entropy(self.head(x).float(), target)


def new_net() -> Net:
    torch.manual_seed(7)
    return Net()


def batches(steps: int, first: int = 0) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    rank = torch.distributed.get_rank()
    for step in range(first, first + steps):
        generator = torch.Generator().manual_seed(100 * step + rank)
        yield (
            torch.randn(BATCH, WIDTH, generator=generator),
            torch.randint(0, CLASSES, (BATCH,), generator=generator),
        )


def config(stage: int, accumulation: int = 1, **more: Any) -> dict[str, Any]:
    optimizer = {"type": "AdamW", "params": {"lr": 1e-2, "weight_decay": 0.1, "torch_adam": True}}
    return {
        "train_micro_batch_size_per_gpu": BATCH,
        "gradient_accumulation_steps": accumulation,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
        "optimizer": optimizer,
        **more,
    }


def run(engine: Any, steps: int, first: int = 0, dtype: torch.dtype | None = None) -> list[float]:
    losses = []
    for x, target in batches(steps, first):
        loss = engine(x if dtype is None else x.to(dtype), target)
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses


def weights(engine: Any) -> dict[str, torch.Tensor]:
    found = {}
    for name, param in engine.module.named_parameters():
        with deepspeed.zero.GatheredParameters([param]):
            found[name] = param.detach().float().clone()
    return found


def summary(engine: Any, losses: list[float], **more: Any) -> dict[str, Any]:
    return {
        "losses": losses,
        "weights": weights(engine),
        "lr": engine.get_lr(),
        "global_steps": engine.global_steps,
        "skipped_steps": engine.skipped_steps,
        **more,
    }


@case(1, 2, 3)
def plain(stage: int, folder: Path) -> dict[str, Any]:
    net = new_net()
    engine, *_ = deepspeed.initialize(model=net, model_parameters=net.parameters(), config=config(stage))
    losses = run(engine, STEPS)
    return summary(
        engine, losses, norm=float(engine.get_global_grad_norm()), clipping=engine.gradient_clipping()
    )


@case(1, 2, 3)
def accumulation(stage: int, folder: Path) -> dict[str, Any]:
    net = new_net()
    engine, *_ = deepspeed.initialize(model=net, model_parameters=net.parameters(), config=config(stage, 3))
    return summary(engine, run(engine, 6))


@case(1, 3)
def clipping(stage: int, folder: Path) -> dict[str, Any]:
    net = new_net()
    settings = config(stage, gradient_clipping=0.05)
    engine, *_ = deepspeed.initialize(model=net, model_parameters=net.parameters(), config=settings)
    return summary(engine, run(engine, STEPS), norm=float(engine.get_global_grad_norm()))


@case(2, 3)
def client_optimizer(stage: int, folder: Path) -> dict[str, Any]:
    net = new_net()
    decayed = [p for name, p in net.named_parameters() if name.endswith("weight")]
    others = [p for name, p in net.named_parameters() if not name.endswith("weight")]
    groups = [{"params": decayed, "weight_decay": 0.2}, {"params": others, "weight_decay": 0.0, "lr": 3e-3}]
    optimizer = torch.optim.AdamW(groups, lr=1e-2)
    settings = config(stage)
    del settings["optimizer"]
    engine, *_ = deepspeed.initialize(model=net, optimizer=optimizer, config=settings)
    return summary(engine, run(engine, STEPS))


@case(1, 3)
def client_scheduler(stage: int, folder: Path) -> dict[str, Any]:
    net = new_net()
    settings = config(stage)
    del settings["optimizer"]
    optimizer = torch.optim.SGD(net.parameters(), lr=0.5, momentum=0.9)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 / (1 + step))
    engine, _, _, scheduler = deepspeed.initialize(
        model=net, optimizer=optimizer, lr_scheduler=schedule, config=settings
    )
    return summary(engine, run(engine, STEPS), last=scheduler.get_last_lr())


@case(2)
def configured_scheduler(stage: int, folder: Path) -> dict[str, Any]:
    decay = {"warmup_num_steps": 2, "total_num_steps": 6, "warmup_max_lr": 0.02}
    cycle = {"cycle_min_lr": 0.001, "cycle_max_lr": 0.02, "cycle_first_step_size": 2}
    result: dict[str, Any] = {"losses": []}
    for kind, params in (("WarmupDecayLR", decay), ("OneCycle", cycle)):
        net = new_net()
        settings = config(stage, scheduler={"type": kind, "params": params})
        engine, *_ = deepspeed.initialize(model=net, model_parameters=net.parameters(), config=settings)
        rates = []
        for x, target in batches(STEPS):
            rates.append((engine.get_lr(), engine.get_mom()))
            engine.backward(engine(x, target))
            engine.step()
        result[kind] = weights(engine), rates
        result["losses"] += run(engine, 1, first=STEPS)
    return result


@case(2, 3)
def frozen(stage: int, folder: Path) -> dict[str, Any]:
    net = new_net()
    net.blocks[0].requires_grad_(False)
    trainable = [p for p in net.parameters() if p.requires_grad]
    engine, *_ = deepspeed.initialize(model=net, model_parameters=trainable, config=config(stage))
    return summary(engine, run(engine, STEPS))


@case(2, 3)
def half_with_overflow(stage: int, folder: Path) -> dict[str, Any]:
    net = new_net()
    fp16 = {"enabled": True, "initial_scale_power": 18, "hysteresis": 1, "loss_scale_window": 2}
    engine, *_ = deepspeed.initialize(
        model=net, model_parameters=net.parameters(), config=config(stage, fp16=fp16)
    )
    losses = run(engine, 8, dtype=torch.float16)
    return summary(engine, losses, scale=engine.optimizer.cur_scale)


@case(1, 2, 3)
def checkpoint(stage: int, folder: Path) -> dict[str, Any]:
    net = new_net()
    schedule = {"type": "WarmupLR", "params": {"warmup_num_steps": 5, "warmup_max_lr": 0.02}}
    settings = config(stage, scheduler=schedule)
    engine, *_ = deepspeed.initialize(model=net, model_parameters=net.parameters(), config=settings)
    losses = run(engine, 2)
    engine.save_checkpoint(str(folder), client_state={"note": 5})
    again = new_net()
    with torch.no_grad():
        for param in again.parameters():
            param.zero_()
    resumed, *_ = deepspeed.initialize(model=again, model_parameters=again.parameters(), config=settings)
    path, client = resumed.load_checkpoint(str(folder))
    assert path is not None
    assert client["note"] == 5, client
    return summary(resumed, losses + run(resumed, 2, first=2))


@case(3)
def sharded_construction(stage: int, folder: Path) -> dict[str, Any]:
    with deepspeed.zero.Init(config_dict_or_path=config(stage)):
        net = Net()
    attributes = [
        (tuple(p.ds_shape), p.ds_numel, tuple(p.shape), p.ds_status.value) for p in net.parameters()
    ]
    source = new_net()
    for target, value in zip(net.parameters(), source.parameters(), strict=True):
        with deepspeed.zero.GatheredParameters(target, modifier_rank=0):
            if deepspeed.comm.get_rank() == 0:
                target.data.copy_(value.data)
    engine, *_ = deepspeed.initialize(model=net, model_parameters=net.parameters(), config=config(stage))
    return summary(engine, run(engine, STEPS), attributes=attributes)


@case(2, 3)
def inspected(stage: int, folder: Path) -> dict[str, Any]:
    from deepspeed.utils import (
        safe_get_full_fp32_param,
        safe_get_full_grad,
        safe_get_full_optimizer_state,
        safe_set_full_fp32_param,
        safe_set_full_grad,
        safe_set_full_optimizer_state,
    )

    net = new_net()
    settings = config(stage, gradient_clipping=0.0)
    engine, *_ = deepspeed.initialize(model=net, model_parameters=net.parameters(), config=settings)
    losses = run(engine, 1)
    seen = {}
    for x, target in batches(1, 1):
        engine.backward(engine(x, target))
    for name, param in engine.module.named_parameters():
        seen[name] = safe_get_full_grad(param), safe_get_full_fp32_param(param)
        seen[name] += (safe_get_full_optimizer_state(param, "exp_avg"),)
    for param in engine.module.parameters():
        safe_set_full_grad(param, torch.full(safe_get_full_grad(param).shape, 0.01))
        safe_set_full_optimizer_state(param, torch.full(safe_get_full_grad(param).shape, 0.02), "exp_avg")
    engine.step()
    result = summary(engine, losses + run(engine, 1, first=2), seen=seen)
    for param in engine.module.parameters():
        safe_set_full_fp32_param(param, torch.full_like(safe_get_full_fp32_param(param), 0.125))
    result["written"] = [safe_get_full_fp32_param(param) for param in engine.module.parameters()]
    return result


def main(folder: Path) -> None:
    deepspeed.init_distributed("gloo")
    # CPUs compute in fp16; DeepSpeed only asks whether they do it fast.
    deepspeed.accelerator.get_accelerator().is_fp16_supported = lambda: True
    results: dict[str, Any] = {"version": deepspeed.__version__}
    for name, function in CASES.items():
        for stage in STAGES[name]:
            results[f"{name}-{stage}"] = function(stage, folder / f"{name}-{stage}")
    if torch.distributed.get_rank() == 0:
        torch.save(results, folder / "results.pt")
    torch.distributed.barrier()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
