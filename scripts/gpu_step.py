"""Time a step of a GPT on one CUDA device: plain PyTorch and each preset, interleaved.

With one rank nothing is communicated, so what differs is the engine's own cost: hooks, casts, copies, the optimizer.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table

import unishard
from unishard.bench.model import build_model
from unishard.bench.plan import Plan

ROUNDS, STEPS = 7, 5
PLAN = Plan(size="124m", ranks=1, micro_batch=8, sequence=512, dtype="bf16")


def tokens() -> torch.Tensor:
    shape = PLAN.shape
    return torch.randint(shape.vocabulary, (shape.micro_batch, shape.sequence), device="cuda")


def plain() -> Callable[[], Any]:
    model = build_model(PLAN).cuda()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    batch = tokens()

    def step() -> None:
        with torch.autocast("cuda", torch.bfloat16):
            loss = model(batch, batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def sharded(preset: str) -> Callable[[], Any]:
    config = {
        "train_micro_batch_size_per_gpu": PLAN.shape.micro_batch,
        "sharding": preset,
        "bf16": {"enabled": True},
        "optimizer": {"type": "AdamW", "params": {}},
    }
    engine = unishard.initialize(model=build_model(PLAN), config=config).engine
    batch = tokens()

    def step() -> None:
        engine.backward(engine(batch, batch))
        engine.step()

    return step


def milliseconds(step: Callable[[], Any]) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(STEPS):
        step()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / STEPS


def main() -> None:
    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
    steps = {"plain, autocast": plain(), **{p: sharded(p) for p in ("NO_SHARD", "ZERO1", "ZERO2", "ZERO3")}}
    times: dict[str, list[float]] = {name: [] for name in steps}
    for step in steps.values():
        milliseconds(step)
    for _ in range(ROUNDS):
        for name, step in steps.items():
            times[name].append(milliseconds(step))
    table = Table(
        "contestant", "ms a step", "against plain", title=f"{ROUNDS} interleaved rounds of {STEPS} steps"
    )
    base = times["plain, autocast"]
    for name, found in times.items():
        ratios = [a / b for a, b in zip(base, found, strict=True)]
        spread = f"{statistics.median(ratios):.2f} [{min(ratios):.2f}, {max(ratios):.2f}]"
        table.add_row(name, f"{statistics.median(found):.1f}", spread)
    Console().print(table)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
