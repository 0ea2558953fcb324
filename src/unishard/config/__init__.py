"""A ds_config is read, checked and settled here, before a model is touched. Imports no torch."""

from __future__ import annotations

from unishard.config.load import load_config
from unishard.config.model import Config
from unishard.config.problems import Problem
from unishard.config.resolve import check, resolve
from unishard.config.resolved import ResolvedConfig

__all__ = ["Config", "Problem", "ResolvedConfig", "check", "load_config", "resolve"]
