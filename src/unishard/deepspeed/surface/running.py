"""`runtime`: engine, configuration, schedules, loaders, numerics."""

from __future__ import annotations

from unishard.deepspeed.entries import Names, absent, constants, part, spelled
from unishard.deepspeed.surface.reasons import INTERNAL, OFFLOAD, TENSOR

_SCHEDULES = part(
    "schedules",
    "LRRangeTest", "OneCycle", "WarmupCosineLR", "WarmupDecayLR", "WarmupLR", "VALID_LR_SCHEDULES",
    "add_tuning_arguments", "get_config_from_args", "get_lr_from_config", "get_torch_optimizer", "override_params",
    "override_1cycle_params", "override_lr_range_test_params", "override_warmupLR_params", "parse_arguments",
    "update_lr",
)  # fmt: skip
_SCHEDULE_KEYS = {
    **constants(LR_RANGE_TEST="LRRangeTest", ONE_CYCLE="OneCycle", WARMUP_LR="WarmupLR"),
    **constants(WARMUP_DECAY_LR="WarmupDecayLR", WARMUP_COSINE_LR="WarmupCosineLR"),
    **constants(WARMUP_LOG_RATE="log", WARMUP_LINEAR_RATE="linear"),
    **spelled("LR_SCHEDULE", "LR_RANGE_TEST_MIN_LR", "LR_RANGE_TEST_STEP_RATE", "LR_RANGE_TEST_STEP_SIZE"),
    **spelled(
        "LR_RANGE_TEST_STAIRCASE",
        "EDGE_VALUE",
        "MID_VALUE",
        "CYCLE_FIRST_STEP_SIZE",
        "CYCLE_FIRST_STAIR_COUNT",
    ),
    **spelled(
        "CYCLE_SECOND_STEP_SIZE",
        "CYCLE_SECOND_STAIR_COUNT",
        "DECAY_STEP_SIZE",
        "CYCLE_MIN_LR",
        "CYCLE_MAX_LR",
    ),
    **spelled(
        "DECAY_LR_RATE", "CYCLE_MIN_MOM", "CYCLE_MAX_MOM", "DECAY_MOM_RATE", "WARMUP_MIN_LR", "WARMUP_MAX_LR"
    ),
    **spelled("WARMUP_NUM_STEPS", "WARMUP_TYPE", "WARMUP_MIN_RATIO", "COS_MIN_RATIO", "TOTAL_NUM_STEPS"),
}
_OPTIMIZER_NAMES = constants(
    ADAGRAD_OPTIMIZER="adagrad", ADAM_OPTIMIZER="adam", ADAMW_OPTIMIZER="adamw", LAMB_OPTIMIZER="lamb",
    LION_OPTIMIZER="lion", MUADAM_OPTIMIZER="muadam", MUADAMW_OPTIMIZER="muadamw", MUSGD_OPTIMIZER="musgd",
    MUON_OPTIMIZER="muon", TORCH_ADAM_PARAM="torch_adam", ADAM_W_MODE="adam_w_mode", ADAM_W_MODE_DEFAULT=True,
    DEEPSPEED_OPTIMIZERS=["adagrad", "adam", "adamw", "lamb", "muadam", "muadamw", "musgd", "lion", "muon"],
)  # fmt: skip
_RUNTIME_KEYS = {
    **spelled(
        "TRAIN_BATCH_SIZE", "TRAIN_MICRO_BATCH_SIZE_PER_GPU", "GRADIENT_ACCUMULATION_STEPS", "OPTIMIZER"
    ),
    **spelled("SCHEDULER", "TYPE", "STEPS_PER_PRINT", "GRADIENT_CLIPPING", "FP16", "PRESCALE_GRADIENTS"),
    **spelled("GRADIENT_PREDIVIDE_FACTOR", "COMMUNICATION_DATA_TYPE", "WALL_CLOCK_BREAKDOWN", "DUMP_STATE"),
    **spelled("DATALOADER_DROP_LAST", "CHECKPOINT", "ZERO_ALLOW_UNTESTED_OPTIMIZER", "DATA_PARALLEL_GROUP"),
    **spelled(
        "GLOBAL_RANK", "VOCABULARY_SIZE", "MEMORY_BREAKDOWN", "TORCH_AUTOCAST", "BUFFER_DTYPE", "DATA_TYPES"
    ),
    **constants(ROUTE_TRAIN="train", ROUTE_EVAL="eval", ROUTE_PREDICT="predict", ROUTE_ENCODE="encode"),
    **constants(
        BFLOAT16="bf16", BFLOAT16_OLD="bfloat16", OPTIMIZER_PARAMS="params", SCHEDULER_PARAMS="params"
    ),
    **constants(
        OPTIMIZER_TYPE_DEFAULT=None,
        GRADIENT_CLIPPING_DEFAULT=1.0,
        STEPS_PER_PRINT_DEFAULT=None,
        LOG_LEVEL_DEFAULT=None,
    ),
    **constants(
        MAX_GRAD_NORM="max_grad_norm", PIPE_REPLICATED="ds_pipe_replicated", LEGACY_FUSION="legacy_fusion"
    ),
    **constants(
        FP16_ENABLED="enabled", FP16_LOSS_SCALE="loss_scale", FP16_INITIAL_SCALE_POWER="initial_scale_power"
    ),
}

RUNNING: dict[str, Names] = {
    "runtime": {},
    "runtime.engine": {
        **part("engine", "DeepSpeedEngine"),
        **part("checkpoint_files", _checkpoint_parallel_metadata="checkpoint_parallel_metadata"),
        **_OPTIMIZER_NAMES,
        **part(
            "zero_optimizers",
            "DeepSpeedZeroOptimizer",
            "BF16_Optimizer",
            "FP16_Optimizer",
            "FP16_UnfusedOptimizer",
        ),
        **part("monitors", "MonitorMaster"),
    },
    "runtime.config": {
        **part("config_object", "DeepSpeedConfig"),
        **part("configuration", "DeepSpeedConfigError"),
        **part("config_models", "DtypeEnum", "get_gradient_clipping", "get_log_level", "get_monitor_config"),
        **part("zero_config", "get_zero_config"),
        **_OPTIMIZER_NAMES,
        **_RUNTIME_KEYS,
    },
    "runtime.config_utils": {
        **part(
            "config_models",
            "DeepSpeedConfigModel",
            "DeepSpeedConfigObject",
            "ScientificNotationEncoder",
            "dict_raise_error_on_duplicate_keys",
            "get_config_default",
            "get_dict_param",
            "get_list_param",
            "get_scalar_param",
            "pp_int",
        )
    },
    "runtime.constants": _RUNTIME_KEYS,
    "runtime.precision_config": {
        **part(
            "config_models",
            "DeepSpeedBF16Config",
            "DeepSpeedFP16Config",
            "get_bfloat16_config",
            "get_float16_config",
        ),
        **constants(BFLOAT16="bf16", BFLOAT16_OLD="bfloat16", FP16="fp16"),
    },
    "runtime.lr_schedules": {**_SCHEDULES, **_SCHEDULE_KEYS},
    "runtime.dataloader": {**part("data", "DeepSpeedDataLoader", "RepeatingLoader")},
    "runtime.base_optimizer": {**part("zero_optimizers", "DeepSpeedOptimizer", "ZeROOptimizer")},
    "runtime.bf16_optimizer": {**part("zero_optimizers", "BF16_Optimizer")},
    "runtime.fp16": {},
    "runtime.fp16.fused_optimizer": {**part("zero_optimizers", "FP16_Optimizer")},
    "runtime.fp16.unfused_optimizer": {**part("zero_optimizers", "FP16_UnfusedOptimizer")},
    "runtime.fp16.loss_scaler": {
        **part("loss_scalers", "DynamicLossScaler", "LossScaler", "LossScalerBase", "CreateLossScaler"),
        **constants(
            INITIAL_LOSS_SCALE="init_scale", SCALE_WINDOW="scale_window", DELAYED_SHIFT="delayed_shift"
        ),
        **constants(CONSECUTIVE_HYSTERESIS="consecutive_hysteresis", MIN_LOSS_SCALE="min_scale"),
    },
    "runtime.utils": {
        **part(
            "numerics",
            "CheckOverflow",
            "DummyOptim",
            "align_dense_tensors",
            "call_to_str",
            "clip_grad_norm_",
            "clip_tensors_by_global_norm",
            "combine_grad_norm_groups",
            "copy_to_device",
            "empty_cache",
            "ensure_directory_exists",
            "filter_empty_parameters",
            "get_global_norm",
            "get_global_norm_of_tensors",
            "get_ma_status",
            "get_only_unique_item",
            "get_weight_norm",
            "has_inf_or_nan",
            "is_model_parallel_parameter",
            "memory_status",
            "move_to_device",
            "noop_decorator",
            "partition_balanced",
            "partition_uniform",
            "prefix_sum_inc",
            "see_memory_usage",
            "set_random_seed",
            "get_flattened_grad_norm",
            "get_tensor_bytes",
            "noop_context",
            "check_internal_apis_for_count_used_parameters",
            "count_used_parameters_in_backward",
            "mask_nan_or_inf_with_val_inplace",
        ),
        **part("numerics", "PartitionedTensor"),
        **absent(INTERNAL, "all_gather_dp_groups", "all_gather_into_tensor_dp_groups"),
    },
    "runtime.compiler": {**part("machine", "is_compile_supported", "disable", "enable", "is_compiling")},
    "runtime.torch_autocast": {
        **part(
            "autocast",
            "LOWER_PRECISION_SAFE_MODULES",
            "PARAM_COMM_DTYPE_ATTR_NAME",
            "get_all_comm_dtypes",
            "get_autocast_dtype",
            "get_comm_dtype",
            "get_default_autocast_lower_precision_modules",
            "has_comm_dtype",
            "init_autocast_params",
            "is_autocast_initialized",
            "sort_dtypes",
            note="what travels is in communication_data_type, whatever the module",
        )
    },
    "runtime.sparse_tensor": {
        **absent("gradients are reduced dense; build embeddings with sparse=False", "SparseTensor")
    },
    "runtime.state_dict_factory": {
        **absent("load weights with unishard.load_safetensors", "SDLoaderFactory")
    },
    "runtime.activation_checkpointing": {},
    "runtime.activation_checkpointing.checkpointing": {
        **part(
            "recomputation",
            "CheckpointFunction",
            "CudaRNGStatesTracker",
            "checkpoint",
            "configure",
            "get_cuda_rng_tracker",
            "is_configured",
            "model_parallel_cuda_manual_seed",
            "model_parallel_reconfigure_tp_seed",
            "non_reentrant_checkpoint",
            "partition_activations_in_checkpoint",
            "reset",
            "set_num_layers",
        ),
        # Globals of DeepSpeed's that scripts read, and set back: what `configure` leaves off here.
        **constants(PARTITION_ACTIVATIONS=False, CONTIGUOUS_CHECKPOINTING=False, CPU_CHECKPOINT=False),
        **constants(SYNCHRONIZE=False, PROFILE_TIME=False, deepspeed_checkpointing_enabled=False),
        **constants(num_layers=None, mpu=None),
    },
    "runtime.activation_checkpointing.config": {
        **part("config_models", "DeepSpeedActivationCheckpointingConfig")
    },
    "runtime.swap_tensor": {**constants(MIN_SWAPPABLE_BYTES=1 << 20)},
    "runtime.swap_tensor.utils": {**constants(MIN_AIO_BYTES=1 << 20, MIN_SWAPPABLE_BYTES=1 << 20)},
    "runtime.swap_tensor.aio_config": {**part("config_models", "get_aio_config")},
    "runtime.swap_tensor.partitioned_param_swapper": {**absent(OFFLOAD, "AsyncPartitionedParameterSwapper")},
    "runtime.swap_tensor.partitioned_optimizer_swapper": {**absent(OFFLOAD, "PartitionedOptimizerSwapper")},
    "runtime.comm": {},
    "runtime.comm.coalesced_collectives": {
        **part("numerics", "reduce_scatter_coalesced"),
        **absent("quantized reduction is not part of this version", "all_to_all_quant_reduce"),
    },
    "runtime.tensor_parallel": {**absent(TENSOR, "TpTrainingManager", "get_tensor_parallel_config")},
    "runtime.zenflow": {},
    "runtime.zenflow.zenflow_config": {**absent(OFFLOAD, "ZenFlowConfig")},
    "runtime.model_checkpointing": {},
    "runtime.model_checkpointing.constants": {
        **part("config_models", "ValidationMode"),
        **constants(CHECKPOINT="checkpoint", CHECKPOINT_TAG_VALIDATION="tag_validation"),
        **constants(CHECKPOINT_TAG_VALIDATION_MODES=["Warn", "Ignore", "Fail"]),
    },
    "runtime.checkpoint_engine": {
        **absent("engines save through unishard's own writer", "TorchCheckpointEngine")
    },
    "runtime.checkpoint_engine.torch_checkpoint_engine": {
        **absent("engines save through unishard's own writer", "TorchCheckpointEngine")
    },
    "runtime.checkpoint_engine.checkpoint_engine": {
        **absent("engines save through unishard's own writer", "CheckpointEngine", "CheckpointCommitInfo")
    },
}
