"""The same 20 steps under several presets and in one process alone: equal losses, different costs."""

from __future__ import annotations

import time
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch import nn

from doors import config_door
from gpt import GPT, Shape
from text import Batches
from unishard.dist.collectives import record_traffic

STEPS = 20
PRESETS = ("NO_SHARD", "ZERO1", "ZERO2", "ZERO3")


def compare_presets(shape: Shape, config: dict[str, Any], data: Batches, console: Console) -> None:
    """Print final loss, tokens/s, bytes at rest and bytes sent for each preset. All ranks call together."""
    table = Table(title=f"{STEPS} steps, {dist.get_world_size()} ranks")
    for column in ("preset", "final loss", "tokens/s", "MB at rest a rank", "MB sent a rank and step"):
        table.add_column(column, justify="left" if column == "preset" else "right")
    size = config["train_micro_batch_size_per_gpu"]
    data = data.smaller(size)
    alone = run_alone(shape, config, data)
    table.add_row("one process", f"{alone[0]:.4f}", f"{alone[1]:,.0f}", f"{alone[2] / 1e6:.1f}", "0.0")
    for preset in PRESETS:
        row = run_preset(shape, config, data, preset)
        table.add_row(preset, f"{row[0]:.4f}", f"{row[1]:,.0f}", f"{row[2] / 1e6:.1f}", f"{row[3] / 1e6:.1f}")
    console.print(table)


def _model(shape: Shape) -> GPT:
    torch.manual_seed(1)
    return GPT(shape)


def run_preset(
    shape: Shape, config: dict[str, Any], data: Batches, preset: str
) -> tuple[float, float, int, int]:
    """Final loss over all ranks, tokens/s of all ranks, bytes at rest, bytes sent a step."""
    chosen = {k: v for k, v in config.items() if k not in ("zero_optimization", "scheduler", "sharding")}
    trainer = config_door(_model(shape), {**chosen, "sharding": preset})
    total = torch.zeros(1)
    with record_traffic() as traffic:
        start = time.perf_counter()
        for step in range(STEPS):
            total[0] = trainer.step(*data.at(step))
        seconds = time.perf_counter() - start
    # Gradients count as they rest before an update; the step has just freed them.
    rest = trainer.persistent_bytes() + _gradient_bytes(trainer.module)
    dist.all_reduce(total)
    tokens = STEPS * data.tokens_per_step * dist.get_world_size()
    return total.item() / dist.get_world_size(), tokens / seconds, rest, traffic.data_bytes // STEPS


def _gradient_bytes(module: nn.Module) -> int:
    from unishard.sharding.unit import units_under

    return sum(g.buffer.layout.shard_numel * 4 for u in units_under(module) for g in u.groups)


def run_alone(shape: Shape, config: dict[str, Any], data: Batches) -> tuple[float, float, int]:
    """Plain PyTorch on the global batch, on every rank for itself."""
    model = _model(shape)
    optimizer = torch.optim.AdamW(model.parameters(), **config["optimizer"]["params"])
    loss, start = 0.0, time.perf_counter()
    for step in range(STEPS):
        batches = [data.at(step, rank) for rank in range(dist.get_world_size())]
        losses = [model(*batch) / len(batches) for batch in batches]
        sum(losses[1:], losses[0]).backward()
        loss = sum(x.item() for x in losses)
        nn.utils.clip_grad_norm_(model.parameters(), config.get("gradient_clipping", 1.0))
        optimizer.step()
        optimizer.zero_grad()
    seconds = time.perf_counter() - start
    parameters = sum(p.numel() for p in model.parameters())
    # Parameter, gradient and Adam's two moments, fp32.
    return loss, STEPS * data.tokens_per_step * dist.get_world_size() / seconds, 16 * parameters
