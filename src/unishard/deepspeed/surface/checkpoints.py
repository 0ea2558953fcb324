"""`checkpoint`: names and helpers around checkpoint files."""

from __future__ import annotations

from unishard.deepspeed.entries import Names, absent, constants, part, spelled
from unishard.deepspeed.surface.reasons import CONVERT, EXPERTS

_KEYS = {
    **spelled("OPTIMIZER_STATE_DICT", "FP32_GROUPS", "FP32_FLAT_GROUPS", "BASE_OPTIMIZER_STATE"),
    **spelled(
        "BASE_OPTIMIZER_STATE_STEP", "SINGLE_PARTITION_OF_FP32_GROUPS", "PARAM_GROUPS", "GROUP_PADDINGS"
    ),
    **spelled(
        "PARTITION_COUNT", "ZERO_STAGE", "CLIP_GRAD", "LOSS_SCALER", "PARAM", "PARAM_SHAPES", "BUFFER_NAMES"
    ),
    **spelled(
        "FROZEN_PARAM_SHAPES", "FROZEN_PARAM_FRAGMENTS", "DS_VERSION", "UNIVERSAL_CHECKPOINT_INFO", "CAT_DIM"
    ),
    **spelled(
        "PARAM_SLICE_MAPPINGS",
        "VOCAB_TENSOR",
        "VOCABULARY_PARAMETER_PATTERNS",
        "PARAMETER_TO_AVERAGE_PATTERNS",
    ),
    **spelled(
        "PARAMETER_WITH_ROW_PARALLELISM_PATTERNS", "TP_REPLICATED_PARAMETER_PATTERNS", "SUB_PARAM_SHAPE"
    ),
    **spelled("PIPELINE_REPLICATED_PARAMETER_PATTERNS", "PARAMETER_WITH_2_SUB_PARAMS_CAT_DIM_0"),
    **spelled("PARAMETER_WITH_SUB_PARAMS", "PARAM_N_SUB_PARAMS", "ORIGINAL_VOCAB_SIZE", "PADDED_VOCAB_SIZE"),
    **constants(FP32_WEIGHT_KEY="fp32", MODEL_FILE_PREFIX="mp_rank_", ZERO_FILE_PREFIX="zero_pp_rank_"),
    **constants(
        OPTIM_FILE_SUFFIX="_optim_states.pt", MODEL_FILE_SUFFIX="_model_states.pt", LAYER_FILE_PREFIX="layer_"
    ),
    **constants(BF16_ZERO_FILE_PREFIX="bf16_zero_pp_rank_", FP16_ZERO_FILE_PREFIX="fp16_zero_pp_rank_"),
    **constants(
        CHECKPOINT_PARALLEL_DIMS="checkpoint_parallel_dimensions",
        CHECKPOINT_PP_DEGREE="pp_degree",
        CHECKPOINT_TP_DEGREE="tp_degree",
        AUTOEP_LAYERS_KEY="ds_autoep_layers",
    ),
    **constants(
        UNIVERSAL_CHECKPOINT_VERSION_KEY="universal_checkpoint_version",
        UNIVERSAL_CHECKPOINT_VERSION_VALUE=0.4,
    ),
}
_NAMES = part(
    "checkpoint_names",
    "get_layer_ckpt_name_for_rank",
    "get_model_ckpt_name_for_rank",
    "get_zero_ckpt_name_for_rank",
)
_READERS = {**absent(CONVERT, "DeepSpeedCheckpoint"), **part("checkpoint_files", "ZeROCheckpoint")}
_DESCRIPTORS = part("checkpoint_files", "model_3d_desc", "get_model_3d_descriptor")
_MERGE = part("checkpoint_files", "merge_state")

CHECKPOINTS: dict[str, Names] = {
    "checkpoint": {
        **_KEYS,
        **_NAMES,
        **_READERS,
        **_DESCRIPTORS,
        **_MERGE,
        **absent(CONVERT, "enable_universal_checkpoint", "SubparamShape", "reshape_meg_2d_parallel"),
    },
    "checkpoint.constants": _KEYS,
    "checkpoint.utils": {**_NAMES, **part("checkpoint_names", "clone_tensors_for_torch_save")},
    "checkpoint.deepspeed_checkpoint": {**absent(CONVERT, "DeepSpeedCheckpoint")},
    "checkpoint.zero_checkpoint": {**part("checkpoint_files", "ZeROCheckpoint")},
    "checkpoint.reshape_utils": _MERGE,
    "checkpoint.reshape_3d_utils": _DESCRIPTORS,
    "checkpoint.ds_to_universal": {
        **part("universal", "main", "parse_arguments"),
        **absent(CONVERT, "dp_index_to_str"),
        **absent(EXPERTS, "_aggregate_autoep_zero12_metadata"),
    },
    "checkpoint.universal_checkpoint": {
        **absent(CONVERT, "enable_universal_checkpoint", "load_hp_checkpoint_state")
    },
}
