"""Learning-rate schedules with DeepSpeed's names and parameters, as `torch.optim.lr_scheduler.LRScheduler`s.

Step a schedule once per applied update, after it; not for a skipped one, nor for a micro-batch. Every value
is a closed form of the number of updates (`unishard.optim.curves`), so resuming needs only that number.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch.optim.lr_scheduler as torch_schedulers
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from unishard.errors import ConfigError, UnsupportedError
from unishard.optim.closed_form import ClosedFormLR, PerGroup, per_group, whole_number
from unishard.optim.curves import (
    WarmupType,
    cosine_decay_fraction,
    linear_decay_fraction,
    range_test_factor,
    warmup_fraction,
)
from unishard.optim.one_cycle import OneCycle
from unishard.optim.options import checked_options, import_class, suggest

_log = logging.getLogger(__name__)


class _Warmup(ClosedFormLR):
    """The warm-up that three schedules begin with."""

    def _set_warmup(self, num_steps: int, kind: str) -> None:
        if kind not in ("log", "linear"):
            raise ConfigError(f"warmup_type is {kind!r}; it must be 'log' or 'linear'")
        if whole_number("warmup_num_steps", num_steps, least=0) == 0:
            _log.info("warmup_num_steps 0 is taken as 2, the shortest warm-up")
        self.warmup_num_steps = max(2, int(num_steps))
        self.warmup_type: WarmupType = "log" if kind == "log" else "linear"

    def _set_total(self, total: int) -> None:
        self.total_num_steps = whole_number("total_num_steps", total, least=1)
        if self.total_num_steps < self.warmup_num_steps:
            _log.warning("total_num_steps %d is less than warmup_num_steps %d", total, self.warmup_num_steps)

    def _warmed(self, update: int) -> float:
        return warmup_fraction(update, self.warmup_num_steps, self.warmup_type)


class WarmupLR(_Warmup):
    """Rise from `warmup_min_lr` to `warmup_max_lr` over `warmup_num_steps` updates, then stay.

    Args:
        optimizer: any `torch.optim.Optimizer`.
        warmup_min_lr: the rate of updates 0 and 1.
        warmup_max_lr: the rate after the warm-up; None for the optimizer's own.
        warmup_num_steps: updates; fewer than 2 count as 2.
        warmup_type: `log` or `linear` in the number of updates.
        last_batch_iteration: see `ClosedFormLR`.

    Raises:
        ConfigError: a value out of range, or a list that does not match the parameter groups.

    >>> import torch
    >>> optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=8.0)
    >>> WarmupLR(optimizer, warmup_num_steps=4, warmup_type="linear").lrs_at(3)
    [4.0]
    """

    def __init__(
        self,
        optimizer: Optimizer,
        warmup_min_lr: PerGroup = 0.0,
        warmup_max_lr: PerGroup | None = None,
        warmup_num_steps: int = 1000,
        warmup_type: str = "log",
        last_batch_iteration: int = -1,
    ) -> None:
        self._set_warmup(warmup_num_steps, warmup_type)
        self.min_lrs = per_group("warmup_min_lr", warmup_min_lr, optimizer)
        self._max_lrs = (
            None if warmup_max_lr is None else per_group("warmup_max_lr", warmup_max_lr, optimizer)
        )
        super().__init__(optimizer, last_batch_iteration)

    @property
    def max_lrs(self) -> list[float]:
        """The rate of each parameter group after the warm-up."""
        return [float(lr) for lr in self.base_lrs] if self._max_lrs is None else self._max_lrs

    def lrs_at(self, update: int) -> list[float]:
        """The learning rate of each parameter group for update `update`, counted from 0."""
        height = self._height(update)
        return [low + (high - low) * height for low, high in zip(self.min_lrs, self.max_lrs, strict=True)]

    def _height(self, update: int) -> float:
        return self._warmed(update)


class WarmupDecayLR(WarmupLR):
    """`WarmupLR`, then fall linearly back to `warmup_min_lr` at `total_num_steps`.

    Args:
        total_num_steps: updates of the whole run, warm-up included.
        others: as in `WarmupLR`, but `warmup_max_lr` is 0.001 when left out.

    Raises:
        ConfigError: as `WarmupLR`.

    >>> import torch
    >>> optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=8.0)
    >>> schedule = WarmupDecayLR(optimizer, total_num_steps=6, warmup_max_lr=8.0, warmup_num_steps=2)
    >>> [schedule.lrs_at(n)[0] for n in (3, 4, 7)]
    [8.0, 6.0, 0.0]
    """

    def __init__(
        self,
        optimizer: Optimizer,
        total_num_steps: int,
        warmup_min_lr: PerGroup = 0.0,
        warmup_max_lr: PerGroup | None = 0.001,
        warmup_num_steps: int = 1000,
        warmup_type: str = "log",
        last_batch_iteration: int = -1,
    ) -> None:
        self._set_warmup(warmup_num_steps, warmup_type)
        self._set_total(total_num_steps)
        super().__init__(
            optimizer, warmup_min_lr, warmup_max_lr, warmup_num_steps, warmup_type, last_batch_iteration
        )

    def _height(self, update: int) -> float:
        if update <= self.warmup_num_steps:
            return self._warmed(update)
        return linear_decay_fraction(update, self.warmup_num_steps, self.total_num_steps)


class WarmupCosineLR(_Warmup):
    """Rise to the optimizer's own rate, then follow half a cosine down to `cos_min_ratio` of it.

    Args:
        optimizer: any `torch.optim.Optimizer`; its groups' rates are the peaks.
        total_num_steps: updates of the whole run, warm-up included.
        warmup_min_ratio: share of the peak at update 1; update 0 uses a rate of 0, as in DeepSpeed.
        warmup_num_steps, warmup_type, last_batch_iteration: as in `WarmupLR`.
        cos_min_ratio: share of the peak from `total_num_steps` on.

    Raises:
        ConfigError: a value out of range.

    >>> import torch
    >>> optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=8.0)
    >>> schedule = WarmupCosineLR(optimizer, total_num_steps=6, warmup_num_steps=2, cos_min_ratio=0.5)
    >>> [schedule.lrs_at(n)[0] for n in (0, 2, 4, 6)]
    [0.0, 8.0, 6.0, 4.0]
    """

    def __init__(
        self,
        optimizer: Optimizer,
        total_num_steps: int,
        warmup_min_ratio: float = 0.0,
        warmup_num_steps: int = 1000,
        cos_min_ratio: float = 0.0001,
        warmup_type: str = "log",
        last_batch_iteration: int = -1,
    ) -> None:
        self._set_warmup(warmup_num_steps, warmup_type)
        self._set_total(total_num_steps)
        for name, ratio in (("warmup_min_ratio", warmup_min_ratio), ("cos_min_ratio", cos_min_ratio)):
            if not 0 <= ratio <= 1:
                raise ConfigError(f"{name} is {ratio}; it must be between 0 and 1")
        self.warmup_min_ratio = warmup_min_ratio
        self.cos_min_ratio = cos_min_ratio
        super().__init__(optimizer, last_batch_iteration)

    def ratio_at(self, update: int) -> float:
        """The share of the peak for update `update`, counted from 0."""
        if update == 0:
            return 0.0
        if update <= self.warmup_num_steps:
            return self.warmup_min_ratio + (1 - self.warmup_min_ratio) * self._warmed(update)
        return cosine_decay_fraction(update, self.warmup_num_steps, self.total_num_steps, self.cos_min_ratio)

    def lrs_at(self, update: int) -> list[float]:
        """The learning rate of each parameter group for update `update`, counted from 0."""
        ratio = self.ratio_at(update)
        return [float(lr) * ratio for lr in self.base_lrs]


class LRRangeTest(ClosedFormLR):
    """Raise the rate steadily, to find the highest one that trains (Smith 2018, arXiv:1803.09820).

    Args:
        optimizer: any `torch.optim.Optimizer`.
        lr_range_test_min_lr: the first rate.
        lr_range_test_step_size: updates per interval.
        lr_range_test_step_rate: growth per interval, as a multiple of the first rate.
        lr_range_test_staircase: rise at the end of each interval instead of with every update.
        last_batch_iteration: see `ClosedFormLR`.

    Raises:
        ConfigError: a value out of range, or a list that does not match the parameter groups.

    >>> import torch
    >>> optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=8.0)
    >>> LRRangeTest(optimizer, 0.5, 10, 2.0).lrs_at(5)
    [1.0]
    """

    def __init__(
        self,
        optimizer: Optimizer,
        lr_range_test_min_lr: PerGroup = 1e-3,
        lr_range_test_step_size: int = 2000,
        lr_range_test_step_rate: float = 1.0,
        lr_range_test_staircase: bool = False,
        last_batch_iteration: int = -1,
    ) -> None:
        self.min_lrs = per_group("lr_range_test_min_lr", lr_range_test_min_lr, optimizer)
        self.step_size = whole_number("lr_range_test_step_size", lr_range_test_step_size, least=1)
        self.step_rate = lr_range_test_step_rate
        self.staircase = lr_range_test_staircase
        super().__init__(optimizer, last_batch_iteration)

    def lrs_at(self, update: int) -> list[float]:
        """The learning rate of each parameter group for update `update`, counted from 0."""
        factor = range_test_factor(update, self.step_size, self.step_rate, self.staircase)
        return [low * factor for low in self.min_lrs]


SCHEDULES: Mapping[str, type[LRScheduler]] = {
    cls.__name__: cls for cls in (WarmupLR, WarmupDecayLR, WarmupCosineLR, OneCycle, LRRangeTest)
}
"""The schedules that a config names without an import path."""

# These take other schedulers, or none at all, where a config has only numbers.
_NOT_FROM_OPTIONS = ("SequentialLR", "ChainedScheduler")


def find_schedule(type_name: str) -> type[LRScheduler]:
    """The schedule class that a config means by `type_name`.

    A name in `SCHEDULES` or of a class in `torch.optim.lr_scheduler` (both without regard to case), or an
    import path.

    Raises:
        ConfigError: unknown name, bad import path, or not an `LRScheduler`.
        UnsupportedError: a scheduler that is made of other schedulers.

    >>> find_schedule("warmuplr").__name__, find_schedule("CosineAnnealingLR").__module__
    ('WarmupLR', 'torch.optim.lr_scheduler')
    """
    in_torch = {
        name: cls
        for name, cls in vars(torch_schedulers).items()
        if isinstance(cls, type) and issubclass(cls, LRScheduler) and not name.startswith("_")
    }
    by_lower = {
        name.lower(): cls for name, cls in {**in_torch, **SCHEDULES}.items() if cls is not LRScheduler
    }
    found = by_lower.get(type_name.lower())
    if found is None and "." in type_name:
        found = import_class("scheduler", type_name)
    if found is None:
        names = [*SCHEDULES, *in_torch]
        hint = suggest(type_name, names) or f" Known: {', '.join(names)}, or the import path of a class."
        raise ConfigError(f"unknown scheduler type {type_name!r}.{hint}")
    if not issubclass(found, LRScheduler) or found is LRScheduler:
        raise ConfigError(
            f"scheduler {type_name!r} is not a subclass of torch.optim.lr_scheduler.LRScheduler; "
            "build it yourself and pass it as `lr_scheduler=`"
        )
    if found.__name__ in _NOT_FROM_OPTIONS:
        raise UnsupportedError(
            f"scheduler {type_name!r} is made of other schedulers, which a config cannot hold; "
            "pass `lr_scheduler=lambda optimizer: ...` instead"
        )
    return found


def check_schedule(type_name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Check a config's scheduler section before there is an optimizer; return the options to be used.

    Values that depend on the optimizer, such as the length of lists, are checked by `build_schedule`.

    Raises:
        ConfigError, UnsupportedError: unknown name or options.

    >>> check_schedule("WarmupLR", {"warmup_num_steps": 10})
    {'warmup_num_steps': 10}
    """
    return checked_options(f"scheduler {type_name}", find_schedule(type_name), options)


def build_schedule(type_name: str, optimizer: Optimizer, options: Mapping[str, Any]) -> LRScheduler:
    """Build the schedule that a config names, over any `torch.optim.Optimizer`.

    Args:
        type_name: see `find_schedule`.
        optimizer: its groups' `lr` is set at once to the first update's value.
        options: keyword options, as written in the config.

    Raises:
        ConfigError: unknown name or option (with the closest valid one), a value that the schedule refuses,
            or a list that does not match the parameter groups.
        UnsupportedError: a scheduler that is made of other schedulers.

    >>> import torch
    >>> optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    >>> build_schedule("LRRangeTest", optimizer, {"lr_range_test_min_lr": 0.01}).get_last_lr()
    [0.01]
    """
    checked = check_schedule(type_name, options)
    build: Callable[..., LRScheduler] = find_schedule(type_name)
    try:
        return build(optimizer, **checked)
    except (TypeError, ValueError, KeyError) as error:
        raise ConfigError(f"scheduler {type_name}: {error} (options given: {dict(options)})") from error
