"""`zero_optimization` by DeepSpeed's attribute names."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Any

from pydantic import Field, field_validator, model_validator

from unishard.deepspeed.parts.config_models import DeepSpeedConfigModel, pp_int
from unishard.deepspeed.parts.logs import logger


class ZeroStageEnum(int, Enum):
    """Stages of ZeRO."""

    disabled = 0
    optimizer_states = 1
    gradients = 2
    weights = 3
    max_stage = 3  # noqa: PIE796 - as DeepSpeed


class OffloadDeviceEnum(str, Enum):
    """Where states may rest."""

    none = "none"
    cpu = "cpu"
    nvme = "nvme"


class OffloadStateTypeEnum(str, Enum):
    """Kinds of state that `engine.offload_states` takes."""

    optim_states = "optim_states"
    hp_params = "hp_params"
    lp_params = "lp_params"
    lp_grads = "lp_grads"
    contiguous_grad_buffer = "contiguous_grad_buffer"


class DeepSpeedZeroOffloadParamConfig(DeepSpeedConfigModel):
    """`offload_param`."""

    device: OffloadDeviceEnum = OffloadDeviceEnum.none
    nvme_path: Path | None = None
    buffer_count: int = Field(5, ge=0)
    buffer_size: int = Field(pp_int(1e8), ge=0)
    max_in_cpu: int = Field(pp_int(1e9), ge=0)
    pin_memory: bool = True


class DeepSpeedZeroOffloadOptimizerConfig(DeepSpeedConfigModel):
    """`offload_optimizer`."""

    device: OffloadDeviceEnum = OffloadDeviceEnum.none
    nvme_path: Path | None = None
    buffer_count: int = Field(4, ge=0)
    pin_memory: bool = True
    pipeline_read: bool = False
    pipeline_write: bool = False
    fast_init: bool = False
    ratio: float = Field(1.0, ge=0.0, le=1.0)
    super_offload: bool = False
    cpuadam_cores_perc: float = Field(0.8, ge=0.0, le=1.0)

    @property
    def pipeline(self) -> bool:
        """Whether reads or writes overlap with the step."""
        return self.pipeline_read or self.pipeline_write


class DeepSpeedZeroLeafModuleConfig(DeepSpeedConfigModel):
    """`leaf_module`: modules that are gathered as one, by class, path or end of path."""

    classes: list[str] = Field(default_factory=list)
    names: list[str] = Field(default_factory=list)
    name_suffixes: list[str] = Field(default_factory=list)

    @field_validator("classes", "names", "name_suffixes", mode="before")
    @classmethod
    def _as_list(cls, value: Any) -> Any:
        return (
            [value] if isinstance(value, str) else list(value) if isinstance(value, (tuple, set)) else value
        )


def _offload_param(switched_on: Any) -> DeepSpeedZeroOffloadParamConfig | None:
    return DeepSpeedZeroOffloadParamConfig.model_validate({"device": "cpu"}) if switched_on else None


def _offload_optimizer(switched_on: Any) -> DeepSpeedZeroOffloadOptimizerConfig | None:
    return DeepSpeedZeroOffloadOptimizerConfig.model_validate({"device": "cpu"}) if switched_on else None


class DeepSpeedZeroConfig(DeepSpeedConfigModel):
    """`zero_optimization`; keys that begin with `stage3_` are attributes without it.

    >>> DeepSpeedZeroConfig(stage=3, stage3_max_live_parameters=7).max_live_parameters
    7
    """

    stage: ZeroStageEnum = ZeroStageEnum.disabled
    contiguous_gradients: bool = True
    reduce_scatter: bool = True
    reduce_bucket_size: int = Field(pp_int(5e8), gt=0)
    use_multi_rank_bucket_allreduce: bool = True
    allgather_partitions: bool = True
    allgather_bucket_size: int = Field(pp_int(5e8), ge=0)
    overlap_comm: bool | None = None
    compute_grad_norm: bool = True
    load_from_fp32_weights: bool = True
    elastic_checkpoint: bool = False
    offload_param: DeepSpeedZeroOffloadParamConfig | None = None
    offload_optimizer: DeepSpeedZeroOffloadOptimizerConfig | None = None
    zenflow: Any = None
    sub_group_size: int = Field(pp_int(1e9), ge=0)
    cpu_offload_param: bool | None = Field(
        None,
        json_schema_extra={"deprecated": True, "new_param": "offload_param", "new_param_fn": _offload_param},  # pyright: ignore
    )
    cpu_offload_use_pin_memory: bool | None = Field(
        None, json_schema_extra={"deprecated": True, "new_param": "offload_optimizer", "set_new_param": False}
    )
    cpu_offload: bool | None = Field(
        None,
        json_schema_extra={  # pyright: ignore
            "deprecated": True,
            "new_param": "offload_optimizer",
            "new_param_fn": _offload_optimizer,
        },
    )
    prefetch_bucket_size: int = Field(pp_int(5e7), ge=0, alias="stage3_prefetch_bucket_size")
    param_persistence_threshold: int = Field(pp_int(1e5), ge=0, alias="stage3_param_persistence_threshold")
    model_persistence_threshold: int = Field(
        pp_int(sys.maxsize, "sys.maxsize"), ge=0, alias="stage3_model_persistence_threshold"
    )
    max_live_parameters: int = Field(pp_int(1e9), ge=0, alias="stage3_max_live_parameters")
    max_reuse_distance: int = Field(pp_int(1e9), ge=0, alias="stage3_max_reuse_distance")
    gather_16bit_weights_on_model_save: bool = Field(False, alias="stage3_gather_16bit_weights_on_model_save")
    module_granularity_threshold: int = Field(pp_int(0), alias="stage3_module_granularity_threshold")
    use_all_reduce_for_fetch_params: bool = Field(False, alias="stage3_use_all_reduce_for_fetch_params")
    allgather_sequential: bool = Field(False, alias="stage3_allgather_sequential")
    stage3_gather_fp16_weights_on_model_save: bool = Field(
        False, json_schema_extra={"deprecated": True, "new_param": "gather_16bit_weights_on_model_save"}
    )
    ignore_unused_parameters: bool = True
    legacy_stage1: bool = False
    round_robin_gradients: bool = False
    parameter_alignment: bool = False
    zero_hpz_partition_size: int = Field(1, ge=0)
    zero_quantized_weights: bool = False
    zero_quantized_nontrainable_weights: bool = False
    zero_quantized_gradients: bool = False
    mics_shard_size: int = -1
    mics_hierarchical_params_gather: bool = False
    memory_efficient_linear: bool = True
    pipeline_loading_checkpoint: bool = False
    override_module_apply: bool = True
    log_trace_cache_warnings: bool = False
    enable_sanity_checks: bool = False
    save_muon_momentum_buffer_in_memory: bool = False
    leaf_module: DeepSpeedZeroLeafModuleConfig = Field(default_factory=DeepSpeedZeroLeafModuleConfig)

    @model_validator(mode="after")
    def _follow_stage(self) -> DeepSpeedZeroConfig:
        if self.overlap_comm is None:
            object.__setattr__(self, "overlap_comm", self.stage == ZeroStageEnum.weights)
        ratio = self.offload_optimizer.ratio if self.offload_optimizer else 1.0
        if ratio < 1.0 and self.stage != ZeroStageEnum.weights:
            raise ValueError(f"offload_optimizer.ratio {ratio} needs stage 3, and the stage is {self.stage}")
        return self


def read_zero_config_deprecated(param_dict: Mapping[str, Any]) -> dict[str, Any]:
    """The section that `"zero_optimization": true` stood for."""
    logger.warning('"zero_optimization": true is an old form; write {"stage": 1}')
    section: dict[str, Any] = {"stage": 1 if param_dict["zero_optimization"] else 0}
    if "allgather_size" in param_dict:
        section["allgather_bucket_size"] = param_dict["allgather_size"]
    return section


def get_zero_config(param_dict: Mapping[str, Any]) -> DeepSpeedZeroConfig:
    """`zero_optimization` of a whole configuration."""
    section = param_dict.get("zero_optimization", {})
    if isinstance(section, bool):
        section = read_zero_config_deprecated(param_dict)
    return DeepSpeedZeroConfig(**section)
