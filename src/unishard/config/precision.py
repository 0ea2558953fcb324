"""Precision: `fp16`, `bf16`, `data_types`, and the dtypes of buffers and outputs."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from unishard.config.fields import (
    Auto,
    Count,
    Dtype,
    Honoured,
    NonNegative,
    Refused,
    Section,
    Size,
    Translated,
)

_FP32_MASTERS = Refused(
    "master weights, gradients and optimizer states are fp32 through the config",
    "remove the key, or set it to false",
)


class FP16(Section):
    """`fp16`: half precision with a loss scale (0: dynamic, else static)."""

    enabled: Annotated[bool, Auto(), Honoured()] = False
    auto_cast: Annotated[bool, Auto(), Honoured()] = False
    loss_scale: Annotated[NonNegative, Auto(), Honoured()] = 0.0
    initial_scale_power: Annotated[Size, Field(le=127), Auto(), Honoured()] = 16
    loss_scale_window: Annotated[Count, Auto(), Honoured()] = 1000
    hysteresis: Annotated[Count, Auto(), Honoured()] = 2
    consecutive_hysteresis: Annotated[bool, Honoured()] = False
    min_loss_scale: Annotated[NonNegative, Auto(), Honoured()] = 1.0
    fp16_master_weights_and_grads: Annotated[bool, _FP32_MASTERS] = False
    fp16_master_weights_and_gradients: Annotated[bool, _FP32_MASTERS] = False
    max_consecutive_overflows: Annotated[Count, Honoured()] = 10


_NO_OVERFLOW_SKIP = Translated(
    "bf16 has no loss scale, so no step is skipped for overflow; watch the gradient norm in the step's record"
)


class BF16(Section):
    """`bf16`: bfloat16 compute with fp32 master weights; no loss scale."""

    enabled: Annotated[bool, Auto(), Honoured()] = False
    immediate_grad_update: Annotated[
        bool, Translated("each gradient is added to its accumulator as soon as backward produces it")
    ] = False
    check_grad_overflow: Annotated[bool | None, Honoured()] = None
    check_overflow: Annotated[bool | None, _NO_OVERFLOW_SKIP] = None
    bf16_master_weights_and_grads: Annotated[bool, _FP32_MASTERS] = False
    bf16_optimizer_states: Annotated[bool, _FP32_MASTERS] = False


class TorchAutocast(Section):
    """`torch_autocast`: forward runs under `torch.autocast`; weights and gradients stay fp32."""

    enabled: Annotated[bool, Honoured()] = False
    dtype: Annotated[Dtype, Honoured()] = "bf16"
    lower_precision_safe_modules: Annotated[
        list[str] | None,
        Translated(
            "gradients of all modules travel in communication_data_type, fp32 unless it says otherwise"
        ),
    ] = None


class DataTypes(Section):
    """`data_types`: dtypes beside the compute dtype; None follows the engine's default."""

    grad_accum_dtype: Annotated[Dtype | None, Auto(), Honoured()] = None
    param_dtype: Annotated[Dtype | None, Honoured()] = None
    buffer_dtype: Annotated[Dtype | None, Honoured()] = None
    keep_in_fp32_modules: Annotated[
        Literal["auto"] | list[str],
        Refused(
            "there is no list of modules whose buffers stay fp32", "set buffer_dtype to fp32 for all buffers"
        ),
    ] = "auto"


class PrecisionKeys(Section):
    """Top-level keys about dtypes."""

    fp16: FP16 = FP16()
    bf16: BF16 = BF16()
    data_types: DataTypes = DataTypes()
    buffer_dtype: Annotated[Dtype | None, Honoured()] = None
    output_dtype: Annotated[Dtype | None, Honoured()] = None
    torch_autocast: TorchAutocast = TorchAutocast()
