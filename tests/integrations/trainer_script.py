"""The Trainer through `unishard.integrations.transformers`, beside the plain one; run on every rank."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch.utils.data import Dataset

# As where no DeepSpeed is installed, and where transformers is imported first: import sorters put it there.
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "deepspeed" else find_spec(name, *rest)
import accelerate  # noqa: E402
import transformers  # noqa: E402

_ = transformers.Trainer, transformers.integrations.HfDeepSpeedConfig
assert not hasattr(accelerate.utils, "DeepSpeedSchedulerWrapper")
importlib.util.find_spec = find_spec

from unishard.integrations.transformers import Trainer, TrainingArguments, use_unishard  # noqa: E402

VOCABULARY, LENGTH = 61, 16
CLASSES = {"gpt2": "GPT2Block", "llama": "LlamaDecoderLayer"}


class Rows(Dataset[dict[str, torch.Tensor]]):
    def __init__(self, size: int) -> None:
        generator = torch.Generator().manual_seed(3)
        self.rows = torch.randint(0, VOCABULARY, (size, LENGTH), generator=generator)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.rows[index], "labels": self.rows[index]}


def new_model(kind: str) -> Any:
    torch.manual_seed(0)
    if kind == "llama":
        return transformers.LlamaForCausalLM(
            transformers.LlamaConfig(
                vocab_size=VOCABULARY,
                hidden_size=32,
                intermediate_size=48,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                max_position_embeddings=LENGTH,
                bos_token_id=0,
                eos_token_id=0,
            )
        )
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=VOCABULARY,
            n_positions=LENGTH,
            n_embd=32,
            n_layer=2,
            n_head=2,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=0,
            eos_token_id=0,
        )
    )


def ds_config(stage: int) -> dict[str, Any]:
    return {
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "zero_optimization": {"stage": stage, "stage3_gather_16bit_weights_on_model_save": True},
    }


def cases(kind: str) -> dict[str, dict[str, Any]]:
    """By name, the arguments that ask for sharding."""
    wrap = {"transformer_layer_cls_to_wrap": [CLASSES[kind]]}
    every = {
        "deepspeed-2": {"deepspeed": ds_config(2)},
        "deepspeed-3": {"deepspeed": ds_config(3)},
        "fsdp": {"fsdp": True, "fsdp_config": {**wrap, "cpu_ram_efficient_loading": True}},
        "shard_grad_op": {"fsdp": "shard_grad_op auto_wrap", "fsdp_config": {"version": 2}},
        "no_shard": {"fsdp": "no_shard", "fsdp_config": {"version": 1, "backward_prefetch": "backward_post"}},
        "hybrid": {"fsdp": "hybrid_shard offload", "fsdp_config": {"version": 1, "limit_all_gathers": True}},
        "bf16": {"fsdp": True, "bf16": True},
        "recompute": {"fsdp": True, "fsdp_config": {"activation_checkpointing": True, **wrap}},
    }
    if int(os.environ["WORLD_SIZE"]) > 2:
        return {"hybrid": every["hybrid"]}
    return every if kind == "gpt2" else {name: every[name] for name in ("deepspeed-3", "recompute")}


def trainer(
    kind: str, folder: Path, start: Path, sharded: dict[str, Any], **options: Any
) -> transformers.Trainer:
    arguments: dict[str, Any] = dict(
        output_dir=str(folder), max_steps=4, per_device_train_batch_size=2, gradient_accumulation_steps=2,
        learning_rate=1e-3, logging_steps=1, report_to=[], use_cpu=not torch.cuda.is_available(),
        seed=1, max_grad_norm=0.5, lr_scheduler_type="linear", warmup_steps=1, disable_tqdm=True,
        dataloader_pin_memory=False, optim="adamw_torch", **sharded, **options,
    )  # fmt: skip
    if not sharded:
        made: tuple[Any, Any] = (transformers.Trainer, transformers.TrainingArguments(**arguments))
    elif kind == "llama":  # the other way in: transformers' own classes, and one call
        made = (transformers.Trainer, use_unishard(transformers.TrainingArguments(**arguments)))
    else:
        made = (Trainer, TrainingArguments(**arguments))
    model = transformers.AutoModelForCausalLM.from_pretrained(str(start))
    loaded = "sharded" if any(p.numel() == 0 for p in model.parameters()) else "whole"
    run = made[0](model=model, args=made[1], train_dataset=Rows(32), eval_dataset=Rows(8))
    run.loaded = loaded
    return run


def logged(run: transformers.Trainer, key: str) -> list[float]:
    return [entry[key] for entry in run.state.log_history if key in entry]


def weights(kind: str, folder: Path) -> dict[str, torch.Tensor]:
    torch.distributed.barrier()
    assert (folder / "model.safetensors").exists(), sorted(folder.iterdir())
    return safetensors.torch.load_file(folder / "model.safetensors")


def through(kind: str, name: str, sharded: dict[str, Any], folder: Path, start: Path) -> dict[str, Any]:
    result: dict[str, Any] = {}
    saving = {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
    run = trainer(kind, folder / name, start, sharded, **saving, load_best_model_at_end=True)
    result["loaded"] = run.loaded
    result["sharding"] = (run.args.deepspeed or {}).get("sharding")
    if kind == "gpt2":
        # transformers' own Trainer would not wrap a model for training that it has evaluated before.
        first = run if sharded else trainer(kind, folder / "first", start, sharded, **saving)
        result["before training"] = first.evaluate()["eval_loss"]
    run.train()
    result["recomputes"] = run.accelerator.unwrap_model(run.model).is_gradient_checkpointing
    result["dtype"] = str(next(iter(run.accelerator.unwrap_model(run.model).parameters())).dtype)
    result["losses"], result["norms"] = logged(run, "loss"), logged(run, "grad_norm")
    result["eval"], result["best"] = run.evaluate()["eval_loss"], run.state.best_metric
    engine = run.model_wrapped
    result["engine"] = f"{type(engine).__module__}.{type(engine).__name__}"
    result["preset"] = getattr(getattr(engine, "config", None), "sharding", None)
    run.save_model(str(folder / name / "model"))
    result["weights"] = weights(kind, folder / name / "model")
    resumed = trainer(kind, folder / name, start, sharded, **saving)
    resumed.train(resume_from_checkpoint=str(folder / name / "checkpoint-2"))
    result["resumed"] = logged(resumed, "loss")
    resumed.save_model(str(folder / name / "resumed"))
    result["weights after resuming"] = weights(kind, folder / name / "resumed")
    return result


def refusals(folder: Path, start: Path) -> dict[str, str]:
    """The messages of arguments that cannot be meant."""
    wrong: dict[str, dict[str, Any]] = {
        "nothing": {},
        "class": {"fsdp": True, "fsdp_config": {"transformer_layer_cls_to_wrap": "LlamaDecoderLayer"}},
        "key": {"fsdp": True, "fsdp_config": {"xla_fsdp_grad_ckpt": True, "cpu_ofload": True}},
    }
    wrong["launch"] = {}
    seen = {}
    for name, sharded in wrong.items():
        os.environ["ACCELERATE_USE_FSDP"] = "true" if name == "launch" else "false"
        try:
            args = transformers.TrainingArguments(
                output_dir=str(folder), use_cpu=not torch.cuda.is_available(), report_to=[], **sharded
            )
            Trainer(
                transformers.AutoModelForCausalLM.from_pretrained(str(start)), args, train_dataset=Rows(8)
            )
        except ValueError as error:
            seen[name] = str(error)
        transformers.integrations.deepspeed.unset_hf_deepspeed_config()
    return seen


def main(folder: Path) -> None:
    transformers.TrainingArguments(output_dir=str(folder), use_cpu=not torch.cuda.is_available()).device  # noqa: B018
    results: dict[str, Any] = {}
    if int(os.environ["WORLD_SIZE"]) == 4:
        os.environ["LOCAL_WORLD_SIZE"] = "2"  # as two nodes of two ranks
    for kind in CLASSES if int(os.environ["WORLD_SIZE"]) == 2 else ("gpt2",):
        start = folder / f"start-{kind}"
        if int(os.environ["RANK"]) == 0:
            new_model(kind).save_pretrained(start)
        torch.distributed.barrier()
        for name, sharded in {"plain": {}, **cases(kind)}.items():
            results[f"{kind} {name}"] = through(kind, name, sharded, folder / kind, start)
            transformers.integrations.deepspeed.unset_hf_deepspeed_config()
            os.environ.pop(
                "ACCELERATE_USE_DEEPSPEED", None
            )  # accelerate leaves it set; the next run may be plain
    results["refusals"] = refusals(folder, folder / "start-gpt2")
    if int(os.environ["RANK"]) == 0:
        torch.save(results, folder / "results.pt")
    torch.distributed.barrier()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
