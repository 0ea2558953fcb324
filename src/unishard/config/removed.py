"""Sections that older DeepSpeed versions had and current ones refuse: known, refused when switched on."""

from __future__ import annotations

from typing import Annotated, Any

from unishard.config.fields import Refused, Section, enabled


def _gone(instead: str) -> Refused:
    return Refused("DeepSpeed removed this feature, and it is not available here", instead, asks=enabled)


class Amp(Section):
    """`amp`: NVIDIA Apex."""

    enabled: Any = False
    opt_level: Any = "O1"
    cast_model_type: Any = None
    patch_torch_functions: Any = None
    keep_batchnorm_fp32: Any = None
    master_weights: Any = None
    loss_scale: Any = None
    cast_model_outputs: Any = None
    num_losses: Any = 1
    verbosity: Any = 1
    min_loss_scale: Any = None
    max_loss_scale: Any = None


class SparseAttention(Section):
    """`sparse_attention`."""

    mode: Any = "fixed"
    block: Any = 16
    different_layout_per_head: Any = False
    num_local_blocks: Any = 4
    num_global_blocks: Any = 1
    attention: Any = "bidirectional"
    horizontal_global_attention: Any = False
    num_different_global_patterns: Any = 1
    num_random_blocks: Any = 0
    local_window_blocks: Any = [4]
    global_block_indices: Any = [0]
    global_block_end_indices: Any = None
    num_sliding_window_blocks: Any = 3


class Elasticity(Section):
    """`elasticity`."""

    enabled: Any = False
    max_train_batch_size: Any = 2000
    micro_batch_sizes: Any = [2, 4, 6]
    min_gpus: Any = 1
    max_gpus: Any = 10000
    min_time: Any = 0
    version: Any = 0.2
    prefer_larger_batch: Any = True
    ignore_non_elastic_batch_info: Any = False
    model_parallel_size: Any = 1
    num_gpus_per_node: Any = 1


class CurriculumLearning(Section):
    """`curriculum_learning`."""

    enabled: Any = False
    curriculum_type: Any = "seqlen"
    min_difficulty: Any = None
    max_difficulty: Any = None
    schedule_type: Any = None
    schedule_config: Any = None


class ProgressiveLayerDrop(Section):
    """`progressive_layer_drop`."""

    enabled: Any = False
    theta: Any = 1.0
    gamma: Any = 0.001


class Eigenvalue(Section):
    """`eigenvalue`."""

    enabled: Any = False
    verbose: Any = False
    max_iter: Any = 100
    tol: Any = 1e-2
    stability: Any = 1e-6
    gas_boundary_resolution: Any = 1
    layer_name: Any = "bert.encoder.layer"
    layer_num: Any = 0


class QuantizeTraining(Section):
    """`quantize_training`."""

    enabled: Any = False
    quantize_verbose: Any = False
    quantizer_kernel: Any = False
    quantize_type: Any = None
    quantize_bits: Any = None
    quantize_schedule: Any = None
    quantize_groups: Any = 1
    quantize_algo: Any = None
    fp16_mixed_quantize: Any = None
    quantize_change_ratio: Any = None
    quantize_eigenvalue: Any = False
    schedule_offset: Any = 1000
    rounding: Any = None


class CompressionTraining(Section):
    """`compression_training`; each technique has shared_parameters and different_groups with free names."""

    weight_quantization: Any = None
    activation_quantization: Any = None
    sparse_pruning: Any = None
    row_pruning: Any = None
    head_pruning: Any = None
    channel_pruning: Any = None
    layer_reduction: Any = None


class Nebula(Section):
    """`nebula`."""

    enabled: Any = False
    persistent_storage_path: Any = None
    persistent_time_interval: Any = 100
    num_of_version_in_retention: Any = 2
    enable_nebula_load: Any = True
    load_path: Any = None


class RemovedKeys(Section):
    """Top-level keys of removed features."""

    amp: Annotated[Amp, _gone("set bf16.enabled or fp16.enabled")] = Amp()
    sparse_attention: Annotated[
        SparseAttention | None,
        Refused("DeepSpeed removed this feature, and it is not available here", "use torch's flex_attention"),
    ] = None
    sparse_gradients: Annotated[
        bool,
        Refused("gradients are reduced dense", "set it to false, and build embeddings with sparse=False"),
    ] = False
    elasticity: Annotated[Elasticity, _gone("set the batch sizes directly")] = Elasticity()
    curriculum_learning: Annotated[CurriculumLearning, _gone("order the data in your own loader")] = (
        CurriculumLearning()
    )
    progressive_layer_drop: Annotated[ProgressiveLayerDrop, _gone("drop layers in the model")] = (
        ProgressiveLayerDrop()
    )
    eigenvalue: Annotated[Eigenvalue, _gone("remove the section")] = Eigenvalue()
    quantize_training: Annotated[QuantizeTraining, _gone("use torchao's quantization-aware training")] = (
        QuantizeTraining()
    )
    compression_training: Annotated[
        CompressionTraining, _gone("prune or quantize the model with torch.ao before training")
    ] = CompressionTraining()
    nebula: Annotated[Nebula, _gone("remove the section")] = Nebula()
