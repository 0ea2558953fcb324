"""Training through FSDP1's names against one process: strategies, models, dtypes, accumulation, clipping."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from unishard.fsdp import FSDP, MixedPrecision, ShardingStrategy
from unishard.fsdp.wrap import CustomPolicy
from unishard.testing.models import MODELS, ToyModel
from unishard.testing.parity import (
    DTYPES,
    TRAINERS,
    ParityCase,
    Run,
    _new_optimizer,
    assert_parity,
    batch_for,
)

FLAT = ("FULL_SHARD", "SHARD_GRAD_OP", "NO_SHARD")
HYBRID = ("HYBRID_SHARD", "_HYBRID_SHARD_ZERO2")
NORMS: list[Tensor] = []


def train_fsdp(model: ToyModel, case: ParityCase) -> Run:
    """As a script for FSDP1 does; door "no_sync" reduces the last micro-batch's backward only."""
    # The forward of a wrapped module must run on all ranks, as with torch's.
    units = set() if case.model == "unused_branch" else set(model.shard_units())
    mixed = DTYPES[case.dtype]
    wrapped: Any = FSDP(
        model,
        sharding_strategy=ShardingStrategy[case.preset],
        auto_wrap_policy=CustomPolicy(lambda m: m in units) if units else None,
        mixed_precision=None
        if case.dtype == "fp32"
        else MixedPrecision(mixed, mixed, mixed, _module_classes_to_ignore=()),
        use_orig_params=case.accumulation == 1,
    )
    optimizer = _new_optimizer(case, wrapped.parameters())
    run = Run({}, [])
    for step in range(case.steps):
        for micro in range(case.accumulation):
            inputs, targets = batch_for(model, step, micro, dist.get_rank())
            quiet = case.door == "no_sync" and micro + 1 < case.accumulation
            with wrapped.no_sync() if quiet else contextlib.nullcontext():
                (model.loss(wrapped(inputs), targets) / case.accumulation).backward()
            if quiet:
                assert all(p.grad is None for p in wrapped.parameters() if p.requires_grad)
        if case.clipping:
            NORMS.append(wrapped.clip_grad_norm_(case.clipping))
        run.gradients.append(whole((n, p.grad) for n, p in wrapped.named_parameters() if p.grad is not None))
        optimizer.step()
        optimizer.zero_grad()
    names = dict(wrapped.named_parameters())
    run.weights = {name: value for name, value in wrapped.state_dict().items() if name in names}
    return run


def whole(items: Iterable[tuple[str, Any]]) -> dict[str, Tensor]:
    return {name: value.full_tensor().detach().clone() for name, value in items}


TRAINERS["fsdp"] = TRAINERS["no_sync"] = train_fsdp


def run_cases(strategy: str, models: list[str], dtypes: tuple[str, ...] = ("fp32",)) -> list[str]:
    os.environ["LOCAL_WORLD_SIZE"] = str(max(dist.get_world_size() // 2, 1))
    failures = []
    for name in models:
        for dtype in dtypes:
            for door, accumulation, clipping in (("fsdp", 1, 0.1), ("no_sync", 3, 0.1), ("fsdp", 3, 0.0)):
                case = ParityCase(name, strategy, door, accumulation, clipping, dtype)
                try:
                    assert_parity(case)
                except AssertionError as error:
                    failures.append(str(error))
    del os.environ["LOCAL_WORLD_SIZE"]
    return failures


# A scalar parameter is refused, as by torch's FSDP.
WRAPPABLE = [name for name in MODELS if name != "tiny_shapes"]


HARD = ["transformer", "tied", "partly_frozen", "with_buffers"]


@pytest.mark.parametrize("strategy", FLAT)
def test_two_ranks(ranks, strategy):
    models = WRAPPABLE if strategy == "FULL_SHARD" else HARD
    assert ranks(run_cases, strategy, models, timeout=120)[0] == []


@pytest.mark.parametrize("strategy", FLAT)
def test_sixteen_bits(ranks, strategy):
    assert ranks(run_cases, strategy, ["tied_transformer", "mlp"], ("bf16",), timeout=120)[0] == []


@pytest.mark.parametrize("strategy", HYBRID)
def test_hybrid_on_four_ranks(ranks, strategy):
    assert ranks(run_cases, strategy, ["tied_transformer"], world_size=4, timeout=120)[0] == []


def clip_norms(strategy: str) -> tuple[float, float]:
    """The norm before clipping and the norm of what clipping left, bound 0.1."""
    os.environ["LOCAL_WORLD_SIZE"] = str(max(dist.get_world_size() // 2, 1))
    NORMS.clear()
    torch.manual_seed(0)
    run = train_fsdp(
        MODELS["transformer"](), ParityCase("transformer", strategy, "fsdp", clipping=0.1, steps=1)
    )
    assert type(NORMS[0]) is Tensor
    return float(NORMS[0]), float(torch.stack([g.norm() for g in run.gradients[0].values()]).norm())


def test_norms_count_every_element_once(ranks):
    """Whatever the strategy, also where replicas hold the same gradients."""
    found = [ranks(clip_norms, strategy, world_size=4) for strategy in (*FLAT, *HYBRID)]
    for norm, left in (pair for results in found for pair in results):
        assert norm == pytest.approx(found[0][0][0], rel=1e-5)
        assert norm > 0.2
        assert left == pytest.approx(0.1, rel=1e-4)
