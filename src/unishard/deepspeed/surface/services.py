"""`comm`, `accelerator`, `utils`, `monitor`: what scripts use around training."""

from __future__ import annotations

from unishard.deepspeed.entries import Names, absent, constants, elsewhere, part, spelled
from unishard.deepspeed.surface.reasons import EXPERTS, FLOPS, INTERNAL, SEQUENCE

_COMM = part(
    "collectives",
    "ProcessGroup", "ReduceOp", "all_gather", "all_gather_coalesced", "all_gather_into_tensor", "all_gather_object",
    "all_reduce", "all_reduce_coalesced", "all_to_all", "all_to_all_single", "allgather_fn", "barrier", "broadcast",
    "broadcast_object_list", "destroy_process_group", "gather", "get_all_ranks_from_group", "get_global_rank",
    "get_local_rank", "get_rank", "get_world_group", "get_world_size", "has_all_gather_into_tensor",
    "has_all_reduce_coalesced", "has_coalescing_manager", "has_reduce_scatter_tensor", "inference_all_reduce",
    "init_distributed", "initialize_mesh_device", "irecv", "is_available", "is_initialized", "isend",
    "batch_isend_irecv", "P2POp", "monitored_barrier", "new_group", "recv", "reduce", "reduce_scatter",
    "reduce_scatter_fn", "reduce_scatter_tensor", "scatter", "send",
)  # fmt: skip
_LOG = part("collectives", "configure", note="there is no communication log; profile with torch.profiler")
_NO_LOG = absent(
    "there is no communication log; profile with torch.profiler",
    "log_summary", "reset_log", "has_comm_data", "get_comm_operation_count", "get_logged_comm_ops", "timed_op",
)  # fmt: skip

_GROUPS = part(
    "groups",
    "initialize", "get_data_parallel_group", "get_data_parallel_rank", "get_data_parallel_world_size",
    "get_model_parallel_group", "get_model_parallel_rank", "get_model_parallel_world_size",
    "get_tensor_model_parallel_group", "get_tensor_model_parallel_rank", "get_tensor_model_parallel_src_rank",
    "get_tensor_model_parallel_world_size", "_clone_world_group", "_ensure_divisibility",
    "_get_broadcast_src_rank", "_get_data_parallel_group",
    "_get_data_parallel_group_ranks", "_get_data_parallel_rank", "_get_data_parallel_world_size",
    "_get_model_parallel_world_size", "_get_sequence_data_parallel_group", "_get_sequence_data_parallel_rank",
    "_get_sequence_data_parallel_world_size", "_get_sequence_parallel_group", "_get_sequence_parallel_rank",
    "_get_sequence_parallel_world_size", "_zero_param_parallel_is_initialized", "mpu", "mesh_device",
)  # fmt: skip
_EXPERT_GROUPS = absent(
    EXPERTS,
    "_create_expert_and_data_parallel", "_create_expert_data_and_model_parallel", "_get_expert_data_parallel_group",
    "_get_expert_data_parallel_group_dict", "_get_expert_data_parallel_group_ranks", "_get_expert_data_parallel_rank",
    "_get_expert_data_parallel_world_size", "_get_expert_model_parallel_world_size", "_get_expert_parallel_group",
    "_get_expert_parallel_group_dict", "_get_expert_parallel_group_ranks", "_get_expert_parallel_rank",
    "_get_expert_parallel_ranks", "_get_expert_parallel_world_size", "_get_local_all_to_all_group",
    "_get_max_expert_parallel_group", "_get_max_expert_size", "_get_max_expert_size_name", "_create_model_parallel",
    "_create_zero_param_parallel_group", "_get_zero_param_intra_parallel_group",
)  # fmt: skip

_FRAGMENTS = part(
    "fragments",
    "safe_get_full_fp32_param", "safe_get_full_grad", "safe_get_full_optimizer_state", "safe_get_local_fp32_param",
    "safe_get_local_grad", "safe_get_local_optimizer_state", "safe_set_full_fp32_param", "safe_set_full_grad",
    "safe_set_full_optimizer_state", "safe_set_local_fp32_param", "safe_set_local_grad",
    "safe_set_local_optimizer_state", "safe_update_full_grad_vectorized",
)  # fmt: skip
_FRAGMENT_INTERNALS = absent(
    INTERNAL,
    "fragment_address", "get_full_hp_param", "get_full_hp_grad", "get_hp_fragment_mapping",
    "map_to_flat_opt_states", "set_full_hp_param", "set_full_hp_grad",
)  # fmt: skip
_LEAVES = part(
    "leaf_modules",
    "get_z3_leaf_modules", "set_z3_leaf_module", "set_z3_leaf_modules", "set_z3_leaf_modules_by_name",
    "set_z3_leaf_modules_by_suffix", "unset_z3_leaf_modules", "z3_leaf_module", "z3_leaf_parameter",
)  # fmt: skip
_LOGS = part(
    "logs",
    "LoggerFactory", "get_current_level", "get_log_level_from_string", "log_dist", "log_dist_once", "logger",
    "print_dist", "set_log_level_from_string", "should_log_le", "warning_once",
)  # fmt: skip
_NUMA = part(
    "machine", "check_for_numactl_pkg", "get_numa_cores", "get_numactl_cmd", "parse_range", "parse_range_list"
)
_LINKAGE = absent(INTERNAL, "link_hp_params", "lazy_init_hp_params_optimizer_state")
_ACCELERATOR = part(
    "accelerator",
    "DeepSpeedAccelerator",
    "get_accelerator",
    "is_current_accelerator_supported",
    "set_accelerator",
)
_CHECKS = part("monitors", "check_tb_availability", "check_wandb_availability", "check_comet_availability")

SERVICES: dict[str, Names] = {
    "comm": {**_COMM, **_LOG, **_NO_LOG},
    "comm.comm": {**_COMM, **_LOG, **_NO_LOG},
    "comm.torch": {**part("collectives", "known_world_size"), **absent(INTERNAL, "TorchBackend")},
    "comm.reduce_op": {**part("collectives", "ReduceOp")},
    "comm.constants": {
        **constants(
            NCCL_BACKEND="nccl",
            GLOO_BACKEND="gloo",
            MPI_BACKEND="mpi",
            CCL_BACKEND="ccl",
            HCCL_BACKEND="hccl",
        ),
        **spelled("COMMS_LOGGER"),
    },
    "comm.config": {**part("config_models", "CommsLoggerConfig")},
    "accelerator": _ACCELERATOR,
    "accelerator.real_accelerator": {
        **part(
            "accelerator",
            "get_accelerator",
            "is_current_accelerator_supported",
            "set_accelerator",
            "SUPPORTED_ACCELERATOR_LIST",
        )
    },
    "accelerator.abstract_accelerator": {**part("accelerator", "DeepSpeedAccelerator")},
    "accelerator.cpu_accelerator": {**part("accelerator", "CPU_Accelerator")},
    "accelerator.cuda_accelerator": {**part("accelerator", "CUDA_Accelerator")},
    "utils": {
        **_FRAGMENTS,
        **_FRAGMENT_INTERNALS,
        **_LEAVES,
        **_LINKAGE,
        **{name: entry for name, entry in _GROUPS.items() if not name.startswith("_")},
        **part("logs", "logger", "log_dist", "log_dist_once", "set_log_level_from_string"),
        **part("logs", "instrument_w_nvtx", "get_caller_func"),
        **part("on_device", "OnDevice"),
        **part("data", "RepeatingLoader"),
        **part("machine", "get_numactl_cmd"),
        **part("modules", "recursive_getattr", "recursive_setattr"),
    },
    "utils.groups": {**_GROUPS, **_EXPERT_GROUPS},
    "utils.logging": _LOGS,
    "utils.tensor_fragment": {**_FRAGMENTS, **_FRAGMENT_INTERNALS},
    "utils.mixed_precision_linkage": _LINKAGE,
    "utils.z3_leaf_module": _LEAVES,
    "utils.init_on_device": {**part("on_device", "OnDevice")},
    "utils.numa": _NUMA,
    "utils.nvtx": {**part("logs", "instrument_w_nvtx")},
    "utils.torch": {**part("machine", "required_torch_version", "register_grad_hook", "jit_script_compat")},
    "utils.module_utils": {**part("modules", "recursive_getattr", "recursive_setattr")},
    "utils.exceptions": {**part("modules", "DeprecatedException")},
    "utils.types": {**part("modules", "ActivationFuncType", "NormType")},
    "utils.debug": {
        **part(
            "modules",
            "debug_extract_module_and_param_names",
            "debug_clear_module_and_param_names",
            "debug_module2name",
            "debug_param2name",
            "debug_param2name_id_shape",
            "debug_param2name_id_shape_status",
            "print_rank0",
            "printflock",
        ),
        **elsewhere("fcntl", fcntl=""),
    },
    "utils.timer": {
        **part("timers", "NoopTimer", "SynchronizedWallClockTimer", "ThroughputTimer", "trim_mean"),
        **spelled("FORWARD_MICRO_TIMER", "BACKWARD_MICRO_TIMER", "STEP_MICRO_TIMER"),
        **spelled("FORWARD_GLOBAL_TIMER", "BACKWARD_GLOBAL_TIMER", "STEP_GLOBAL_TIMER"),
    },
    "utils.comms_logging": {
        **absent("profile with torch.profiler", "CommsLogger", "get_caller_func", "calc_bw_log")
    },
    "utils.zero_to_fp32": {
        **part(
            "consolidation",
            "OUTPUT_DTYPE_NAMES",
            "convert_zero_checkpoint_to_fp32_state_dict",
            "convert_zero_checkpoint_to_state_dict",
            "get_fp32_state_dict_from_zero_checkpoint",
            "get_model_state_files",
            "get_optim_files",
            "load_state_dict_from_zero_checkpoint",
            "to_torch_tensor",
        )
    },
    "utils.zero_to_torch": {**part("consolidation", "main")},
    "utils.bwc": {
        **part(
            "modules",
            "bwc_pipeline_parallel_group",
            "bwc_pipeline_parallel_world_size",
            "bwc_tensor_model_parallel_group",
            "bwc_tensor_model_parallel_rank",
            "bwc_tensor_model_parallel_world_size",
        )
    },
    "monitor": {},
    "monitor.config": {
        **part(
            "config_models",
            "CSVConfig",
            "CometConfig",
            "DeepSpeedMonitorConfig",
            "TensorBoardConfig",
            "WandbConfig",
            "get_monitor_config",
        )
    },
    "monitor.monitor": {
        **part(
            "monitors",
            "Monitor",
            "MonitorMaster",
            "TensorBoardMonitor",
            "csvMonitor",
            "WandbMonitor",
            "CometMonitor",
        )
    },
    "monitor.csv_monitor": {**part("monitors", "csvMonitor")},
    "monitor.tensorboard": {**part("monitors", "TensorBoardMonitor")},
    "monitor.wandb": {**part("monitors", "WandbMonitor")},
    "monitor.comet": {**part("monitors", "CometMonitor", "EventsLogScheduler")},
    "monitor.utils": _CHECKS,
    "profiling": {},
    "profiling.config": {**part("config_models", "DeepSpeedFlopsProfilerConfig")},
    "profiling.flops_profiler": {**absent(FLOPS, "FlopsProfiler", "get_model_profile")},
    "profiling.flops_profiler.profiler": {
        **absent(
            FLOPS,
            "FlopsProfiler",
            "get_model_profile",
            "get_module_flops",
            "get_module_macs",
            "flops_to_string",
        )
    },
    "sequence": {},
    "sequence.layer": {**absent(SEQUENCE, "DistributedAttention", "single_all_to_all")},
    "sequence.cross_entropy": {**absent(SEQUENCE, "vocab_sequence_parallel_cross_entropy")},
    "runtime.sequence_parallel": {},
    "runtime.sequence_parallel.ulysses_sp": {
        **absent(
            SEQUENCE, "UlyssesSPAttentionHF", "UlyssesSPDataLoaderAdapter", "SequenceTiledCompute", "TiledMLP"
        )
    },
    "runtime.sequence_parallel.parallel_state_sp": {**absent(SEQUENCE, "initialize_sequence_parallel")},
}
