"""The config door: `initialize` builds an `Engine` from a DeepSpeed configuration."""

from __future__ import annotations

from unishard.engine.engine import Engine
from unishard.engine.initialize import initialize

__all__ = ["Engine", "initialize"]
