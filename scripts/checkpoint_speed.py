"""Save and load 124 M parameters with AdamW state, beside the peers: seconds, stall of background saves, bytes, memory.

    torchrun --standalone --nproc_per_node 2 scripts/checkpoint_speed.py [--rounds 5] [--size 124m] [--folder DIR]

Contestants take turns. Everybody's files are on the disk before the clock stops: what a contestant does not sync itself
is synced for it. Files are dropped from the page cache before a load.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table

from unishard.bench import memory
from unishard.bench.model import build_model
from unishard.bench.plan import ADAMW, Plan


class Contestant(ABC):
    """A trained model with optimizer state, and its ways to save and load."""

    name: str

    @abstractmethod
    def save(self, folder: Path) -> None: ...

    @abstractmethod
    def load(self, folder: Path) -> None: ...

    def save_in_background(self, folder: Path) -> Callable[[], Any] | None:
        """Return as soon as training may go on; what is returned waits for the rest. `None`: not available."""
        return None


class Unishard(Contestant):
    name = "unishard ZERO3"

    def __init__(self, plan: Plan) -> None:
        import unishard

        config = {
            "train_micro_batch_size_per_gpu": plan.shape.micro_batch,
            "zero_optimization": {"stage": 3},
            "optimizer": {"type": "AdamW", "params": ADAMW},
        }
        self.engine = unishard.initialize(model=build_model(plan), config=config).engine
        loss = self.engine(*batch(plan))
        self.engine.backward(loss)
        self.engine.step()

    def save(self, folder: Path) -> None:
        self.engine.save_checkpoint(folder, "one")

    def load(self, folder: Path) -> None:
        self.engine.load_checkpoint(folder, "one")

    def save_in_background(self, folder: Path) -> Callable[[], Any]:
        self.engine.save_checkpoint(folder, "one", background=True)
        return self.engine.wait_for_checkpoints


class Fsdp2(Contestant):
    name = "FSDP2 with DCP"

    def __init__(self, plan: Plan) -> None:
        from torch.distributed.fsdp import fully_shard

        self.model = build_model(plan)
        for block in self.model.blocks:
            fully_shard(block)
        fully_shard(self.model)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), fused=True, **ADAMW)
        self.model(*batch(plan)).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def _state(self) -> dict[str, Any]:
        from torch.distributed.checkpoint.state_dict import get_state_dict

        model, optimizer = get_state_dict(self.model, self.optimizer)
        return {"model": model, "optim": optimizer}

    def save(self, folder: Path) -> None:
        import torch.distributed.checkpoint as dcp

        dcp.save(self._state(), checkpoint_id=folder)

    def load(self, folder: Path) -> None:
        import torch.distributed.checkpoint as dcp
        from torch.distributed.checkpoint.state_dict import set_state_dict

        state = self._state()
        dcp.load(state, checkpoint_id=folder)
        set_state_dict(
            self.model, self.optimizer, model_state_dict=state["model"], optim_state_dict=state["optim"]
        )

    def save_in_background(self, folder: Path) -> Callable[[], Any]:
        import torch.distributed.checkpoint as dcp

        pending: Any = dcp.async_save(self._state(), checkpoint_id=folder)
        return pending.result


class TorchSave(Contestant):
    """Each rank's tensors in one file of its own: nothing to reshard, nothing to agree on."""

    name = "torch.save a rank"

    def __init__(self, plan: Plan) -> None:
        numel = sum(p.numel() for p in build_model(plan).parameters()) // dist.get_world_size()
        self.state = {name: torch.randn(numel) for name in ("param", "exp_avg", "exp_avg_sq")}

    def save(self, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        torch.save(self.state, folder / f"{dist.get_rank()}.pt")

    def load(self, folder: Path) -> None:
        found = torch.load(folder / f"{dist.get_rank()}.pt", weights_only=True)
        for name, value in found.items():
            self.state[name].copy_(value)


class DeepSpeed(Contestant):
    name = "DeepSpeed ZeRO-3"

    def __init__(self, plan: Plan) -> None:
        os.environ["DS_ACCELERATOR"] = "cpu"
        import deepspeed

        config = {
            "train_micro_batch_size_per_gpu": plan.shape.micro_batch,
            "zero_optimization": {"stage": 3},
            "optimizer": {"type": "AdamW", "params": {**ADAMW, "torch_adam": True}},
        }
        self.engine, *_ = deepspeed.initialize(model=build_model(plan), config=config)
        loss = self.engine(*batch(plan))
        self.engine.backward(loss)
        self.engine.step()

    def save(self, folder: Path) -> None:
        self.engine.save_checkpoint(str(folder), "one")

    def load(self, folder: Path) -> None:
        self.engine.load_checkpoint(str(folder), "one")


def batch(plan: Plan) -> tuple[torch.Tensor, torch.Tensor]:
    shape = plan.shape
    tokens = torch.randint(shape.vocabulary, (1, 16))
    return tokens, tokens


def timed(action: Callable[[], Any], folder: Path) -> float:
    """Seconds until every rank is done and everything in `folder` is on the disk."""
    dist.barrier()
    start = time.perf_counter()
    action()
    sync(folder)
    dist.barrier()
    return time.perf_counter() - start


def sync(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            try:
                descriptor = os.open(path, os.O_RDONLY)
            except FileNotFoundError:
                continue
            os.fsync(descriptor)
            os.close(descriptor)


def drop_from_cache(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)
    dist.barrier()
    if dist.get_rank() == 0 and os.access("/proc/sys/vm/drop_caches", os.W_OK):
        Path("/proc/sys/vm/drop_caches").write_text("1")  # the advice above leaves some pages behind
    dist.barrier()


def one_round(contestant: Contestant, base: Path, found: dict[str, list[float]]) -> None:
    folder = base / contestant.name.replace(" ", "-")
    found.setdefault("save", []).append(timed(lambda: contestant.save(folder), folder))
    found.setdefault("bytes", []).append(sum(p.stat().st_size for p in folder.rglob("*") if p.is_file()))
    drop_from_cache(folder)
    memory.reset_peak()
    before = memory.resident()
    found.setdefault("load", []).append(timed(lambda: contestant.load(folder), base / "nothing"))
    found.setdefault("load peak", []).append(memory.peak_resident() - before)
    clear(folder)
    waits: list[Any] = []
    stall = time.perf_counter()
    waits.append(contestant.save_in_background(folder))
    stall = time.perf_counter() - stall
    if waits[0] is not None:
        found.setdefault("stall", []).append(stall)
        waits[0]()
        clear(folder)


def clear(folder: Path) -> None:
    dist.barrier()
    if dist.get_rank() == 0:
        shutil.rmtree(folder, ignore_errors=True)
    dist.barrier()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--size", default="124m")
    parser.add_argument(
        "--folder", type=Path, default=Path(tempfile.gettempdir()) / "unishard-checkpoint-speed"
    )
    parser.add_argument("--without", nargs="*", default=[])
    options = parser.parse_args()
    dist.init_process_group("cpu:gloo")
    torch.set_num_threads(1)
    if dist.get_rank() == 0:
        options.folder.mkdir(parents=True, exist_ok=True)
    dist.barrier()
    plan = Plan(size=options.size)
    kinds = [k for k in (Unishard, Fsdp2, TorchSave, DeepSpeed) if k.name not in options.without]
    contestants = [kind(plan) for kind in kinds]
    results: dict[str, dict[str, list[float]]] = {c.name: {} for c in contestants}
    for _ in range(options.rounds):
        for contestant in contestants:
            one_round(contestant, options.folder, results[contestant.name])
    if dist.get_rank() == 0:
        report(results, 12 * sum(p.numel() for p in build_model(plan).parameters()))
    dist.barrier()
    shutil.rmtree(options.folder, ignore_errors=True)
    dist.destroy_process_group()


def report(results: dict[str, dict[str, list[float]]], state: int) -> None:
    table = Table("", "save s", "unishard against it", "load s", "unishard against it", "stall s", "size / state",
                  "load peak MB")  # fmt: skip
    ours = results[Unishard.name]

    def spread(values: list[float]) -> str:
        return f"{statistics.median(values):.2f} [{min(values):.2f}, {max(values):.2f}]" if values else "-"

    for name, found in results.items():
        ratios = {k: [t / u for t, u in zip(found[k], ours[k], strict=True)] for k in ("save", "load")}
        table.add_row(
            name, spread(found["save"]), spread(ratios["save"]), spread(found["load"]), spread(ratios["load"]),
            spread(found.get("stall", [])), f"{statistics.median(found['bytes']) / state:.4f}",
            f"{statistics.median(found['load peak']) / 1e6:.0f}",
        )  # fmt: skip
    Console(width=150).print(table)


if __name__ == "__main__":
    main()
