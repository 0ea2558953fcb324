"""`auto_shard`: the automatic choice of units, through the code door."""

from __future__ import annotations

from typing import Any

from torch import nn

from unishard.sharding.api import shard_records
from unishard.sharding.wrap import ChosenUnit, assign_parameters, choose_modules


def auto_shard(model: nn.Module, **options: Any) -> nn.Module:
    """Shard repeated blocks one by one, then large modules, then the rest with the root; return the model.

    `options` are those of `fully_shard`. A parameter tied across units goes to their outermost common one, with one
    log line; see `describe(model)` for the choice.

    >>> model = auto_shard(nn.Sequential(nn.Linear(2, 2), nn.ReLU()))
    >>> type(model).__name__
    'FSDPSequential'
    """
    chosen = assign_parameters(model, choose_modules(model), options.pop("ignored_params", None) or set())
    for choice in sorted(chosen, key=_depth, reverse=True):
        shard_records([choice.module], choice.records, **options)
    return model


def _depth(choice: ChosenUnit) -> int:
    return choice.name.count(".") + 1 if choice.name else 0
