"""`DeepSpeedConfig`: a configuration read and settled, by DeepSpeed's attribute names."""

from __future__ import annotations

import json
from typing import Any

import torch.distributed as dist

from unishard.config import ResolvedConfig, resolve
from unishard.config.batch import TRIAD, TriadError, solve
from unishard.deepspeed.parts.config_models import (
    DeepSpeedActivationCheckpointingConfig,
    DeepSpeedAutotuningConfig,
    DeepSpeedBF16Config,
    DeepSpeedFlopsProfilerConfig,
    DeepSpeedFP16Config,
    DeepSpeedMonitorConfig,
    get_aio_config,
    get_bfloat16_config,
    get_float16_config,
    get_monitor_config,
)
from unishard.deepspeed.parts.configuration import (
    DeepSpeedConfigError,
    raw_config,
    with_defaults,
    without_max_grad_norm,
)
from unishard.deepspeed.parts.zero_config import DeepSpeedZeroConfig, get_zero_config
from unishard.errors import ConfigError


class DeepSpeedConfig:
    """The configuration of a run on this many ranks. Values are attributes; sections have DeepSpeed's classes.

    Args:
        config: a path, a dict, or a base64 string of JSON. mpu: what knows the data-parallel size, if not all ranks.

    Raises:
        DeepSpeedConfigError: every problem at once.

    >>> DeepSpeedConfig({"train_batch_size": 8, "zero_optimization": {"stage": 2}}).zero_optimization_stage
    2
    """

    def __init__(self, config: Any, mpu: Any = None, mesh_device: Any = None) -> None:
        self.world_size = _world_size(mpu, mesh_device)
        self.global_rank = dist.get_rank() if dist.is_initialized() else 0
        try:
            self._param_dict = raw_config(config)
            self._resolved: ResolvedConfig = resolve(
                without_max_grad_norm(with_defaults(self._param_dict)),
                dp_world_size=self.world_size,
                world_size_source="the process group",
            )
        except ConfigError as error:
            raise DeepSpeedConfigError(str(error)) from error

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._resolved, name)

    def _configure_train_batch_size(self) -> None:
        """Settle `train_batch_size`, `train_micro_batch_size_per_gpu` and `gradient_accumulation_steps` again, from
        those of them that were assigned."""
        given = [self.__dict__.get(name) for name in TRIAD]
        try:
            triad = solve(given[0], given[1], given[2], self.world_size, "the process group")
        except TriadError as error:
            raise DeepSpeedConfigError(str(error)) from error
        self.train_batch_size = triad.train
        self.train_micro_batch_size_per_gpu = triad.micro
        self.gradient_accumulation_steps = triad.accumulation

    @property
    def zero_config(self) -> DeepSpeedZeroConfig:
        return get_zero_config(self._param_dict)

    @property
    def zero_optimization_stage(self) -> int:
        return self._resolved.zero_optimization.stage

    @property
    def zero_enabled(self) -> bool:
        return self.zero_optimization_stage > 0

    @property
    def float16_config(self) -> DeepSpeedFP16Config:
        return get_float16_config(self._param_dict)

    @property
    def bfloat16_config(self) -> DeepSpeedBF16Config:
        return get_bfloat16_config(self._param_dict)

    @property
    def monitor_config(self) -> DeepSpeedMonitorConfig:
        return get_monitor_config(self._param_dict)

    @property
    def activation_checkpointing_config(self) -> DeepSpeedActivationCheckpointingConfig:
        return DeepSpeedActivationCheckpointingConfig(self._param_dict)

    @property
    def flops_profiler_config(self) -> DeepSpeedFlopsProfilerConfig:
        return DeepSpeedFlopsProfilerConfig(self._param_dict)

    @property
    def autotuning_config(self) -> DeepSpeedAutotuningConfig:
        return DeepSpeedAutotuningConfig(self._param_dict)

    @property
    def aio_config(self) -> dict[str, Any]:
        return get_aio_config(self._param_dict)

    @property
    def optimizer_name(self) -> str | None:
        section = self._param_dict.get("optimizer")
        return None if section is None else str(section["type"]).lower()

    @property
    def optimizer_params(self) -> dict[str, Any] | None:
        return (self._param_dict.get("optimizer") or {}).get("params")

    @property
    def scheduler_name(self) -> str | None:
        return (self._param_dict.get("scheduler") or {}).get("type")

    @property
    def scheduler_params(self) -> dict[str, Any] | None:
        return (self._param_dict.get("scheduler") or {}).get("params")

    @property
    def checkpoint_tag_validation_enabled(self) -> bool:
        return self._resolved.checkpoint.tag_validation.upper() != "IGNORE"

    @property
    def checkpoint_tag_validation_fail(self) -> bool:
        return self._resolved.checkpoint.tag_validation.upper() == "FAIL"

    @property
    def load_universal_checkpoint(self) -> bool:
        return self._resolved.checkpoint.load_universal

    def print_user_config(self) -> None:
        """Print the configuration as given."""
        print(json.dumps(self._param_dict, indent=4, sort_keys=True, default=str))

    def print(self, name: str) -> None:
        """Print every value with where it is from, and the configuration as given."""
        print(f"{name}:")
        for row in self._resolved.as_table():
            print(f"  {row.key} = {row.value} ({row.origin})")
        self.print_user_config()


def _world_size(mpu: Any, mesh_device: Any) -> int:
    if mpu is not None:
        return mpu.get_data_parallel_world_size()
    if mesh_device is not None:
        return mesh_device.get_group(mesh_dim="data_parallel").size()
    return dist.get_world_size() if dist.is_initialized() else 1
