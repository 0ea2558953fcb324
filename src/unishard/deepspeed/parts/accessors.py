"""DeepSpeed's accessors that are one configuration value each, as a table."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

_Z = "zero_optimization."

CONFIG_ACCESSORS: dict[str, str] = {
    "optimizer_params": "optimizer.params",
    "scheduler_params": "scheduler.params",
    "optimizer_legacy_fusion": "optimizer.legacy_fusion",
    "zero_allow_untested_optimizer": "zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer": "zero_force_ds_cpu_optimizer",
    "zero_reduce_scatter": _Z + "reduce_scatter",
    "zero_overlap_comm": _Z + "overlap_comm",
    "zero_offload_optimizer": _Z + "offload_optimizer",
    "zero_offload_param": _Z + "offload_param",
    "zero_sub_group_size": _Z + "sub_group_size",
    "zero_reduce_bucket_size": _Z + "reduce_bucket_size",
    "zero_multi_rank_bucket_allreduce": _Z + "use_multi_rank_bucket_allreduce",
    "zero_allgather_bucket_size": _Z + "allgather_bucket_size",
    "zero_allgather_partitions": _Z + "allgather_partitions",
    "zero_contiguous_gradients": _Z + "contiguous_gradients",
    "zero_load_from_fp32_weights": _Z + "load_from_fp32_weights",
    "zero_elastic_checkpoint": _Z + "elastic_checkpoint",
    "zero_max_live_parameters": _Z + "stage3_max_live_parameters",
    "zero_max_reuse_distance": _Z + "stage3_max_reuse_distance",
    "zero_prefetch_bucket_size": _Z + "stage3_prefetch_bucket_size",
    "zero_module_granularity_threshold": _Z + "stage3_module_granularity_threshold",
    "zero_param_persistence_threshold": _Z + "stage3_param_persistence_threshold",
    "zero_model_persistence_threshold": _Z + "stage3_model_persistence_threshold",
    "zero_gather_16bit_weights_on_model_save": _Z + "stage3_gather_16bit_weights_on_model_save",
    "zero_legacy_stage1": _Z + "legacy_stage1",
    "zero_ignore_unused_parameters": _Z + "ignore_unused_parameters",
    "zero_round_robin_gradients": _Z + "round_robin_gradients",
    "zero_parameter_alignment": _Z + "parameter_alignment",
    "zero_hpz_partition_size": _Z + "zero_hpz_partition_size",
    "zero_quantized_weights": _Z + "zero_quantized_weights",
    "zero_quantized_nontrainable_weights": _Z + "zero_quantized_nontrainable_weights",
    "zero_quantized_gradients": _Z + "zero_quantized_gradients",
    "zero_log_trace_cache_warnings": _Z + "log_trace_cache_warnings",
    "zero_allgather_sequential": _Z + "stage3_allgather_sequential",
    "zero_compute_grad_norm": _Z + "compute_grad_norm",
    "is_sanity_checks_enabled": _Z + "enable_sanity_checks",
    "fp16_auto_cast": "fp16.auto_cast",
    "fp16_master_weights_and_gradients": "fp16.fp16_master_weights_and_grads",
    "bf16_master_weights_and_gradients": "bf16.bf16_master_weights_and_grads",
    "bf16_optimizer_states": "bf16.bf16_optimizer_states",
    "torch_autocast_enabled": "torch_autocast.enabled",
    "gradient_predivide_factor": "gradient_predivide_factor",
    "managed_gradient_accumulation": "managed_gradient_accumulation",
    "memory_breakdown": "memory_breakdown",
    "dump_state": "dump_state",
    "dataloader_drop_last": "dataloader_drop_last",
    "use_node_local_storage": "checkpoint.use_node_local_storage",
    "load_universal_checkpoint": "checkpoint.load_universal",
    "checkpoint_serialization_enabled": "checkpoint.checkpoint_serialization",
    "flops_profiler_enabled": "flops_profiler.enabled",
    "flops_profiler_profile_step": "flops_profiler.profile_step",
    "flops_profiler_module_depth": "flops_profiler.module_depth",
    "flops_profiler_top_modules": "flops_profiler.top_modules",
    "flops_profiler_detailed": "flops_profiler.detailed",
    "flops_profiler_output_file": "flops_profiler.output_file",
    "autotuning_enabled": "autotuning.enabled",
    "data_efficiency_enabled": "data_efficiency.enabled",
    "curriculum_learning_enabled": "curriculum_learning.enabled",
    "aio_config": "aio",
    "log_level": "log_level",
    "gradient_clipping": "gradient_clipping",
}
"""Accessor -> the dotted key of the resolved configuration that it returns."""

_FIXED: dict[str, Any] = {
    "random_ltd_enabled": False,
    "data_sampling_enabled": False,
    "autotp_size": 0,
    "is_deepcompile_enabled": False,
    "is_deepcompile_active": False,
    "super_offload": False,
}
"""Questions about what does not exist here."""

T = TypeVar("T", bound=type)


def config_accessors(table: Mapping[str, str]) -> Callable[[T], T]:
    """A class decorator: one method for each row, unless the class has one already."""

    def decorate(cls: T) -> T:
        for name, path in table.items():
            setattr(cls, name, _accessor(name, path))
        for name, value in _FIXED.items():
            setattr(cls, name, _constant(name, value))
        cls.zero_cpu_offload = cls.zero_use_cpu_optimizer = lambda self: _offloads(self)  # pyright: ignore
        cls.zero_optimization_partition_gradients = lambda self: self.zero_optimization_stage() >= 2  # pyright: ignore
        cls.zero_optimization_partition_weights = lambda self: self.zero_optimization_stage() >= 3  # pyright: ignore
        cls.postscale_gradients = lambda self: not self.config.prescale_gradients  # pyright: ignore
        cls.initial_dynamic_scale = lambda self: 2.0**self.config.fp16.initial_scale_power  # pyright: ignore
        return cls

    return decorate


def _offloads(engine: Any) -> bool:
    section = engine.zero_offload_optimizer()
    return section is not None and section.device in ("cpu", "nvme")


def _accessor(name: str, path: str) -> Callable[[Any], Any]:
    parts = path.split(".")

    def read(self: Any) -> Any:
        value: Any = getattr(self._config, parts[0])
        for part in parts[1:]:
            value = None if value is None else getattr(value, part)
        return value

    read.__name__ = read.__qualname__ = name
    read.__doc__ = f"`{path}` of the resolved configuration."
    return read


def _constant(name: str, value: Any) -> Callable[[Any], Any]:
    def read(self: Any) -> Any:
        return value

    read.__name__ = read.__qualname__ = name
    return read
