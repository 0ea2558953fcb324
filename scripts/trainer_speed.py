"""Hugging Face's Trainer on unishard beside the same Trainer on the real DeepSpeed: seconds of a step, in turns.

Both train the same GPT-2 shape from the same weights and rows on CPU ranks, each run in processes of its own, so that a
pair of runs sees the same machine. Needs the extras `hf` and `bench`.

    python scripts/trainer_speed.py [--stages 2 3] [--rounds 3] [--ranks 2] [--steps 20]

It prints, for each stage, every pair and the median of the ratios (DeepSpeed's step over unishard's: above 1, unishard
is faster) with the least and the greatest.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

VOCABULARY, LENGTH, BATCH = 4096, 128, 4
WARM_UP = 3
"""Steps before the clock starts: caches and the recorded order of gathers."""
SIDES = ("unishard", "deepspeed")


def ds_config(stage: int) -> dict[str, Any]:
    return {
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "zero_optimization": {"stage": stage, "reduce_bucket_size": "auto"},
        "zero_allow_untested_optimizer": True,
    }


def worker(stage: int, steps: int, out: Path) -> None:
    """One run on one rank; the first rank writes seconds a step and the last loss."""
    import deepspeed
    import torch
    import transformers

    deepspeed.init_distributed("gloo")

    class Rows(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
        rows = torch.randint(0, VOCABULARY, (512, LENGTH), generator=torch.Generator().manual_seed(0))

        def __len__(self) -> int:
            return len(self.rows)

        def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
            return {"input_ids": self.rows[index], "labels": self.rows[index]}

    class Clock(transformers.TrainerCallback):
        times: list[float] = []

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            self.times.append(time.perf_counter())

    args = transformers.TrainingArguments(
        output_dir=str(out / "work"), max_steps=WARM_UP + steps, per_device_train_batch_size=BATCH, use_cpu=True,
        learning_rate=1e-3, save_strategy="no", report_to=[], disable_tqdm=True, logging_steps=WARM_UP + steps, seed=0,
        dataloader_pin_memory=False, optim="adamw_torch", deepspeed=ds_config(stage),
    )  # fmt: skip
    transformers.set_seed(0)
    shape = transformers.GPT2Config(
        vocab_size=VOCABULARY, n_positions=LENGTH, n_embd=384, n_layer=6, n_head=6, resid_pdrop=0.0, embd_pdrop=0.0,
        attn_pdrop=0.0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model = transformers.GPT2LMHeadModel(shape)
    clock = Clock()
    trainer = transformers.Trainer(model=model, args=args, train_dataset=Rows(), callbacks=[clock])
    trainer.train()
    between = [b - a for a, b in zip(clock.times[WARM_UP - 1 :], clock.times[WARM_UP:], strict=False)]
    [loss] = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    if args.process_index == 0:
        seen = {"step": statistics.median(between), "loss": loss, "version": deepspeed.__version__}
        (out / "seen.json").write_text(json.dumps(seen))


def launch(side: str, stage: int, options: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        own = [str(Path(__file__)), "--worker", folder, "--stages", str(stage), "--steps", str(options.steps)]
        command = [sys.executable, "-m", "unishard.cli.main", "run", "-n", str(options.ranks)]
        command += ["--as-deepspeed"] if side == "unishard" else []
        environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
        done = subprocess.run([*command, *own], env=environment, capture_output=True, text=True, timeout=900)
        if done.returncode != 0:
            sys.exit(f"{side}, stage {stage}, failed:\n{done.stderr[-3000:]}")
        seen = json.loads((Path(folder) / "seen.json").read_text())
    if ("unishard" in seen["version"]) != (side == "unishard"):
        sys.exit(f"{side} was asked for, and deepspeed {seen['version']} ran")
    return seen


def compare(stage: int, options: argparse.Namespace) -> None:
    ratios = []
    for turn in range(options.rounds):
        # The other one begins in every second turn: a machine that slows down favours neither.
        sides = SIDES if turn % 2 == 0 else SIDES[::-1]
        seen = {side: launch(side, stage, options) for side in sides}
        ratios.append(seen["deepspeed"]["step"] / seen["unishard"]["step"])
        figures = ", ".join(f"{s} {seen[s]['step'] * 1e3:.0f} ms (loss {seen[s]['loss']:.5f})" for s in SIDES)
        print(f"stage {stage}, turn {turn + 1}: {figures}, ratio {ratios[-1]:.2f}", flush=True)
    spread = f"[{min(ratios):.2f}, {max(ratios):.2f}]"
    print(
        f"stage {stage}: DeepSpeed's step / unishard's, median {statistics.median(ratios):.2f} {spread}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--stages", nargs="+", type=int, choices=(1, 2, 3), default=[2, 3])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker is not None:
        worker(options.stages[0], options.steps, options.worker)
        return
    for stage in options.stages:
        compare(stage, options)


if __name__ == "__main__":
    main()
