"""One process that trains alone on the global batch: what sharding is compared with, not by."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch

from unishard.bench.contestant import Contestant, TorchTrainer, no_context
from unishard.bench.model import build_model
from unishard.bench.plan import ADAMW, Plan


def autocast(is_last: bool) -> AbstractContextManager[Any]:
    """bf16 compute over fp32 parameters, for contestants without a mixed precision of their own."""
    return torch.autocast("cpu", torch.bfloat16)


def build(plan: Plan) -> TorchTrainer:
    model = build_model(plan)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True, **ADAMW)
    return TorchTrainer(model, optimizer, autocast if plan.dtype == "bf16" else no_context)


CONTESTANTS = (
    Contestant(
        name="plain",
        family="plain",
        level="replicated",
        setting="one process, the global batch in one forward, all ranks' threads; fused AdamW; bf16 by autocast",
        build=build,
        alone=True,
    ),
)
