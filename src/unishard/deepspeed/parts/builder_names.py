"""Names of DeepSpeed's operation builders, apart from them so that the surface table imports nothing heavy."""

from __future__ import annotations

KERNEL_OF = {
    "CPUAdamBuilder": "adam",
    "CPULionBuilder": "lion",
    "CPUAdagradBuilder": "adagrad",
    "FusedAdamBuilder": "adam",
    "FusedLionBuilder": "lion",
}
"""Builders whose operation is one of unishard's kernels, each with a torch fallback."""

THROUGH_CONFIGURATION = ("AsyncIOBuilder",)
"""Builders whose operation runs here through the configuration (NVMe offload), without a module to call."""

OTHERS = (
    "CCLCommBuilder",
    "EvoformerAttnBuilder",
    "FPQuantizerBuilder",
    "FusedLambBuilder",
    "GDSBuilder",
    "InferenceBuilder",
    "InferenceCoreBuilder",
    "InferenceCutlassBuilder",
    "QuantizerBuilder",
    "RaggedOpsBuilder",
    "RaggedUtilsBuilder",
    "RandomLTDBuilder",
    "ShareMemCommBuilder",
    "SpatialInferenceBuilder",
    "StochasticTransformerBuilder",
    "TransformerBuilder",
    "UtilsBuilder",
)
"""Builders of what does not exist here."""

BUILDER_NAMES = (*KERNEL_OF, *THROUGH_CONFIGURATION, *OTHERS)
