"""`optimizer` and `scheduler`: types by any spelling, parameters checked against the type."""

from __future__ import annotations

from typing import Any

import pytest

from unishard.config import ResolvedConfig, check, resolve
from unishard.config.optimizer import OPTIMIZERS, TORCH_OPTIMIZERS, UNAVAILABLE_OPTIMIZERS
from unishard.config.scheduler import SCHEDULES, TORCH_SCHEDULES
from unishard.errors import ConfigError

BASE: dict[str, Any] = {"train_micro_batch_size_per_gpu": 1}
REQUIRED = {
    "WarmupDecayLR": {"total_num_steps": 2000},
    "WarmupCosineLR": {"total_num_steps": 2000},
    "OneCycle": {"cycle_min_lr": 0.1, "cycle_max_lr": 0.2},
}


def with_optimizer(kind: str, **params: Any) -> ResolvedConfig:
    return resolve(BASE | {"optimizer": {"type": kind, "params": params}}, dp_world_size=1)


def with_scheduler(kind: str, **params: Any) -> ResolvedConfig:
    return resolve(BASE | {"scheduler": {"type": kind, "params": params}}, dp_world_size=1)


def optimizer(kind: str, **params: Any) -> tuple[str, dict[str, Any]]:
    section = with_optimizer(kind, **params).optimizer
    assert section is not None
    return section.type, section.params


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_types_are_found_in_any_case(kind: str) -> None:
    expected = "AdamW" if kind == "Adam" else kind
    for spelling in (kind, kind.lower(), kind.upper()):
        assert optimizer(spelling)[0] == expected


def test_adam_means_adamw_unless_told_otherwise() -> None:
    found = with_optimizer("Adam", lr=1e-3)
    assert found.optimizer is not None
    assert (found.optimizer.type, "adam_w_mode" in found.optimizer.params) == ("AdamW", False)
    assert found.origin("optimizer.type") == "derived"
    assert len(found.log_lines) == 1
    assert 'optimizer.type = "Adam": means AdamW, as in DeepSpeed' in found.log_lines[0]
    assert optimizer("Adam", adam_w_mode=False) == (
        "Adam",
        {"weight_decay": 0.0, "lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "adam_w_mode": False}
        | {"bias_correction": True, "amsgrad": False},
    )
    assert with_optimizer("Adam", adam_w_mode=False).log_lines == ()


def test_torch_adam_keeps_torchs_default_decay() -> None:
    assert optimizer("AdamW", torch_adam=True)[1]["weight_decay"] == 0.01
    assert optimizer("AdamW", torch_adam=True, weight_decay=0.5)[1]["weight_decay"] == 0.5
    assert optimizer("Adam", torch_adam=True, adam_w_mode=False)[1]["weight_decay"] == 0.0
    assert len(with_optimizer("AdamW", torch_adam=True).log_lines) == 1


@pytest.mark.parametrize(
    ("kind", "params", "key", "words"),
    [
        ("AdamW", {"learning_rate": 1}, "learning_rate", "unknown key"),
        ("AdamW", {"weight_deacy": 1.0}, "weight_deacy", "did you mean 'weight_decay'?"),
        ("SGD", {"betas": [0.9, 0.9]}, "betas", "unknown key"),
        ("AdamW", {"max_grad_norm": 1.0}, "max_grad_norm", "set gradient_clipping"),
        ("AdamW", {"betas": [0.9, 1.0]}, "betas", "must be less than 1, got 1.0"),
        ("AdamW", {"lr": -1.0}, "lr", "must be at least 0, got -1.0"),
        ("AdamW", {"lr": "1e-3"}, "lr", "write it without quotes"),
        ("Lion", {"eps": 1e-8}, "eps", "unknown key"),
        ("Adagrad", {"fp32_optimizer_states": False}, "fp32_optimizer_states", "set it to true"),
    ],
)
def test_wrong_parameter_is_refused(kind: str, params: dict[str, Any], key: str, words: str) -> None:
    (problem,) = check(BASE | {"optimizer": {"type": kind, "params": params}}, dp_world_size=1)
    assert problem.key == f"optimizer.params.{key}"
    assert words in problem.message


@pytest.mark.parametrize("kind", UNAVAILABLE_OPTIMIZERS)
def test_unavailable_type_says_what_to_use(kind: str) -> None:
    with pytest.raises(ConfigError) as caught:
        with_optimizer(kind, freeze_step=3)
    entry = UNAVAILABLE_OPTIMIZERS[kind]
    assert str(caught.value) == f'optimizer.type: "{kind}" {entry.reason}; use {entry.instead}'


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("Adamm", "did you mean 'Adam'?"),
        ("rmsprop", "did you mean 'RMSprop'?"),
        ("torch..SGD", "use one of AdamW, Adam, SGD"),
        ("torch.optim.LBFGS", "needs whole matrices or the whole model at once"),
    ],
)
def test_unknown_type_is_refused(kind: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        with_optimizer(kind)
    assert words in str(caught.value)


def test_import_paths_keep_their_own_parameters() -> None:
    assert optimizer("my.package.Optimizer", rank=3) == ("my.package.Optimizer", {"rank": 3})
    for kind in TORCH_OPTIMIZERS:
        assert optimizer(kind, lr=1e-3) == (f"torch.optim.{kind}", {"lr": 1e-3})
    assert with_optimizer("RMSprop").log_lines == ('optimizer.type = "RMSprop": read as torch.optim.RMSprop',)
    assert optimizer("torch.optim.NAdam", lr=0.1, betas="auto")[1] == {"lr": 0.1}
    (problem,) = check(BASE | {"optimizer": {"type": "torch.optim.NAdam", "params": {"lr": "auto"}}})
    assert problem.key == "optimizer.params.lr"


@pytest.mark.parametrize("kind", SCHEDULES)
def test_schedules_take_their_parameters_and_no_others(kind: str) -> None:
    found = with_scheduler(kind.lower(), **REQUIRED.get(kind, {})).scheduler
    assert found is not None
    assert found.type == kind
    assert set(found.params) == set(SCHEDULES[kind].model_fields) - {"last_batch_iteration"}
    config = BASE | {"scheduler": {"type": kind, "params": REQUIRED.get(kind, {}) | {"warmup_stepz": 3}}}
    (problem,) = check(config, dp_world_size=1)
    assert problem.key == "scheduler.params.warmup_stepz"


@pytest.mark.parametrize("kind", REQUIRED)
def test_required_parameters_are_named(kind: str) -> None:
    problems = check(BASE | {"scheduler": {"type": kind}}, dp_world_size=1)
    assert {problem.key for problem in problems} == {f"scheduler.params.{key}" for key in REQUIRED[kind]}
    assert all("is required" in problem.message for problem in problems)


def test_what_is_resolved_is_what_gets_built() -> None:
    optim = pytest.importorskip("unishard.optim.base")
    schedules = pytest.importorskip("unishard.optim.schedules")
    for kind in OPTIMIZERS:
        named, params = optimizer(kind, **({"adam_w_mode": False} if kind == "Adam" else {}))
        assert optim.check_optimizer(named, params).keys() == params.keys()
    for kind in SCHEDULES:
        found = with_scheduler(kind, **REQUIRED.get(kind, {})).scheduler
        assert found is not None
        assert schedules.check_schedule(found.type, found.params).keys() == found.params.keys()


def test_schedule_position_is_state() -> None:
    assert with_scheduler("WarmupLR", last_batch_iteration=-1).log_lines == ()
    assert (
        "restore it with load_state_dict" in with_scheduler("WarmupLR", last_batch_iteration=5).log_lines[0]
    )


def test_warmup_peaks_at_the_optimizers_rate() -> None:
    config = {"optimizer": {"type": "SGD", "params": {"lr": 0.3}}, "scheduler": {"type": "WarmupLR"}}
    found = resolve(BASE | config, dp_world_size=1)
    assert found.scheduler is not None
    assert found.scheduler.params["warmup_max_lr"] == 0.3
    assert found.origin("scheduler.params.warmup_max_lr") == "derived"


def test_torch_schedules() -> None:
    for kind in TORCH_SCHEDULES:
        found = with_scheduler(kind, step_size=3).scheduler
        assert found is not None
        assert (found.type, found.params) == (f"torch.optim.lr_scheduler.{kind}", {"step_size": 3})
    with pytest.raises(
        ConfigError, match=r"scheduler.type: unknown type \"WarmupRL\"; did you mean 'WarmupLR'"
    ):
        with_scheduler("WarmupRL")
