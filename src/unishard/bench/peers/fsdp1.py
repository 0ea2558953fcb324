"""torch's FullyShardedDataParallel (FSDP1)."""

from __future__ import annotations

from functools import partial

import torch

from unishard.bench.contestant import Contestant, TorchTrainer
from unishard.bench.model import Block, build_model
from unishard.bench.plan import ADAMW, Plan


def build(plan: Plan, *, full: bool) -> TorchTrainer:
    from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecision, ShardingStrategy
    from torch.distributed.fsdp.wrap import ModuleWrapPolicy

    low = torch.bfloat16
    model = FullyShardedDataParallel(
        build_model(plan),
        sharding_strategy=ShardingStrategy.FULL_SHARD if full else ShardingStrategy.SHARD_GRAD_OP,
        auto_wrap_policy=ModuleWrapPolicy({Block}),
        mixed_precision=MixedPrecision(param_dtype=low, reduce_dtype=low) if plan.dtype == "bf16" else None,
        device_id=torch.device("cpu"),
    )

    def free() -> None:
        # torch 2.13 keeps flat parameters for ever; their memory at least must not pile up from round to round.
        for parameter in model.parameters():
            parameter.untyped_storage().resize_(0)

    optimizer = torch.optim.AdamW(model.parameters(), fused=True, **ADAMW)
    return TorchTrainer(model, optimizer, close_with=free)


_SETTING = "each block and the root wrapped, flat parameters, fused AdamW; gradients reduced each micro-batch"

CONTESTANTS = (
    Contestant(
        name="fsdp1-gradop",
        family="fsdp1-gradop",
        level="zero2",
        setting="SHARD_GRAD_OP, " + _SETTING,
        build=partial(build, full=False),
        imports=("torch.distributed.fsdp",),
    ),
    Contestant(
        name="fsdp1-full",
        family="fsdp1-full",
        level="zero3",
        setting="FULL_SHARD, " + _SETTING,
        build=partial(build, full=True),
        imports=("torch.distributed.fsdp",),
    ),
)
