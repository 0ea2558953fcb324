"""FSDP1's names over unishard's core: `from unishard.fsdp import FSDP` (or its long name), and little else changes.

Parameters are DTensors between uses and keep their names and shapes, as with `use_orig_params=True`; any `torch.optim`
optimizer built on `model.parameters()` works. Weights and buffers start as rank 0's.
"""

from __future__ import annotations

from typing import Any

from unishard.fsdp.options import BackwardPrefetch, CPUOffload, MixedPrecision, ShardingStrategy
from unishard.fsdp.refused import REFUSED_NAMES, refuse
from unishard.fsdp.state_dict_type import (
    FullOptimStateDictConfig,
    FullStateDictConfig,
    LocalOptimStateDictConfig,
    LocalStateDictConfig,
    OptimStateDictConfig,
    OptimStateKeyType,
    ShardedOptimStateDictConfig,
    ShardedStateDictConfig,
    StateDictConfig,
    StateDictSettings,
    StateDictType,
)
from unishard.fsdp.wrapper import FullyShardedDataParallel

FSDP = FullyShardedDataParallel

__all__ = [
    "BackwardPrefetch",
    "CPUOffload",
    "FSDP",
    "FullOptimStateDictConfig",
    "FullStateDictConfig",
    "FullyShardedDataParallel",
    "LocalOptimStateDictConfig",
    "LocalStateDictConfig",
    "MixedPrecision",
    "OptimStateDictConfig",
    "OptimStateKeyType",
    "ShardedOptimStateDictConfig",
    "ShardedStateDictConfig",
    "ShardingStrategy",
    "StateDictConfig",
    "StateDictSettings",
    "StateDictType",
]


def __getattr__(name: str) -> Any:
    if name in REFUSED_NAMES:
        refuse(name, REFUSED_NAMES[name])
    raise AttributeError(f"module 'unishard.fsdp' has no attribute {name!r}")
