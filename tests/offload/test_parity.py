"""State that rests on a tier trains as state in memory does, under every preset, accumulation, clipping and dtype."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from unishard.sharding.placement import PRESETS, Placement
from unishard.testing.parity import ParityCase, assert_all_parity

Ranks = Callable[..., Any]
FLAT = [name for name, preset in PRESETS.items() if not preset.needs_replicas]
HYBRID = [name for name, preset in PRESETS.items() if preset.needs_replicas]


def cases(preset: str) -> Iterator[ParityCase]:
    sharded = PRESETS[preset].parameter is Placement.SHARD
    replicated = ("optimizer", "optimizer+gradient")
    for offload in (
        (*replicated, "parameter", "gradient", "optimizer+parameter+gradient") if sharded else replicated
    ):
        for model, accumulation, clipping, dtype, optimizer in (
            ("transformer", 3, 0.1, "fp32", "AdamW"),
            ("tied", 1, 0.1, "bf16", "AdamW"),
            ("partly_frozen", 3, 0.0, "fp32", "SGD"),
            ("tiny_shapes", 1, 0.1, "fp16", "AdamW"),
            ("unused_branch", 1, 0.0, "fp32", "AdamW"),
            # No kernel knows it: it steps through torch, on tensors that are put in place for it.
            ("transformer", 1, 0.1, "bf16", "torch.optim.NAdam"),
        ):
            yield ParityCase(
                model, preset, "config", accumulation, clipping, dtype, optimizer, offload=offload
            )


def run_cases(preset: str) -> None:
    assert_all_parity(cases(preset))


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("preset", FLAT)
def test_flat_meshes(preset: str, world_size: int, ranks: Ranks) -> None:
    ranks(run_cases, preset, world_size=world_size, timeout=120)


@pytest.mark.parametrize("preset", HYBRID)
def test_hybrid_meshes(preset: str, ranks: Ranks) -> None:
    ranks(run_cases, preset, world_size=4, timeout=120)
