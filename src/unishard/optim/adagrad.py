"""Adagrad (Duchi, Hazan, Singer 2011): torch's, fused where it can be."""

from __future__ import annotations

from typing import Any

import torch
from torch.optim import Optimizer

from unishard.optim.base import register, with_fused


@register("Adagrad", accepts=torch.optim.Adagrad)
def build_adagrad(groups: list[dict[str, Any]], options: dict[str, Any]) -> Optimizer:
    """Build `torch.optim.Adagrad`; the options are that class's. Its state is allocated at once."""
    return torch.optim.Adagrad(groups, **with_fused(torch.optim.Adagrad, groups, options))
