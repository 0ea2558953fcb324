"""Train a GPT on real text through either door of unishard, then compare the sharding presets.

torchrun --standalone --nproc_per_node 2 examples/train_gpt.py --config examples/ds_config_zero3.json
"""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from tokenizers import Tokenizer

from compare import compare_presets
from doors import Trainer, code_door, config_door
from gpt import GPT, Shape, generate
from text import Batches, standard_library, train_tokenizer
from unishard.dist.agree import agree
from unishard.dist.collectives import communicator
from unishard.dist.mesh import ensure_process_group
from unishard.dist.traffic import record_traffic
from unishard.observe.monitors import JsonlMonitor, Monitor, TensorBoardMonitor
from unishard.observe.record import StepRecord


@dataclass(frozen=True)
class Options:
    config: Path
    door: str
    preset: str | None
    steps: int
    batch_size: int
    out: Path
    seed: int
    table: bool
    shape: Shape
    characters: int


def parse() -> Options:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", type=Path, default=Path(__file__).with_name("ds_config_zero3.json"))
    parser.add_argument("--door", choices=("config", "code"), default="config")
    parser.add_argument(
        "--preset", help="a sharding preset, instead of the config's: ZERO1, ZERO2, ZERO3, ..."
    )
    parser.add_argument("--steps", type=int, default=100, help="and the length of the schedule")
    parser.add_argument("--batch-size", type=int, help="sequences a rank and step, instead of the config's")
    parser.add_argument("--out", type=Path, default=Path("runs/train_gpt"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-table", action="store_true", help="skip the comparison of presets at the end")
    parser.add_argument("--quick", action="store_true", help="a tiny model, to see that everything runs")
    args = parser.parse_args()
    shape, characters = Shape(), 3_000_000
    configured = json.loads(args.config.read_text()).get("train_micro_batch_size_per_gpu", 4)
    if args.quick:
        shape, characters = Shape(vocabulary=512, context=32, width=32, heads=2, depth=2), 100_000
    return Options(
        config=args.config,
        door=args.door,
        preset=args.preset,
        steps=args.steps,
        batch_size=args.batch_size or configured,
        out=args.out,
        seed=args.seed,
        table=not args.no_table,
        shape=shape,
        characters=characters,
    )


class Interrupted(Exception):
    """Raised on every rank at the same step."""


class Interrupt:
    """Ctrl-C or SIGTERM on any rank, agreed by all at the next step: nobody is left inside a collective."""

    def __init__(self) -> None:
        self._asked = False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._ask)

    def _ask(self, number: int, frame: Any) -> None:
        self._asked = True

    def check(self) -> None:
        """Raise `Interrupted` on all ranks if any was asked to stop. All ranks call together."""
        flag = torch.tensor([int(self._asked)])
        if communicator(dist.group.WORLD).all_reduce_control(flag, "max").item():
            raise Interrupted


def prepare_text(options: Options, rank: int) -> tuple[Tokenizer, torch.Tensor]:
    """Train the tokenizer once, on the first rank; all ranks load it. Fails on all ranks or on none."""
    world = communicator(dist.group.WORLD)
    file = options.out / f"tokenizer-{options.shape.vocabulary}-{options.characters}.json"
    with agree(world, "train the tokenizer"):
        text = standard_library(options.characters)
        if rank == 0 and not file.exists():
            options.out.mkdir(parents=True, exist_ok=True)
            unfinished = file.with_suffix(".part")
            train_tokenizer(text, options.shape.vocabulary).save(str(unfinished))
            unfinished.replace(file)
    with agree(world, "load the tokenizer"):
        tokenizer = Tokenizer.from_file(str(file))
        return tokenizer, torch.tensor(tokenizer.encode(text).ids)


def build(options: Options, config: dict[str, Any]) -> Trainer:
    torch.manual_seed(options.seed)
    model = GPT(options.shape)
    make: Callable[..., Trainer] = config_door if options.door == "config" else code_door
    return make(model, config)


def load_config(options: Options) -> dict[str, Any]:
    config = json.loads(options.config.read_text())
    config["train_micro_batch_size_per_gpu"] = options.batch_size
    if options.preset:
        config.pop("zero_optimization", None)
        config["sharding"] = options.preset
    if "scheduler" in config:
        config["scheduler"]["params"]["total_num_steps"] = max(options.steps, 2)
        warmup = config["scheduler"]["params"].get("warmup_num_steps", 0)
        config["scheduler"]["params"]["warmup_num_steps"] = max(min(warmup, options.steps // 4), 1)
    return config


@contextmanager
def progress_bar(visible: bool, steps: int) -> Iterator[Callable[[int, str], None]]:
    columns = (
        TextColumn("train"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total}  {task.description}"),
    )
    with Progress(*columns, TimeRemainingColumn(), disable=not visible) as bar:
        task = bar.add_task("", total=steps)
        yield lambda step, text: bar.update(task, completed=step, description=text)


@torch.no_grad()
def evaluate(trainer: Trainer, held_out: Batches, batches: int = 4) -> float:
    """Mean loss over held-out text and all ranks."""
    trainer.model.eval()
    total = torch.stack([trainer.model(*held_out.at(i)) for i in range(batches)]).mean()
    trainer.model.train()
    dist.all_reduce(total)
    return total.item() / dist.get_world_size()


def train(
    options: Options,
    trainer: Trainer,
    data: Batches,
    held_out: Batches,
    monitors: list[Monitor],
    interrupt: Interrupt,
) -> None:
    """Run the steps, each recorded by `monitors`. Raises `Interrupted` between two of them."""
    rank, world = dist.get_rank(), dist.get_world_size()
    start = time.perf_counter()
    tokens = options.batch_size * options.shape.context * world
    note, every = "", max(options.steps // 4, 1)
    with progress_bar(rank == 0, options.steps) as show:
        for step in range(1, options.steps + 1):
            interrupt.check()
            rate = trainer.learning_rate()
            with record_traffic() as traffic:
                loss = trainer.step(*data.at(step))
            speed = tokens * step / (time.perf_counter() - start)
            if step % every == 0:
                note = f"  held-out {evaluate(trainer, held_out):.3f}"
            show(step, f"loss {loss:.3f}  {speed:,.0f} tokens/s  lr {rate:.1e}{note}")
            record = StepRecord(
                step=step,
                loss=loss,
                learning_rate=rate,
                grad_norm=trainer.grad_norm(),
                tokens_per_second=speed,
                skipped_steps=trainer.skipped_steps(),
                loss_scale=trainer.loss_scale(),
                bytes_sent=traffic.data_bytes,
            )
            for monitor in monitors:
                monitor.write(record)


def run(options: Options, console: Console, interrupt: Interrupt) -> None:
    rank, world = dist.get_rank(), dist.get_world_size()
    tokenizer, tokens = prepare_text(options, rank)
    split = int(0.95 * len(tokens))
    context = options.shape.context
    data = Batches(tokens[:split], context, options.batch_size, rank, world, options.seed)
    held_out = Batches(tokens[split:], context, options.batch_size, rank, world, seed=1)
    config = load_config(options)
    trainer = build(options, config)
    console.print(
        f"{trainer.description}: {trainer.parameters / 1e6:.1f} M parameters, {len(tokens):,} tokens of text"
    )
    monitors: list[Monitor] = []
    if rank == 0:
        folder = options.out / time.strftime("%Y-%m-%d-%H%M%S")
        monitors = [JsonlMonitor(folder / "steps.jsonl"), TensorBoardMonitor(folder)]
    try:
        train(options, trainer, data, held_out, monitors, interrupt)
    finally:
        for monitor in monitors:
            monitor.close()
    loss = evaluate(trainer, held_out)
    console.print(f"held-out loss {loss:.3f}, perplexity {math.exp(loss):.1f}; records are in {options.out}")
    prompt = torch.tensor([tokenizer.encode("def ").ids])
    trainer.model.eval()
    sample = generate(trainer.model, prompt, 60, context)
    console.print("sample:", style="bold")
    console.print(tokenizer.decode(sample[0].tolist()), markup=False, highlight=False)
    if options.table:
        small = replace(options, batch_size=1)
        compare_presets(small.shape, load_config(small), data, console, interrupt.check)


def main() -> int:
    options, interrupt = parse(), Interrupt()
    ensure_process_group()
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // local))
    console = Console(quiet=dist.get_rank() != 0)
    status = 0
    try:
        run(options, console, interrupt)
    except Interrupted:
        ranks = dist.get_world_size()
        console.print(
            f"interrupted: all {ranks} ranks stopped at the same step; records are in {options.out}"
        )
        status = 130
    dist.barrier()  # the launcher stops the others as soon as one rank leaves with an error
    return status


if __name__ == "__main__":
    sys.exit(main())
