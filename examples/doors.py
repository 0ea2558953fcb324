"""The same training loop through both doors of unishard."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import unishard
from gpt import GPT
from unishard.sharding.unit import units_under


@dataclass(frozen=True)
class Trainer:
    """A model to call, and one `step(inputs, targets) -> loss`."""

    model: nn.Module
    module: nn.Module
    step: Callable[[Tensor, Tensor], float]
    learning_rate: Callable[[], float]
    grad_norm: Callable[[], float | None]
    optimizer: torch.optim.Optimizer
    description: str
    parameters: int
    skipped_steps: Callable[[], int] = lambda: 0
    loss_scale: Callable[[], float] = lambda: 1.0

    def persistent_bytes(self) -> int:
        """Parameters, gradients and optimizer state that this rank holds between steps."""
        held = sum(sum(g.persistent_bytes.values()) for u in units_under(self.module) for g in u.groups)
        state = 0
        for entry in self.optimizer.state.values():
            state += sum(_bytes(value) for value in entry.values() if isinstance(value, Tensor))
        return held + state


def _bytes(tensor: Any) -> int:
    local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return local.numel() * local.element_size()


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
    parameters = sum(p.numel() for p in model.parameters())
    stage = config.get("zero_optimization", {}).get("stage", 3)
    sharding = config.get("sharding") or ("NO_SHARD", "ZERO1", "ZERO2", "ZERO3")[stage]
    for block in model.blocks:
        unishard.fully_shard(block, sharding=sharding)
    unishard.fully_shard(model, sharding=sharding)
    settings = config["optimizer"]["params"]
    optimizer = torch.optim.AdamW(model.parameters(), **settings)
    norms: list[float] = []

    def step(inputs: Tensor, targets: Tensor) -> float:
        loss = model(inputs, targets)
        loss.backward()
        norms[:] = [unishard.clip_grad_norm_(model.parameters(), config.get("gradient_clipping", 1.0)).item()]
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return Trainer(
        model=model,
        module=model,
        step=step,
        learning_rate=lambda: settings["lr"],
        grad_norm=lambda: norms[0] if norms else None,
        optimizer=optimizer,
        description=f"code door, {sharding}",
        parameters=parameters,
    )
