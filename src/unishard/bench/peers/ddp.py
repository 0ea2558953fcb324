"""torch's DistributedDataParallel, alone and with torch's ZeroRedundancyOptimizer (ZeRO-1)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch.nn.parallel import DistributedDataParallel

from unishard.bench.contestant import Contestant, MicroContext, TorchTrainer
from unishard.bench.model import build_model
from unishard.bench.peers.plain import autocast
from unishard.bench.plan import ADAMW, Plan


def build(plan: Plan, *, zero1: bool = False, bf16_wire: bool = False) -> TorchTrainer:
    # Gradients that are views of the buckets save a copy of the model's size, and time.
    model = DistributedDataParallel(build_model(plan), gradient_as_bucket_view=True)
    if bf16_wire:
        from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook

        # By its name torch refuses it where there is no CUDA, though gloo sums bf16.
        model.register_comm_hook(None, lambda group, bucket: bf16_compress_hook(group, bucket))
    return TorchTrainer(model, _optimizer(model, zero1), _micro(model, plan))


def _optimizer(model: DistributedDataParallel, zero1: bool) -> torch.optim.Optimizer:
    if not zero1:
        return torch.optim.AdamW(model.parameters(), fused=True, **ADAMW)
    from torch.distributed.optim import ZeroRedundancyOptimizer

    return ZeroRedundancyOptimizer(
        model.parameters(), torch.optim.AdamW, parameters_as_bucket_view=True, fused=True, **ADAMW
    )


def _micro(model: DistributedDataParallel, plan: Plan) -> MicroContext:
    @contextmanager
    def micro(is_last: bool) -> Iterator[None]:
        model.require_backward_grad_sync = is_last
        if plan.dtype == "bf16":
            with autocast(is_last):
                yield
        else:
            yield

    return micro


_SETTING = "gradient_as_bucket_view=True, buckets of 25 MB, no_sync until the last micro-batch, fused AdamW"

CONTESTANTS = (
    Contestant(
        name="ddp",
        family="ddp",
        level="replicated",
        setting=_SETTING + "; bf16 by autocast, gradients travel in fp32",
        build=build,
        waits_in_backward=True,
    ),
    Contestant(
        name="ddp-bf16-wire",
        family="ddp",
        level="replicated",
        setting=_SETTING + "; bf16 by autocast, gradients travel in bf16 (bf16_compress_hook)",
        build=partial(build, bf16_wire=True),
        dtypes=("bf16",),
        waits_in_backward=True,
    ),
    Contestant(
        name="torch-zero1",
        family="torch-zero1",
        level="zero1",
        setting="ZeroRedundancyOptimizer(parameters_as_bucket_view=True) over ddp: " + _SETTING,
        build=partial(build, zero1=True),
        imports=("torch.distributed.optim",),
        waits_in_backward=True,
    ),
)
