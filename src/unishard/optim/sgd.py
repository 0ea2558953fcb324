"""Stochastic gradient descent with momentum: torch's."""

from __future__ import annotations

from typing import Any

import torch
from torch.optim import Optimizer

from unishard.optim.base import register, with_fused


@register("SGD", accepts=torch.optim.SGD)
def build_sgd(groups: list[dict[str, Any]], options: dict[str, Any]) -> Optimizer:
    """Build `torch.optim.SGD`; the options are that class's."""
    return torch.optim.SGD(groups, **with_fused(torch.optim.SGD, groups, options))
