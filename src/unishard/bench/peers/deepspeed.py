"""DeepSpeed's ZeRO stages, each with both CPU optimizers and with and without overlapped communication."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from unishard.bench.contestant import Contestant, EngineTrainer, Held, Level, optimizer_state
from unishard.bench.model import build_model
from unishard.bench.plan import ADAMW, Plan

BUCKET = 10_000_000
"""Elements of a reduction or gather: 40 MB in fp32. The default of 500 million is one bucket for these models, which
leaves nothing to overlap."""


class DeepSpeedTrainer(EngineTrainer):
    """DeepSpeed's engine, whose hooks keep it and its tensors alive after `destroy`: they are emptied, or the rounds of
    a run would add up until the machine has no memory left."""

    def close(self) -> None:
        held = self.held()
        super().close()
        for tensor in (*held.parameters, *held.gradients, *held.optimizer):
            tensor.data = tensor.new_empty(0)


def config(plan: Plan, stage: int, overlap: bool, offload: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The ds_config of one contestant; everything that is not here has DeepSpeed's default."""
    return {
        "train_micro_batch_size_per_gpu": plan.shape.micro_batch,
        "gradient_accumulation_steps": plan.accumulation,
        "gradient_clipping": 0.0,
        "steps_per_print": 1_000_000_000,
        "bf16": {"enabled": plan.dtype == "bf16"},
        "zero_optimization": {
            "stage": stage,
            "overlap_comm": overlap,
            "contiguous_gradients": True,
            "reduce_bucket_size": BUCKET,
            "allgather_bucket_size": BUCKET,
            "stage3_prefetch_bucket_size": BUCKET,
            **(offload or {}),
        },
        "zero_allow_untested_optimizer": True,
    }


def build(
    plan: Plan, *, stage: int, cpu_adam: bool, overlap: bool, offload: Mapping[str, Any] | None = None
) -> DeepSpeedTrainer:
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    model = build_model(plan)
    engine: Any = deepspeed.initialize(
        model=model, optimizer=_optimizer(model, cpu_adam), config=config(plan, stage, overlap, offload)
    )[0]
    return DeepSpeedTrainer(engine, engine.optimizer.optimizer, partial(_held, engine))


def _optimizer(model: torch.nn.Module, cpu_adam: bool) -> torch.optim.Optimizer:
    if not cpu_adam:
        return torch.optim.AdamW(model.parameters(), fused=True, **ADAMW)
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    return DeepSpeedCPUAdam(model.parameters(), adamw_mode=True, **ADAMW)


def _held(engine: Any) -> Held:
    """What DeepSpeed keeps, found where it keeps it: it has no single list of its own."""
    zero = engine.optimizer
    parameters = list(engine.module.parameters())
    shards = [p.ds_tensor for p in parameters if hasattr(p, "ds_tensor")]
    flat = [getattr(zero, name, []) for name in ("bit16_groups_flat", "fp16_partitioned_groups_flat")]
    masters = [p for group in zero.optimizer.param_groups for p in group["params"]]
    gradients = [p.grad for p in (*masters, *parameters) if p.grad is not None]
    gradients += _tensors_in(getattr(zero, "averaged_gradients", {}))
    gradients += _tensors_in(getattr(zero, "grad_partitions_flat_buffer", None))
    return Held(
        [*parameters, *shards, *_tensors_in(flat), *masters], gradients, optimizer_state(zero.optimizer)
    )


def _tensors_in(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [t for each in value for t in _tensors_in(each)] if isinstance(value, list | tuple) else []


_LEVELS: dict[int, Level] = {1: "zero1", 2: "zero2", 3: "zero3"}


def _row(stage: int, cpu_adam: bool, overlap: bool) -> Contestant:
    optimizer = "DeepSpeedCPUAdam" if cpu_adam else "torch's fused AdamW"
    return Contestant(
        name=f"deepspeed-{stage}-{'cpuadam' if cpu_adam else 'fused'}{'-overlap' if overlap else ''}",
        family=f"deepspeed-{stage}",
        level=_LEVELS[stage],
        setting=f"stage {stage}, {optimizer}, overlap_comm {str(overlap).lower()}, contiguous_gradients, buckets of "
        f"{BUCKET:,} elements, no clipping",
        build=partial(build, stage=stage, cpu_adam=cpu_adam, overlap=overlap),
        imports=("deepspeed",),
        install="pip install 'unishard[bench]' with torch constrained to the version you have (`make bench` does "
        "that), or leave it out with --without 'deepspeed-*'",
    )


def _offloaded(suffix: str, what: str, offload: Mapping[str, Any]) -> Contestant:
    row = _row(3, True, True)
    return dataclasses.replace(
        row,
        name=f"deepspeed-3-{suffix}",
        family="deepspeed-3-offload",
        level="offload",
        setting=f"{row.setting}, {what}",
        build=partial(build, stage=3, cpu_adam=True, overlap=True, offload=offload),
    )


CONTESTANTS = (
    *(
        _row(stage, cpu_adam, overlap)
        for stage in (1, 2, 3)
        for cpu_adam in (True, False)
        for overlap in (True, False)
    ),
    # Its nvme offload needs an extension built on the spot, which dies on more than one rank here.
    _offloaded("cpu", "optimizer offloaded to cpu", {"offload_optimizer": {"device": "cpu"}}),
)
