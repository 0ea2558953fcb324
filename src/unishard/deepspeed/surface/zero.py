"""`runtime.zero`: sharded construction, gathering, configuration, optimizers."""

from __future__ import annotations

from unishard.deepspeed.entries import Names, absent, constants, part
from unishard.deepspeed.surface.reasons import INTERNAL, OFFLOAD

_STATUS = part("parameters", "ZeroParamStatus", "ZeroParamType")
_INIT = part("zero_init", "Init", "GatheredParameters", "register_external_parameter")
_TILING = part("tiling", "TiledLinear", "TiledLinearReturnBias", "split_tensor_along_last_dim")
_OFFLOAD_CONFIG = part(
    "zero_config",
    "DeepSpeedZeroOffloadOptimizerConfig",
    "DeepSpeedZeroOffloadParamConfig",
    "OffloadDeviceEnum",
)
_ESTIMATES = part(
    "estimates",
    "estimate_zero2_model_states_mem_needs", "estimate_zero2_model_states_mem_needs_all_cold",
    "estimate_zero2_model_states_mem_needs_all_live",
)  # fmt: skip
_ESTIMATES_3 = part(
    "estimates",
    "estimate_zero3_model_states_mem_needs", "estimate_zero3_model_states_mem_needs_all_cold",
    "estimate_zero3_model_states_mem_needs_all_live",
)  # fmt: skip
_OFFLOAD = part(
    "zero_optimizers", DeepSpeedZeRoOffload="ZeROOptimizer", note="a name: without an optimizer there is none"
)

ZERO: dict[str, Names] = {
    "runtime.zero": {
        **_STATUS,
        **_INIT,
        **part("tiling", "TiledLinear", "TiledLinearReturnBias"),
        **_OFFLOAD,
        **part("generation", "unwrap_model_for_generation"),
        **absent(INTERNAL, "DeepSpeedTensorOverride"),
    },
    "runtime.zero.partition_parameters": {
        **_STATUS,
        **_INIT,
        **part("zero_init", "unregister_external_parameter", "shutdown_init_context", "restore_init_context"),
        **part("zero_init", "_contradicting_single_rank_pg_error"),
        **part(
            "partitions",
            "partitioned_param_data_shape",
            "free_param",
            "zero_wrapper_for_fp_tensor_constructor",
        ),
        **part(
            "partitions", "_orig_torch_arange", "_orig_torch_empty", "_orig_torch_zeros", "_orig_torch_tensor"
        ),
        **part("partitions", "MultipleAllGatherHandles", "NoGatherHandle", "get_all_subclasses"),
        **part("collectives", "init_distributed"),
        **part("accelerator", "get_accelerator"),
        **absent(
            INTERNAL, "AllGatherHandle", "AllGatherCoalescedHandle", "InsertPostInitMethodToModuleSubClasses"
        ),
    },
    "runtime.zero.parameter_offload": {**_OFFLOAD, **absent(INTERNAL, "ZeROOrderedDict")},
    "runtime.zero.partitioned_param_coordinator": {
        **absent(INTERNAL, "PartitionedParameterCoordinator", "InflightParamRegistry", "iter_params")
    },
    "runtime.zero.config": {
        **part(
            "zero_config",
            "DeepSpeedZeroConfig",
            "ZeroStageEnum",
            "get_zero_config",
            "read_zero_config_deprecated",
        ),
        **_OFFLOAD_CONFIG,
        **constants(ZERO_OPTIMIZATION="zero_optimization"),
    },
    "runtime.zero.offload_config": {**_OFFLOAD_CONFIG, **part("zero_config", "OffloadStateTypeEnum")},
    "runtime.zero.offload_states": {
        **absent(OFFLOAD, "offload_adam_states", "reload_adam_states", "get_state_devices")
    },
    "runtime.zero.leaf_module_config": {
        **part("zero_config", "DeepSpeedZeroLeafModuleConfig"),
        **constants(
            DEFAULT_LEAF_MODULE_CLASSES=[], DEFAULT_LEAF_MODULE_NAMES=[], DEFAULT_LEAF_MODULE_NAME_SUFFIXES=[]
        ),
    },
    "runtime.zero.utils": {
        **part("parameters", "is_zero_param"),
        **part(
            "partitions", "ZeRORuntimeException", "ZERO_SUPPORTED_OPTIMIZERS", "is_zero_supported_optimizer"
        ),
        **part(
            "partitions", "apply_to_tensors_only", "assert_ints_same_as_other_ranks", "get_lst_from_rank0"
        ),
        **part(
            "partitions", "assert_lst_len_same_as_other_ranks", "defragment", "get_mapping_to_flat_buffer"
        ),
        **part("numerics", "get_only_unique_item"),
    },
    "runtime.zero.tiling": _TILING,
    "runtime.zero.linear": {**part("tiling", "LinearModuleForZeroStage3", "zero3_linear_wrap")},
    "runtime.zero.stage_1_and_2": {
        **part("zero_optimizers", "DeepSpeedZeroOptimizer"),
        **part("numerics", "split_half_float_double"),
        **_ESTIMATES,
    },
    "runtime.zero.stage3": {
        **part("zero_optimizers", "DeepSpeedZeroOptimizer_Stage3"),
        **part("generation", "unwrap_model_for_generation"),
        **_ESTIMATES_3,
    },
    "runtime.zero.contiguous_memory_allocator": {**absent(INTERNAL, "ContiguousMemoryAllocator")},
}
