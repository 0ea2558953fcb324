"""What the engine itself costs in a step, without waiting for anybody, at any number of ranks.

A fake process group stands for the others, and large collectives are replaced by nothing, since the fake group
copies for each rank. The model's compute is subtracted by timing the same model plain.
`python scripts/bookkeeping.py [--depth 24] [--ranks 8 64 512 1024]`
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.testing._internal.distributed.fake_pg import FakeStore

import unishard
from unishard.dist import collectives
from unishard.testing.models import TinyTransformer

REPEATS, STEPS = 15, 10


class Finished:
    """A collective that is over."""

    def wait(self) -> bool:
        return True


collectives._all_gather = collectives._reduce_scatter = lambda *_, **__: Finished()


def milliseconds(steps: list[Callable[[], Any]]) -> list[float]:
    """Medians of each, interleaved; processor time, so that other programs do not count."""
    found: list[list[float]] = [[] for _ in steps]
    for _ in range(REPEATS):
        for times, step in zip(found, steps, strict=True):
            start = time.process_time()
            for _ in range(STEPS):
                step()
            times.append((time.process_time() - start) / STEPS * 1e3)
    return [statistics.median(times) for times in found]


def plain(depth: int) -> Callable[[], Any]:
    model = TinyTransformer(width=32, depth=depth)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    tokens = torch.zeros(1, 4, dtype=torch.long)

    def step() -> None:
        model(tokens).sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def sharded(depth: int, preset: str) -> Callable[[], Any]:
    model: nn.Module = TinyTransformer(width=32, depth=depth)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "sharding": preset,
        "optimizer": {"type": "AdamW", "params": {}},
    }
    engine = unishard.initialize(model=model, config=config).engine
    tokens = torch.zeros(1, 4, dtype=torch.long)

    def step() -> None:
        engine.backward(engine(tokens).sum())
        engine.step()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--depth", type=int, default=24)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 8, 64, 512, 1024])
    options = parser.parse_args()
    torch.set_num_threads(1)
    presets = ("NO_SHARD", "ZERO1", "ZERO2", "ZERO3")
    table = Table("ranks", *presets, title=f"ms a step over plain PyTorch, {options.depth} blocks")
    for ranks in options.ranks:
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
        steps = [plain(options.depth), *(sharded(options.depth, preset) for preset in presets)]
        for step in steps:
            step()
            step()
        base, *found = milliseconds(steps)
        table.add_row(str(ranks), *(f"{time - base:.2f}" for time in found))
        dist.destroy_process_group()
    Console().print(table)


if __name__ == "__main__":
    main()
