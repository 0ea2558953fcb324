"""What users ask an engine: DeepSpeed's accessors over the resolved configuration."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from unishard.config import ResolvedConfig
from unishard.dist.mesh import Axes
from unishard.optim.sharded import ShardedOptimizer
from unishard.sharding.schedule import Schedule


class Accessors(nn.Module):
    """Read-only answers; `Engine` holds what they read."""

    module: nn.Module
    config: ResolvedConfig
    axes: Axes
    device: torch.device
    optimizer: ShardedOptimizer | None
    lr_scheduler: Any
    schedule: Schedule
    _step_applied: bool

    def train_batch_size(self) -> int:
        """Samples in one update, over all ranks and micro-batches."""
        return self.config.train_batch_size

    def train_micro_batch_size_per_gpu(self) -> int:
        return self.config.train_micro_batch_size_per_gpu

    def gradient_accumulation_steps(self) -> int:
        return self.config.gradient_accumulation_steps

    def gradient_clipping(self) -> float:
        return self.config.gradient_clipping

    def get_global_grad_norm(self) -> float | None:
        """Norm of the last update's gradients over all ranks, unscaled and before clipping; `None` before the first."""
        return None if self.optimizer is None else self.optimizer.grad_norm

    def get_lr(self) -> list[float]:
        return [] if self.optimizer is None else [float(g["lr"]) for g in self.optimizer.param_groups]

    def get_mom(self) -> list[Any]:
        groups = [] if self.optimizer is None else self.optimizer.param_groups
        return [g["betas"] if "betas" in g else g.get("momentum", 0.0) for g in groups]

    def was_step_applied(self) -> bool:
        """Whether the last `step()` changed parameters: at a boundary, and not skipped."""
        return self._step_applied

    @property
    def skipped_steps(self) -> int:
        return 0 if self.optimizer is None else self.optimizer.skipped_steps

    @property
    def loss_scale(self) -> float:
        return 1.0 if self.optimizer is None else self.optimizer.loss_scale

    cur_scale = loss_scale

    def zero_optimization_stage(self) -> int:
        return self.config.zero_optimization.stage

    def zero_optimization(self) -> bool:
        return self.zero_optimization_stage() > 0

    def fp16_enabled(self) -> bool:
        return bool(self.config.fp16.enabled)

    def bfloat16_enabled(self) -> bool:
        return bool(self.config.bf16.enabled)

    def dynamic_loss_scale(self) -> bool:
        return self.fp16_enabled() and not self.config.fp16.loss_scale

    def steps_per_print(self) -> float:
        return self.config.steps_per_print

    def wall_clock_breakdown(self) -> bool:
        return bool(self.config.wall_clock_breakdown)

    def optimizer_name(self) -> str | None:
        return None if self.config.optimizer is None else self.config.optimizer.type

    def scheduler_name(self) -> str | None:
        return None if self.config.scheduler is None else self.config.scheduler.type

    @property
    def global_rank(self) -> int:
        return dist.get_rank()

    @property
    def local_rank(self) -> int:
        import os

        return int(os.environ.get("LOCAL_RANK", "0"))

    @property
    def world_size(self) -> int:
        return dist.get_world_size()

    @property
    def dp_world_size(self) -> int:
        return self.axes.world_size

    def module_state_dict(self) -> dict[str, torch.Tensor]:
        """Whole parameters and buffers on every rank, gathered group by group. All ranks call together."""
        state = {name: buffer.detach().clone() for name, buffer in self.module.state_dict().items()}
        names: dict[int, list[str]] = {}
        for name, param in self.module.named_parameters(remove_duplicate=False):
            names.setdefault(id(param), []).append(name)
        for group in self.schedule.groups:
            held = group.shown_whole
            group.unshard()
            group.wait()
            for registration in group.registrations:
                value = registration.whole.detach().clone()
                state.update(dict.fromkeys(names.get(id(registration.visible), []), value))
            if not held:
                group.reshard()
        return state
