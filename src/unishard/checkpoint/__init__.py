"""Checkpoints that load at any world size, survive a kill at any instant, and that others can read."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from unishard.checkpoint.api import async_save, inspect, load, read_tensor, save
    from unishard.checkpoint.background import PendingSave

_HOMES = {
    "save": "api",
    "async_save": "api",
    "load": "api",
    "inspect": "api",
    "read_tensor": "api",
    "PendingSave": "background",
}

__all__ = ["PendingSave", "async_save", "inspect", "load", "read_tensor", "save"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'unishard.checkpoint' has no attribute {name!r}")
    return getattr(importlib.import_module(f"unishard.checkpoint.{_HOMES[name]}"), name)
