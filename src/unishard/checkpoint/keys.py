"""The names of things in a checkpoint, which docs/checkpoints.md lists."""

from __future__ import annotations

MODEL = "model"
"""Parameters and persistent buffers, by name."""
STATE = "optim.state"
"""Optimizer state: by parameter name, then kind."""
GROUPS = "optim.param_groups"
"""Options of the optimizer's parameter groups: by position, then option."""
ENGINE = "unishard.engine"
"""Counters, loss scale and schedule."""
CLIENT = "unishard.client_state"
RANDOM = "unishard.rng"
"""Random generators, by rank."""
TRUST = "UNISHARD_TRUST_CHECKPOINTS"
"""Environment variable: 1 lets client state hold classes of your own, which loading runs code of."""
