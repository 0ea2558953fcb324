"""Other people's checkpoints: opened where they lie, checked, compared, and written as one another."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from unishard.checkpoint.convert.consolidate import (
        convert_zero_checkpoint_to_fp32_state_dict,
        get_fp32_state_dict_from_zero_checkpoint,
        load_state_dict_from_zero_checkpoint,
    )
    from unishard.checkpoint.convert.format import Hints, Opened, Options
    from unishard.checkpoint.convert.operations import compare, convert, verify
    from unishard.checkpoint.convert.registry import open_checkpoint

_HOMES = {
    "open_checkpoint": "registry",
    "convert": "operations",
    "verify": "operations",
    "compare": "operations",
    "Hints": "format",
    "Opened": "format",
    "Options": "format",
    "get_fp32_state_dict_from_zero_checkpoint": "consolidate",
    "convert_zero_checkpoint_to_fp32_state_dict": "consolidate",
    "load_state_dict_from_zero_checkpoint": "consolidate",
}

__all__ = [
    "Hints",
    "Opened",
    "Options",
    "compare",
    "convert",
    "convert_zero_checkpoint_to_fp32_state_dict",
    "get_fp32_state_dict_from_zero_checkpoint",
    "load_state_dict_from_zero_checkpoint",
    "open_checkpoint",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'unishard.checkpoint.convert' has no attribute {name!r}")
    return getattr(importlib.import_module(f"unishard.checkpoint.convert.{_HOMES[name]}"), name)
