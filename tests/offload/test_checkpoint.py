"""Checkpoints of state that rests on a tier: the same file, group by group, and any setting loads any other's."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import unishard
from unishard.testing.models import TinyTransformer
from unishard.testing.tiers import resting_late

Ranks = Callable[..., Any]


def start(offload: str, seed: int = 0, preset: str = "ZERO3", **more: Any) -> Any:
    config = {
        "train_micro_batch_size_per_gpu": 12 // dist.get_world_size(),
        "sharding": preset,
        "gradient_clipping": 0.5,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "eps": 1e-3}},
        **more,
    }
    torch.manual_seed(seed)
    with resting_late(offload) if offload else nullcontext():
        return unishard.initialize(model=TinyTransformer(), config=config).engine


def run(engine: Any, steps: range) -> list[float]:
    losses = []
    for step in steps:
        draw = torch.Generator().manual_seed(step)
        tokens = torch.randint(37, (12, 7), generator=draw).chunk(dist.get_world_size())[dist.get_rank()]
        loss = engine(tokens).float().pow(2).mean()
        engine.backward(loss)
        engine.step()
        total = loss.detach().clone()
        dist.all_reduce(total)
        losses.append(total.item() / dist.get_world_size())
    return losses


def writes(folder: str, offload: str, background: bool = False, **more: Any) -> list[float]:
    engine = start(offload, **more)
    run(engine, range(3))
    engine.save_checkpoint(folder, background=background)
    losses = run(engine, range(3, 6))
    engine.wait_for_checkpoints()
    return losses


def continues(folder: str, offload: str, before: int, **more: Any) -> list[float]:
    engine = start(offload, seed=5, **more)
    run(engine, range(before))
    engine.load_checkpoint(folder)
    losses = run(engine, range(3, 6))
    assert all(g.resting is None or g.resting.idle for g in engine.schedule.groups)
    return losses


WAYS = [
    ("optimizer+parameter", "", {}),
    ("", "optimizer+parameter", {}),
    ("optimizer", "parameter", {}),
    ("optimizer+parameter", "optimizer+parameter", {"bf16": {"enabled": True}}),
    ("optimizer", "optimizer", {"preset": "ZERO1", "bf16": {"enabled": True}}),
    ("optimizer", "", {"optimizer": {"type": "torch.optim.NAdam", "params": {"lr": 1e-2, "eps": 1e-3}}}),
]


@pytest.mark.parametrize(("writer", "reader", "more"), WAYS)
def test_any_setting_continues_any_other(
    writer: str, reader: str, more: dict[str, Any], tmp_path: Path, ranks: Ranks
) -> None:
    bound = 2e-2 if "bf16" in more else 2e-5
    expected = ranks(writes, str(tmp_path), writer, world_size=2, **more)[0]
    for before, world_size in ((0, 2), (2, 2), (1, 3)):
        found = ranks(continues, str(tmp_path), reader, before, world_size=world_size, **more)[0]
        if world_size == 2:
            assert found == expected
        assert found == pytest.approx(expected, rel=bound)


def test_a_background_save_is_done_at_once(tmp_path: Path, ranks: Ranks) -> None:
    expected = ranks(writes, str(tmp_path), "optimizer", True, world_size=2)[0]
    assert ranks(continues, str(tmp_path), "optimizer", 0, world_size=2)[0] == expected
