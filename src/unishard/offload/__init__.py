"""Where state rests when it is not on the device: tiers, and what moves state between them while work goes on.

| module | what |
|---|---|
| `device`, `cpu`, `nvme` | the tiers, behind `unishard.sharding.ports.Tier` |
| `layered` | several tiers, filled one after the other |
| `policy` | what `fully_shard(offload_policy=)` takes |
| `activations` | activations that rest on a tier between forward and backward |

See docs/offload.md.
"""

from __future__ import annotations

from unishard.offload.activations import offload_activations
from unishard.offload.aligned import aligned_empty
from unishard.offload.cpu import CpuTier
from unishard.offload.device import DeviceTier
from unishard.offload.layered import LayeredTier
from unishard.offload.nvme import NvmeTier
from unishard.offload.policy import NVMeOffloadPolicy

__all__ = [
    "CpuTier",
    "DeviceTier",
    "LayeredTier",
    "NVMeOffloadPolicy",
    "NvmeTier",
    "aligned_empty",
    "offload_activations",
]
