"""Recomputation instead of saved activations, under the names of `deepspeed.checkpointing`.

    from unishard import checkpointing

    checkpointing.configure(None, checkpoint_in_cpu=True)
    hidden = checkpointing.checkpoint(block, hidden)

What a checkpointed function was given rests where `configure` says until backward: on the device, in parts across
tensor-parallel ranks, in host memory, or on a tier of `unishard.offload`. Gradients are those of the plain function.
"""

from __future__ import annotations

from unishard.checkpointing.recompute import checkpoint, non_reentrant_checkpoint
from unishard.checkpointing.rng import (
    RngStatesTracker,
    get_cuda_rng_tracker,
    model_parallel_cuda_manual_seed,
    model_parallel_reconfigure_tp_seed,
)
from unishard.checkpointing.settings import (
    configure,
    is_configured,
    partition_activations_in_checkpoint,
    reset,
    set_num_layers,
)

CudaRNGStatesTracker = RngStatesTracker

__all__ = [
    "CudaRNGStatesTracker",
    "RngStatesTracker",
    "checkpoint",
    "configure",
    "get_cuda_rng_tracker",
    "is_configured",
    "model_parallel_cuda_manual_seed",
    "model_parallel_reconfigure_tp_seed",
    "non_reentrant_checkpoint",
    "partition_activations_in_checkpoint",
    "reset",
    "set_num_layers",
]
