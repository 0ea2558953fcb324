"""The same 20 steps under several presets and in one process alone: equal losses, different costs."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch import nn

from doors import config_door, state_bytes
from gpt import GPT, Shape
from text import Batches
from unishard.dist.traffic import record_traffic

STEPS = 20
PRESETS = ("NO_SHARD", "ZERO1", "ZERO2", "ZERO3")


class Row(NamedTuple):
    """One line of the table. Loss and tokens are those of all ranks, bytes those of one."""

    loss: float
    tokens_per_second: float
    bytes_at_rest: int
    bytes_sent_per_step: int


def compare_presets(
    shape: Shape, config: dict[str, Any], data: Batches, console: Console, before_step: Callable[[], None]
) -> None:
    """Print final loss, tokens/s, bytes at rest and bytes sent for each preset. All ranks call together."""
    data = data.smaller(config["train_micro_batch_size_per_gpu"])
    table = Table(title=f"{STEPS} steps, {dist.get_world_size()} ranks")
    for column in ("preset", "final loss", "tokens/s", "MB at rest a rank", "MB sent a rank and step"):
        table.add_column(column, justify="left" if column == "preset" else "right")
    rows = {"one process": run_alone(shape, config, data, before_step)}
    for preset in PRESETS:
        rows[preset] = run_preset(shape, config, data, preset, before_step)
    for name, row in rows.items():
        rest, sent = row.bytes_at_rest / 1e6, row.bytes_sent_per_step / 1e6
        table.add_row(name, f"{row.loss:.4f}", f"{row.tokens_per_second:,.0f}", f"{rest:.1f}", f"{sent:.1f}")
    console.print(table)


def _model(shape: Shape) -> GPT:
    torch.manual_seed(1)
    return GPT(shape)


def run_preset(
    shape: Shape, config: dict[str, Any], data: Batches, preset: str, before_step: Callable[[], None]
) -> Row:
    """The steps through the config door."""
    chosen = {k: v for k, v in config.items() if k not in ("zero_optimization", "scheduler", "sharding")}
    trainer = config_door(_model(shape), {**chosen, "sharding": preset})
    held = 0

    def measure(groups: Any) -> None:
        nonlocal held
        held = trainer.persistent_bytes()

    # The moment when all that persists is there: gradients are reduced, and the update has not freed them yet.
    trainer.optimizer.before_update = measure
    loss = torch.zeros(1)
    with record_traffic() as traffic:
        start = time.perf_counter()
        for step in range(STEPS):
            before_step()
            loss[0] = trainer.step(*data.at(step))
        seconds = time.perf_counter() - start
    dist.all_reduce(loss)
    return Row(
        loss.item() / dist.get_world_size(), _all_tokens(data) / seconds, held, traffic.data_bytes // STEPS
    )


def run_alone(shape: Shape, config: dict[str, Any], data: Batches, before_step: Callable[[], None]) -> Row:
    """Plain PyTorch on the global batch, on every rank for itself."""
    model = _model(shape)
    optimizer = torch.optim.AdamW(model.parameters(), **config["optimizer"]["params"])
    loss, held, start = 0.0, 0, time.perf_counter()
    for step in range(STEPS):
        before_step()
        batches = [data.at(step, rank) for rank in range(dist.get_world_size())]
        losses = [model(*batch) / len(batches) for batch in batches]
        sum(losses[1:], losses[0]).backward()
        loss = sum(x.item() for x in losses)
        nn.utils.clip_grad_norm_(model.parameters(), config.get("gradient_clipping") or math.inf)
        held = sum(2 * p.nbytes for p in model.parameters()) + state_bytes(optimizer)
        optimizer.step()
        optimizer.zero_grad()
    return Row(loss, _all_tokens(data) / (time.perf_counter() - start), held, 0)


def _all_tokens(data: Batches) -> int:
    return STEPS * data.tokens_per_step * dist.get_world_size()
