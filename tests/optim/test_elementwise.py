"""Only optimizers that treat every element alone may step shards."""

from __future__ import annotations

import logging
import sys
import types
from typing import Any

import pytest
import torch

from unishard.errors import UnsupportedError
from unishard.optim.base import build_optimizer
from unishard.optim.elementwise import check_client_optimizer, elementwise, probe, require_elementwise
from unishard.optim.lion import Lion


class Signs(torch.optim.Optimizer):
    """A foreign elementwise optimizer."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for param in group["params"]:
                param -= group["lr"] * param.grad.sign()


class TensorNorm(Signs):
    """Scales by the norm of the whole tensor, under a name that no list has."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for param in group["params"]:
                param -= group["lr"] * param.grad / param.grad.norm()


class MatrixOnly(Signs):
    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for param in group["params"]:
                if param.ndim != 2:
                    raise ValueError("2-D parameters only")
                param -= group["lr"] * param.grad


class NeedsMore(Signs):
    def __init__(self, params: Any, lr: float, model: torch.nn.Module) -> None:
        super().__init__(params, lr)


class MyMuon(torch.optim.Muon):
    pass


def test_known_classes() -> None:
    assert all(elementwise(cls) for cls in (torch.optim.AdamW, torch.optim.RMSprop, Lion, Signs))
    assert not any(elementwise(cls) for cls in (torch.optim.LBFGS, torch.optim.Adafactor, MyMuon))


@pytest.mark.parametrize("cls", [torch.optim.LBFGS, torch.optim.Adafactor, torch.optim.SparseAdam, MyMuon])
def test_known_refusals_say_why_and_what_instead(cls: type[torch.optim.Optimizer]) -> None:
    with pytest.raises(UnsupportedError, match=rf"{cls.__name__} cannot step shards: it .*Use AdamW"):
        require_elementwise(cls)


@pytest.mark.parametrize("cls", [TensorNorm, MatrixOnly])
def test_unknown_classes_are_tried_out(cls: type[torch.optim.Optimizer]) -> None:
    require_elementwise(Signs, {"lr": 0.1})
    with pytest.raises(UnsupportedError, match=f"{cls.__name__} cannot step shards: a matrix stepped whole"):
        require_elementwise(cls, {"lr": 0.1})


def test_a_config_that_names_an_unknown_class_has_it_tried_out(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("client_optimizers")
    vars(module).update(Signs=Signs, TensorNorm=TensorNorm)
    monkeypatch.setitem(sys.modules, "client_optimizers", module)
    assert isinstance(build_optimizer("client_optimizers.Signs", [], {"lr": 0.1}), Signs)
    with pytest.raises(UnsupportedError, match="TensorNorm cannot step shards"):
        build_optimizer("client_optimizers.TensorNorm", [], {"lr": 0.1})


def test_a_rate_of_zero_does_not_blind_the_trial() -> None:
    assert probe(TensorNorm, {"lr": 0.0}) is False


def test_the_trial_leaves_the_random_state_alone() -> None:
    before = torch.get_rng_state()
    probe(Signs, {})
    assert torch.equal(before, torch.get_rng_state())


def test_a_class_that_cannot_be_tried_is_accepted_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="unishard"):
        require_elementwise(NeedsMore, {"lr": 0.1})
    assert "NeedsMore could not be tried" in caplog.text


def test_client_optimizers() -> None:
    params = [torch.nn.Parameter(torch.ones(2, 2))]
    check_client_optimizer(torch.optim.AdamW(params, fused=True))
    check_client_optimizer(Signs(params))
    for optimizer in (TensorNorm(params), torch.optim.Muon(params)):
        with pytest.raises(UnsupportedError, match="cannot step shards"):
            check_client_optimizer(optimizer)
