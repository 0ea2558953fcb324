"""What the engine does to dtypes: buffers keep theirs, quantized weights too, and scripts can ask."""

from __future__ import annotations

import importlib
import logging
from typing import Any

import pytest
import torch
from torch import nn

from unishard.deepspeed.parts.logs import logger

deepspeed: Any = importlib.import_module("unishard.deepspeed")

WIDTH = 8
FP8 = torch.float8_e4m3fn


def quantized() -> Any:
    """A linear layer beside a frozen weight of one byte each, which ranks make differently."""
    model: Any = nn.Sequential(nn.Linear(WIDTH, WIDTH))
    held = nn.Module()
    value = float(torch.distributed.get_rank() + 1)
    held.weight = nn.Parameter(torch.full((WIDTH, WIDTH), value).to(FP8), requires_grad=False)
    held.register_buffer("scale", torch.ones(WIDTH).to(FP8))
    model.held = held
    model.register_buffer("frequencies", torch.ones(WIDTH))
    model.forward = lambda x: model[0](x)
    return model


def engine_of(model: nn.Module, stage: int, **more: Any) -> Any:
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": stage},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2}},
        **more,
    }
    trained = [p for p in model.parameters() if p.requires_grad]
    return deepspeed.initialize(model=model, model_parameters=trained, config=config)[0]


def _buffers_and_quantized_weights(stage: int) -> None:
    model = quantized()
    engine = engine_of(model, stage)
    assert (engine._config.param_dtype, engine._config.buffer_dtype) == (None, None)
    engine.backward(engine(torch.ones(1, WIDTH, dtype=torch.bfloat16)).sum())
    engine.step()
    assert model[0].weight.dtype is torch.bfloat16
    assert (model.frequencies.dtype, model.held.scale.dtype) == (torch.float32, FP8)
    with deepspeed.zero.GatheredParameters(list(model.parameters())):
        assert model.held.weight.dtype is FP8
        assert model.held.weight.float().eq(1).all()  # the first rank's
    cast = engine_of(quantized(), stage, data_types={"buffer_dtype": "bf16"})
    assert cast.module.frequencies.dtype is torch.bfloat16
    assert cast.module.held.scale.dtype is FP8


def test_buffers_and_quantized_weights_keep_their_dtype(ranks):
    for stage in (0, 3):
        ranks(_buffers_and_quantized_weights, stage)


def _dtypes_by_name() -> None:
    engine = engine_of(nn.Linear(WIDTH, 1), 0, data_types={"param_dtype": "bf16", "buffer_dtype": "fp32"})
    assert engine._mixed_precision_dtypes() == (torch.bfloat16, torch.float32)
    engine._assert_valid_mixed_precision_config()
    engine.bfloat16_enabled = lambda: False
    with pytest.raises(AssertionError, match="param_dtype bf16 contradicts"):
        engine._assert_valid_mixed_precision_config()
    loss = engine(torch.ones(1, WIDTH, dtype=torch.bfloat16)).sum()
    assert engine.backward(loss).dtype is torch.float32


def test_dtypes_by_name(ranks):
    ranks(_dtypes_by_name, world_size=1)


def _classes() -> None:
    for params, offload, shown in (
        ({}, None, "FusedAdam"),
        ({}, {"device": "cpu"}, "DeepSpeedCPUAdam"),
        ({"torch_adam": True}, None, "AdamW"),
    ):
        section = {"type": "AdamW", "params": {"lr": 1e-2, **params}}
        zero = {"stage": 2, **({} if offload is None else {"offload_optimizer": offload})}
        engine = engine_of(nn.Linear(WIDTH, 1), 2, optimizer=section, zero_optimization=zero)
        inner = engine.optimizer.optimizer
        assert type(inner).__name__ == shown
        assert getattr(inner, "adam_w_mode", True) is True
        engine.backward(engine(torch.ones(1, WIDTH, dtype=torch.bfloat16)).sum())
        engine.step()
        assert len(inner.state) == 2
    plain = engine_of(nn.Linear(WIDTH, 1), 0, optimizer={"type": "SGD", "params": {"lr": 1e-2}})
    assert type(plain.optimizer).__name__ == "FP16_UnfusedOptimizer"
    assert plain.optimizer.low_precision_dtype is torch.bfloat16


def test_optimizers_are_of_the_classes_that_scripts_expect(ranks):
    ranks(_classes, world_size=1)


def _scales() -> None:
    engine = engine_of(nn.Linear(WIDTH, 1), 1, bf16={"enabled": False}, fp16={"enabled": True})
    engine.optimizer._set_loss_scale(32.0)
    assert engine.optimizer.loss_scaler.cur_scale == engine.loss_scale_value() == 32.0
    engine.optimizer.override_loss_scale(8.0)
    assert engine.loss_scale_value() == 8.0
    engine.backward(engine(torch.ones(1, WIDTH, dtype=torch.float16)).sum())
    engine.step()
    assert engine.was_step_applied()
    for bad, message in ((float("inf"), "must be finite"), (0, "must be greater than 0")):
        with pytest.raises(ValueError, match=message):
            engine.optimizer.override_loss_scale(bad)


def test_scripts_may_set_the_loss_scale(ranks):
    ranks(_scales, world_size=1)


def _log_level() -> None:
    ours, before = logging.getLogger("unishard"), (logging.getLogger("unishard").level, logger.level)
    try:
        assert engine_of(nn.Linear(WIDTH, 1), 0).log_level() is None
        assert (ours.level, logger.level) == before
        assert engine_of(nn.Linear(WIDTH, 1), 0, log_level="error").log_level() == "ERROR"
        assert ours.level == logger.level == logging.ERROR
    finally:
        ours.setLevel(before[0])
        logger.setLevel(before[1])


def test_log_level(ranks):
    ranks(_log_level, world_size=1)
