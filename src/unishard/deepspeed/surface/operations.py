"""`ops`: optimizers and what tells which kernels are there."""

from __future__ import annotations

from unishard.deepspeed.entries import Names, absent, part
from unishard.deepspeed.parts.builder_names import BUILDER_NAMES
from unishard.deepspeed.surface.reasons import COMPRESSED, INFERENCE, OFFLOAD, WHOLE

_ADAM = part("optimizers", "DeepSpeedCPUAdam", "FusedAdam")
_LION = part("optimizers", "DeepSpeedCPULion", "FusedLion")
_BUILDERS = part("op_builders", "OpBuilder", *BUILDER_NAMES)

OPERATIONS: dict[str, Names] = {
    "ops": {**part("names", "__compatible_ops__")},
    "ops.adam": {
        **_ADAM,
        **absent(OFFLOAD, "ZenFlowCPUAdam", "ZenFlowSelectiveAdamW", "ZenFlowSelectiveAdamW_stage3"),
    },
    "ops.adam.cpu_adam": {**part("optimizers", "DeepSpeedCPUAdam")},
    "ops.adam.fused_adam": {**part("optimizers", "FusedAdam")},
    "ops.lion": _LION,
    "ops.lion.cpu_lion": {**part("optimizers", "DeepSpeedCPULion")},
    "ops.lion.fused_lion": {**part("optimizers", "FusedLion")},
    "ops.adagrad": {**part("optimizers", "DeepSpeedCPUAdagrad")},
    "ops.adagrad.cpu_adagrad": {**part("optimizers", "DeepSpeedCPUAdagrad")},
    "ops.lamb": {**absent(WHOLE, "FusedLamb")},
    "ops.lamb.fused_lamb": {**absent(WHOLE, "FusedLamb")},
    "ops.aio": {**part("op_builders", "AsyncIOBuilder")},
    "ops.op_builder": _BUILDERS,
    "ops.op_builder.builder": {**part("op_builders", "OpBuilder")},
    "ops.op_builder.all_ops": {**part("op_builders", "ALL_OPS")},
    "ops.transformer": {
        **absent(
            INFERENCE, "DeepSpeedTransformerLayer", "DeepSpeedTransformerConfig", "DeepSpeedInferenceConfig"
        )
    },
    "ops.fp_quantizer": {**absent(INFERENCE, "FP_Quantize")},
    "runtime.fp16.onebit": {**absent(COMPRESSED, "OnebitAdam", "OnebitLamb", "ZeroOneAdam")},
    "runtime.fp16.onebit.adam": {**absent(COMPRESSED, "OnebitAdam")},
    "runtime.fp16.onebit.lamb": {**absent(COMPRESSED, "OnebitLamb")},
    "runtime.fp16.onebit.zoadam": {**absent(COMPRESSED, "ZeroOneAdam")},
}
