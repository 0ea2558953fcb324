"""`pipe`, `moe`: names that scripts import; the mechanisms are not part of this version."""

from __future__ import annotations

from unishard.deepspeed.entries import Names, absent, part
from unishard.deepspeed.surface.reasons import EXPERTS, PIPELINE

_PIPE = {
    **part("pipeline_names", "LayerSpec", "TiedLayerSpec"),
    **absent(PIPELINE, "PipelineModule"),
}
_TOPOLOGY = part(
    "pipeline_names",
    "ProcessTopology", "PipeDataParallelTopology", "PipeModelDataParallelTopology",
)  # fmt: skip
_SCHEDULE = (
    "BackwardPass", "BufferOpInstruction", "DataParallelSchedule", "ForwardPass", "InferenceSchedule", "LoadMicroBatch",
    "OptimizerStep", "PipeInstruction", "PipeSchedule", "RecvActivation", "RecvGrad", "ReduceGrads", "ReduceTiedGrads",
    "SendActivation", "SendGrad", "TrainSchedule",
)  # fmt: skip
_GATING = part(
    "gating", "top1gating", "top2gating", "topkgating", note="for one rank; routes are dense tensors"
)

PARALLELISM: dict[str, Names] = {
    "pipe": _PIPE,
    "runtime.pipe": {**_PIPE, **part("pipeline_names", "ProcessTopology")},
    "runtime.pipe.module": {**_PIPE, **absent(PIPELINE, "PipelineError")},
    "runtime.pipe.topology": {**_TOPOLOGY, **absent(PIPELINE, "PipelineParallelGrid")},
    "runtime.pipe.schedule": absent(PIPELINE, *_SCHEDULE),
    "runtime.pipe.engine": absent(PIPELINE, "PipelineEngine"),
    "moe.layer": absent(EXPERTS, "MoE"),
    "moe.sharded_moe": {**_GATING, **absent(EXPERTS, "MOELayer", "TopKGate")},
    "moe.mappings": absent(EXPERTS, "drop_tokens", "gather_tokens"),
    "moe.utils": part(
        "gating",
        "has_moe_layers", "is_moe_param", "is_moe_param_group", "split_params_into_different_moe_groups_for_optimizer",
        "split_params_into_shared_and_expert_params", "configure_moe_param_groups",
    ),
}  # fmt: skip
