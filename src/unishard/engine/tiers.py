"""From the configuration to the tiers that a model's states rest on."""

from __future__ import annotations

import logging
import math
from typing import Any

import torch
import torch.distributed as dist

from unishard.config import ResolvedConfig
from unishard.dist.agree import agree
from unishard.dist.collectives import communicator
from unishard.offload.aligned import RecycledPages
from unishard.sharding.ports import ON_DEVICE, Tier, Tiers
from unishard.sharding.precision import as_dtype

log = logging.getLogger("unishard")


def build_tiers(rc: ResolvedConfig, device: torch.device) -> Tiers:
    """Open what the sections `offload_*` ask for. All ranks call together; raises on all or on none."""
    zero = rc.zero_optimization
    parameter, optimizer, gradient = zero.offload_param, zero.offload_optimizer, zero.offload_gradient

    def on_device(numel: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(numel, dtype=dtype, device=device)

    found = ON_DEVICE
    with agree(communicator(dist.group.WORLD), "open the tiers of offloaded state"):
        beside = _tier(optimizer, rc, device)
        found = Tiers(
            parameter=_tier(parameter, rc, device),
            optimizer=beside,
            # Gradients go with the optimizer that needs them, unless a section of their own says otherwise.
            gradient=beside if gradient is None else _tier(gradient, rc, device),
            ratio=1.0 if optimizer is None else optimizer.ratio,
            buffer=RecycledPages().empty if device.type == "cpu" else on_device,
        )
    return found


def _tier(section: Any, rc: ResolvedConfig, device: torch.device) -> Tier | None:
    if section is None or section.device == "none":
        return None
    if section.device == "cpu":
        if device.type == "cpu":
            if dist.get_rank() == 0:
                log.info(
                    "unishard: offload to cpu: the model computes on the CPU, so its state is there already"
                )
            return None
        return _host(section)
    from unishard.offload.layered import LayeredTier
    from unishard.offload.nvme import BLOCK, NvmeTier

    layers: list[tuple[Tier, float]] = []
    if getattr(section, "max_in_cpu", None):
        itemsize = as_dtype(rc.compute_dtype).itemsize
        layers.append((_host(section), section.max_in_cpu * itemsize))
    given = rc.origin("aio.block_size") != "default"
    nvme = NvmeTier(section.nvme_path, block=rc.aio.block_size if given else BLOCK, depth=rc.aio.queue_depth)
    return LayeredTier([*layers, (nvme, math.inf)]) if layers else nvme


def _host(section: Any) -> Tier:
    from unishard.offload.aligned import PinnedBudget
    from unishard.offload.cpu import CpuTier

    return CpuTier(PinnedBudget() if section.pin_memory else None)
