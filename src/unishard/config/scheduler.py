"""`scheduler`: learning-rate schedules, and the parameters each takes.

Sources: DeepSpeed's documented schedules; Smith 2018 (arXiv 1803.09820) for OneCycle and LRRangeTest.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from unishard.config.fields import Auto, Count, Honoured, Int, NonNegative, Section, Size, Translated

_RESUMED = Translated("a schedule's position is its state: restore it with load_state_dict", (-1,))
Rates = NonNegative | list[NonNegative]


class ScheduleParams(Section):
    """Parameters common to every schedule."""

    last_batch_iteration: Annotated[Int, _RESUMED] = -1


class WarmupLRParams(ScheduleParams):
    """`scheduler.params` of WarmupLR; without `warmup_max_lr`, the optimizer's own rate."""

    warmup_min_lr: Annotated[Rates, Auto(), Honoured()] = 0.0
    warmup_max_lr: Annotated[Rates | None, Auto("lr"), Honoured()] = None
    warmup_num_steps: Annotated[Count, Auto("override"), Honoured()] = 1000
    warmup_type: Annotated[Literal["log", "linear"], Auto(), Honoured()] = "log"


class WarmupDecayLRParams(WarmupLRParams):
    """`scheduler.params` of WarmupDecayLR."""

    total_num_steps: Annotated[Count, Auto("override"), Honoured()]
    warmup_max_lr: Annotated[Rates, Auto("lr"), Honoured()] = 1e-3


class WarmupCosineLRParams(ScheduleParams):
    """`scheduler.params` of WarmupCosineLR; ratios are of the optimizer's rate."""

    total_num_steps: Annotated[Count, Auto("override"), Honoured()]
    warmup_min_ratio: Annotated[NonNegative, Auto(), Honoured()] = 0.0
    warmup_num_steps: Annotated[Count, Auto("override"), Honoured()] = 1000
    cos_min_ratio: Annotated[NonNegative, Auto(), Honoured()] = 1e-4
    warmup_type: Annotated[Literal["log", "linear"], Auto(), Honoured()] = "log"


class OneCycleParams(ScheduleParams):
    """`scheduler.params` of OneCycle."""

    cycle_min_lr: Annotated[Rates, Honoured()]
    cycle_max_lr: Annotated[Rates, Honoured()]
    decay_lr_rate: Annotated[NonNegative, Honoured()] = 0.0
    cycle_first_step_size: Annotated[Count, Honoured()] = 2000
    cycle_second_step_size: Annotated[Count | None, Honoured()] = None
    cycle_first_stair_count: Annotated[Size, Honoured()] = 0
    cycle_second_stair_count: Annotated[Size | None, Honoured()] = None
    decay_step_size: Annotated[Size, Honoured()] = 0
    cycle_momentum: Annotated[bool, Honoured()] = True
    cycle_min_mom: Annotated[NonNegative, Field(lt=1), Honoured()] = 0.8
    cycle_max_mom: Annotated[NonNegative, Field(lt=1), Honoured()] = 0.9
    decay_mom_rate: Annotated[NonNegative, Honoured()] = 0.0


class LRRangeTestParams(ScheduleParams):
    """`scheduler.params` of LRRangeTest."""

    lr_range_test_min_lr: Annotated[Rates, Honoured()] = 1e-3
    lr_range_test_step_size: Annotated[Count, Honoured()] = 2000
    lr_range_test_step_rate: Annotated[NonNegative, Honoured()] = 1.0
    lr_range_test_staircase: Annotated[bool, Honoured()] = False


SCHEDULES: dict[str, type[ScheduleParams]] = {
    "WarmupLR": WarmupLRParams,
    "WarmupDecayLR": WarmupDecayLRParams,
    "WarmupCosineLR": WarmupCosineLRParams,
    "OneCycle": OneCycleParams,
    "LRRangeTest": LRRangeTestParams,
}
"""Types built here, by canonical spelling."""


TORCH_SCHEDULES = (
    "StepLR",
    "MultiStepLR",
    "ConstantLR",
    "LinearLR",
    "ExponentialLR",
    "PolynomialLR",
    "CosineAnnealingLR",
    "CosineAnnealingWarmRestarts",
    "CyclicLR",
    "OneCycleLR",
)
"""Schedules of torch.optim.lr_scheduler, accepted without their module as DeepSpeed does."""


class Scheduler(Section):
    """`scheduler`: a type by name or import path of a torch scheduler, and its parameters."""

    type: Annotated[str, Honoured()]
    params: Annotated[dict[str, Any], Honoured()] = {}


class SchedulerKeys(Section):
    """Top-level keys about the schedule."""

    scheduler: Annotated[Scheduler | None, Honoured()] = None
