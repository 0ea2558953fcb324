"""A Trainer script as its users write it: it knows nothing of unishard. Run on every rank; prints what it saw."""

from __future__ import annotations

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


def trainer(
    folder: Path, ds_config: dict[str, Any] | None, steps: int, **options: Any
) -> transformers.Trainer:
    defaults: dict[str, Any] = dict(  # noqa: C408
        output_dir=str(folder), max_steps=steps, per_device_train_batch_size=2, gradient_accumulation_steps=2,
        learning_rate=1e-3, logging_steps=1, save_strategy="no", report_to=[], use_cpu=not torch.cuda.is_available(),
        deepspeed=ds_config, seed=1, max_grad_norm=0.5, lr_scheduler_type="linear", warmup_steps=1, disable_tqdm=True,
        logging_strategy="steps", dataloader_pin_memory=False, optim="adamw_torch",
    )  # fmt: skip
    args = transformers.TrainingArguments(**(defaults | options))
    # With the arguments in place, ZeRO-3 builds the model sharded and reads the file shard by shard.
    model = transformers.GPT2LMHeadModel.from_pretrained(str(folder.parent / "start"))
    if ds_config is not None and ds_config["zero_optimization"]["stage"] == 3:
        assert all(hasattr(p, "ds_id") and p.numel() == 0 for p in model.parameters())
    return transformers.Trainer(model=model, args=args, train_dataset=Rows(32), eval_dataset=Rows(8))


def losses(run: transformers.Trainer) -> list[float]:
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry]


def saved_weights(folder: Path) -> dict[str, torch.Tensor]:
    torch.distributed.barrier()
    return safetensors.torch.load_file(folder / "model.safetensors")


def through_trainer(stage: int | None, folder: Path) -> dict[str, Any]:
    ds_config = None if stage is None else config(stage)
    result: dict[str, Any] = {}
    run = trainer(folder / "whole", ds_config, 4)
    run.train()
    result["losses"] = losses(run)
    result["norms"] = [entry["grad_norm"] for entry in run.state.log_history if "grad_norm" in entry]
    result["eval"] = run.evaluate()["eval_loss"]
    run.save_model(str(folder / f"model-{stage}"))
    result["weights"] = saved_weights(folder / f"model-{stage}")
    if stage is None:
        return result
    # Best model at end: the checkpoint of the lowest evaluation loss is loaded again.
    saving: dict[str, Any] = dict(  # noqa: C408
        save_strategy="steps", save_steps=2, eval_strategy="steps", eval_steps=2, load_best_model_at_end=True
    )
    first = trainer(folder / f"halves-{stage}", ds_config, 4, **saving)
    first.train()
    result["best"] = first.state.best_model_checkpoint
    result["evaluated again"] = first.evaluate()["eval_loss"], first.state.best_metric
    resumed = trainer(folder / f"halves-{stage}", ds_config, 4, **saving)
    resumed.train(resume_from_checkpoint=str(folder / f"halves-{stage}" / "checkpoint-2"))
    result["resumed"] = losses(resumed)
    return result


def new_accelerator(stage: int | None) -> Any:
    from accelerate import Accelerator, DeepSpeedPlugin, InitProcessGroupKwargs
    from accelerate.state import AcceleratorState, PartialState

    AcceleratorState._reset_state(True)
    PartialState._reset_state()
    if stage is None:
        os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)
        return Accelerator(gradient_accumulation_steps=2, cpu=not torch.cuda.is_available())
    plugin = DeepSpeedPlugin(
        zero_stage=stage, gradient_accumulation_steps=2, gradient_clipping=0.5, zero3_save_16bit_model=True
    )
    # Accelerate looks for a backend on GPUs only.
    backend = [] if torch.cuda.is_available() else [InitProcessGroupKwargs(backend="gloo")]
    return Accelerator(deepspeed_plugin=plugin, gradient_accumulation_steps=2, kwargs_handlers=backend)


def through_accelerate(stage: int | None, folder: Path) -> dict[str, Any]:
    accelerator = new_accelerator(stage)
    loader = torch.utils.data.DataLoader(Rows(32), batch_size=2)
    model = transformers.GPT2LMHeadModel.from_pretrained(str(folder / "start"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step // 2))
    model, optimizer, loader, schedule = accelerator.prepare(model, optimizer, loader, schedule)
    seen, norms = [], []
    for batch in loader:
        with accelerator.accumulate(model):
            loss = model(**batch).loss
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                norms.append(float(accelerator.clip_grad_norm_(model.parameters(), 0.5)))
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            seen.append(accelerator.gather(loss.detach()).mean().item())
    whole = accelerator.get_state_dict(model)
    result = {"losses": seen, "norms": norms, "rate": schedule.get_last_lr()[0]}
    result["weights"] = {} if whole is None else {k: v.float().cpu() for k, v in whole.items()}
    if stage is not None:
        accelerator.save_state(str(folder / f"accelerate-{stage}"))
        accelerator.load_state(str(folder / f"accelerate-{stage}"))
        result["unwrapped"] = type(accelerator.unwrap_model(model)).__name__
        result["steps"] = model.global_steps
    return result


def main(folder: Path) -> None:
    if int(os.environ.get("RANK", "0")) == 0:
        new_model().save_pretrained(folder / "start")
    transformers.TrainingArguments(output_dir=str(folder)).device  # noqa: B018 - creates the process group
    torch.distributed.barrier()
    results: dict[str, Any] = {}
    for stage in (None, 1, 2, 3):
        results[f"trainer-{stage}"] = through_trainer(stage, folder)
    transformers.integrations.deepspeed.unset_hf_deepspeed_config()
    for stage in (None, 2, 3):
        results[f"accelerate-{stage}"] = through_accelerate(stage, folder)
    import deepspeed

    results["version"] = deepspeed.__version__
    if int(os.environ.get("RANK", "0")) == 0:
        torch.save(results, folder / "results.pt")
    torch.distributed.barrier()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
