"""`engine.optimizer` under DeepSpeed's class names: one sharded optimizer, shown as each of theirs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from unishard.config import ResolvedConfig
from unishard.optim.loss_scale import NoLossScale
from unishard.optim.sharded import ShardedOptimizer


class DeepSpeedOptimizer(ShardedOptimizer):
    """What every engine's optimizer is. `optimizer` is the torch optimizer that steps this rank's shards."""

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        return self.inner

    @property
    def overflow(self) -> bool:
        """Whether the last step was skipped because gradients were not finite."""
        return self.skipped

    @property
    def loss_scaler(self) -> Any:
        """The loss scale's state: `cur_scale`, `loss_scale` and the settings it was built with."""
        return ScalerView(self)

    @property
    def loss_scale_config(self) -> Any:
        """As `loss_scaler`."""
        return ScalerView(self)

    @property
    def dynamic_loss_scale(self) -> bool:
        return hasattr(self.scaler, "window")

    @property
    def clip_grad(self) -> float:
        return self._rules.max_norm

    @property
    def _global_grad_norm(self) -> float | None:
        return self.grad_norm

    def get_loss_scale(self) -> float:
        return self.loss_scale

    def set_lr(self, lr: float) -> None:
        """Give every parameter group the rate `lr`."""
        for group in self.param_groups:
            group["lr"] = lr

    def get_lr(self) -> float:
        return float(self.param_groups[0]["lr"])

    def _params(self, group: int) -> list[nn.Parameter]:
        """The user's parameters of one parameter group."""
        return [piece.group.registrations[piece.index].visible for piece in self.members[group]]

    def _masters(self, group: int) -> list[torch.Tensor]:
        """This rank's fp32 parts of the parameters of one parameter group."""
        return [piece.param.detach() for piece in self.members[group]]

    def refresh_fp32_params(self) -> None:
        """Master weights follow the parameters by themselves; nothing to do."""

    def destroy(self) -> None:
        """Nothing is registered anywhere that would need removing."""


class ZeROOptimizer(DeepSpeedOptimizer):
    """Base of the optimizers of ZeRO."""

    @property
    def single_partition_of_fp32_groups(self) -> list[torch.Tensor]:
        """For each parameter group this rank's fp32 elements, flat: a copy when they lie in several shards."""
        return [_flat(self._masters(group)) for group in range(len(self.members))]

    @property
    def bit16_groups(self) -> list[list[nn.Parameter]]:
        """For each parameter group the parameters that compute."""
        return [self._params(group) for group in range(len(self.members))]

    fp16_groups = bit16_groups

    @property
    def params_in_partition(self) -> list[list[nn.Parameter]]:
        """For each parameter group, the parameters of which this rank holds a part."""
        return [
            [p.group.registrations[p.index].visible for p in pieces if p.param.numel()]
            for pieces in self.members
        ]


class DeepSpeedZeroOptimizer(ZeROOptimizer):
    """ZeRO-1 and 2."""


class DeepSpeedZeroOptimizer_Stage3(ZeROOptimizer):
    """ZeRO-3."""

    @property
    def fp32_partitioned_groups_flat(self) -> list[torch.Tensor]:
        return self.single_partition_of_fp32_groups

    @property
    def fp16_partitioned_groups(self) -> list[list[torch.Tensor]]:
        """For each parameter group this rank's parts, in the dtype they rest in."""
        return [self._masters(group) for group in range(len(self.members))]


class BF16_Optimizer(ZeROOptimizer):
    """bf16 without a sharded model."""

    @property
    def fp32_groups_flat_partition(self) -> list[torch.Tensor]:
        return self.single_partition_of_fp32_groups


class FP16_Optimizer(DeepSpeedOptimizer):
    """fp16 without a sharded model."""

    @property
    def fp32_groups_flat(self) -> list[torch.Tensor]:
        return [_flat(self._masters(group)) for group in range(len(self.members))]

    @property
    def fp16_groups(self) -> list[list[nn.Parameter]]:
        return [self._params(group) for group in range(len(self.members))]


class FP16_UnfusedOptimizer(FP16_Optimizer):
    """fp16 with an optimizer that steps tensor by tensor; here the same."""

    @property
    def fp32_groups(self) -> list[list[torch.Tensor]]:
        return [self._masters(group) for group in range(len(self.members))]


class ScalerView:
    """A loss scale under DeepSpeed's attribute names."""

    _NAMES = {
        "cur_scale": "scale",
        "loss_scale": "scale",
        "scale_window": "window",
        "min_scale": "min_scale",
        "min_loss_scale": "min_scale",
        "scale_factor": "growth_factor",
        "delayed_shift": "hysteresis",
        "consecutive_hysteresis": "consecutive_hysteresis",
        "init_scale": "initial",
        "cur_hysteresis": "_hysteresis_left",
    }

    def __init__(self, optimizer: DeepSpeedOptimizer) -> None:
        self._scaler = optimizer.scaler

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self._scaler, self._NAMES.get(name, name))

    @property
    def dynamic(self) -> bool:
        return hasattr(self._scaler, "window")

    @property
    def dynamic_loss_scale(self) -> bool:
        return self.dynamic

    @property
    def use_grad_scaling(self) -> bool:
        return not isinstance(self._scaler, NoLossScale)


def _flat(tensors: list[torch.Tensor]) -> torch.Tensor:
    if not tensors:
        return torch.empty(0)
    return tensors[0].view(-1) if len(tensors) == 1 else torch.cat([t.reshape(-1) for t in tensors])


def optimizer_class(rc: ResolvedConfig) -> type[ShardedOptimizer]:
    """The class that DeepSpeed's users expect under this configuration."""
    stage = rc.zero_optimization.stage
    if stage == 3:
        return DeepSpeedZeroOptimizer_Stage3
    if stage in (1, 2):
        return BF16_Optimizer if _accumulates_in_fp32(rc, stage) else DeepSpeedZeroOptimizer
    if rc.bf16.enabled:
        return BF16_Optimizer
    return FP16_Optimizer if rc.fp16.enabled else DeepSpeedOptimizer


def _accumulates_in_fp32(rc: ResolvedConfig, stage: int) -> bool:
    """DeepSpeed runs ZeRO-1 in bf16 with fp32 accumulation on its bf16 optimizer."""
    return stage == 1 and bool(rc.bf16.enabled) and rc.grad_accum_dtype == "fp32"


def parameters_of(optimizer: ShardedOptimizer) -> Iterator[nn.Parameter]:
    """The user's parameters that `optimizer` updates."""
    for piece in optimizer.pieces:
        yield piece.group.registrations[piece.index].visible
