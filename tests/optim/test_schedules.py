"""Schedules against numbers of DeepSpeed 0.19.8, worked out by its documented formulas."""

from __future__ import annotations

import logging
import math
import warnings
from typing import Any

import pytest
import torch
from torch.optim.lr_scheduler import LRScheduler

from unishard.errors import ConfigError, StateError, UnsupportedError
from unishard.optim.schedules import SCHEDULES, WarmupLR, build_schedule, check_schedule, find_schedule

WARMUP = {"warmup_num_steps": 4, "warmup_max_lr": 0.3, "warmup_min_lr": 0.01}
DECAY = {"total_num_steps": 8, "warmup_max_lr": 0.3, "warmup_num_steps": 3}
COSINE = {"total_num_steps": 8, "warmup_num_steps": 3, "warmup_min_ratio": 0.1, "cos_min_ratio": 0.05}
RANGE = {"lr_range_test_min_lr": 0.01, "lr_range_test_step_size": 3, "lr_range_test_step_rate": 2.5}
CYCLE = {"cycle_min_lr": 0.01, "cycle_max_lr": 0.3, "cycle_first_step_size": 3, "cycle_second_step_size": 2}
OPTIONS = {
    "WarmupLR": WARMUP,
    "WarmupDecayLR": DECAY,
    "WarmupCosineLR": COSINE,
    "LRRangeTest": RANGE,
    "OneCycle": CYCLE,
}


def make_optimizer(groups: int = 1, lr: Any = 0.5) -> torch.optim.Optimizer:
    return torch.optim.AdamW(
        [{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": lr} for _ in range(groups)]
    )


def used(schedule: LRScheduler, updates: int) -> list[float]:
    """The first group's rate in each of the next updates."""
    rates = []
    for _ in range(updates):
        rates.append(float(schedule.optimizer.param_groups[0]["lr"]))
        schedule.optimizer.step()
        schedule.step()
    return rates


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        # 0.01 + 0.29 * log(n) / log(4)
        ("WarmupLR", WARMUP, [0.01, 0.01, 0.155, 0.01 + 0.29 * math.log(3) / math.log(4), 0.3, 0.3]),
        # 0.01 + 0.29 * (n - 1) / 4
        ("WarmupLR", {**WARMUP, "warmup_type": "linear"}, [0.01, 0.01, 0.0825, 0.155, 0.2275, 0.3, 0.3]),
        # Without warmup_max_lr the optimizer's own rate, 0.5.
        ("WarmupLR", {"warmup_num_steps": 2}, [0.0, 0.0, 0.5, 0.5]),
        # A warm-up of 0 or 1 steps has 2.
        ("WarmupLR", {"warmup_num_steps": 1, "warmup_type": "linear"}, [0.0, 0.0, 0.25, 0.5]),
        ("WarmupLR", {"warmup_num_steps": 0, "warmup_type": "linear"}, [0.0, 0.0, 0.25, 0.5]),
        (
            "WarmupDecayLR",
            {**DECAY, "warmup_type": "linear"},
            [0.0, 0.0, 0.1, 0.2, 0.3, 0.24, 0.18, 0.12, 0.06, 0.0, 0.0],
        ),
        ("WarmupDecayLR", {"total_num_steps": 4, "warmup_num_steps": 2}, [0, 0, 0.001, 0.001, 0.0005, 0, 0]),
        (
            "WarmupCosineLR",
            COSINE,
            [
                0.0,
                0.05,
                0.3339183891,
                0.5,
                0.4546415362,
                0.3358915362,
                0.1891084638,
                0.0703584638,
                0.025,
                0.025,
            ],
        ),
        ("LRRangeTest", RANGE, [0.01, 0.0183333333, 0.0266666667, 0.035, 0.0433333333, 0.0516666667, 0.06]),
        (
            "LRRangeTest",
            {**RANGE, "lr_range_test_staircase": True},
            [0.01, 0.01, 0.01, 0.035, 0.035, 0.035, 0.06],
        ),
        ("OneCycle", CYCLE, [0.01, 0.1066666667, 0.2033333333, 0.3, 0.155, 0.01, 0.01, 0.01]),
    ],
)
def test_golden_rates(name: str, options: dict[str, Any], expected: list[float]) -> None:
    schedule = build_schedule(name, make_optimizer(), options)
    assert used(schedule, len(expected)) == pytest.approx(expected, abs=1e-10)


@pytest.mark.parametrize("name", SCHEDULES)
def test_defaults_start_and_no_torch_warnings(name: str) -> None:
    required = {key: value for key, value in OPTIONS[name].items() if "total" in key or "cycle_m" in key}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        used(build_schedule(name, make_optimizer(), required), 3)


@pytest.mark.parametrize("name", SCHEDULES)
def test_last_lr_is_the_coming_updates_and_tensor_rates_are_filled_in_place(name: str) -> None:
    rate = torch.tensor(0.5)
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=rate, foreach=False)
    schedule = build_schedule(name, optimizer, OPTIONS[name])
    used(schedule, 3)
    assert optimizer.param_groups[0]["lr"] is rate
    assert float(schedule.get_last_lr()[0]) == float(rate)
    schedule.load_state_dict(schedule.state_dict())
    assert optimizer.param_groups[0]["lr"] is rate
    plain = build_schedule(name, make_optimizer(), OPTIONS[name])
    assert float(rate) == pytest.approx(used(plain, 4)[3])


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("saved_after", [0, 1, 4, 7])
def test_a_loaded_state_goes_on_exactly(name: str, saved_after: int) -> None:
    straight = used(build_schedule(name, make_optimizer(), OPTIONS[name]), 10)
    saving = build_schedule(name, make_optimizer(), OPTIONS[name])
    used(saving, saved_after)
    state = saving.state_dict()
    assert all(isinstance(value, (int, float, list)) for value in state.values()), (
        "must load with weights_only"
    )
    loading = build_schedule(name, make_optimizer(), OPTIONS[name])
    loading.load_state_dict(state)
    assert loading.last_epoch == saved_after
    assert used(loading, 10 - saved_after) == straight[saved_after:]


@pytest.mark.parametrize("name", SCHEDULES)
def test_resuming_by_iteration_number_and_from_deepspeeds_state(name: str) -> None:
    straight = used(build_schedule(name, make_optimizer(), OPTIONS[name]), 10)
    by_number = build_schedule(name, make_optimizer(), {**OPTIONS[name], "last_batch_iteration": 3})
    assert used(by_number, 6) == straight[4:]
    from_state = build_schedule(name, make_optimizer(), OPTIONS[name])
    from_state.load_state_dict({"last_batch_iteration": 3})
    assert used(from_state, 6) == straight[4:]


def test_the_config_decides_the_shape_after_a_resume() -> None:
    short = build_schedule("WarmupDecayLR", make_optimizer(), {**DECAY, "warmup_type": "linear"})
    used(short, 8)
    longer = build_schedule(
        "WarmupDecayLR", make_optimizer(), {**DECAY, "warmup_type": "linear", "total_num_steps": 13}
    )
    longer.load_state_dict(short.state_dict())
    assert used(longer, 2) == pytest.approx([0.18, 0.15])


def test_a_state_that_does_not_fit_is_refused() -> None:
    schedule = build_schedule("WarmupLR", make_optimizer(2), {})
    with pytest.raises(StateError, match=r"WarmupLR cannot load.*2 parameter groups"):
        schedule.load_state_dict(build_schedule("WarmupLR", make_optimizer(1), {}).state_dict())
    with pytest.raises(StateError, match="'gamma'"):
        schedule.load_state_dict({"gamma": 1})


def test_values_per_group() -> None:
    optimizer = make_optimizer(2)
    options = {**WARMUP, "warmup_min_lr": [0.1, 0.2], "warmup_max_lr": [1.0, 2.0]}
    schedule = build_schedule("WarmupLR", optimizer, options)
    assert schedule.get_last_lr() == [0.1, 0.2]
    used(schedule, 5)
    assert [group["lr"] for group in optimizer.param_groups] == [1.0, 2.0]


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("WarmupLR", "warmup_min_lr"),
        ("WarmupLR", "warmup_max_lr"),
        ("WarmupDecayLR", "warmup_max_lr"),
        ("LRRangeTest", "lr_range_test_min_lr"),
        ("OneCycle", "cycle_max_lr"),
        ("OneCycle", "cycle_min_mom"),
    ],
)
def test_lists_must_match_the_groups(name: str, key: str) -> None:
    with pytest.raises(ConfigError, match=f"{key} has 3 values and the optimizer 2 parameter groups"):
        build_schedule(name, make_optimizer(2), {**OPTIONS[name], key: [0.1, 0.2, 0.3]})


@pytest.mark.parametrize(
    ("name", "options", "fragments"),
    [
        ("WarmupL", {}, ["unknown scheduler type 'WarmupL'", "Did you mean 'WarmupLR'?"]),
        ("zzz", {}, ["unknown scheduler type 'zzz'", "Known: WarmupLR"]),
        ("torch.optim.lr_scheduler.StepR", {}, ["no class 'StepR'", "Did you mean 'StepLR'?"]),
        (
            "torch.nn.Linear",
            {},
            ["not a subclass of torch.optim.lr_scheduler.LRScheduler", "`lr_scheduler=`"],
        ),
        ("WarmupLR", {"warmup_steps": 3}, ["scheduler WarmupLR", "'warmup_steps'", "'warmup_num_steps'"]),
        ("WarmupDecayLR", {}, ["'total_num_steps' is required"]),
        ("WarmupLR", {"warmup_type": "cosine"}, ["warmup_type is 'cosine'", "'log' or 'linear'"]),
        ("WarmupLR", {"warmup_num_steps": -1}, ["warmup_num_steps is -1"]),
        ("WarmupLR", {"warmup_num_steps": 1.5}, ["warmup_num_steps is 1.5"]),
        ("WarmupLR", {"warmup_max_lr": "1e-3"}, ["'warmup_max_lr' is the string '1e-3'"]),
        ("WarmupCosineLR", {"total_num_steps": 0}, ["total_num_steps is 0"]),
        ("WarmupCosineLR", {**COSINE, "cos_min_ratio": 2}, ["cos_min_ratio is 2"]),
        ("LRRangeTest", {"lr_range_test_step_size": 0}, ["lr_range_test_step_size is 0"]),
        ("StepLR", {"gamma": 0.1}, ["'step_size' is required"]),
        ("LambdaLR", {"lr_lambda": "lambda n: 1"}, ["'lr_lambda' is the string"]),
        ("CyclicLR", {"base_lr": 0.1, "max_lr": 0.2, "mode": "zigzag"}, ["scheduler CyclicLR", "mode"]),
    ],
)
def test_refusals_name_the_value_and_the_remedy(
    name: str, options: dict[str, Any], fragments: list[str]
) -> None:
    with pytest.raises(ConfigError) as caught:
        build_schedule(name, make_optimizer(), options)
    for fragment in fragments:
        assert fragment in str(caught.value)


def test_schedules_made_of_schedules_are_refused() -> None:
    with pytest.raises(UnsupportedError, match=r"SequentialLR.*lr_scheduler=lambda optimizer"):
        build_schedule("SequentialLR", make_optimizer(), {})


@pytest.mark.parametrize("name", ["CosineAnnealingLR", "torch.optim.lr_scheduler.CosineAnnealingLR"])
def test_any_torch_scheduler(name: str) -> None:
    schedule = build_schedule(name, make_optimizer(), {"T_max": 4})
    assert used(schedule, 5) == pytest.approx([0.5, 0.4267766953, 0.25, 0.0732233047, 0.0])


def test_names_match_without_case_and_check_needs_no_optimizer() -> None:
    assert find_schedule("warmuplr") is WarmupLR
    assert check_schedule("onecycle", CYCLE) == CYCLE
    with pytest.raises(ConfigError, match="'cycle_max_lr' is required"):
        check_schedule("OneCycle", {"cycle_min_lr": 0.1})


def test_whole_floats_are_numbers_of_steps_and_short_totals_warn(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="unishard"):
        schedule = build_schedule("WarmupDecayLR", make_optimizer(), {**DECAY, "total_num_steps": 2.0})
    assert "total_num_steps 2 is less than warmup_num_steps 3" in caplog.text
    assert used(schedule, 6)[-1] == 0.0


def test_a_second_schedule_starts_from_the_first_rate_of_all() -> None:
    optimizer = make_optimizer()
    build_schedule("WarmupLR", optimizer, {"warmup_num_steps": 2})
    assert used(build_schedule("WarmupLR", optimizer, {"warmup_num_steps": 2}), 3)[-1] == 0.5
