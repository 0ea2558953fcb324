"""Sections of features that this version lacks: every key is known, and switching one on is refused.

Values inside are not checked: with its section off a key means nothing; on, the whole section is refused.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from unishard.config.fields import Honoured, Refused, Section, Translated, enabled, not_available


class FlopsProfiler(Section):
    """`flops_profiler`."""

    enabled: Any = False
    recompute_fwd_factor: Any = 0.0
    profile_step: Any = 1
    module_depth: Any = -1
    top_modules: Any = 1
    detailed: Any = True
    output_file: Any = None


class Autotuning(Section):
    """`autotuning`."""

    enabled: Any = False
    fast: Any = True
    results_dir: Any = "autotuning_results"
    exps_dir: Any = "autotuning_exps"
    overwrite: Any = True
    start_step: Any = None
    end_step: Any = None
    start_profile_step: Any = 3
    end_profile_step: Any = 5
    metric: Any = "throughput"
    metric_path: Any = None
    tuner_type: Any = "gridsearch"
    tuner_early_stopping: Any = 5
    tuner_num_trials: Any = 50
    arg_mappings: Any = None
    max_train_batch_size: Any = None
    min_train_batch_size: Any = 1
    max_train_micro_batch_size_per_gpu: Any = 1024
    min_train_micro_batch_size_per_gpu: Any = 1
    num_tuning_micro_batch_sizes: Any = 3
    mp_size: Any = 1
    model_info: Any = None
    model_info_path: Any = None


class RandomLtd(Section):
    """`data_efficiency.data_routing.random_ltd`."""

    enabled: Any = False
    total_layer_num: Any = None
    random_ltd_layer_num: Any = None
    random_ltd_layer_id: Any = None
    model_mask_name: Any = None
    model_type: Any = None
    micro_batch_size: Any = None
    global_batch_size: Any = None
    hidden_state_order: Any = None
    random_ltd_schedule: Any = None
    layer_token_lr_schedule: Any = None


class DataRouting(Section):
    """`data_efficiency.data_routing`."""

    enabled: Any = False
    random_ltd: RandomLtd = RandomLtd()


class Curriculum(Section):
    """`data_efficiency.data_sampling.curriculum_learning`."""

    enabled: Any = False
    data_cluster_path: Any = None
    curriculum_metrics: Any = None


class DynamicBatching(Section):
    """`data_efficiency.data_sampling.dynamic_batching`."""

    enabled: Any = False
    metrics_path: Any = None
    lr_scaling_method: Any = "linear"
    min_batch_size: Any = 1
    max_batch_size: Any = None
    sequence_picking_order: Any = "dataloader"
    max_tokens: Any = None
    verbose: Any = False


class DataSampling(Section):
    """`data_efficiency.data_sampling`."""

    enabled: Any = False
    num_epochs: Any = 1000
    num_workers: Any = 0
    pin_memory: Any = False
    curriculum_learning: Curriculum = Curriculum()
    dynamic_batching: DynamicBatching = DynamicBatching()


class DataEfficiency(Section):
    """`data_efficiency`."""

    enabled: Any = False
    seed: Any = 1234
    data_routing: DataRouting = DataRouting()
    data_sampling: DataSampling = DataSampling()


class PartitionConfig(Section):
    """`tensor_parallel.partition_config`."""

    use_default_specs: Any = True
    layer_specs: Any = []


class TensorParallelSize(Section):
    """`tensor_parallel.tensor_parallel`."""

    tp_size: Any = 1
    tp_grain_size: Any = 1


class TensorParallel(Section):
    """`tensor_parallel`."""

    autotp_size: Any = 0
    tp_size: Any = 1
    dtype: Any = None
    preset_model: Any = None
    tp_overlap_comm: Any = False
    vocab_parallel_lm_head: Any = None
    vocab_parallel_ce_backend: Any = "torch"
    partition_config: PartitionConfig | None = None
    tensor_parallel: TensorParallelSize | None = None
    tp: TensorParallelSize | None = None
    injection_policy_tuple: Any = None
    keep_module_on_host: Any = False
    replace_with_kernel_inject: Any = False


class ExpertParallel(Section):
    """`expert_parallel`."""

    enabled: Any = False
    autoep_size: Any = 1
    expert_tensor_parallel_size: Any = 1
    validate_folding_routing: Any = False
    async_split_plan: Any = False
    preset_model: Any = None
    use_grouped_mm: Any = True
    disable_triton_grouped_mm: Any = False
    moe_layer_pattern: Any = None
    router_pattern: Any = None
    expert_pattern: Any = None
    score_func: Any = "auto"
    score_apply: Any = "auto"
    combine_impl: Any = "auto"
    row_weighting_impl: Any = "auto"
    gate_up_impl: Any = "separate"
    comm_backend: Any = "comm"
    comm_num_sm: Any = 12
    comm_qp_margin: Any = 4
    comm_max_tokens_per_rank: Any = 0
    route_norm: Any = None
    route_scale: Any = 1.0
    top_k: Any = "auto"
    routed_scaling_factor: Any = "auto"
    num_expert_groups: Any = None
    num_limited_groups: Any = None
    load_balance_coeff: Any = None
    expert_w1: Any = None
    expert_w2: Any = None
    expert_w3: Any = None
    num_experts_attr: Any = None
    top_k_attr: Any = None
    has_shared_experts: Any = None
    shared_experts_pattern: Any = None
    shared_experts_gate_pattern: Any = None
    expert_activation: Any = None


class Pipeline(Section):
    """`pipeline`."""

    stages: Any = "auto"
    partition: Any = "best"
    seed_layers: Any = False
    activation_checkpoint_interval: Any = 0
    pipe_partitioned: Any = True
    grad_partitioned: Any = True
    use_reentrant: Any = True


class HybridEngine(Section):
    """`hybrid_engine`."""

    enabled: Any = False
    max_out_tokens: Any = 512
    inference_tp_size: Any = 1
    release_inference_cache: Any = False
    pin_parameters: Any = True
    tp_gather_partition_size: Any = 8
    enable_cuda_graph: Any = False


class Compile(Section):
    """`compile`."""

    enabled: Any = False
    backend: Any = "inductor"
    kwargs: Any = {}
    deepcompile: Any = False
    autoep_non_moe: Any = False
    free_activation: Any = False
    free_activation_threshold: Any = 10485760
    offload_activation: Any = False
    offload_activation_pin_memory: Any = True
    offload_opt_states: Any = False
    offload_parameters: Any = False
    double_buffer: Any = True
    symmetric_memory: Any = False
    debug_log: Any = False
    sync_before_reduce: Any = False
    sync_after_reduce: Any = False
    sync_before_allgather: Any = False
    sync_after_allgather: Any = False
    keep_int_input_tensors: Any = True
    keep_all_input_tensors: Any = False
    passes: Any = None


class ParallelWrite(Section):
    """`checkpoint.parallel_write`."""

    pipeline_stage: Annotated[bool, not_available("parallel writing by pipeline", "set it to false")] = False


class CheckpointWriter(Section):
    """`checkpoint.writer`."""

    type: Any = "FAST"
    decoupled: Any = False
    io_buffer_size: Any = 64 * 1024**2
    io_buffer_double: Any = True
    io_multiplier: Any = 1
    show_statistics: Any = False
    data_parallel: Any = None


class Checkpoint(Section):
    """`checkpoint`."""

    tag_validation: Annotated[
        Literal["Ignore", "Warn", "Fail", "IGNORE", "WARN", "FAIL", "ignore", "warn", "fail"], Honoured()
    ] = "Warn"
    load_universal: Annotated[
        bool, Translated("load_checkpoint finds out by itself what kind of checkpoint it is given")
    ] = False
    use_node_local_storage: Annotated[
        bool,
        not_available("node-local storage", "set it to false, and save to a folder that all nodes share"),
    ] = False
    checkpoint_serialization: Annotated[
        bool, Translated("files hold tensors as they are, whatever this says")
    ] = True
    parallel_write: ParallelWrite = ParallelWrite()
    writer: Annotated[
        CheckpointWriter | None,
        Refused("there is one writer, which writes large blocks from every rank", "remove the section"),
    ] = None


def _degree(value: Any) -> bool:
    return isinstance(value, int) and value > 1


def _tensor_parallel(section: TensorParallel) -> bool:
    nested = [part.tp_size for part in (section.tensor_parallel, section.tp) if part is not None]
    return any(map(_degree, (section.autotp_size, section.tp_size, *nested)))


class UnavailableKeys(Section):
    """Top-level keys of what DeepSpeed has and this version has not."""

    flops_profiler: Annotated[
        FlopsProfiler,
        not_available("flops_profiler", "use torch.utils.flop_counter.FlopCounterMode", asks=enabled),
    ] = FlopsProfiler()
    autotuning: Annotated[
        Autotuning, not_available("autotuning", "try micro-batch sizes and stages by hand", asks=enabled)
    ] = Autotuning()
    data_efficiency: Annotated[
        DataEfficiency,
        not_available("data_efficiency", "sample and order the data in your own loader", asks=enabled),
    ] = DataEfficiency()
    tensor_parallel: Annotated[
        TensorParallel,
        not_available(
            "tensor_parallel through the config",
            "apply torch.distributed.tensor.parallel first and shard with unishard.fully_shard",
            asks=_tensor_parallel,
        ),
    ] = TensorParallel()
    expert_parallel: Annotated[
        ExpertParallel,
        not_available("expert_parallel", "train the experts data-parallel, with stage 3", asks=enabled),
    ] = ExpertParallel()
    pipeline: Annotated[
        Pipeline,
        not_available(
            "pipeline parallelism", "use stage 3 with smaller micro-batches", asks=lambda s: _degree(s.stages)
        ),
    ] = Pipeline()
    hybrid_engine: Annotated[
        HybridEngine, not_available("hybrid_engine", "generate with the model in eval mode", asks=enabled)
    ] = HybridEngine()
    compile: Annotated[
        Compile,
        not_available(
            "compiling through the config",
            "call torch.compile on each block before initialize",
            asks=lambda s: bool(s.enabled or s.deepcompile or s.passes),
        ),
    ] = Compile()
    checkpoint: Checkpoint = Checkpoint()
    weight_quantization: Annotated[Any, not_available("weight_quantization", "remove the section")] = None
    datastates_ckpt: Annotated[
        Any, not_available("datastates_ckpt", "remove the section", neutral=(False,))
    ] = None
    graph_harvesting: Annotated[bool, Refused("DeepSpeed removed it too", "set it to false")] = False
