"""No key is ignored: every key that DeepSpeed documents is honoured, translated with one line, or refused."""

from __future__ import annotations

from typing import Any

import pytest

from unishard.config import Config, check, load_config, resolve
from unishard.config.fields import Honoured, Refused, Section, Translated
from unishard.config.optimizer import OPTIMIZERS
from unishard.config.scheduler import SCHEDULES
from unishard.config.schema import keys, known_keys, section_type, treatment_of

# Written out from DeepSpeed's configuration page and the sources of 0.19.8, apart from the models under test.
DOCUMENTED = """
train_batch_size train_micro_batch_size_per_gpu gradient_accumulation_steps managed_gradient_accumulation
optimizer.type optimizer.params optimizer.legacy_fusion scheduler.type scheduler.params communication_data_type
seq_parallel_communication_data_type gradient_allreduce_op prescale_gradients gradient_predivide_factor
sparse_gradients fp16.enabled fp16.auto_cast fp16.loss_scale fp16.initial_scale_power fp16.loss_scale_window
fp16.hysteresis fp16.consecutive_hysteresis fp16.min_loss_scale fp16.fp16_master_weights_and_grads bf16.enabled
bf16.immediate_grad_update bf16.check_grad_overflow bf16.bf16_master_weights_and_grads bf16.bf16_optimizer_states
torch_autocast.enabled torch_autocast.dtype torch_autocast.lower_precision_safe_modules amp.enabled amp.opt_level
gradient_clipping zero_optimization.stage zero_optimization.allgather_partitions
zero_optimization.allgather_bucket_size zero_optimization.compute_grad_norm zero_optimization.overlap_comm
zero_optimization.reduce_scatter zero_optimization.reduce_bucket_size zero_optimization.contiguous_gradients
zero_optimization.use_multi_rank_bucket_allreduce zero_optimization.load_from_fp32_weights
zero_optimization.elastic_checkpoint zero_optimization.zenflow.topk_ratio zero_optimization.sub_group_size
zero_optimization.offload_param.device zero_optimization.offload_param.nvme_path
zero_optimization.offload_param.pin_memory zero_optimization.offload_param.buffer_count
zero_optimization.offload_param.buffer_size zero_optimization.offload_param.max_in_cpu
zero_optimization.offload_optimizer.device zero_optimization.offload_optimizer.nvme_path
zero_optimization.offload_optimizer.pin_memory zero_optimization.offload_optimizer.ratio
zero_optimization.offload_optimizer.buffer_count zero_optimization.offload_optimizer.fast_init
zero_optimization.offload_optimizer.pipeline_read zero_optimization.offload_optimizer.pipeline_write
zero_optimization.offload_optimizer.super_offload zero_optimization.offload_optimizer.cpuadam_cores_perc
zero_optimization.cpu_offload zero_optimization.cpu_offload_param zero_optimization.cpu_offload_use_pin_memory
zero_optimization.stage3_max_live_parameters zero_optimization.stage3_max_reuse_distance
zero_optimization.stage3_prefetch_bucket_size zero_optimization.stage3_param_persistence_threshold
zero_optimization.stage3_model_persistence_threshold zero_optimization.stage3_module_granularity_threshold
zero_optimization.stage3_use_all_reduce_for_fetch_params zero_optimization.stage3_allgather_sequential
zero_optimization.stage3_gather_16bit_weights_on_model_save
zero_optimization.stage3_gather_fp16_weights_on_model_save zero_optimization.ignore_unused_parameters
zero_optimization.legacy_stage1 zero_optimization.round_robin_gradients zero_optimization.parameter_alignment
zero_optimization.zero_hpz_partition_size zero_optimization.zero_quantized_weights
zero_optimization.zero_quantized_nontrainable_weights zero_optimization.zero_quantized_gradients
zero_optimization.zeropp_loco_param zero_optimization.mics_shard_size
zero_optimization.mics_hierarchical_params_gather zero_optimization.memory_efficient_linear
zero_optimization.pipeline_loading_checkpoint zero_optimization.override_module_apply
zero_optimization.log_trace_cache_warnings zero_optimization.enable_sanity_checks
zero_optimization.save_muon_momentum_buffer_in_memory zero_optimization.leaf_module.classes
zero_optimization.leaf_module.names zero_optimization.leaf_module.name_suffixes zero_allow_untested_optimizer
zero_force_ds_cpu_optimizer disable_allgather aio.block_size aio.queue_depth aio.thread_count
aio.intra_op_parallelism aio.single_submit aio.overlap_events aio.use_gds steps_per_print wall_clock_breakdown
memory_breakdown dump_state disable_python_gc log_level vocabulary_size dataloader_drop_last
timers.throughput.enabled timers.throughput.synchronized autotuning.enabled autotuning.results_dir
autotuning.exps_dir autotuning.overwrite autotuning.metric autotuning.start_profile_step
autotuning.end_profile_step autotuning.fast autotuning.max_train_batch_size autotuning.mp_size
autotuning.num_tuning_micro_batch_sizes autotuning.tuner_type autotuning.tuner_early_stopping
autotuning.tuner_num_trials autotuning.arg_mappings flops_profiler.enabled flops_profiler.profile_step
flops_profiler.module_depth flops_profiler.top_modules flops_profiler.detailed flops_profiler.output_file
flops_profiler.recompute_fwd_factor activation_checkpointing.partition_activations
activation_checkpointing.cpu_checkpointing activation_checkpointing.contiguous_memory_optimization
activation_checkpointing.number_checkpoints activation_checkpointing.synchronize_checkpoint_boundary
activation_checkpointing.profile sparse_attention.mode sparse_attention.block
sparse_attention.different_layout_per_head sparse_attention.num_local_blocks sparse_attention.num_global_blocks
sparse_attention.attention sparse_attention.horizontal_global_attention
sparse_attention.num_different_global_patterns sparse_attention.num_random_blocks
sparse_attention.local_window_blocks sparse_attention.global_block_indices
sparse_attention.global_block_end_indices sparse_attention.num_sliding_window_blocks data_efficiency.enabled
data_efficiency.seed data_efficiency.data_routing.enabled data_efficiency.data_routing.random_ltd.enabled
data_efficiency.data_routing.random_ltd.total_layer_num
data_efficiency.data_routing.random_ltd.random_ltd_layer_num
data_efficiency.data_routing.random_ltd.random_ltd_layer_id data_efficiency.data_routing.random_ltd.model_mask_name
data_efficiency.data_routing.random_ltd.model_type data_efficiency.data_routing.random_ltd.hidden_state_order
data_efficiency.data_routing.random_ltd.random_ltd_schedule data_efficiency.data_sampling.enabled
data_efficiency.data_sampling.num_epochs data_efficiency.data_sampling.num_workers
data_efficiency.data_sampling.curriculum_learning.enabled
data_efficiency.data_sampling.curriculum_learning.data_cluster_path
data_efficiency.data_sampling.curriculum_learning.curriculum_metrics curriculum_learning.enabled
curriculum_learning.curriculum_type curriculum_learning.min_difficulty curriculum_learning.max_difficulty
curriculum_learning.schedule_type curriculum_learning.schedule_config progressive_layer_drop.enabled
progressive_layer_drop.theta progressive_layer_drop.gamma eigenvalue.enabled quantize_training.enabled
nebula.enabled graph_harvesting tensorboard.enabled tensorboard.output_path tensorboard.job_name
csv_monitor.enabled csv_monitor.output_path csv_monitor.job_name wandb.enabled wandb.group wandb.team wandb.project
comet.enabled comet.workspace comet.project comet.samples_log_interval comet.experiment_name comet.api_key
comet.experiment_key comet.online comet.mode comms_logger.enabled comms_logger.verbose comms_logger.prof_all
comms_logger.debug comms_logger.prof_ops compression_training.weight_quantization
compression_training.activation_quantization compression_training.sparse_pruning compression_training.row_pruning
compression_training.head_pruning compression_training.channel_pruning compression_training.layer_reduction
checkpoint.tag_validation checkpoint.load_universal checkpoint.use_node_local_storage
checkpoint.parallel_write.pipeline_stage checkpoint.checkpoint_serialization checkpoint.writer.type
data_types.grad_accum_dtype data_types.param_dtype data_types.buffer_dtype data_types.keep_in_fp32_modules
elasticity.enabled elasticity.max_train_batch_size elasticity.micro_batch_sizes elasticity.min_gpus
elasticity.max_gpus elasticity.min_time elasticity.version elasticity.ignore_non_elastic_batch_info
elasticity.num_gpus_per_node elasticity.model_parallel_size elasticity.prefer_larger_batch
tensor_parallel.autotp_size tensor_parallel.preset_model tensor_parallel.tp_overlap_comm
tensor_parallel.vocab_parallel_lm_head tensor_parallel.partition_config.use_default_specs
tensor_parallel.partition_config.layer_specs tensor_parallel.tensor_parallel.tp_size expert_parallel.enabled
expert_parallel.autoep_size expert_parallel.preset_model expert_parallel.top_k hybrid_engine.enabled
hybrid_engine.max_out_tokens hybrid_engine.inference_tp_size hybrid_engine.release_inference_cache
hybrid_engine.pin_parameters hybrid_engine.tp_gather_partition_size hybrid_engine.enable_cuda_graph pipeline.stages
pipeline.partition pipeline.seed_layers pipeline.activation_checkpoint_interval pipeline.pipe_partitioned
pipeline.grad_partitioned compile.deepcompile compile.passes compile.offload_activation compile.free_activation
weight_quantization datastates_ckpt use_data_before_expert_parallelism data_parallel_size sequence_parallel_size
""".split()  # noqa: SIM905

REFUSED_SECTIONS: dict[str, Any] = {
    "amp": {"enabled": True},
    "sparse_attention": {"mode": "fixed"},
    "elasticity": {"enabled": True},
    "curriculum_learning": {"enabled": True},
    "progressive_layer_drop": {"enabled": True},
    "eigenvalue": {"enabled": True},
    "quantize_training": {"enabled": True},
    "compression_training": {"weight_quantization": {"shared_parameters": {"enabled": True}}},
    "nebula": {"enabled": True},
    "flops_profiler": {"enabled": True},
    "autotuning": {"enabled": True},
    "data_efficiency": {"enabled": True},
    "tensor_parallel": {"autotp_size": 2},
    "expert_parallel": {"enabled": True},
    "pipeline": {"stages": 2},
    "hybrid_engine": {"enabled": True},
    "compile": {"deepcompile": True},
    "checkpoint.writer": {"type": "FAST"},
    "comms_logger": {"enabled": True},
    "zero_optimization.zenflow": {"topk_ratio": 0.2},
}
NEUTRAL_SECTIONS = [
    {"zero_optimization": {"offload_optimizer": {"device": "none"}}},
    {"zero_optimization": {"offload_param": {"device": "none"}, "cpu_offload": False}},
    {"flops_profiler": {"enabled": False, "profile_step": 5}},
    {"compression_training": {"weight_quantization": {"shared_parameters": {"enabled": False}}}},
    {"tensor_parallel": {"autotp_size": 1}, "pipeline": {"stages": "auto"}, "amp": {"enabled": "auto"}},
    {"data_efficiency": {"enabled": False, "data_sampling": {"enabled": True}}},
]
CANDIDATES = [
    True,
    False,
    3,
    1,
    2.5,
    "bf16",
    "Fail",
    "Ignore",
    "WARNING",
    "fp16",
    "mean",
    "sum",
    "text",
    8,
    [],
    ["x"],
    [0.1, 0.2],
    "ZERO1",
    "cpu",
    0.5,
]


def nested(path: str, value: Any) -> dict[str, Any]:
    for part in reversed(path.split(".")):
        value = {part: value}
    if path == "optimizer.legacy_fusion":
        value["optimizer"]["type"] = "AdamW"
    return value


def given(path: str, value: Any) -> dict[str, Any]:
    return {"train_micro_batch_size_per_gpu": 1} | nested(path, value)


def accepted(path: str) -> list[Any]:
    """Values of the right type for a leaf that say something else than its default."""
    field = known_keys()[path].field
    neutral = (field.default, *getattr(treatment_of(field), "neutral", ()))
    fits = [value for value in CANDIDATES if value not in neutral and _fits(path, value)]
    assert fits, f"add a candidate for {path}"
    return fits


def _fits(path: str, value: Any) -> bool:
    try:
        load_config(nested(path, value))
    except ValueError:
        return False
    return True


def leaves(kind: type) -> list[str]:
    return [path for path, key in known_keys().items() if isinstance(treatment_of(key.field), kind)]


def sections(model: type[Section], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, field in model.model_fields.items():
        inner = section_type(field)
        if inner is not None:
            found[prefix + name] = treatment_of(field)
            found |= sections(inner, f"{prefix}{name}.")
    return found


@pytest.mark.parametrize("path", DOCUMENTED)
def test_documented_key_has_a_treatment(path: str) -> None:
    assert isinstance(known_keys()[path].treatment, (Honoured, Translated, Refused))


def test_every_other_key_has_a_treatment_too() -> None:
    assert [path for path, key in known_keys().items() if key.treatment is None] == []
    for name, model in (OPTIMIZERS | SCHEDULES).items():
        assert [key.path for key in keys(model) if key.treatment is None] == [], name


@pytest.mark.parametrize("path", leaves(Translated))
def test_translated_key_gives_one_line(path: str) -> None:
    for value in accepted(path):
        config = given(path, value)
        if path == "zero_optimization.zero_hpz_partition_size":
            config["zero_optimization"]["stage"] = 3
        resolved = resolve(config, dp_world_size=24)
        assert len(resolved.log_lines) == 1
        assert resolved.log_lines[0].startswith(f"{path} = ")
    silent = resolve(given(path, known_keys()[path].field.default), dp_world_size=24)
    assert silent.log_lines == ()


@pytest.mark.parametrize("path", leaves(Refused))
def test_refused_key_says_what_to_use(path: str) -> None:
    key = known_keys()[path]
    treatment = treatment_of(key.field)
    assert isinstance(treatment, Refused)
    for value in accepted(path):
        problems = check(given(path, value), dp_world_size=1)
        assert [problem.key for problem in problems] == [path]
        assert treatment.reason in problems[0].message
        assert treatment.instead in problems[0].message
    assert check(given(path, key.field.default), dp_world_size=1) == []


def test_refused_sections_all_have_an_example() -> None:
    refused = {path for path, treatment in sections(Config).items() if isinstance(treatment, Refused)}
    assert refused == set(REFUSED_SECTIONS)


@pytest.mark.parametrize("path", REFUSED_SECTIONS)
def test_refused_section_says_what_to_use(path: str) -> None:
    (problem,) = check(given(path, REFUSED_SECTIONS[path]), dp_world_size=1)
    treatment = sections(Config)[path]
    assert problem.key == path
    assert problem.message == f"{treatment.reason}; {treatment.instead}"


@pytest.mark.parametrize("config", NEUTRAL_SECTIONS, ids=lambda config: next(iter(config)))
def test_a_section_that_is_off_is_accepted(config: dict[str, Any]) -> None:
    resolved = resolve({"train_micro_batch_size_per_gpu": 1} | config, dp_world_size=1)
    assert resolved.log_lines == ()


def test_honoured_keys_are_silent_and_kept() -> None:
    skipped = {"optimizer.type", "optimizer.params", "scheduler.type", "scheduler.params"}
    for path in sorted(set(leaves(Honoured)) - skipped):
        config = load_config(nested(path, accepted(path)[0]))
        assert config.model_dump(exclude_unset=True) != {}
        problems = check(given(path, accepted(path)[0]))
        assert [problem for problem in problems if problem.rule in ("refused", "unknown-key")] == [], path


@pytest.mark.parametrize(
    ("config", "key", "words"),
    [
        ({"train_batchsize": 8}, "train_batchsize", "did you mean 'train_batch_size'?"),
        ({"zero_optimisation": {"stage": 2}}, "zero_optimisation", "did you mean 'zero_optimization'?"),
        ({"zero_optimization": {"stge": 2}}, "zero_optimization.stge", "did you mean 'stage'?"),
        ({"stage": 2}, "stage", "did you mean 'zero_optimization.stage'?"),
        ({"bf16": {"loss_scale": 1}}, "bf16.loss_scale", "did you mean 'fp16.loss_scale'?"),
        ({"lr": 1e-3}, "lr", "did you mean 'optimizer.params.lr'?"),
        ({"overlapcomm": True}, "overlapcomm", "did you mean 'zero_optimization.overlap_comm'?"),
        (
            {"zero_optimization": {"prefetch_bucket_size": 1}},
            "zero_optimization.prefetch_bucket_size",
            "did you mean 'stage3_prefetch_bucket_size'?",
        ),
        (
            {"zero_optimization": {"offload_param": {"devise": "none"}}},
            "zero_optimization.offload_param.devise",
            "did you mean 'device'?",
        ),
        ({"fp16": {"opt_level": "O2"}}, "fp16.opt_level", "known keys here are enabled, auto_cast"),
        ({"timers": {"enabled": True}}, "timers.enabled", "remove it; known keys here are throughput"),
        ({"_comment": "for later"}, "_comment", "no comments"),
        ({"fp16": {"//": "for later"}}, "fp16.//", "no comments"),
        ({"qwertyuiop": 1}, "qwertyuiop", "known keys here are train_batch_size"),
        ({"timers": {"throughput": {"enable": True}}}, "timers.throughput.enable", "did you mean 'enabled'?"),
    ],
)
def test_unknown_key_is_refused_with_a_suggestion(config: dict[str, Any], key: str, words: str) -> None:
    problems = [problem for problem in check(config, dp_world_size=1) if problem.rule == "unknown-key"]
    assert [problem.key for problem in problems] == [key]
    assert words in problems[0].message


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"train_batch_size": "8"},
            'train_batch_size: expected an integer, got "8" (a string); write it without',
        ),
        ({"train_batch_size": True}, "train_batch_size: expected an integer, got true"),
        ({"train_batch_size": 8.5}, "train_batch_size: expected an integer, got 8.5"),
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps: must be at least 1, got 0"),
        ({"gradient_accumulation_steps": -2}, "gradient_accumulation_steps: must be at least 1, got -2"),
        ({"fp16": {"enabled": 1}}, "fp16.enabled: expected true or false, got 1"),
        ({"fp16": {"loss_scale": -128}}, "fp16.loss_scale: must be at least 0, got -128"),
        ({"fp16": None}, "fp16: expected an object, got null"),
        ({"bf16": True}, "bf16: expected an object, got true"),
        ({"gradient_clipping": -1.0}, "gradient_clipping: must be at least 0, got -1.0"),
        ({"gradient_clipping": float("nan")}, "gradient_clipping: expected a finite number"),
        ({"zero_optimization": {"stage": 4}}, "zero_optimization.stage: must be at most 3, got 4"),
        ({"zero_optimization": {"stage": "auto"}}, 'zero_optimization.stage: "auto" is not possible here'),
        (
            {"communication_data_type": "fp8"},
            "communication_data_type: unknown dtype 'fp8'; use fp32, bf16 or",
        ),
        ({"buffer_dtype": "bfloat"}, "did you mean 'bfloat16'?"),
        ({"steps_per_print": 0}, "steps_per_print: expected an integer of at least 1, null or"),
        ({"sharding": "ZERO4"}, "sharding: expected 'NO_SHARD', 'ZERO1'"),
        ({"optimizer": {"params": {"lr": 1.0}}}, "optimizer.type: is required"),
        (
            {"optimizer": {"type": "AdamW", "params": {"betas": [0.9]}}},
            "optimizer.params.betas: has too few values",
        ),
        (
            {"data_types": {"keep_in_fp32_modules": 3}},
            "data_types.keep_in_fp32_modules: expected 'auto', got 3",
        ),
    ],
)
def test_wrong_value_names_key_value_and_remedy(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=r".") as caught:
        resolve({"train_micro_batch_size_per_gpu": 1} | config, dp_world_size=1)
    assert message in str(caught.value)


def test_every_problem_is_reported_at_once() -> None:
    config = {
        "train_batch_size": 7,
        "gradient_accumulation_steps": 2,
        "typo": 1,
        "fp16": {"enabled": True, "loss_scale": "0"},
        "bf16": {"enabled": True, "typo": 1},
        "comms_logger": {"enabled": True},
        "optimizer": {"type": "AdamW", "params": {"lr": "auto", "bets": [0.9, 0.99]}},
    }
    found = {(problem.key, problem.rule) for problem in check(config, dp_world_size=2)}
    assert found == {
        ("typo", "unknown-key"),
        ("bf16.typo", "unknown-key"),
        ("fp16.loss_scale", "type"),
        ("comms_logger", "refused"),
        ("optimizer.params.bets", "unknown-key"),
        ("optimizer.params.lr", "auto"),
        ("train_batch_size", "batch-triad"),
        ("bf16.enabled", "fp16-and-bf16"),
    }
    with pytest.raises(ValueError, match="8 problems in the config") as caught:
        resolve(config, dp_world_size=2)
    assert str(caught.value).count("\n  - ") == 8


def test_config_can_be_written_in_python() -> None:
    with pytest.raises(ValueError, match=r"zero_optimization\.stge: unknown key; did you mean 'stage'"):
        Config(zero_optimization={"stge": 2})
    built = Config(train_batch_size=8, zero_optimization={"stage": 1})
    assert resolve(built, dp_world_size=4).train_micro_batch_size_per_gpu == 2
