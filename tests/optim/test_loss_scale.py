"""Loss scales as sequences of overflows (x) and clean updates (.)."""

from __future__ import annotations

from typing import Any

import pytest

from unishard.errors import ConfigError, StateError
from unishard.optim.loss_scale import DynamicLossScale, LossScale, NoLossScale, StaticLossScale


def scales(machine: LossScale, events: str) -> list[float]:
    trace = []
    for event in events:
        machine.update(overflow=event == "x")
        trace.append(machine.scale)
    return trace


@pytest.mark.parametrize(
    ("settings", "events", "expected"),
    [
        # The first overflow spends hysteresis, each later one halves, the floor holds.
        ({}, "xxxxx", [8, 4, 2, 1, 1]),
        ({"hysteresis": 1}, "xx", [4, 2]),
        ({"hysteresis": 3}, "xxx", [8, 8, 4]),
        ({"hysteresis": 1, "min_scale": 3.0}, "xxx", [4, 3, 3]),
        ({"hysteresis": 1, "backoff_factor": 0.25}, "x", [2]),
        # Growth comes with clean update window + 1, then every window.
        ({"window": 2}, ".......", [8, 8, 16, 16, 32, 32, 64]),
        ({"window": 2, "growth_factor": 3.0}, "...", [8, 8, 24]),
        ({"window": 1}, "....", [8, 16, 32, 64]),
        # An overflow starts the count again.
        ({"window": 2, "hysteresis": 1}, "..x....", [8, 8, 4, 4, 4, 8, 8]),
        # Hysteresis spent stays spent over clean updates, until growth refills it.
        ({}, "x.x", [8, 8, 4]),
        ({"window": 2}, "x...x.x", [8, 8, 8, 16, 16, 16, 8]),
        # With consecutive_hysteresis any clean update refills it.
        ({"consecutive_hysteresis": True}, "x.x.xx", [8, 8, 8, 8, 8, 4]),
    ],
)
def test_dynamic_sequences(settings: dict[str, Any], events: str, expected: list[float]) -> None:
    assert scales(DynamicLossScale(initial=8, **settings), events) == expected


def test_dynamic_defaults() -> None:
    machine = DynamicLossScale()
    assert (machine.scale, machine.window, machine.hysteresis, machine.min_scale) == (65536.0, 1000, 2, 1)


def test_dynamic_is_exhausted_by_overflows_in_a_row_at_the_floor() -> None:
    machine = DynamicLossScale(initial=4, hysteresis=1, max_consecutive_overflows=3)
    exhausted = []
    for event in "xxxx.xxx":  # 4→2, 2→1, then two at the floor, a clean one, three at the floor
        machine.update(overflow=event == "x")
        exhausted.append(machine.exhausted)
    assert exhausted == [False] * 7 + [True]


def test_overflows_above_the_floor_do_not_exhaust() -> None:
    machine = DynamicLossScale(initial=2.0**8, hysteresis=1, max_consecutive_overflows=1)
    assert scales(machine, "x" * 8)[-1] == 1
    assert not machine.exhausted
    machine.update(overflow=True)
    assert machine.exhausted


@pytest.mark.parametrize("machine", [StaticLossScale(128, 2), NoLossScale(2)])
def test_fixed_scales_never_move_and_exhaust_in_a_row(machine: LossScale) -> None:
    start = machine.scale
    assert scales(machine, "x.x.") == [start] * 4
    assert not machine.exhausted
    assert scales(machine, "xx") == [start] * 2
    assert machine.exhausted


@pytest.mark.parametrize(
    "machine",
    [StaticLossScale(2, None), NoLossScale(None), DynamicLossScale(2, max_consecutive_overflows=None)],
)
def test_no_limit_means_never_exhausted(machine: LossScale) -> None:
    scales(machine, "x" * 100)
    assert not machine.exhausted


@pytest.mark.parametrize("split", range(1, 12))
def test_a_loaded_state_goes_on_exactly(split: int) -> None:
    events = "x..x...xx..x"
    settings = {"initial": 8, "window": 2, "max_consecutive_overflows": 2}
    straight, before, after = (DynamicLossScale(**settings) for _ in range(3))
    expected = scales(straight, events)
    scales(before, events[:split])
    after.load_state_dict(before.state_dict())
    assert scales(after, events[split:]) == expected[split:]
    assert after.state_dict() == straight.state_dict()


def test_a_loaded_scale_respects_the_configured_floor_and_fixed_ones_keep_theirs() -> None:
    low = DynamicLossScale(initial=2)
    raised = DynamicLossScale(initial=64, min_scale=16)
    raised.load_state_dict(low.state_dict())
    assert raised.scale == 16
    fixed = StaticLossScale(128)
    fixed.load_state_dict(StaticLossScale(4).state_dict())
    assert fixed.scale == 128


def test_a_state_of_another_kind_is_refused() -> None:
    with pytest.raises(StateError, match=r"DynamicLossScale cannot load.*'overflows'"):
        DynamicLossScale().load_state_dict(StaticLossScale(1).state_dict())
    with pytest.raises(StateError, match=r"NoLossScale cannot load.*'hysteresis_left'"):
        NoLossScale().load_state_dict(DynamicLossScale().state_dict())


def test_all_satisfy_the_protocol() -> None:
    assert all(isinstance(m, LossScale) for m in (StaticLossScale(2), NoLossScale(), DynamicLossScale()))


@pytest.mark.parametrize(
    ("settings", "fragment"),
    [
        ({"initial": 0.5}, "initial loss scale is 0.5.*raise initial_scale_power"),
        ({"initial": float("inf")}, "initial loss scale is inf"),
        ({"min_scale": 0}, "min_loss_scale is 0"),
        ({"growth_factor": 1}, "growth_factor is 1; it must be above 1"),
        ({"backoff_factor": 1.5}, "backoff_factor is 1.5; it must be between 0 and 1"),
        ({"window": 0}, "loss_scale_window is 0"),
        ({"hysteresis": 0}, "hysteresis is 0"),
        ({"max_consecutive_overflows": 0}, "max_consecutive_overflows is 0"),
    ],
)
def test_dynamic_refusals(settings: dict[str, Any], fragment: str) -> None:
    with pytest.raises(ConfigError, match=fragment):
        DynamicLossScale(**settings)


@pytest.mark.parametrize("scale", [0, -2, float("inf"), float("nan")])
def test_static_refusals(scale: float) -> None:
    with pytest.raises(ConfigError, match="loss_scale is"):
        StaticLossScale(scale)
