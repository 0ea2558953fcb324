"""DeepSpeed's configuration classes, for code that builds or reads sections by attribute.

Whether a key is honoured is decided where a model meets its configuration (`unishard.config`); these only parse.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from enum import Enum
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field, field_serializer, field_validator

from unishard.deepspeed.parts.configuration import DeepSpeedConfigError
from unishard.deepspeed.parts.logs import logger


class DeepSpeedConfigModel(BaseModel):
    """Base of the sections: unknown keys are errors, `"auto"` means the default, old names still work.

    A field is an old name when `json_schema_extra` has `deprecated`; `new_param` then names its successor, which takes
    the value through `new_param_fn` unless `set_new_param` is false.
    """

    model_config = ConfigDict(
        validate_default=True,
        validate_assignment=True,
        use_enum_values=True,
        populate_by_name=True,
        extra="forbid",
        arbitrary_types_allowed=True,
        protected_namespaces=(),
    )

    def __init__(self, strict: bool = False, **data: Any) -> None:
        if not strict:
            data = {key: value for key, value in data.items() if value != "auto" or key == "replace_method"}
        super().__init__(**data)
        for name, field in type(self).model_fields.items():
            old = field.json_schema_extra
            if isinstance(old, dict) and old.get("deprecated") and name in self.model_fields_set:
                self._replace_old(name, old)

    def _replace_old(self, name: str, old: Mapping[str, Any]) -> None:
        successor = old.get("new_param", "")
        instead = f"; use {successor}" if successor else ""
        logger.warning(
            f"configuration key {name} is deprecated{instead} {old.get('deprecated_msg', '')}".rstrip()
        )
        if not successor or not old.get("set_new_param", True):
            return
        value = old.get("new_param_fn", lambda given: given)(getattr(self, name))
        *path, last = successor.split(".")
        holder: Any = self
        for part in path:
            holder = getattr(holder, part)
        if last in getattr(holder, "model_fields_set", ()):
            raise DeepSpeedConfigError(
                f"{name} is an old name of {successor}, and both are given; keep {successor}"
            )
        setattr(holder, last, value)

    @field_serializer("dtype", check_fields=False)
    def _serialize_dtype(self, dtype: torch.dtype) -> str:
        return str(dtype)


class pp_int(int):
    """An integer that prints with commas, or as it is told.

    >>> pp_int(100000)
    100,000
    """

    def __new__(cls, val: float, custom_print_str: str | None = None) -> pp_int:
        made = super().__new__(cls, int(val))
        made.custom_print_str = custom_print_str
        return made

    custom_print_str: str | None

    def __repr__(self) -> str:
        return self.custom_print_str or f"{self.real:,}"


class ScientificNotationEncoder(json.JSONEncoder):
    """JSON with indentation, numbers above 1000 in scientific notation."""

    def iterencode(self, o: Any, _one_shot: bool = False, level: int = 0) -> Any:
        width = self.indent if isinstance(self.indent, int) else 4
        if isinstance(o, bool):
            return "true" if o else "false"
        if isinstance(o, (int, float)):
            return f"{o:e}" if o > 1e3 else f"{o}"
        if isinstance(o, Mapping):
            pad, end = " " * (level + 1) * width, " " * level * width
            rows = [f'\n{pad}"{key}": {self.iterencode(value, level=level + 1)}' for key, value in o.items()]
            return "{" + ", ".join(rows) + f"\n{end}}}"
        if isinstance(o, Sequence) and not isinstance(o, str):
            return f"[{', '.join(map(self.iterencode, o))}]"
        return "\n, ".join(super().iterencode(o, _one_shot))


class DeepSpeedConfigObject:
    """Shows its attributes as JSON."""

    def repr(self) -> dict[str, Any]:
        return self.__dict__

    def __repr__(self) -> str:
        return json.dumps(self.__dict__, sort_keys=True, indent=4, cls=ScientificNotationEncoder, default=str)


def get_config_default(config: type[BaseModel], field_name: str) -> Any:
    """The default of a field. Raises `AssertionError` where there is none."""
    field = config.model_fields.get(field_name)
    if field is None:
        raise AssertionError(f"'{field_name}' is not a field in {config}")
    if field.is_required():
        raise AssertionError(f"'{field_name}' is a required field and does not have a default value")
    return field.get_default(call_default_factory=True)


def get_scalar_param(param_dict: Mapping[str, Any], param_name: str, param_default_value: Any) -> Any:
    """A key's value, or the default."""
    return param_dict.get(param_name, param_default_value)


get_list_param = get_dict_param = get_scalar_param


def dict_raise_error_on_duplicate_keys(ordered_pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """For `json.load(object_pairs_hook=...)`: a dict, or `ValueError` naming keys given twice."""
    repeated = [key for key, count in Counter(key for key, _ in ordered_pairs).items() if count > 1]
    if repeated:
        raise ValueError(f"Duplicate keys in DeepSpeed config: {repeated}")
    return dict(ordered_pairs)


class DtypeEnum(Enum):
    """Dtypes by any of their names."""

    fp16 = torch.float16, "torch.float16", "fp16", "float16", "half"
    fp32 = torch.float32, "torch.float32", "fp32", "float32", "float"
    int8 = torch.int8, "torch.int8", "int8"
    bf16 = torch.bfloat16, "torch.bfloat16", "bf16", "bfloat16"

    def __new__(cls, *values: Any) -> DtypeEnum:
        made = object.__new__(cls)
        made._value_ = values[0]
        for other in values[1:]:
            cls._value2member_map_[other] = made
        return made


class ValidationMode:
    """What happens when ranks disagree on a checkpoint's tag."""

    WARN, IGNORE, FAIL = "WARN", "IGNORE", "FAIL"


class DeepSpeedFP16Config(DeepSpeedConfigModel):
    """`fp16`; a `loss_scale` of 0 is a dynamic one."""

    enabled: bool = False
    auto_cast: bool = False
    loss_scale: float = Field(0, ge=0, allow_inf_nan=True)
    initial_scale_power: int = 16
    loss_scale_window: int = 1000
    hysteresis: int = 2
    consecutive_hysteresis: bool = False
    min_loss_scale: int = 1
    fp16_master_weights_and_grads: bool = False

    @field_validator("loss_scale", mode="before")
    @classmethod
    def _finite(cls, value: Any) -> Any:
        if isinstance(value, bool) or not isinstance(value, (int, float, str)):
            raise ValueError(f"fp16.loss_scale must be a number, and is {value!r}; 0 is a dynamic one")
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"fp16.loss_scale must be a finite number, and is {value}; 0 is a dynamic one")
        return value

    @field_validator("loss_scale_window", "min_loss_scale", mode="before")
    @classmethod
    def _number(cls, value: Any) -> Any:
        if isinstance(value, bool):
            raise ValueError(f"it must be a number of at least 1, and is {value}")
        return value

    def initial_dynamic_scale(self) -> float:
        return 2**self.initial_scale_power

    def dynamic_loss_scale_args(self) -> dict[str, Any]:
        """What DeepSpeed's dynamic scaler is built with."""
        return {
            "init_scale": 2**self.initial_scale_power,
            "scale_window": self.loss_scale_window,
            "delayed_shift": self.hysteresis,
            "consecutive_hysteresis": self.consecutive_hysteresis,
            "min_scale": self.min_loss_scale,
        }


class DeepSpeedBF16Config(DeepSpeedConfigModel):
    """`bf16`."""

    enabled: bool = False
    immediate_grad_update: bool = False
    check_grad_overflow: bool = True
    bf16_master_weights_and_grads: bool = False
    bf16_optimizer_states: bool = False


def get_float16_config(param_dict: Mapping[str, Any]) -> DeepSpeedFP16Config:
    """`fp16` of a whole configuration."""
    return DeepSpeedFP16Config(**param_dict.get("fp16", {}))


def get_bfloat16_config(param_dict: Mapping[str, Any]) -> DeepSpeedBF16Config:
    """`bf16` (or its old name `bfloat16`) of a whole configuration."""
    return DeepSpeedBF16Config(**param_dict.get("bf16", param_dict.get("bfloat16", {})))


class TensorBoardConfig(DeepSpeedConfigModel):
    """`tensorboard`."""

    enabled: bool = False
    output_path: str = ""
    job_name: str = "DeepSpeedJobName"


class CSVConfig(TensorBoardConfig):
    """`csv_monitor`."""


class WandbConfig(DeepSpeedConfigModel):
    """`wandb`."""

    enabled: bool = False
    group: str | None = None
    team: str | None = None
    project: str = "deepspeed"


class CometConfig(DeepSpeedConfigModel):
    """`comet`."""

    enabled: bool = False
    samples_log_interval: int = 100
    project: str | None = None
    workspace: str | None = None
    api_key: str | None = None
    experiment_name: str | None = None
    experiment_key: str | None = None
    online: bool | None = None
    mode: str | None = None


class DeepSpeedMonitorConfig(DeepSpeedConfigModel):
    """All monitors' sections; `enabled` when any is."""

    tensorboard: TensorBoardConfig = Field(default_factory=TensorBoardConfig)
    comet: CometConfig = Field(default_factory=CometConfig)
    wandb: WandbConfig = Field(default_factory=WandbConfig)
    csv_monitor: CSVConfig = Field(default_factory=CSVConfig)

    @property
    def enabled(self) -> bool:
        return any(each.enabled for each in (self.tensorboard, self.comet, self.wandb, self.csv_monitor))


def get_monitor_config(param_dict: Mapping[str, Any]) -> DeepSpeedMonitorConfig:
    """The monitors' sections of a whole configuration."""
    names = ("tensorboard", "comet", "wandb", "csv_monitor")
    return DeepSpeedMonitorConfig(**{name: param_dict[name] for name in names if name in param_dict})


def get_log_level(param_dict: Mapping[str, Any]) -> str | None:
    """`log_level` of a whole configuration; `None` leaves the logger as it is."""
    return param_dict.get("log_level")


def get_gradient_clipping(param_dict: Mapping[str, Any]) -> float:
    """`gradient_clipping` of a whole configuration: 1 unless it is given, 0 for none."""
    return param_dict.get("gradient_clipping", 1.0)


class CommsLoggerConfig(DeepSpeedConfigModel):
    """`comms_logger`."""

    enabled: bool = False
    prof_all: bool = True
    prof_ops: list[str] = []
    verbose: bool = False
    debug: bool = False


class DeepSpeedFlopsProfilerConfig(DeepSpeedConfigObject):
    """`flops_profiler` of a whole configuration."""

    def __init__(self, param_dict: Mapping[str, Any]) -> None:
        section = param_dict.get("flops_profiler", {})
        self.enabled = section.get("enabled", False)
        self.profile_step = section.get("profile_step", 1)
        self.module_depth = section.get("module_depth", -1)
        self.top_modules = section.get("top_modules", 1)
        self.detailed = section.get("detailed", True)
        self.output_file = section.get("output_file")


class DeepSpeedActivationCheckpointingConfig(DeepSpeedConfigObject):
    """`activation_checkpointing` of a whole configuration."""

    def __init__(self, param_dict: Mapping[str, Any]) -> None:
        section = param_dict.get("activation_checkpointing", {})
        self.partition_activations = section.get("partition_activations", False)
        self.contiguous_memory_optimization = section.get("contiguous_memory_optimization", False)
        self.cpu_checkpointing = section.get("cpu_checkpointing", False)
        self.number_checkpoints = section.get("number_checkpoints")
        self.synchronize_checkpoint_boundary = section.get("synchronize_checkpoint_boundary", False)
        self.profile = section.get("profile", False)


class DeepSpeedAutotuningConfig(DeepSpeedConfigObject):
    """`autotuning` of a whole configuration."""

    def __init__(self, param_dict: Mapping[str, Any]) -> None:
        self.__dict__.update({"enabled": False, **param_dict.get("autotuning", {})})


def get_aio_config(param_dict: Mapping[str, Any]) -> dict[str, Any]:
    """`aio` of a whole configuration, defaults filled in."""
    defaults = {
        "block_size": 1048576,
        "queue_depth": 8,
        "intra_op_parallelism": 1,
        "single_submit": False,
        "overlap_events": True,
        "use_gds": False,
    }
    return {**defaults, **param_dict.get("aio", {})}
