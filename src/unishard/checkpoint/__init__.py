"""Checkpoints that load at any world size, survive a kill at any instant, and that others can read."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from unishard.checkpoint.api import async_save, inspect, load, read_tensor, save
    from unishard.checkpoint.background import PendingSave
    from unishard.checkpoint.state_dict import (
        StateDictOptions,
        get_model_state_dict,
        get_optimizer_state_dict,
        get_state_dict,
        set_model_state_dict,
        set_optimizer_state_dict,
        set_state_dict,
    )

_HOMES = {
    "save": "api",
    "async_save": "api",
    "load": "api",
    "inspect": "api",
    "read_tensor": "api",
    "PendingSave": "background",
    "StateDictOptions": "state_dict",
    "get_model_state_dict": "state_dict",
    "get_optimizer_state_dict": "state_dict",
    "get_state_dict": "state_dict",
    "set_model_state_dict": "state_dict",
    "set_optimizer_state_dict": "state_dict",
    "set_state_dict": "state_dict",
}

__all__ = [
    "PendingSave",
    "StateDictOptions",
    "async_save",
    "get_model_state_dict",
    "get_optimizer_state_dict",
    "get_state_dict",
    "inspect",
    "load",
    "read_tensor",
    "save",
    "set_model_state_dict",
    "set_optimizer_state_dict",
    "set_state_dict",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'unishard.checkpoint' has no attribute {name!r}")
    return getattr(importlib.import_module(f"unishard.checkpoint.{_HOMES[name]}"), name)
