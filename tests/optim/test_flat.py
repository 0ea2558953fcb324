"""Stepping whole shards through kernels gives what the optimizer itself gives, in weights and in state."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import unishard
from unishard.optim.flat import FlatSteps, rule_of
from unishard.optim.lion import Lion

Ranks = Callable[..., Any]
OPTIMIZERS: list[tuple[str, dict[str, Any]]] = [
    ("AdamW", {"lr": 1e-2, "weight_decay": 0.1}),
    ("Adam", {"lr": 1e-2, "weight_decay": 0.1, "adam_w_mode": False}),
    ("Adam", {"lr": 1e-2, "bias_correction": False}),
    ("Lion", {"lr": 1e-3, "weight_decay": 0.1}),
    ("Adagrad", {"lr": 1e-2, "lr_decay": 0.1, "initial_accumulator_value": 0.3}),
    ("SGD", {"lr": 1e-2}),
    ("SGD", {"lr": 1e-2, "momentum": 0.9, "dampening": 0.1, "weight_decay": 0.1}),
    ("SGD", {"lr": 1e-2, "momentum": 0.9, "nesterov": True}),
]


class Branches(nn.Module):
    """The second branch takes part in odd steps only."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 7)
        self.second = nn.Linear(6, 7)
        self.last = nn.Linear(7, 3)

    def forward(self, x: Tensor, both: bool) -> Tensor:
        hidden = self.first(x) + (self.second(x) if both else 0.0)
        return self.last(torch.tanh(hidden)).pow(2).mean()


@contextmanager
def one_by_one():
    """Parameters stepped by the optimizer itself."""
    can_step = FlatSteps.can_step
    FlatSteps.can_step = staticmethod(lambda inner, pieces: False)
    try:
        yield
    finally:
        FlatSteps.can_step = can_step


def config_of(name: str, options: dict[str, Any], preset: str, dtype: str, clipping: float) -> dict[str, Any]:
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 4,
        "sharding": preset,
        "gradient_clipping": clipping,
        "optimizer": {"type": name, "params": options},
        "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 3, "warmup_max_lr": 1e-2}},
    }
    return config if dtype == "fp32" else {**config, dtype: {"enabled": True}}


def start(config: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    model = Branches()
    groups = [
        {"params": [model.first.weight, model.last.weight]},
        {"params": [p for p in model.parameters() if p.ndim == 1] + [model.second.weight], "lr": 5e-3},
    ]
    return unishard.initialize(model=model, model_parameters=groups, config=config).engine


def run(engine: Any, steps: range) -> None:
    for step in steps:
        inputs = torch.randn(4, 6, generator=torch.Generator().manual_seed(10 * step + dist.get_rank()))
        engine.backward(engine(inputs, step % 2 == 1))
        engine.step()


def snapshot(engine: Any) -> tuple[list[Tensor], list[dict[str, Any]]]:
    shards = [group.buffer.shard.clone() for group in engine.schedule.groups]
    with unishard.gather(engine.module):
        shards += [p.detach().clone() for p in engine.module.parameters()]
    inner = engine.optimizer.inner
    params = [p for group in inner.param_groups for p in group["params"]]
    states = [
        {name: torch.as_tensor(value).clone() for name, value in inner.state[p].items()}
        for p in params
        if p in inner.state
    ]
    return shards, states


def same(found: Any, expected: Any, tolerance: float = 1e-6) -> None:
    torch.testing.assert_close(found, expected, rtol=10 * tolerance, atol=tolerance)


def weights_and_state(name: str, options: dict[str, Any]) -> None:
    for preset, dtype, clipping in (("ZERO1", "fp32", 0.1), ("ZERO2", "bf16", 0.0), ("ZERO3", "fp32", 0.1)):
        config = config_of(name, options, preset, dtype, clipping)
        with one_by_one():
            expected = start(config)
            run(expected, range(6))
        found = start(config)
        run(found, range(6))
        same(snapshot(found), snapshot(expected))


@pytest.mark.parametrize(("name", "options"), OPTIMIZERS)
def test_weights_and_state_are_the_optimizers(name: str, options: dict[str, Any], ranks: Ranks) -> None:
    ranks(weights_and_state, name, options)


def taken_over(name: str, options: dict[str, Any]) -> None:
    """Between the two ways of stepping, in both directions, and through a state dict."""
    config = config_of(name, options, "ZERO2", "fp32", 0.1)
    expected = start(config)
    run(expected, range(8))
    found = start(config)
    run(found, range(3))
    with one_by_one():
        run(found, range(3, 5))
    run(found, range(5, 6))
    saved = found.optimizer.state_dict()
    found.optimizer.load_state_dict(saved)
    run(found, range(6, 8))
    same(snapshot(found), snapshot(expected))


@pytest.mark.parametrize(("name", "options"), OPTIMIZERS)
def test_state_survives_a_change_of_way(name: str, options: dict[str, Any], ranks: Ranks) -> None:
    ranks(taken_over, name, options)


def test_rules_are_exact_or_none() -> None:
    weight = nn.Parameter(torch.ones(2))
    known: list[torch.optim.Optimizer] = [
        torch.optim.AdamW([weight], weight_decay=0.1),
        torch.optim.Adam([weight], weight_decay=0.1),
        Lion([weight]),
        torch.optim.Adagrad([weight]),
        torch.optim.SGD([weight]),
    ]
    decoupled = [getattr(rule_of(o, o.param_groups[0]), "decoupled", None) for o in known]
    assert decoupled == [True, False, None, None, None]

    class Mine(torch.optim.AdamW):
        """May do anything in its step."""

    unknown: list[torch.optim.Optimizer] = [
        torch.optim.AdamW([weight], amsgrad=True),
        torch.optim.SGD([weight], maximize=True),
        torch.optim.AdamW([weight], foreach=True),
        torch.optim.RMSprop([weight]),
        Mine([weight]),
    ]
    assert [rule_of(o, o.param_groups[0]) for o in unknown] == [None] * 5
