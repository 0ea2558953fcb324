"""Does the swapped AdamW step hide its reads and writes? Seconds of the update, of the transfers, and of both together.

    python scripts/swapped_step.py [--rounds 7] [--millions 30] [--groups 12] [--folder DIR]

fp32 master weights and both moments rest on the nvme tier, gradients in memory. A step in which everything overlaps
takes as long as the larger of the two alone, and one group's read and write.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from unishard.kernels import AdamRule, Target, update
from unishard.offload import NvmeTier, Swapped, SwappedStep, aligned_empty

STATES = ("master", "exp_avg", "exp_avg_sq")
RULE = AdamRule(lr=1e-3, weight_decay=0.1)


def seconds(action: Callable[[], object]) -> float:
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--millions", type=float, default=30.0)
    parser.add_argument("--groups", type=int, default=12)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    options = parser.parse_args()
    torch.set_num_threads(1)
    numel = int(options.millions * 1e6) // options.groups
    with NvmeTier(options.folder, rank=0) as tier:
        groups = []
        for index in range(options.groups):
            for state in STATES:
                tier.put(f"{state}{index}", torch.full((numel,), 0.1))
            groups.append([Swapped(tier, f"{state}{index}") for state in STATES])
        grads = [torch.randn(numel) for _ in range(options.groups)]
        resting = [[aligned_empty(numel, torch.float32).fill_(0.1) for _ in STATES] for _ in groups]

        def adam(index: int, tensors: list[torch.Tensor]) -> None:
            update([Target(tensors[0], grads[index], (tensors[1], tensors[2]))], RULE, step=10)

        steps = {count: SwappedStep(groups, buffer_count=count) for count in (1, 2, 3)}
        contestants: dict[str, Callable[[], object]] = {
            "update alone": lambda: [adam(index, resting[index]) for index in range(options.groups)],
            "transfers alone": lambda: steps[3].run(lambda index, tensors: None),
            **{
                f"both, buffer_count={count}": lambda step=step: step.run(adam)
                for count, step in steps.items()
            },
        }
        found: dict[str, list[float]] = {name: [] for name in contestants}
        for number in range(options.rounds + 1):
            for name, action in contestants.items():
                taken = seconds(action)
                if number:  # the first is for memory and files that are new
                    found[name].append(taken)
    report(found, options.groups * numel * 12)


def report(found: dict[str, list[float]], nbytes: int) -> None:
    table = Table(f"{nbytes / 1e6:.0f} MB read and written", "seconds", "over the larger alone")
    for name, times in found.items():
        ratios = [
            own / max(update, transfers)
            for own, update, transfers in zip(
                times, found["update alone"], found["transfers alone"], strict=True
            )
        ]
        table.add_row(name, spread(times), spread(ratios))
    Console(width=110).print(table)


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):.3f} [{min(values):.3f}, {max(values):.3f}]"


if __name__ == "__main__":
    main()
