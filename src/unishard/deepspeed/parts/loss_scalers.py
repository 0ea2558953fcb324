"""`runtime.fp16.loss_scaler`: DeepSpeed's scalers by themselves; the engine has its own loss scale."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch

from unishard.optim.loss_scale import DynamicLossScale


class LossScalerBase:
    """A factor for losses."""

    def __init__(self, cur_scale: float) -> None:
        self.cur_scale = cur_scale
        self.dynamic = False

    @property
    def loss_scale(self) -> float:
        return self.cur_scale

    def scale_loss(self, loss: torch.Tensor) -> torch.Tensor:
        """The loss times the scale."""
        return loss * self.loss_scale

    def backward(self, loss: torch.Tensor, retain_graph: bool = False) -> None:
        """Differentiate the scaled loss."""
        self.scale_loss(loss).backward(retain_graph=retain_graph)

    def has_overflow(self, params: Iterable[torch.Tensor]) -> bool:
        """Whether a gradient is not finite; a static scale does not look."""
        return False

    def update_scale(self, overflow: bool) -> None:
        """Move the scale after a step."""


class LossScaler(LossScalerBase):
    """A scale that stays."""

    def __init__(self, scale: float = 1) -> None:
        super().__init__(scale)


class DynamicLossScaler(LossScalerBase):
    """A scale that falls on overflow and grows without."""

    def __init__(
        self,
        init_scale: float = 2**32,
        scale_factor: float = 2.0,
        scale_window: int = 1000,
        min_scale: float = 1,
        delayed_shift: int = 1,
        consecutive_hysteresis: bool = False,
        raise_error_at_min_scale: bool = True,
        dtype: torch.dtype = torch.half,
    ) -> None:
        super().__init__(init_scale)
        self.dynamic = True
        self.scale_factor, self.scale_window, self.min_scale = scale_factor, scale_window, min_scale
        self.delayed_shift, self.consecutive_hysteresis = delayed_shift, consecutive_hysteresis
        self.raise_error_at_min_scale = raise_error_at_min_scale
        self._state = DynamicLossScale(
            initial=float(init_scale),
            growth_factor=scale_factor,
            backoff_factor=1 / scale_factor,
            window=scale_window,
            hysteresis=delayed_shift,
            consecutive_hysteresis=consecutive_hysteresis,
            min_scale=min_scale,
        )

    def has_overflow(self, params: Iterable[torch.Tensor]) -> bool:
        return any(not torch.isfinite(p.grad).all() for p in params if p.grad is not None)

    def update_scale(self, overflow: bool) -> None:
        """As the base; raises once an overflow finds the scale at its floor."""
        if overflow and self.raise_error_at_min_scale and self.cur_scale <= self.min_scale:
            raise Exception("the loss scale is at its minimum and gradients still overflow; exiting run")
        self._state.update(overflow)
        self.cur_scale = self._state.scale


def CreateLossScaler(
    dtype: torch.dtype,
    static_loss_scale: float,
    dynamic_scaling: bool,
    dynamic_loss_args: dict[str, Any] | None,
) -> LossScalerBase:
    """A dynamic scaler for fp16 if asked for, else a static one (1 for other dtypes)."""
    initial = (dynamic_loss_args or {}).get("init_scale", 1.0)
    if not math.isfinite(initial):
        raise ValueError(f"dynamic_loss_args['init_scale'] must be finite, and is {initial}")
    if dtype == torch.half and dynamic_scaling:
        return DynamicLossScaler(dtype=dtype, **(dynamic_loss_args or {}))
    return LossScaler(static_loss_scale if dtype == torch.half else 1.0)
