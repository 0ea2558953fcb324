"""unishard: train PyTorch models too large for one device, through DeepSpeed's front door or FSDP's.

Public names are imported when first touched, so that `import unishard` costs next to nothing over `import torch`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from unishard.version import __version__

_HOMES = {
    "initialize": "unishard.engine",
    "Engine": "unishard.engine",
    "Config": "unishard.config",
    "fully_shard": "unishard.sharding.fully_shard",
    "FSDPModule": "unishard.sharding.api",
    "UnshardHandle": "unishard.sharding.api",
    "register_fsdp_forward_method": "unishard.sharding.api",
    "share_comm_ctx": "unishard.sharding.api",
    "DataParallelMeshDims": "unishard.sharding.policies",
    "MixedPrecisionPolicy": "unishard.sharding.policies",
    "OffloadPolicy": "unishard.sharding.policies",
    "CPUOffloadPolicy": "unishard.offload.policy",
    "NVMeOffloadPolicy": "unishard.offload.policy",
    "auto_shard": "unishard.sharding.auto",
    "describe": "unishard.sharding.describe",
    "gather": "unishard.sharding.gather",
    "init_sharded": "unishard.sharding.init",
    "load_safetensors": "unishard.sharding.load",
    "clip_grad_norm_": "unishard.optim.clip",
    "MixedPrecision": "unishard.sharding.precision",
    "Sharding": "unishard.sharding.placement",
    "PRESETS": "unishard.sharding.placement",
    "NO_SHARD": "unishard.sharding.placement",
    "DDP": "unishard.sharding.placement",
    "ZERO1": "unishard.sharding.placement",
    "ZERO2": "unishard.sharding.placement",
    "SHARD_GRAD_OP": "unishard.sharding.placement",
    "ZERO3": "unishard.sharding.placement",
    "FULL_SHARD": "unishard.sharding.placement",
    "HYBRID_ZERO1": "unishard.sharding.placement",
    "HYBRID_ZERO2": "unishard.sharding.placement",
    "HYBRID_SHARD_GRAD_OP": "unishard.sharding.placement",
    "HYBRID_SHARD": "unishard.sharding.placement",
    "UnishardError": "unishard.errors",
    "ConfigError": "unishard.errors",
    "ShardingError": "unishard.errors",
    "StateError": "unishard.errors",
    "UnsupportedError": "unishard.errors",
    "NonFiniteError": "unishard.errors",
    "RankError": "unishard.errors",
    "OffloadError": "unishard.errors",
    "TiledLinear": "unishard.sharding.tiling",
}
_SUBMODULES = ("checkpoint", "checkpointing")

__all__ = [
    "__version__",
    "CPUOffloadPolicy",
    "Config",
    "ConfigError",
    "DDP",
    "DataParallelMeshDims",
    "Engine",
    "FSDPModule",
    "FULL_SHARD",
    "HYBRID_SHARD",
    "HYBRID_SHARD_GRAD_OP",
    "HYBRID_ZERO1",
    "HYBRID_ZERO2",
    "MixedPrecision",
    "MixedPrecisionPolicy",
    "NO_SHARD",
    "NVMeOffloadPolicy",
    "NonFiniteError",
    "OffloadError",
    "OffloadPolicy",
    "PRESETS",
    "RankError",
    "SHARD_GRAD_OP",
    "Sharding",
    "ShardingError",
    "StateError",
    "TiledLinear",
    "UnishardError",
    "UnshardHandle",
    "UnsupportedError",
    "ZERO1",
    "ZERO2",
    "ZERO3",
    "auto_shard",
    "checkpoint",
    "checkpointing",
    "clip_grad_norm_",
    "describe",
    "fully_shard",
    "gather",
    "init_sharded",
    "initialize",
    "load_safetensors",
    "register_fsdp_forward_method",
    "share_comm_ctx",
]


def __getattr__(name: str) -> Any:
    if name in _SUBMODULES:
        return importlib.import_module(f"unishard.{name}")
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'unishard' has no attribute {name!r}")
    value = getattr(importlib.import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return list(__all__)


if TYPE_CHECKING:
    from unishard import checkpoint as checkpoint
    from unishard.config import Config as Config
    from unishard.engine import Engine as Engine
    from unishard.engine import initialize as initialize
    from unishard.sharding.fully_shard import fully_shard as fully_shard
