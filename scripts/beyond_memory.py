"""Train a model whose states do not fit: under a memory limit of a part of them, with everything on the nvme tier.

Runs the same training three times, each in a process of its own: unlimited and in memory; limited and offloaded, which
has to give the same losses; limited and in memory, which the system kills. The limit is a cgroup's (v1), so this needs
root. `python scripts/beyond_memory.py [--nvme FOLDER] [--share 0.25]`
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

GROUP = Path("/sys/fs/cgroup/memory/unishard_beyond_memory")
STATE_BYTES = 16  # fp32 parameter, gradient and two moments


def train(options: argparse.Namespace) -> dict[str, Any]:
    """Train in this process; returns losses, elements and the memory held before and at most."""
    import torch
    import torch.distributed as dist

    import unishard
    from unishard.testing.models import TinyTransformer

    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    torch.set_num_threads(2)
    baseline = _warm_up()
    tier = {"device": "nvme", "nvme_path": options.nvme}
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "sharding": "ZERO3",
        # A norm needs all gradients first: they rest on the tier until the update.
        **({"gradient_clipping": options.clip} if options.clip else {"optimizer_in_backward": True}),
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
        "zero_optimization": {"offload_optimizer": tier, "offload_param": tier} if options.offload else {},
    }
    torch.manual_seed(0)
    with torch.device("meta"):
        model = TinyTransformer(vocabulary=64, width=options.width, depth=options.depth, heads=8, length=16)
    elements = sum(p.numel() for p in model.parameters())
    engine = unishard.initialize(model=model, config=config).engine
    losses = []
    for step in range(options.steps):
        draw = torch.Generator().manual_seed(step)
        tokens = torch.randint(64, (1, 16), generator=draw)
        loss = torch.nn.functional.cross_entropy(engine(tokens).flatten(0, 1), tokens.flatten())
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return {"losses": losses, "elements": elements, "baseline": baseline, "peak": _held("VmHWM")}


def _warm_up() -> int:
    """Load what training loads, with a model of no size; returns the bytes held then."""
    import torch

    import unishard

    small = torch.nn.Linear(2, 2)
    config = {"train_micro_batch_size_per_gpu": 1, "optimizer": {"type": "AdamW", "params": {}}}
    engine = unishard.initialize(model=small, config=config).engine
    engine.backward(engine(torch.ones(1, 2)).sum())
    engine.step()
    return _held("VmRSS")


def _held(kind: str) -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{kind}:")[1].split()[0]) * 1024


def run(options: argparse.Namespace, *, offload: bool, limit: int | None) -> dict[str, Any] | int:
    """Train in a process of its own, in the cgroup if limited; returns what it found, or its exit code."""
    command = [sys.executable, __file__, "--child", "--nvme", options.nvme]
    command += [f"--{name}={getattr(options, name)}" for name in ("width", "depth", "steps", "clip")]
    command += ["--offload"] if offload else []

    def enter() -> None:
        if limit is not None:
            (GROUP / "tasks").write_text(str(os.getpid()))

    if limit is not None:
        GROUP.mkdir(exist_ok=True)
        (GROUP / "memory.limit_in_bytes").write_text(str(limit))
    done = subprocess.run(command, preexec_fn=enter, capture_output=True, text=True, check=False)
    if done.returncode > 0:
        raise RuntimeError(done.stderr)
    return json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else done.returncode


def compare(options: argparse.Namespace) -> dict[str, Any]:
    """All three runs; raises `RuntimeError` unless they end as they should."""
    free = run(options, offload=False, limit=None)
    assert isinstance(free, dict)
    states = STATE_BYTES * free["elements"]
    limit = int(free["baseline"] + options.share * states)
    try:
        offloaded = run(options, offload=True, limit=limit)
        in_memory = run(options, offload=False, limit=limit)
    finally:
        GROUP.rmdir()
    if not isinstance(offloaded, dict) or offloaded["losses"] != free["losses"]:
        raise RuntimeError(f"offloaded under {limit / 1e6:.0f} MB: {offloaded}; in memory: {free}")
    if isinstance(in_memory, dict):
        raise RuntimeError(f"the limit of {limit / 1e6:.0f} MB limits nothing: {in_memory}")
    return {
        "parameters": free["elements"],
        "states_mb": states / 1e6,
        "baseline_mb": free["baseline"] / 1e6,
        "limit_mb": limit / 1e6,
        "peak_in_memory_mb": free["peak"] / 1e6,
        "peak_offloaded_mb": offloaded["peak"] / 1e6,
        "losses": offloaded["losses"],
        "in_memory_ended_with": in_memory,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--nvme", default="")
    parser.add_argument("--share", type=float, default=0.25, help="of the states' bytes, above the baseline")
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--depth", type=int, default=24)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument(
        "--clip", type=float, default=0.0, help="clip; otherwise groups are updated in backward"
    )
    parser.add_argument("--offload", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(train(options)))
        return
    with tempfile.TemporaryDirectory(dir=options.nvme or None) as folder:
        options.nvme = folder
        print(json.dumps(compare(options), indent=2))


if __name__ == "__main__":
    main()
