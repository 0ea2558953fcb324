"""torch's fully_shard (FSDP2)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from unishard.bench.contestant import Contestant, MicroContext, TorchTrainer, no_context
from unishard.bench.model import build_model
from unishard.bench.plan import ADAMW, Plan


def build(plan: Plan, *, full: bool) -> TorchTrainer:
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16 if plan.dtype == "bf16" else None)
    model = build_model(plan)
    options: dict[str, Any] = {"mp_policy": policy, "reshard_after_forward": full}
    for block in model.blocks:
        fully_shard(block, **options)
    fully_shard(model, **options)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True, **ADAMW)
    return TorchTrainer(model, optimizer, no_context if full else keep_between_micro_batches(model))


def keep_between_micro_batches(model: Any) -> MicroContext:
    """ZeRO-2 with accumulation: parameters stay whole until the last micro-batch's backward."""

    @contextmanager
    def micro(is_last: bool) -> Iterator[None]:
        model.set_reshard_after_backward(is_last)
        yield

    return micro


_SETTING = "each block and the root sharded, fused AdamW; gradients reduced each micro-batch"

CONTESTANTS = (
    Contestant(
        name="fsdp2-gradop",
        family="fsdp2-gradop",
        level="zero2",
        setting="reshard_after_forward=False, whole until the last micro-batch is over, " + _SETTING,
        build=partial(build, full=False),
        imports=("torch.distributed.fsdp",),
    ),
    Contestant(
        name="fsdp2-full",
        family="fsdp2-full",
        level="zero3",
        setting="reshard_after_forward=True, " + _SETTING,
        build=partial(build, full=True),
        imports=("torch.distributed.fsdp",),
    ),
)
