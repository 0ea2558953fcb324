"""The 1cycle policy's shape and its momentum."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch

from unishard.errors import ConfigError
from unishard.optim.one_cycle import OneCycle

BASE = {"cycle_min_lr": 0.01, "cycle_max_lr": 0.3, "cycle_first_step_size": 3, "cycle_second_step_size": 2}
DECAYING = {**BASE, "decay_step_size": 2, "decay_lr_rate": 0.5, "decay_mom_rate": 0.01}


def adam(**options: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam([torch.nn.Parameter(torch.zeros(1))], **options)


def sgd(**options: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1, **options)


def test_rate_and_momentum_move_against_each_other_then_decay() -> None:
    optimizer = adam(betas=(0.5, 0.95))
    schedule = OneCycle(optimizer, **DECAYING)
    rates, momenta = [], []
    for _ in range(10):
        rates.append(optimizer.param_groups[0]["lr"])
        momenta.append(optimizer.param_groups[0]["betas"][0])
        assert optimizer.param_groups[0]["betas"][1] == 0.95
        optimizer.step()
        schedule.step()
    # 0.01 + 0.29 * height, then 0.01 / (1 + 0.5 * (n - 5) / 2)
    expected = [0.01, 0.1066666667, 0.2033333333, 0.3, 0.155, 0.01, 0.008, 0.0066666667, 0.0057142857, 0.005]
    assert rates == pytest.approx(expected)
    # 0.9 - 0.1 * height, then 0.9 * (1 + 0.01 * (n - 5) / 2)
    expected = [0.9, 0.8666666667, 0.8333333333, 0.8, 0.85, 0.9, 0.9045, 0.909, 0.9135, 0.918]
    assert momenta == pytest.approx(expected)


def test_stairs_and_one_sided_cycles() -> None:
    def trace(count: int, **options: Any) -> list[float]:
        schedule = OneCycle(adam(), 0.0, 1.0, **options)
        return [schedule.lrs_at(update)[0] for update in range(count)]

    options = {"cycle_first_step_size": 4, "cycle_first_stair_count": 2}
    assert trace(9, **options) == [0, 0, 0.5, 0.5, 1.0, 0.5, 0.5, 0, 0]
    options |= {"cycle_second_step_size": 6, "cycle_second_stair_count": 3}
    assert trace(11, **options) == pytest.approx([0, 0, 0.5, 0.5, 1, 2 / 3, 2 / 3, 1 / 3, 1 / 3, 0, 0])
    assert trace(4, cycle_first_step_size=2, cycle_second_step_size=0) == [0, 0.5, 0, 0]


def test_momentum_of_sgd_is_cycled_and_zero_stays_zero(caplog: pytest.LogCaptureFixture) -> None:
    optimizer = sgd(momentum=0.5)
    schedule = OneCycle(optimizer, **BASE)
    for _ in range(3):
        optimizer.step()
        schedule.step()
    assert optimizer.param_groups[0]["momentum"] == pytest.approx(0.8)
    with caplog.at_level(logging.WARNING, logger="unishard"):
        plain = sgd()
        OneCycle(plain, **BASE)
    assert plain.param_groups[0]["momentum"] == 0
    assert "SGD has no momentum to cycle" in caplog.text


def test_cycle_momentum_off_leaves_betas() -> None:
    optimizer = adam(betas=(0.5, 0.95))
    OneCycle(optimizer, **BASE, cycle_momentum=False)
    assert optimizer.param_groups[0]["betas"] == (0.5, 0.95)


def test_decaying_momentum_stays_below_one() -> None:
    schedule = OneCycle(adam(), **{**DECAYING, "decay_mom_rate": 10.0})
    assert schedule.momenta_at(1000) == [0.9999]


def test_momentum_is_restored_with_the_state() -> None:
    saved = OneCycle(adam(), **BASE)
    for _ in range(2):
        saved.optimizer.step()
        saved.step()
    loaded = OneCycle(adam(), **BASE)
    loaded.load_state_dict(saved.state_dict())
    assert loaded.optimizer.param_groups[0]["betas"] == saved.optimizer.param_groups[0]["betas"]
    assert loaded.optimizer.param_groups[0]["betas"][0] == pytest.approx(0.8333333333)


def test_a_decay_without_intervals_is_said(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="unishard"):
        OneCycle(adam(), **BASE, decay_lr_rate=0.1)
    assert "decay_step_size is 0" in caplog.text


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("cycle_first_step_size", 0),
        ("cycle_second_step_size", -1),
        ("cycle_first_stair_count", -1),
        ("decay_step_size", -5),
    ],
)
def test_refused_shapes(key: str, value: float) -> None:
    with pytest.raises(ConfigError, match=f"{key} is {value}; it must be"):
        OneCycle(adam(), **{**BASE, key: value})
