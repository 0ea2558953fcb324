"""The batch triad: any two sizes give the third, and a misfit shows all numbers and where the world size is from."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unishard.config import check, resolve
from unishard.config.batch import TRIAD, Triad, implied_world_size, solve
from unishard.errors import ConfigError

SIZES = st.integers(1, 64)


@settings(max_examples=100, deadline=None)
@given(SIZES, SIZES, SIZES, st.integers(1, 1024), st.sets(st.integers(0, 2), max_size=1))
def test_two_sizes_give_the_third(
    micro: int, accumulation: int, world: int, factor: int, missing: set[int]
) -> None:
    world *= factor
    full = Triad(micro * accumulation * world, micro, accumulation)
    given_sizes = [
        None if place in missing else size for place, size in enumerate((full.train, micro, accumulation))
    ]
    assert solve(given_sizes[0], given_sizes[1], given_sizes[2], world, "a test") == full
    assert implied_world_size(full.train, micro, accumulation) == world


@pytest.mark.parametrize(
    ("sizes", "world", "expected"),
    [
        ({"train_batch_size": 32}, 4, (32, 8, 1)),
        ({"train_micro_batch_size_per_gpu": 3}, 4, (12, 3, 1)),
        ({"train_batch_size": 32, "gradient_accumulation_steps": 2}, 4, (32, 4, 2)),
        ({"train_batch_size": "auto", "train_micro_batch_size_per_gpu": 2}, 2, (4, 2, 1)),
        (dict.fromkeys(TRIAD, "auto") | {"train_batch_size": 8}, 2, (8, 4, 1)),
        ({"train_batch_size": 32.0, "train_micro_batch_size_per_gpu": 4}, 2, (32, 4, 4)),
    ],
)
def test_resolved_sizes(sizes: dict[str, Any], world: int, expected: tuple[int, int, int]) -> None:
    resolved = resolve(sizes, dp_world_size=world)
    assert tuple(getattr(resolved, key) for key in TRIAD) == expected
    for key in TRIAD:
        origin = "auto" if sizes.get(key) == "auto" else "dict" if key in sizes else "derived"
        assert resolved.origin(key) == origin


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        (
            {"train_batch_size": 16, "train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 1},
            "16 != 4 x 1 x 2 = 8; set train_batch_size to 8, or leave one of the three out",
        ),
        (
            {"train_batch_size": 15, "train_micro_batch_size_per_gpu": 4},
            "must be a multiple of 4 x 2 = 8; use 8 or 16",
        ),
        ({"train_batch_size": 15, "gradient_accumulation_steps": 3}, "multiple of 3 x 2 = 6; use 12 or 18"),
        ({"train_batch_size": 1}, "multiple of 1 x 2 = 2; use 2"),
        ({"gradient_accumulation_steps": 2}, "set train_batch_size or train_micro_batch_size_per_gpu"),
        ({}, "set train_batch_size or train_micro_batch_size_per_gpu"),
    ],
)
def test_a_misfit_shows_every_number(sizes: dict[str, int], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve(sizes, dp_world_size=2, world_size_source="torchrun")
    message = str(caught.value)
    assert words in message
    for key in TRIAD:
        assert f"{key}={sizes.get(key, 'unset')}" in message
    assert "data-parallel world size 2 (from torchrun)" in message


def test_without_a_world_size_the_sizes_imply_it() -> None:
    sizes: dict[str, Any] = {
        "train_batch_size": 32,
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": 2,
    }
    assert check(sizes) == []
    sizes["sharding"] = "ZERO3"
    assert check(sizes | {"mesh": {"dp_replicate": 2, "dp_shard": 2}}) == []
    (problem,) = check(sizes | {"mesh": {"dp_replicate": 3}})
    assert "world size 4 (from the batch sizes themselves)" in problem.message
    (problem,) = check(sizes | {"train_batch_size": 33})
    assert problem.rule == "batch-triad"


@pytest.mark.parametrize("world", [0, -1, True, 2.0])
def test_an_impossible_world_size_is_refused(world: Any) -> None:
    with pytest.raises(ConfigError, match=r"must be an integer of at least 1"):
        resolve({"train_batch_size": 8}, dp_world_size=world)
