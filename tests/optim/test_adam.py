"""Adam and AdamW against torch and against the formulas written out."""

from __future__ import annotations

import logging
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from unishard.errors import ConfigError
from unishard.optim.adam import UncorrectedAdam
from unishard.optim.base import build_optimizer

GRADS = torch.randn(5, 33, generator=torch.Generator().manual_seed(3))
START = torch.linspace(-2, 2, 33)


def run(optimizer: torch.optim.Optimizer, param: Tensor) -> Tensor:
    for grad in GRADS:
        param.grad = grad.clone()
        optimizer.step()
    return param.detach()


def ours(name: str, options: dict[str, Any]) -> Tensor:
    param = torch.nn.Parameter(START.clone())
    return run(build_optimizer(name, [param], options), param)


def reference(cls: type[torch.optim.Optimizer], **options: Any) -> Tensor:
    param = torch.nn.Parameter(START.clone())
    return run(cls([param], foreach=False, **options), param)  # pyright: ignore


@pytest.mark.parametrize(
    "extra", [{}, {"amsgrad": True}, {"maximize": True}, {"betas": [0.8, 0.95], "eps": 1e-6}]
)
@pytest.mark.parametrize(
    ("name", "mode", "cls"),
    [
        ("AdamW", {}, torch.optim.AdamW),
        ("AdamW", {"adam_w_mode": True}, torch.optim.AdamW),
        ("Adam", {}, torch.optim.AdamW),
        ("Adam", {"adam_w_mode": True}, torch.optim.AdamW),
        ("Adam", {"adam_w_mode": False}, torch.optim.Adam),
        ("torch.optim.Adam", {}, torch.optim.Adam),
    ],
)
def test_both_decay_conventions(name: str, mode: dict[str, Any], cls: Any, extra: dict[str, Any]) -> None:
    common = {"lr": 0.05, "weight_decay": 0.3}
    expected = reference(cls, **common, **{**extra, "betas": tuple(extra.get("betas", (0.9, 0.999)))})
    torch.testing.assert_close(ours(name, {**common, **mode, **extra}), expected, rtol=2e-6, atol=1e-6)


def test_the_conventions_differ_enough_to_be_told_apart() -> None:
    common = {"lr": 0.05, "weight_decay": 0.3}
    difference = reference(torch.optim.AdamW, **common) - reference(torch.optim.Adam, **common)
    assert difference.abs().max() > 0.01


@pytest.mark.parametrize(
    ("name", "options", "decay"),
    [
        ("AdamW", {}, 0.0),
        ("Adam", {}, 0.0),
        ("AdamW", {"torch_adam": True}, 0.01),
        ("Adam", {"torch_adam": True, "adam_w_mode": False}, 0.0),
        ("AdamW", {"torch_adam": True, "weight_decay": 0.2}, 0.2),
        ("torch.optim.AdamW", {}, 0.01),
    ],
)
def test_default_weight_decay_is_that_of_whoever_is_named(
    name: str, options: dict[str, Any], decay: float
) -> None:
    optimizer = build_optimizer(name, [torch.nn.Parameter(torch.ones(1))], options)
    assert optimizer.param_groups[0]["weight_decay"] == decay


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("decoupled", [False, True])
def test_no_bias_correction_follows_the_formula(decoupled: bool, amsgrad: bool, maximize: bool) -> None:
    options = {"lr": 0.05, "betas": [0.8, 0.9], "eps": 1e-3, "weight_decay": 0.3, "amsgrad": amsgrad}
    options |= {"bias_correction": False, "adam_w_mode": decoupled, "maximize": maximize}
    expected = []
    for start, grads in zip(START.tolist(), GRADS.T.tolist(), strict=True):
        w, m, v, largest = start, 0.0, 0.0, 0.0
        for given in grads:
            g = -given if maximize else given
            g += 0.0 if decoupled else 0.3 * w
            m, v = 0.8 * m + 0.2 * g, 0.9 * v + 0.1 * g * g
            largest = max(largest, v) if amsgrad else v
            w -= 0.05 * (m / (math.sqrt(largest) + 1e-3) + (0.3 * w if decoupled else 0.0))
        expected.append(w)
    torch.testing.assert_close(ours("Adam", options), torch.tensor(expected), rtol=1e-5, atol=1e-6)


def test_uncorrected_adam_refuses_what_torch_refuses() -> None:
    with pytest.raises(ValueError, match="beta"):
        UncorrectedAdam([], betas=(0.9, 1.5))
    with pytest.raises(TypeError, match="typo"):
        UncorrectedAdam([], typo=1)


@pytest.mark.parametrize(
    ("options", "warns"),
    [
        ({"weight_decay": 0.1}, True),
        ({"weight_decay": 0.0}, False),
        ({"weight_decay": 0.1, "adam_w_mode": True}, False),
        ({"weight_decay": 0.1, "adam_w_mode": False}, False),
    ],
)
def test_adam_meaning_adamw_is_said_where_it_matters(
    options: dict[str, Any], warns: bool, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="unishard"):
        build_optimizer("Adam", [torch.nn.Parameter(torch.ones(1))], options)
    assert ("write type 'AdamW'" in caplog.text) is warns


def test_adam_warns_for_decay_in_a_group(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="unishard"):
        build_optimizer("Adam", [{"params": [], "weight_decay": 0.1}], {})
    assert "adam_w_mode: false" in caplog.text


@pytest.mark.parametrize(
    ("name", "options", "fragment"),
    [
        ("AdamW", {"adam_w_mode": False}, "contradicts the name.*use type 'Adam'"),
        ("AdamW", {"fp32_optimizer_states": False}, "fp32_optimizer_states: false is not supported"),
        ("Adam", {"set_grad_none": False}, "set_grad_none: false is not supported"),
        ("Adam", {"bias_correction": False, "fused": True}, "fused: true needs bias_correction: true"),
        ("AdamW", {"fused": True, "foreach": True}, "cannot be `True` together"),
    ],
)
def test_contradictions_are_refused(name: str, options: dict[str, Any], fragment: str) -> None:
    with pytest.raises(ConfigError, match=f"optimizer {name}: .*{fragment}"):
        build_optimizer(name, [torch.nn.Parameter(torch.ones(1))], options)
