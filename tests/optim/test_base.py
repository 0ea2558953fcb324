"""Every registered optimizer keeps one contract; names and options are refused by name."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from unishard.errors import ConfigError, UnsupportedError
from unishard.optim.base import (
    build_optimizer,
    check_optimizer,
    find_optimizer,
    register,
    registered,
    with_fused,
)

CUTS = (0, 1, 334, 1003)
DECAY = {"weight_decay": 0.1, "lr": 0.01}
CASES = [
    *((name, DECAY) for name in ("AdamW", "Adam", "SGD", "Lion", "Adagrad")),
    ("AdamW", {"amsgrad": True, "maximize": True}),
    ("Adam", {"adam_w_mode": False, **DECAY}),
    ("Adam", {"bias_correction": False, "amsgrad": True, **DECAY}),
    ("SGD", {"momentum": 0.9, "nesterov": True, **DECAY}),
    ("torch.optim.RMSprop", {"momentum": 0.5, "centered": True}),
    ("NAdam", {}),
    ("torch.optim.Adam", {"weight_decay": 0.1}),
]


def parameters(*tensors: Tensor) -> list[Tensor]:
    return [torch.nn.Parameter(tensor.clone()) for tensor in tensors]


def cut(flat: Tensor) -> list[Tensor]:
    """Views at odd offsets, as pieces of a flat shard are."""
    return [flat[start:stop] for start, stop in itertools.pairwise(CUTS)]


def stepped(name: str, options: dict[str, Any], split: Callable[[Tensor], list[Tensor]]) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    weight, *grads = torch.randn(6, CUTS[-1], generator=generator).unbind()
    flat = weight.clone()
    params = [torch.nn.Parameter(piece) for piece in split(flat)]
    optimizer = build_optimizer(name, params, options)
    for grad in grads:
        for param, piece in zip(params, split(grad), strict=True):
            param.grad = piece
        optimizer.step()
    assert not torch.equal(flat, weight), "the pieces must be views of the flat shard"
    return flat


def test_the_contract_covers_every_registered_optimizer() -> None:
    assert {name for name, _ in CASES} >= registered().keys()


@pytest.mark.parametrize(("name", "options"), CASES)
def test_pieces_step_bit_for_bit_like_the_whole(name: str, options: dict[str, Any]) -> None:
    assert torch.equal(stepped(name, options, lambda flat: [flat]), stepped(name, options, cut))


@pytest.mark.parametrize(("name", "options"), CASES)
def test_a_piece_without_a_gradient_is_untouched(name: str, options: dict[str, Any]) -> None:
    moved, still = parameters(torch.ones(5), torch.ones(5))
    optimizer = build_optimizer(name, [moved, still], options)
    for _ in range(2):
        moved.grad = torch.full((5,), 0.5)
        optimizer.step()
    assert torch.equal(still, torch.ones(5))
    assert not torch.equal(moved, torch.ones(5))


@pytest.mark.parametrize(("name", "options"), CASES)
def test_empty_groups_build_step_and_save(name: str, options: dict[str, Any]) -> None:
    for params in ([], [{"params": []}, {"params": [], "lr": 0.5}]):
        optimizer = build_optimizer(name, params, options)
        optimizer.step()
        assert optimizer.state_dict()["state"] == {}
        assert len(optimizer.param_groups) == max(1, len(params))


@pytest.mark.parametrize(("name", "options"), CASES)
def test_state_dict_resumes_exactly(name: str, options: dict[str, Any]) -> None:
    (straight,), (resumed,) = parameters(torch.ones(7)), parameters(torch.ones(7))
    grads = torch.randn(4, 7, generator=torch.Generator().manual_seed(2))
    first = build_optimizer(name, [straight], options)
    second = build_optimizer(name, [resumed], options)
    for step, grad in enumerate(grads):
        if step == 2:
            saved = second.state_dict()
            second = build_optimizer(name, [resumed], options)
            second.load_state_dict(saved)
        straight.grad, resumed.grad = grad.clone(), grad.clone()
        first.step()
        second.step()
    assert torch.equal(straight, resumed)


@pytest.mark.parametrize(("name", "options"), CASES)
def test_a_closure_is_run_with_gradients_on(name: str, options: dict[str, Any]) -> None:
    (param,) = parameters(torch.ones(3))
    optimizer = build_optimizer(name, [param], options)

    def closure() -> Tensor:
        loss = (param * 2).sum()
        loss.backward()
        return loss

    loss = optimizer.step(closure)  # pyright: ignore
    assert loss.item() == 6.0
    assert not torch.equal(param, torch.ones(3))


def test_groups_override_options_and_are_not_changed() -> None:
    group = {"params": parameters(torch.ones(2)), "lr": 0.5, "name": "head"}
    optimizer = build_optimizer("adamw", [group, {"params": []}], {"lr": 0.1})
    assert [entry["lr"] for entry in optimizer.param_groups] == [0.5, 0.1]
    assert optimizer.param_groups[0]["name"] == "head"
    assert sorted(group) == ["lr", "name", "params"]


@pytest.mark.parametrize("name", ["adamw", "ADAMW", "AdamW"])
def test_names_match_without_case(name: str) -> None:
    assert find_optimizer(name).name == "AdamW"


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, True),
        ({"amsgrad": True, "maximize": True}, True),
        ({"foreach": True}, None),
        ({"foreach": False}, None),
        ({"fused": False}, False),
        ({"differentiable": True}, None),
    ],
)
def test_fused_is_used_unless_the_user_chose(options: dict[str, Any], expected: bool | None) -> None:
    for name in ("AdamW", "torch.optim.Adam"):
        optimizer = build_optimizer(name, parameters(torch.ones(2)), options)
        assert optimizer.param_groups[0]["fused"] is expected


def test_fused_is_left_alone_where_there_is_no_kernel() -> None:
    group = {"params": [torch.nn.Parameter(torch.ones(2, device="meta"))]}
    assert with_fused(torch.optim.AdamW, [group], {}) == {}
    half = {"params": parameters(torch.ones(2, dtype=torch.bfloat16))}
    assert with_fused(torch.optim.AdamW, [half], {}) == {}
    assert with_fused(torch.optim.RMSprop, [{"params": parameters(torch.ones(2))}], {}) == {}


@pytest.mark.parametrize(
    ("name", "options", "fragments"),
    [
        ("AdmaW", {}, ["unknown optimizer type 'AdmaW'", "Did you mean 'AdamW'?"]),
        ("zzz", {}, ["unknown optimizer type 'zzz'", "Known: ", "AdamW", "import path"]),
        ("torch.optim.RMSpop", {}, ["no class 'RMSpop'", "Did you mean 'RMSprop'?"]),
        ("no_such_module.Class", {}, ["cannot import 'no_such_module'"]),
        ("torch.nn.Linear", {}, ["'torch.nn.Linear' is not a torch.optim.Optimizer"]),
        ("AdamW", {"betass": 1}, ["optimizer AdamW", "unknown option 'betass'", "Did you mean 'betas'?"]),
        ("SGD", {"betas": 1, "mom": 1}, ["unknown option 'betas'", "unknown option 'mom'", "momentum"]),
        ("torch.optim.RMSprop", {"momentun": 1}, ["'momentun'", "Did you mean 'momentum'?"]),
        ("AdamW", {"max_grad_norm": 1.0}, ["'max_grad_norm'", "`gradient_clipping`"]),
        ("AdamW", {"lr": "1e-5"}, ["'lr' is the string '1e-5'", "1e-05"]),
        ("AdamW", {"lr": -1.0}, ["optimizer AdamW", "-1.0"]),
        ("SGD", {"nesterov": True}, ["optimizer SGD", "Nesterov"]),
        ("Lion", {"betas": [0.9, 1.0]}, ["optimizer Lion", "[0, 1)"]),
        ("Lion", {"lr": -1}, ["optimizer Lion", "-1"]),
    ],
)
def test_refusals_name_the_value_and_the_remedy(
    name: str, options: dict[str, Any], fragments: list[str]
) -> None:
    for refuse in (
        lambda: build_optimizer(name, parameters(torch.ones(2)), options),
        lambda: check_optimizer(name, options),
    ):
        with pytest.raises(ConfigError) as caught:
            refuse()
        for fragment in fragments:
            assert fragment in str(caught.value)


@pytest.mark.parametrize(
    ("name", "fragment"),
    [
        ("LBFGS", "closure"),
        ("torch.optim.LBFGS", "closure"),
        ("Adafactor", "whole tensor"),
        ("torch.optim.Muon", "matrices"),
        ("SparseAdam", "sparse"),
        ("Lamb", "norms"),
        ("OneBitAdam", "compresses"),
        ("MuAdamW", "width"),
    ],
)
def test_optimizers_that_need_whole_tensors_are_refused(name: str, fragment: str) -> None:
    with pytest.raises(UnsupportedError) as caught:
        build_optimizer(name, parameters(torch.ones(2)), {})
    assert fragment in str(caught.value)
    assert "AdamW" in str(caught.value)


def test_a_whole_run_option_in_a_group_is_refused() -> None:
    group = {"params": parameters(torch.ones(2)), "bias_correction": False}
    with pytest.raises(ConfigError, match=r"parameter group 1 sets 'bias_correction'.*move it"):
        build_optimizer("Adam", [{"params": []}, group], {})


def test_a_name_cannot_be_taken_twice() -> None:
    with pytest.raises(ValueError, match=r"'adamw' of .* is taken by unishard.optim.adam"):
        register("adamw", accepts=torch.optim.AdamW)(lambda groups, options: torch.optim.AdamW(groups))
