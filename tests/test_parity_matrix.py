"""The permanent matrix: preset x accumulation x clipping x dtype x model x ranks, both doors, against one process."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import pytest

from unishard.sharding.placement import PRESETS
from unishard.testing.models import MODELS
from unishard.testing.parity import ParityCase, assert_all_parity
from unishard.testing.transport import through_sockets

FLAT = [name for name, preset in PRESETS.items() if not preset.needs_replicas]
HARD = ("transformer", "tied", "partly_frozen", "tiny_shapes", "unused_branch")
HYBRID = [name for name, preset in PRESETS.items() if preset.needs_replicas]


def cases(preset: str, door: str, thorough: bool) -> Iterator[ParityCase]:
    dtypes = ("fp32", "bf16", "fp16") if door == "config" else ("fp32", "bf16")
    # A scalar parameter cannot be a `Shard(0)` DTensor; fully_shard refuses it, as torch's does.
    models = [name for name in (MODELS if thorough else HARD) if door == "config" or name != "tiny_shapes"]
    for model, (accumulation, clipping), dtype in product(
        models, ((1, 0.0), (3, 0.1), (1, 0.1), (3, 0.0)), dtypes
    ):
        if (accumulation == 1) == (clipping > 0) and not (thorough and dtype == "fp32"):
            continue
        if not thorough and (accumulation == 1 or dtype == "fp16"):
            continue
        if door == "code" and (model, dtype) == ("with_buffers", "bf16"):
            continue  # FSDP2's policy leaves buffers alone, and this model multiplies by them
        optimizer = "SGD" if accumulation == 3 and not clipping else "AdamW"
        yield ParityCase(model, preset, door, accumulation, clipping, dtype, optimizer)


def run_cases(preset: str, door: str, thorough: bool) -> None:
    assert_all_parity(cases(preset, door, thorough))


@pytest.mark.parametrize("door", ["config", "code"])
@pytest.mark.parametrize("preset", FLAT)
def test_two_ranks(preset: str, door: str, ranks: Callable[..., Any]) -> None:
    ranks(run_cases, preset, door, True, world_size=2, timeout=240)


@pytest.mark.parametrize("world_size", [1, 3, 4])
@pytest.mark.parametrize("preset", FLAT)
def test_other_numbers_of_ranks(preset: str, world_size: int, ranks: Callable[..., Any]) -> None:
    for door in ("config", "code"):
        ranks(run_cases, preset, door, False, world_size=world_size, timeout=240)


def run_through_sockets(preset: str, door: str) -> None:
    with through_sockets():
        run_cases(preset, door, False)


@pytest.mark.parametrize("preset", ["NO_SHARD", "ZERO1", "ZERO2", "ZERO3"])
def test_the_transport_between_hosts(preset: str, ranks: Callable[..., Any]) -> None:
    """Ranks on one host read each other's memory; on several they exchange messages."""
    for door in ("config", "code"):
        ranks(run_through_sockets, preset, door, world_size=3, timeout=240)


def test_hybrid_meshes_between_hosts(ranks: Callable[..., Any]) -> None:
    ranks(run_through_sockets, "HYBRID_ZERO2", "config", world_size=4, timeout=240)


@pytest.mark.parametrize("preset", HYBRID)
def test_hybrid_meshes(preset: str, ranks: Callable[..., Any]) -> None:
    for door in ("config", "code"):
        ranks(run_cases, preset, door, False, world_size=4, timeout=240)
