"""The 1cycle policy: one triangular cycle of learning rate and momentum, then a slow decay."""

from __future__ import annotations

import logging
from typing import Any

from torch.optim import Optimizer

from unishard.errors import ConfigError
from unishard.optim.closed_form import ClosedFormLR, PerGroup, per_group
from unishard.optim.curves import Cycle

_log = logging.getLogger(__name__)

_MAX_MOMENTUM = 0.9999  # decay makes momentum grow without end, and 1 is no average


class OneCycle(ClosedFormLR):
    """Cycle the rate up and down once, and momentum the other way (Smith 2018, arXiv:1803.09820).

    Momentum is `betas[0]` or a non-zero `momentum` of a parameter group; a group with neither is left alone.
    DeepSpeed also sets `betas[1]` to 0.99, gives update 0 `cycle_min_mom`, and leaves SGD's momentum alone;
    here `betas[1]` stays, update 0 has `cycle_max_mom`, and SGD's momentum is cycled. Rates are DeepSpeed's.

    Args:
        optimizer: any `torch.optim.Optimizer`.
        cycle_min_lr: the rate at both ends of the cycle.
        cycle_max_lr: the rate at its peak.
        decay_lr_rate: after the cycle the rate is `cycle_min_lr / (1 + decay_lr_rate * intervals)`.
        cycle_first_step_size: updates of the rising half.
        cycle_second_step_size: updates of the falling half; None for the first's.
        cycle_first_stair_count: stairs of the rising half; 0 for a smooth one.
        cycle_second_stair_count: stairs of the falling half; None for the first's.
        decay_step_size: updates per decay interval; 0 for no decay.
        cycle_momentum: whether to cycle momentum.
        cycle_min_mom, cycle_max_mom: momentum at the peak and at the ends of the cycle.
        decay_mom_rate: then momentum is `cycle_max_mom * (1 + decay_mom_rate * intervals)`, below 1.
        last_batch_iteration: see `ClosedFormLR`.

    Raises:
        ConfigError: a value out of range, or a list that does not match the parameter groups.

    >>> import torch
    >>> optimizer = torch.optim.Adam([torch.nn.Parameter(torch.zeros(1))])
    >>> schedule = OneCycle(optimizer, 1.0, 3.0, cycle_first_step_size=2)
    >>> [schedule.lrs_at(n)[0] for n in range(5)], optimizer.param_groups[0]["betas"]
    ([1.0, 2.0, 3.0, 2.0, 1.0], (0.9, 0.999))
    """

    def __init__(
        self,
        optimizer: Optimizer,
        cycle_min_lr: PerGroup,
        cycle_max_lr: PerGroup,
        decay_lr_rate: float = 0.0,
        cycle_first_step_size: float = 2000,
        cycle_second_step_size: float | None = None,
        cycle_first_stair_count: int = 0,
        cycle_second_stair_count: int | None = None,
        decay_step_size: float = 0,
        cycle_momentum: bool = True,
        cycle_min_mom: PerGroup = 0.8,
        cycle_max_mom: PerGroup = 0.9,
        decay_mom_rate: float = 0.0,
        last_batch_iteration: int = -1,
    ) -> None:
        second = cycle_first_step_size if cycle_second_step_size is None else cycle_second_step_size
        second_stairs = (
            cycle_first_stair_count if cycle_second_stair_count is None else cycle_second_stair_count
        )
        self._cycle = Cycle(
            cycle_first_step_size, second, cycle_first_stair_count, second_stairs, decay_step_size
        )
        _require_shape(self._cycle)
        if (decay_lr_rate or decay_mom_rate) and not decay_step_size:
            _log.warning("OneCycle: decay rates have no effect while decay_step_size is 0")
        self.min_lrs = per_group("cycle_min_lr", cycle_min_lr, optimizer)
        self.max_lrs = per_group("cycle_max_lr", cycle_max_lr, optimizer)
        self.min_moms = per_group("cycle_min_mom", cycle_min_mom, optimizer)
        self.max_moms = per_group("cycle_max_mom", cycle_max_mom, optimizer)
        self.decay_lr_rate, self.decay_mom_rate = decay_lr_rate, decay_mom_rate
        self.cycle_momentum = cycle_momentum and _has_momentum(optimizer)
        super().__init__(optimizer, last_batch_iteration)

    def lrs_at(self, update: int) -> list[float]:
        """The learning rate of each parameter group for update `update`, counted from 0."""
        height = self._cycle.fraction(update)
        decay = 1 + self.decay_lr_rate * self._cycle.decay_intervals(update)
        return [
            (low + (high - low) * height) / decay
            for low, high in zip(self.min_lrs, self.max_lrs, strict=True)
        ]

    def momenta_at(self, update: int) -> list[float]:
        """The momentum of each parameter group for update `update`, counted from 0."""
        height = self._cycle.fraction(update)
        growth = 1 + self.decay_mom_rate * self._cycle.decay_intervals(update)
        bounds = zip(self.min_moms, self.max_moms, strict=True)
        return [min((high - (high - low) * height) * growth, _MAX_MOMENTUM) for low, high in bounds]

    def step(self, epoch: int | None = None) -> None:
        """Move to the next update's rates and momenta; call it after each applied update."""
        super().step(epoch)
        self._apply_momenta()

    def _apply(self) -> None:
        super()._apply()
        self._apply_momenta()

    def _apply_momenta(self) -> None:
        if not self.cycle_momentum:
            return
        momenta = self.momenta_at(self.last_epoch)
        for group, momentum in zip(self.optimizer.param_groups, momenta, strict=True):
            if "betas" in group:
                group["betas"] = (momentum, *group["betas"][1:])
            elif group.get("momentum"):
                group["momentum"] = momentum


def _has_momentum(optimizer: Optimizer) -> bool:
    def found(group: dict[str, Any]) -> bool:
        return "betas" in group or bool(group.get("momentum"))

    if any(found(group) for group in optimizer.param_groups):
        return True
    _log.warning("OneCycle: %s has no momentum to cycle; only the rate moves", type(optimizer).__name__)
    return False


def _require_shape(cycle: Cycle) -> None:
    if cycle.first <= 0:
        raise ConfigError(f"cycle_first_step_size is {cycle.first}; it must be above 0")
    named = {
        "cycle_second_step_size": cycle.second,
        "cycle_first_stair_count": cycle.first_stairs,
        "cycle_second_stair_count": cycle.second_stairs,
        "decay_step_size": cycle.decay_size,
    }
    for name, value in named.items():
        if value < 0:
            raise ConfigError(f"{name} is {value}; it must be 0 or more")
