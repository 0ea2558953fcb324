"""A Trainer's arguments and a configuration become one, or an error names both values."""

from __future__ import annotations

import importlib.util
import json
import sys
from typing import Any

import pytest
import torch
from torch import nn

from unishard.config import Config, resolve
from unishard.errors import ConfigError
from unishard.integrations import lightning
from unishard.integrations.lightning_arguments import (
    Completed,
    TrainerArguments,
    completed,
    configuration,
    for_inference,
)
from unishard.integrations.lightning_strategy import move_buffers


@pytest.mark.parametrize(
    ("config", "options", "means"),
    [
        (None, {}, {"sharding": "ZERO3"}),
        ("zero2", {}, {"sharding": "ZERO2"}),
        ("FULL_SHARD", {"gradient_clipping": 1.0}, {"sharding": "FULL_SHARD", "gradient_clipping": 1.0}),
        (None, {"stage": 1}, {"zero_optimization": {"stage": 1}}),
        ({"zero_optimization": {"stage": 3}}, {"stage": 3}, {"zero_optimization": {"stage": 3}}),
        (
            "ZERO3",
            {"offload_optimizer": {"device": "cpu"}, "seed": None},
            {"sharding": "ZERO3", "zero_optimization": {"offload_optimizer": {"device": "cpu"}}},
        ),
        (Config(train_batch_size=8), {}, {"train_batch_size": 8}),
    ],
)
def test_what_a_strategys_arguments_mean(config, options, means):
    assert configuration(config, options) == means


def test_a_path_is_read(tmp_path):
    path = tmp_path / "ds_config.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 2}}))
    for given in (path, str(path)):
        assert configuration(given, {"stage": 2}) == {"zero_optimization": {"stage": 2}}


@pytest.mark.parametrize(
    ("config", "options", "says"),
    [
        (
            {"zero_optimization": {"stage": 3}},
            {"stage": 2},
            "stage is 3 in the configuration and 2 as an option",
        ),
        ({"gradient_clipping": 1.0}, {"gradient_clipping": 0.5}, "1.0 in the configuration and 0.5"),
        (None, {"gradient_cliping": 0.5}, "did you mean 'gradient_clipping'"),
        ("ZERO4", {}, "no such file"),
    ],
)
def test_arguments_that_contradict_each_other_are_refused(config, options, says):
    with pytest.raises(ConfigError, match=says):
        configuration(config, options)


def done(config: dict[str, Any], **arguments: Any) -> Completed:
    return completed(config, TrainerArguments(**arguments), ranks=2)


@pytest.mark.parametrize(
    ("config", "arguments", "sizes"),
    [
        ({}, {"micro_batch": 4}, (8, 4, 1)),
        ({}, {"micro_batch": 4, "accumulation": 3}, (24, 4, 3)),
        ({}, {}, (2, 1, 1)),
        ({"train_batch_size": 24}, {"micro_batch": 4}, (24, 4, 3)),
        ({"train_batch_size": 24}, {"micro_batch": 4, "accumulation": 3}, (24, 4, 3)),
        ({"train_batch_size": 24}, {"accumulation": 3}, (24, 4, 3)),
        ({"train_batch_size": "auto", "gradient_accumulation_steps": 2}, {"micro_batch": 4}, (16, 4, 2)),
        ({"train_micro_batch_size_per_gpu": 4}, {"micro_batch": 4}, (8, 4, 1)),
        ({"train_micro_batch_size_per_gpu": 4}, {}, (8, 4, 1)),
    ],
)
def test_sizes_of_the_batch(config, arguments, sizes):
    found = done(config, **arguments)
    resolved = resolve(found.config, dp_world_size=2)
    assert sizes == (
        resolved.train_batch_size,
        resolved.train_micro_batch_size_per_gpu,
        resolved.gradient_accumulation_steps,
    )
    assert found.accumulation == sizes[2]
    assert found.assumed == (sizes[1] == 1)


@pytest.mark.parametrize(
    ("config", "arguments", "clip", "engine"),
    [
        ({}, {}, 0.0, 0.0),
        ({}, {"clip": 0.5}, 0.5, 0.5),
        ({"gradient_clipping": "auto"}, {"clip": 0.5}, 0.5, 0.5),
        ({"gradient_clipping": 0.5}, {}, 0.5, 0.5),
        ({"gradient_clipping": 0.5}, {"clip": 0.5}, 0.5, 0.5),
        ({}, {"clip": 0.5, "clip_algorithm": "value"}, 0.5, 0.0),
    ],
)
def test_clipping(config, arguments, clip, engine):
    found = done(config, **arguments)
    assert (found.clip, found.config["gradient_clipping"]) == (clip, engine)


@pytest.mark.parametrize(
    ("config", "precision", "dtype"),
    [
        ({}, "32-true", "fp32"),
        ({}, "bf16-mixed", "bf16"),
        ({}, "16-true", "fp16"),
        ({"bf16": {"enabled": "auto"}, "fp16": {"enabled": "auto", "hysteresis": 4}}, "16-mixed", "fp16"),
        ({"bf16": {"enabled": "auto"}}, "32-true", "fp32"),
        ({"bf16": {"enabled": True}}, "32-true", "bf16"),
        ({"bf16": {"enabled": True}, "fp16": {"enabled": False}}, "bf16-true", "bf16"),
    ],
)
def test_precision(config, precision, dtype):
    found = done(config, precision=precision).config
    assert resolve(found, dp_world_size=2).compute_dtype == dtype
    assert found.get("fp16", {}).get("hysteresis") == config.get("fp16", {}).get("hysteresis")


@pytest.mark.parametrize(
    ("config", "arguments", "says"),
    [
        ({"gradient_accumulation_steps": 4}, {"accumulation": 2}, r"= 4 .*accumulate_grad_batches=2"),
        ({"train_micro_batch_size_per_gpu": 2}, {"micro_batch": 4}, r"= 2 .*batch_size=4"),
        ({"train_batch_size": 10}, {"micro_batch": 4}, r"train_batch_size=10.*=4.*world size 2"),
        ({"train_batch_size": 8}, {"micro_batch": 4, "accumulation": 2}, r"8 != 4 x 2 x 2"),
        ({"gradient_clipping": 1.0}, {"clip": 0.5}, r"= 1.0 .*gradient_clip_val=0.5"),
        ({"gradient_clipping": 1.0}, {"clip": 1.0, "clip_algorithm": "value"}, r"= 1.0 .*algorithm='value'"),
        ({"bf16": {"enabled": True}}, {"precision": "16-mixed"}, r"bf16.enabled = true .*'16-mixed'"),
        ({"bf16": {"enabled": False}}, {"precision": "bf16-true"}, r"bf16.enabled = false .*'bf16-true'"),
        ({}, {"precision": "64-true"}, r"precision='64-true'.*bf16-mixed"),
        ({"optimizer": {"type": "Adam"}}, {"optimizer": "SGD"}, r'"Adam".*returns SGD'),
        ({"scheduler": {"type": "WarmupLR"}}, {"scheduler": "StepLR"}, r'"WarmupLR".*returns StepLR'),
        (
            {"gradient_clipping": 1.0, "gradient_accumulation_steps": 4},
            {"clip": 0.5, "accumulation": 2},
            r"(?s)accumulate_grad_batches=2.*gradient_clip_val=0.5",
        ),
    ],
)
def test_values_that_both_give_differently_are_named(config, arguments, says):
    with pytest.raises(ConfigError, match=says):
        done(config, **arguments)


def test_evaluation_needs_no_optimizer():
    config = {
        "sharding": "ZERO3",
        "optimizer": {"type": "Adam"},
        "train_batch_size": 7,
        "bf16": {"enabled": True},
    }
    assert for_inference(config) == {
        "sharding": "ZERO3",
        "bf16": {"enabled": True},
        "train_micro_batch_size_per_gpu": 1,
    }


def test_buffers_go_to_the_device_and_parameters_stay():
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    move_buffers(model, torch.device("meta"))
    assert all(buffer.is_meta for buffer in model.buffers())
    assert not any(param.is_meta for param in model.parameters())


def test_without_lightning_the_class_says_what_to_install(monkeypatch):
    for package in ("lightning.pytorch", "pytorch_lightning"):
        monkeypatch.delitem(sys.modules, package, raising=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install 'unishard\[lightning\]'"):
        _ = lightning.UnishardStrategy
    with pytest.raises(AttributeError, match="it has UnishardStrategy"):
        _ = lightning.Strategy
