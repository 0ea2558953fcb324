"""Offload policies, which `fully_shard(offload_policy=)` takes: where the states of its modules rest."""

from __future__ import annotations

import math
import weakref
from dataclasses import dataclass

import torch

from unishard.errors import ShardingError
from unishard.offload.aligned import PinnedBudget, RecycledPages
from unishard.sharding.policies import OffloadPolicy
from unishard.sharding.ports import ON_DEVICE, Tier, Tiers


@dataclass(frozen=True)
class _KindsOfState(OffloadPolicy):
    """Which of the sharded states rest elsewhere, on one tier, which equal policies share."""

    def open_tiers(self, device: torch.device) -> Tiers:
        """The tiers of this and equal policies. Raises `OffloadError` if they cannot be had."""
        found = _open.get((self, device))
        if found is not None:
            return found
        tier = self._tier()

        def on_device(numel: int, dtype: torch.dtype) -> torch.Tensor:
            return torch.empty(numel, dtype=dtype, device=device)

        parameter, optimizer, gradient = (tier if getattr(self, name) else None for name in _KINDS)
        buffer = RecycledPages().empty if device.type == "cpu" else on_device
        _open[self, device] = found = Tiers(parameter, optimizer, gradient, buffer=buffer)
        return found

    def _tier(self) -> Tier:
        raise NotImplementedError

    def _require_any(self) -> None:
        if not any(getattr(self, name) for name in _KINDS):
            raise ShardingError(
                f"{type(self).__name__}(parameters=False, optimizer=False, gradients=False) offloads nothing; leave "
                "offload_policy out"
            )


_KINDS = ("parameters", "optimizer", "gradients")


@dataclass(frozen=True)
class CPUOffloadPolicy(_KindsOfState):
    """Sharded states rest in host memory, each kind chosen on its own, and come to the accelerator for their use.

    Unlike with torch's policy the optimizer steps on the accelerator, one group after the other. Without an accelerator
    states are in host memory already, and nothing changes.

    - `pin_memory`: page-locked, up to a quarter of the host's memory divided by its ranks. - `parameters`: shards of
    parameters. - `optimizer`: what a torch optimizer keeps for them in `state`. - `gradients`: reduced gradients.

    >>> CPUOffloadPolicy().open_tiers(torch.device("cpu")) is ON_DEVICE
    True
    """

    pin_memory: bool = True
    parameters: bool = True
    optimizer: bool = True
    gradients: bool = True

    def __post_init__(self) -> None:
        self._require_any()

    def open_tiers(self, device: torch.device) -> Tiers:
        return ON_DEVICE if device.type == "cpu" else super().open_tiers(device)

    def _tier(self) -> Tier:
        from unishard.offload.cpu import CpuTier

        return CpuTier(PinnedBudget() if self.pin_memory else None)


@dataclass(frozen=True)
class NVMeOffloadPolicy(_KindsOfState):
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
        self._require_any()

    def _tier(self) -> Tier:
        from unishard.offload.cpu import CpuTier
        from unishard.offload.layered import LayeredTier
        from unishard.offload.nvme import NvmeTier

        nvme = NvmeTier(self.nvme_path, block=self.block_size, depth=self.queue_depth)
        return LayeredTier([(CpuTier(), self.max_in_cpu), (nvme, math.inf)]) if self.max_in_cpu else nvme


_open: weakref.WeakValueDictionary[tuple[_KindsOfState, torch.device], Tiers] = weakref.WeakValueDictionary()
