"""A Trainer script as its users write it: it knows nothing of unishard. Run on every rank; prints what it saw."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import transformers
from torch.utils.data import Dataset

VOCABULARY, LENGTH = 61, 16


class Rows(Dataset[dict[str, torch.Tensor]]):
    def __init__(self, size: int) -> None:
        generator = torch.Generator().manual_seed(3)
        self.rows = torch.randint(0, VOCABULARY, (size, LENGTH), generator=generator)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.rows[index], "labels": self.rows[index]}


def config(stage: int, **more: Any) -> dict[str, Any]:
    return {
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "zero_optimization": {
            "stage": stage,
            "reduce_bucket_size": "auto",
            "stage3_prefetch_bucket_size": "auto",
            "stage3_param_persistence_threshold": "auto",
            "stage3_gather_16bit_weights_on_model_save": True,
        },
        "zero_allow_untested_optimizer": True,
        **more,
    }


def new_model() -> Any:
    torch.manual_seed(0)
    shape = transformers.GPT2Config(
        vocab_size=VOCABULARY, n_positions=LENGTH, n_embd=32, n_layer=2, n_head=2, resid_pdrop=0.0, embd_pdrop=0.0,
        attn_pdrop=0.0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(shape)


def trainer(folder: Path, ds_config: dict[str, Any], steps: int, **options: Any) -> transformers.Trainer:
    defaults: dict[str, Any] = dict(
        output_dir=str(folder), max_steps=steps, per_device_train_batch_size=2, gradient_accumulation_steps=2,
        learning_rate=1e-3, logging_steps=1, save_strategy="no", report_to=[], use_cpu=not torch.cuda.is_available(),
        deepspeed=ds_config, seed=1, max_grad_norm=0.5, lr_scheduler_type="linear", warmup_steps=1,
    )  # fmt: skip
    args = transformers.TrainingArguments(**(defaults | options))
    # With the arguments in place, ZeRO-3 builds the model sharded and reads the file shard by shard.
    model = transformers.GPT2LMHeadModel.from_pretrained(str(folder.parent / "start"))
    return transformers.Trainer(model=model, args=args, train_dataset=Rows(32), eval_dataset=Rows(8))


def losses(run: transformers.Trainer) -> list[float]:
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry]


def main(stage: int, folder: Path) -> None:
    result: dict[str, Any] = {}
    if int(os.environ.get("RANK", "0")) == 0:
        new_model().save_pretrained(folder / "start")
    transformers.TrainingArguments(output_dir=str(folder)).device  # noqa: B018 - creates the process group
    torch.distributed.barrier()
    run = trainer(folder / "whole", config(stage), 4)
    run.train()
    result["losses"] = losses(run)
    result["eval"] = run.evaluate()["eval_loss"]
    run.save_model(str(folder / "model"))
    import deepspeed

    result["file"] = deepspeed.__file__
    result["version"] = deepspeed.__version__
    if run.is_world_process_zero():
        saved = safetensors.torch.load_file(folder / "model" / "model.safetensors")
        result["weights"] = float(sum(value.double().abs().sum() for value in saved.values()))
    halves = dict(save_strategy="steps", save_steps=2, eval_strategy="steps", eval_steps=2, load_best_model_at_end=True)
    first = trainer(folder / "halves", config(stage), 4, **halves)
    first.train()
    result["halves"] = losses(first)
    resumed = trainer(folder / "halves", config(stage), 4, **halves)
    resumed.train(resume_from_checkpoint=str(folder / "halves" / "checkpoint-2"))
    result["resumed"] = losses(resumed)
    if int(os.environ.get("RANK", "0")) == 0:
        (folder / "result.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
