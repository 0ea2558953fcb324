"""A resumed run goes on with exactly the samples that the saved one had not trained on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import unishard

Ranks = Callable[..., Any]
SAMPLES, BATCH = 50, 12


def start(accumulation: int) -> tuple[Any, Any]:
    torch.manual_seed(0)
    config = {
        "train_micro_batch_size_per_gpu": BATCH // accumulation // dist.get_world_size(),
        "gradient_accumulation_steps": accumulation,
        "zero_optimization": {"stage": 2},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2}},
    }
    data = [torch.tensor([float(i)]) for i in range(SAMPLES)]
    engine, _, loader, _ = unishard.initialize(model=nn.Linear(1, 3), config=config, training_data=data)
    return engine, loader


def micro_steps(engine: Any, loader: Any, count: int) -> list[list[int]]:
    """Train; the samples of each micro-batch, over all ranks."""
    seen: list[list[int]] = []
    while True:
        for batch in loader:
            engine.backward(engine(batch / SAMPLES).square().mean())
            engine.step()
            everyone: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(everyone, batch.flatten().int().tolist())
            seen.append([sample for part in everyone for sample in part])
            if len(seen) == count:
                return seen


def by_step(micro: list[list[int]], accumulation: int) -> list[list[int]]:
    steps = [micro[i : i + accumulation] for i in range(0, len(micro), accumulation)]
    return [sorted(sample for part in step for sample in part) for step in steps]


Seen = tuple[list[list[int]], torch.Tensor]


def uninterrupted(accumulation: int, steps: int) -> Seen:
    engine, loader = start(accumulation)
    seen = micro_steps(engine, loader, steps * accumulation)
    return by_step(seen, accumulation), weights(engine)


def weights(engine: Any) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in engine.module.parameters()])


def saves(folder: str, accumulation: int, micro: int) -> None:
    engine, loader = start(accumulation)
    micro_steps(engine, loader, micro)
    engine.save_checkpoint(folder)


def goes_on(folder: str, accumulation: int, steps: int, busy: bool) -> Seen:
    engine, loader = start(accumulation)
    if busy:
        micro_steps(engine, loader, 1)  # leaves a gradient behind, and a loader at another position
    engine.load_checkpoint(folder)
    assert engine.micro_steps % accumulation == 0
    seen = micro_steps(engine, loader, steps * accumulation)
    return by_step(seen, accumulation), weights(engine)


@pytest.mark.parametrize("extra", [0, 1], ids=["at a boundary", "between micro-batches"])
@pytest.mark.parametrize("done", [2, 5], ids=["first epoch", "second epoch"])
def test_accumulated_and_on_other_ranks(done: int, extra: int, tmp_path: Any, ranks: Ranks) -> None:
    folder = str(tmp_path)
    expected, after = ranks(uninterrupted, 2, done + 2)[0]
    assert len({sample for step in expected[:4] for sample in step}) == 48, "no sample twice in an epoch"
    ranks(saves, folder, 2, 2 * done + extra)
    for world_size, busy in ((2, False), (2, True), (3, False), (1, False)):
        seen, found = ranks(goes_on, folder, 2, 2, busy, world_size=world_size)[0]
        assert seen == expected[done:], f"{world_size} ranks"
        if world_size == 2:
            assert torch.equal(found, after)
        torch.testing.assert_close(found, after, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("world_size", "accumulation"), [(4, 1), (2, 3), (1, 4)])
def test_another_accumulation(world_size: int, accumulation: int, tmp_path: Any, ranks: Ranks) -> None:
    """With the same global batch, the rest of the epoch is the same."""
    folder = str(tmp_path)
    expected, after = ranks(uninterrupted, 2, 4)[0]
    ranks(saves, folder, 2, 4)
    seen, found = ranks(goes_on, folder, accumulation, 2, False, world_size=world_size)[0]
    assert seen == expected[2:]
    torch.testing.assert_close(found, after, rtol=1e-4, atol=1e-6)
