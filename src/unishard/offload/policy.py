"""`NVMeOffloadPolicy`: what `fully_shard(offload_policy=)` takes, where states rest on a disk."""

from __future__ import annotations

import math
import weakref
from dataclasses import dataclass

import torch

from unishard.errors import ShardingError
from unishard.offload.aligned import RecycledPages
from unishard.sharding.policies import OffloadPolicy
from unishard.sharding.ports import Tier, Tiers


@dataclass(frozen=True)
class NVMeOffloadPolicy(OffloadPolicy):
    """Sharded states rest in files below `nvme_path`, each kind chosen on its own. See docs/offload.md.

    - `parameters`: shards of parameters. - `optimizer`: what a torch optimizer keeps for them in `state`. -
    `gradients`: reduced gradients, from backward to the update. Modules whose policies are equal share one file.
    - `max_in_cpu`: that many bytes of each rank in host memory, the rest on the disk. - `block_size`, `queue_depth`: of
    transfers, in bytes and requests.

    >>> NVMeOffloadPolicy("/local/nvme", optimizer=False).parameters
    True
    """

    nvme_path: str
    parameters: bool = True
    optimizer: bool = True
    gradients: bool = True
    max_in_cpu: int = 0
    block_size: int = 8 << 20
    queue_depth: int = 8

    def __post_init__(self) -> None:
        for name in ("max_in_cpu", "block_size", "queue_depth"):
            value, least = getattr(self, name), 0 if name == "max_in_cpu" else 1
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ShardingError(
                    f"NVMeOffloadPolicy({name}={value!r}): pass a whole number, {least} or more"
                )
        if not (self.parameters or self.optimizer or self.gradients):
            raise ShardingError(
                "NVMeOffloadPolicy(parameters=False, optimizer=False, gradients=False) offloads nothing; leave "
                "offload_policy out"
            )

    def open_tiers(self, device: torch.device) -> Tiers:
        """The tiers of this and equal policies. Raises `OffloadError` if the disk cannot be used."""
        found = _open.get((self, device))
        if found is not None:
            return found
        tier = self._tier()

        def on_device(numel: int, dtype: torch.dtype) -> torch.Tensor:
            return torch.empty(numel, dtype=dtype, device=device)

        found = Tiers(
            parameter=tier if self.parameters else None,
            optimizer=tier if self.optimizer else None,
            gradient=tier if self.gradients else None,
            buffer=RecycledPages().empty if device.type == "cpu" else on_device,
        )
        _open[self, device] = found
        return found

    def _tier(self) -> Tier:
        from unishard.offload.cpu import CpuTier
        from unishard.offload.layered import LayeredTier
        from unishard.offload.nvme import NvmeTier

        nvme = NvmeTier(self.nvme_path, block=self.block_size, depth=self.queue_depth)
        return LayeredTier([(CpuTier(), self.max_in_cpu), (nvme, math.inf)]) if self.max_in_cpu else nvme


_open: weakref.WeakValueDictionary[tuple[NVMeOffloadPolicy, torch.device], Tiers] = (
    weakref.WeakValueDictionary()
)
