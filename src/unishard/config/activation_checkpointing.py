"""`activation_checkpointing`: options of recomputation."""

from __future__ import annotations

from typing import Annotated

from unishard.config.fields import Count, Section, Translated, not_available

_PLAIN = "set it to false, and wrap blocks with torch.utils.checkpoint"


class ActivationCheckpointing(Section):
    """`activation_checkpointing`: which modules recompute is the model's choice; these keys only tune it."""

    partition_activations: Annotated[bool, not_available("partitioning saved activations", _PLAIN)] = False
    cpu_checkpointing: Annotated[bool, not_available("offloading saved activations", _PLAIN)] = False
    contiguous_memory_optimization: Annotated[
        bool, not_available("a contiguous activation buffer", _PLAIN)
    ] = False
    number_checkpoints: Annotated[
        Count | None, Translated("it sizes the buffer of contiguous_memory_optimization, which is off")
    ] = None
    synchronize_checkpoint_boundary: Annotated[
        bool, Translated("recomputation needs no synchronisation at its boundaries")
    ] = False
    profile: Annotated[bool, Translated("recomputation is not timed apart; use torch.profiler")] = False


class ActivationCheckpointingKeys(Section):
    """The top-level key."""

    activation_checkpointing: ActivationCheckpointing = ActivationCheckpointing()
