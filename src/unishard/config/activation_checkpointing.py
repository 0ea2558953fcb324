"""`activation_checkpointing`: options of recomputation."""

from __future__ import annotations

from typing import Annotated

from unishard.config.fields import Count, Honoured, Section, Translated


class ActivationCheckpointing(Section):
    """`activation_checkpointing`: how functions that go through `unishard.checkpointing.checkpoint` keep their inputs.

    Which ones do is the model's choice.
    """

    partition_activations: Annotated[
        bool,
        Translated(
            "inputs are divided among the tensor-parallel ranks that unishard.checkpointing.configure(mpu_) was told "
            "of, and without it there is one"
        ),
    ] = False
    cpu_checkpointing: Annotated[bool, Honoured()] = False
    contiguous_memory_optimization: Annotated[bool, Honoured()] = False
    number_checkpoints: Annotated[Count | None, Honoured()] = None
    synchronize_checkpoint_boundary: Annotated[bool, Honoured()] = False
    profile: Annotated[bool, Honoured()] = False


class ActivationCheckpointingKeys(Section):
    """The top-level key."""

    activation_checkpointing: ActivationCheckpointing = ActivationCheckpointing()
