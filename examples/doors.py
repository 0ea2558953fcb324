"""The same training loop through both doors of unishard."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

import unishard
from gpt import GPT
from unishard.errors import ConfigError
from unishard.optim.schedules import build_schedule
from unishard.sharding.unit import units_under

CODE_DOOR_KEYS = {
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
    "steps_per_print",
    "zero_optimization",
    "sharding",
    "optimizer",
    "scheduler",
}
"""What `code_door` reads or does not need; other keys ask for more than it shows."""


@dataclass(frozen=True)
class Trainer:
    """A model to call, and one `step(inputs, targets) -> loss`."""

    model: nn.Module
    module: nn.Module
    step: Callable[[Tensor, Tensor], float]
    learning_rate: Callable[[], float]
    grad_norm: Callable[[], float | None]
    optimizer: Any
    description: str
    parameters: int
    skipped_steps: Callable[[], int] = lambda: 0
    loss_scale: Callable[[], float] = lambda: 1.0

    def persistent_bytes(self) -> int:
        """Parameters, gradients and optimizer state that this rank holds now."""
        held = sum(sum(g.persistent_bytes.values()) for u in units_under(self.module) for g in u.groups)
        return held + state_bytes(self.optimizer)


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of optimizer state on this rank."""
    tensors = [x for entry in optimizer.state.values() for x in entry.values() if isinstance(x, Tensor)]
    return sum((x.to_local() if isinstance(x, DTensor) else x).nbytes for x in tensors)


def config_door(model: GPT, config: dict[str, Any]) -> Trainer:
    """DeepSpeed's: a configuration, `engine(batch)`, `engine.backward(loss)`, `engine.step()`."""
    parameters = sum(p.numel() for p in model.parameters())
    engine, optimizer, _, _ = unishard.initialize(model=model, config=config)

    def step(inputs: Tensor, targets: Tensor) -> float:
        loss = engine(inputs, targets)
        engine.backward(loss)
        engine.step()
        return loss.item()

    return Trainer(
        model=engine,
        module=model,
        step=step,
        learning_rate=lambda: engine.get_lr()[0],
        grad_norm=engine.get_global_grad_norm,
        optimizer=optimizer,
        description=f"config door, {engine.config.sharding}",
        parameters=parameters,
        skipped_steps=lambda: engine.skipped_steps,
        loss_scale=lambda: engine.loss_scale,
    )


def code_door(model: GPT, config: dict[str, Any]) -> Trainer:
    """FSDP2's: `fully_shard` on blocks and root, any torch optimizer on the parameters."""
    _check_code_door(config)
    parameters = sum(p.numel() for p in model.parameters())
    stage = config.get("zero_optimization", {}).get("stage", 3)
    sharding = config.get("sharding") or ("NO_SHARD", "ZERO1", "ZERO2", "ZERO3")[stage]
    for block in model.blocks:
        unishard.fully_shard(block, sharding=sharding)
    unishard.fully_shard(model, sharding=sharding)
    optimizer = torch.optim.AdamW(model.parameters(), **config["optimizer"]["params"])
    schedule = None
    if "scheduler" in config:
        schedule = build_schedule(config["scheduler"]["type"], optimizer, config["scheduler"]["params"])
    max_norm = config.get("gradient_clipping") or math.inf
    norms: list[float] = []

    def step(inputs: Tensor, targets: Tensor) -> float:
        loss = model(inputs, targets)
        loss.backward()
        norms[:] = [unishard.clip_grad_norm_(model.parameters(), max_norm).item()]
        optimizer.step()
        optimizer.zero_grad()
        if schedule is not None:
            schedule.step()
        return loss.item()

    return Trainer(
        model=model,
        module=model,
        step=step,
        learning_rate=lambda: float(optimizer.param_groups[0]["lr"]),
        grad_norm=lambda: norms[0] if norms else None,
        optimizer=optimizer,
        description=f"code door, {sharding}",
        parameters=parameters,
    )


def _check_code_door(config: dict[str, Any]) -> None:
    unread = sorted(set(config) - CODE_DOOR_KEYS)
    if config.get("gradient_accumulation_steps", 1) != 1:
        unread.append("gradient_accumulation_steps")
    if config["optimizer"]["type"].lower() != "adamw":
        unread.append(f"optimizer.type {config['optimizer']['type']}")
    if unread:
        raise ConfigError(f"--door code does not show {', '.join(unread)}; take it out, or use --door config")
