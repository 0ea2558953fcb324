"""How much resident memory grows over a long run with optimizer state, gradients and parameters on the nvme tier.

Trains one process for `--steps` updates and compares the resident memory of the last quarter with that of the second
(the first fills allocators and recorded orders). `python scripts/memory_growth.py [--door code] [--nvme FOLDER]`
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import unishard
from unishard.testing.models import TinyTransformer

VOCABULARY, LENGTH = 64, 16


def resident() -> int:
    """Bytes of this process in memory."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0]) * 1024


def config_door(model: Any, folder: str) -> Callable[[torch.Tensor], float]:
    """A step of `unishard.initialize`."""
    tier = {"device": "nvme", "nvme_path": folder}
    engine = unishard.initialize(
        model=model,
        config={
            "train_micro_batch_size_per_gpu": 1,
            "sharding": "ZERO3",
            "gradient_clipping": 1.0,
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
            "zero_optimization": {"offload_optimizer": tier, "offload_param": tier},
        },
    ).engine

    def step(tokens: torch.Tensor) -> float:
        loss = torch.nn.functional.cross_entropy(engine(tokens).flatten(0, 1), tokens.flatten())
        engine.backward(loss)
        engine.step()
        return loss.item()

    return step


def code_door(model: Any, folder: str) -> Callable[[torch.Tensor], float]:
    """A step of `unishard.fully_shard` and a torch optimizer."""
    policy = unishard.NVMeOffloadPolicy(folder)
    for block in model.shard_units():
        unishard.fully_shard(block, offload_policy=policy)
    unishard.fully_shard(model, offload_policy=policy)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    def step(tokens: torch.Tensor) -> float:
        loss = torch.nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten())
        loss.backward()
        unishard.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def measure(options: argparse.Namespace, folder: str) -> dict[str, Any]:
    """Train, and return what was held."""
    torch.manual_seed(0)
    model = TinyTransformer(
        vocabulary=VOCABULARY, width=options.width, depth=options.depth, heads=4, length=LENGTH
    )
    elements = sum(p.numel() for p in model.parameters())
    step = (code_door if options.door == "code" else config_door)(model, folder)
    held, losses = [], []
    for index in range(options.steps):
        draw = torch.Generator().manual_seed(index % 8)
        losses.append(step(torch.randint(VOCABULARY, (1, LENGTH), generator=draw)))
        gc.collect()
        held.append(resident())
    quarter = options.steps // 4
    before, after = statistics.median(held[quarter : 2 * quarter]), statistics.median(held[-quarter:])
    return {
        "door": options.door,
        "parameters": elements,
        "steps": options.steps,
        "first_loss": losses[0],
        "last_loss": losses[-1],
        "states_mb": 16 * elements / 1e6,
        "held_mb": before / 1e6,
        "growth_mb": (after - before) / 1e6,
        "growth": after / before - 1,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--nvme", default=None)
    parser.add_argument("--door", choices=["config", "code"], default="config")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--depth", type=int, default=8)
    parser.add_argument(
        "--limit", type=float, default=0.01, help="fail if memory grows by more than this share"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    with tempfile.TemporaryDirectory(dir=options.nvme) as folder:
        found = measure(options, folder)
    print(json.dumps(found, indent=2))
    if found["growth"] > options.limit:
        raise SystemExit(f"resident memory grew by {found['growth']:.2%}, more than {options.limit:.2%}")


if __name__ == "__main__":
    main()
