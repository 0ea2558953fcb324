"""`runtime.lr_schedules`: unishard's schedules, and the command-line arguments that DeepSpeed reads for them."""

from __future__ import annotations

import argparse
import logging
from typing import Any

import torch

from unishard.optim.closed_form import ClosedFormLR
from unishard.optim.one_cycle import OneCycle as _OneCycle
from unishard.optim.schedules import LRRangeTest as _LRRangeTest
from unishard.optim.schedules import WarmupCosineLR as _WarmupCosineLR
from unishard.optim.schedules import WarmupDecayLR as _WarmupDecayLR
from unishard.optim.schedules import WarmupLR as _WarmupLR

__all__ = ["LRRangeTest", "OneCycle", "WarmupCosineLR", "WarmupDecayLR", "WarmupLR"]

log = logging.getLogger("unishard")


class _Numbered(ClosedFormLR):
    """`step(n)` in DeepSpeed says that update n, counted from 0, is over; torch's that update n is next."""

    def step(self, epoch: int | None = None) -> None:
        super().step(None if epoch is None else epoch + 1)

    @property
    def last_batch_iteration(self) -> int:
        """The last update that is over; -1 before the first."""
        return self.last_epoch - 1


def _known_type(kind: str) -> str:
    """DeepSpeed warms up logarithmically where it does not know the type, and says so."""
    if kind in ("log", "linear"):
        return kind
    log.warning(
        "unishard: warmup_type %r is neither 'log' nor 'linear'; taking 'log', as DeepSpeed does", kind
    )
    return "log"


class LRRangeTest(_Numbered, _LRRangeTest):
    """As `unishard.optim.schedules.LRRangeTest`."""


class WarmupLR(_Numbered, _WarmupLR):
    """As `unishard.optim.schedules.WarmupLR`; an unknown `warmup_type` is taken for `"log"`."""

    def _set_warmup(self, num_steps: int, kind: str) -> None:
        super()._set_warmup(num_steps, _known_type(kind))


class WarmupDecayLR(_Numbered, _WarmupDecayLR):
    """As `unishard.optim.schedules.WarmupDecayLR`; an unknown `warmup_type` is taken for `"log"`."""

    def _set_warmup(self, num_steps: int, kind: str) -> None:
        super()._set_warmup(num_steps, _known_type(kind))


class WarmupCosineLR(_Numbered, _WarmupCosineLR):
    """As `unishard.optim.schedules.WarmupCosineLR`; an unknown `warmup_type` is taken for `"log"`."""

    def _set_warmup(self, num_steps: int, kind: str) -> None:
        super()._set_warmup(num_steps, _known_type(kind))

    def get_lr_ratio(self) -> float:
        """The share of each group's own rate that the coming update uses."""
        return self.ratio_at(self.last_epoch)


class OneCycle(_Numbered, _OneCycle):
    """`unishard.optim.one_cycle.OneCycle` with DeepSpeed's treatment of momentum.

    `betas[1]` is 0.99 throughout, the first update takes `cycle_min_mom`, and SGD's momentum is left alone.
    """

    _SECOND_BETA = 0.99

    def __init__(self, optimizer: Any, *args: Any, **options: Any) -> None:
        self._started = False
        super().__init__(optimizer, *args, **options)
        if not all("betas" in group for group in optimizer.param_groups):
            self.cycle_momentum = False
        if self.cycle_momentum:
            for group, momentum in zip(optimizer.param_groups, self.min_moms, strict=True):
                group["betas"] = (momentum, self._SECOND_BETA)
        self._started = True

    def _apply_momenta(self) -> None:
        if self._started:
            super()._apply_momenta()

    def get_mom(self) -> list[tuple[float, float]] | None:
        """The betas of each group for the coming update; `None` when momentum is not cycled."""
        if not self.cycle_momentum:
            return None
        return [(momentum, self._SECOND_BETA) for momentum in self.momenta_at(self.last_epoch)]

    @property
    def total_size(self) -> float:
        """Updates of the whole cycle."""
        return self._cycle.first + self._cycle.second

    @property
    def step_ratio(self) -> float:
        """The rising share of the cycle."""
        return self._cycle.first / self.total_size


SCHEDULES = {kind.__name__: kind for kind in (LRRangeTest, OneCycle, WarmupLR, WarmupDecayLR, WarmupCosineLR)}
"""Schedules that the door builds in place of the engine's own."""

VALID_LR_SCHEDULES = ["LRRangeTest", "OneCycle", "WarmupLR", "WarmupDecayLR", "WarmupCosineLR"]

_FLOATS: dict[str, float] = {
    "lr_range_test_min_lr": 0.001,
    "lr_range_test_step_rate": 1.0,
    "cycle_min_lr": 0.01,
    "cycle_max_lr": 0.1,
    "decay_lr_rate": 0.0,
    "cycle_min_mom": 0.8,
    "cycle_max_mom": 0.9,
    "decay_mom_rate": 0.0,
    "warmup_min_lr": 0.0,
    "warmup_max_lr": 0.001,
    "warmup_min_ratio": 0.01,
    "cos_min_ratio": 0.01,
}
_INTS: dict[str, int] = {
    "lr_range_test_step_size": 1000,
    "cycle_first_step_size": 1000,
    "cycle_first_stair_count": -1,
    "cycle_second_step_size": -1,
    "cycle_second_stair_count": -1,
    "decay_step_size": 1000,
    "warmup_num_steps": 1000,
    "total_num_steps": 10000,
}
_OF_SCHEDULE = {
    "LRRangeTest": ("lr_range_test_",),
    "OneCycle": ("cycle_", "decay_"),
    "WarmupLR": ("warmup_min_lr", "warmup_max_lr", "warmup_num_steps", "warmup_type"),
    "WarmupDecayLR": ("warmup_min_lr", "warmup_max_lr", "warmup_num_steps", "warmup_type", "total_num_steps"),
    "WarmupCosineLR": (
        "warmup_min_ratio",
        "warmup_num_steps",
        "warmup_type",
        "cos_min_ratio",
    ),
}


def add_tuning_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the options of every schedule to `parser`, and return it.

    >>> parser = add_tuning_arguments(argparse.ArgumentParser())
    >>> parser.parse_args(["--lr_schedule", "OneCycle"]).cycle_max_lr
    0.1
    """
    group = parser.add_argument_group("Convergence Tuning", "Convergence tuning configurations")
    group.add_argument(
        "--lr_schedule", type=str, default=None, help="one of " + ", ".join(VALID_LR_SCHEDULES)
    )
    for name, default in _FLOATS.items():
        group.add_argument(f"--{name}", type=float, default=default)
    for name, default in _INTS.items():
        group.add_argument(f"--{name}", type=int, default=default)
    group.add_argument("--lr_range_test_staircase", default=False, action="store_true")
    group.add_argument("--cycle_momentum", default=False, action="store_true")
    group.add_argument("--warmup_type", type=str, default="log", help="log or linear")
    return parser


def parse_arguments() -> tuple[argparse.Namespace, list[str]]:
    """The options of the command line, and what is not among them."""
    return add_tuning_arguments(argparse.ArgumentParser()).parse_known_args()


def _override(schedule: str, args: Any, params: dict[str, Any]) -> None:
    for name, value in vars(args).items():
        # A size below zero is the command line's way of not giving one.
        given = value is not None and not (name in _INTS and value < 0)
        if name.startswith(_OF_SCHEDULE[schedule]) and given:
            params[name] = value


def override_lr_range_test_params(args: Any, params: dict[str, Any]) -> None:
    """Put what `args` has of LRRangeTest's options into `params`."""
    _override("LRRangeTest", args, params)


def override_1cycle_params(args: Any, params: dict[str, Any]) -> None:
    """Put what `args` has of OneCycle's options into `params`."""
    _override("OneCycle", args, params)


def override_warmupLR_params(args: Any, params: dict[str, Any]) -> None:
    """Put what `args` has of WarmupLR's options into `params`."""
    _override("WarmupLR", args, params)


def override_params(args: Any, params: dict[str, Any]) -> None:
    """Put what `args` has of any schedule's options into `params`."""
    for schedule in _OF_SCHEDULE:
        _override(schedule, args, params)


def get_config_from_args(args: Any) -> tuple[dict[str, Any] | None, str | None]:
    """A `scheduler` section made of command-line options, or `None` and what is wrong."""
    chosen = getattr(args, "lr_schedule", None)
    if chosen is None:
        return None, "--lr_schedule not specified on command line"
    if chosen not in VALID_LR_SCHEDULES:
        return None, f"{chosen} is not supported LR schedule"
    params: dict[str, Any] = {}
    _override(chosen, args, params)
    return {"type": chosen, "params": params}, None


def get_lr_from_config(config: dict[str, Any]) -> tuple[float | None, str]:
    """The highest rate of a `scheduler` section, or `None` and what is wrong."""
    for key in ("type", "params"):
        if key not in config:
            return None, f"LR schedule {key} not defined in config"
    if config["type"] not in VALID_LR_SCHEDULES:
        return None, f"{config['type']} is not a valid LR schedule"
    if config["type"] == "WarmupCosineLR":
        return None, "WarmupCosineLR has no rate of its own: it scales those of the optimizer's groups"
    key = {"LRRangeTest": "lr_range_test_min_lr", "OneCycle": "cycle_max_lr"}.get(
        config["type"], "warmup_max_lr"
    )
    return config["params"][key], ""


def update_lr(param_groups: list[dict[str, Any]], lrs: list[Any]) -> list[Any]:
    """Give each group its rate; returns the rates."""
    for group, rate in zip(param_groups, lrs, strict=False):
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate
    return [group["lr"] for group in param_groups]


def get_torch_optimizer(optimizer: Any) -> torch.optim.Optimizer:
    """The torch optimizer that `optimizer` is or holds. Raises `TypeError` if there is none."""
    if isinstance(optimizer, torch.optim.Optimizer):
        return optimizer
    inner = getattr(optimizer, "optimizer", None)
    if isinstance(inner, torch.optim.Optimizer):
        return inner
    raise TypeError(f"{type(optimizer).__name__} is not a subclass of torch.optim.Optimizer")
