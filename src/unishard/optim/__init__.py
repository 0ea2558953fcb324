"""Optimizers over local shards, learning-rate schedules and loss scales, loaded when first used."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from unishard.optim.adam import UncorrectedAdam as UncorrectedAdam
    from unishard.optim.base import build_optimizer as build_optimizer
    from unishard.optim.base import check_optimizer as check_optimizer
    from unishard.optim.base import register as register
    from unishard.optim.elementwise import check_client_optimizer as check_client_optimizer
    from unishard.optim.elementwise import require_elementwise as require_elementwise
    from unishard.optim.lion import Lion as Lion
    from unishard.optim.loss_scale import DynamicLossScale as DynamicLossScale
    from unishard.optim.loss_scale import LossScale as LossScale
    from unishard.optim.loss_scale import NoLossScale as NoLossScale
    from unishard.optim.loss_scale import StaticLossScale as StaticLossScale
    from unishard.optim.one_cycle import OneCycle as OneCycle
    from unishard.optim.schedules import LRRangeTest as LRRangeTest
    from unishard.optim.schedules import WarmupCosineLR as WarmupCosineLR
    from unishard.optim.schedules import WarmupDecayLR as WarmupDecayLR
    from unishard.optim.schedules import WarmupLR as WarmupLR
    from unishard.optim.schedules import build_schedule as build_schedule
    from unishard.optim.schedules import check_schedule as check_schedule

_HOME = {
    "build_optimizer": "base",
    "check_optimizer": "base",
    "register": "base",
    "check_client_optimizer": "elementwise",
    "require_elementwise": "elementwise",
    "Lion": "lion",
    "UncorrectedAdam": "adam",
    "build_schedule": "schedules",
    "check_schedule": "schedules",
    "WarmupLR": "schedules",
    "WarmupDecayLR": "schedules",
    "WarmupCosineLR": "schedules",
    "OneCycle": "one_cycle",
    "LRRangeTest": "schedules",
    "LossScale": "loss_scale",
    "NoLossScale": "loss_scale",
    "StaticLossScale": "loss_scale",
    "DynamicLossScale": "loss_scale",
}

__all__ = [
    "build_optimizer",
    "check_optimizer",
    "register",
    "check_client_optimizer",
    "require_elementwise",
    "Lion",
    "UncorrectedAdam",
    "build_schedule",
    "check_schedule",
    "WarmupLR",
    "WarmupDecayLR",
    "WarmupCosineLR",
    "OneCycle",
    "LRRangeTest",
    "LossScale",
    "NoLossScale",
    "StaticLossScale",
    "DynamicLossScale",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
