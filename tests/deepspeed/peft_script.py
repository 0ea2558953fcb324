"""LoRA through the Trainer as its users write it, which knows nothing of unishard; run on every rank."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import peft
import safetensors.torch
import torch
import transformers

sys.path.insert(0, str(Path(__file__).parent))
from hugging_face import Rows, config, losses, new_model

TARGETS = ["c_attn", "c_proj"]


def first_adapters(folder: Path) -> None:
    """Adapters to start from. PEFT starts B at zero, which would hide half of what can go wrong."""
    base = transformers.GPT2LMHeadModel.from_pretrained(str(folder / "start"))
    shape = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=4,
        lora_alpha=8,
        lora_dropout=0.0,
        target_modules=TARGETS,
        fan_in_fan_out=True,
    )
    model = peft.get_peft_model(base, shape)
    for name, param in model.named_parameters():
        if "lora_B" in name:
            param.data.normal_(0.0, 0.02)
    model.save_pretrained(str(folder / "adapters"))


def trainer(folder: Path, name: str, stage: int | None, **more: Any) -> transformers.Trainer:
    args = transformers.TrainingArguments(
        output_dir=str(folder / name), max_steps=4, per_device_train_batch_size=2, learning_rate=1e-2, logging_steps=1,
        save_strategy="steps", save_steps=2, report_to=[], use_cpu=not torch.cuda.is_available(), seed=1,
        max_grad_norm=0.5, disable_tqdm=True, dataloader_pin_memory=False,
        deepspeed=None if stage is None else config(stage), **more,
    )  # fmt: skip
    base = transformers.GPT2LMHeadModel.from_pretrained(str(folder / "start"))
    model = peft.PeftModel.from_pretrained(base, str(folder / "adapters"), is_trainable=True)
    return transformers.Trainer(model=model, args=args, train_dataset=Rows(32), eval_dataset=Rows(8))


def saved(folder: Path) -> dict[str, torch.Tensor]:
    torch.distributed.barrier()
    return safetensors.torch.load_file(folder / "adapter_model.safetensors")


def merged(folder: Path, adapters: Path) -> dict[str, torch.Tensor]:
    """On one process, as whoever uses the result does it."""
    base = transformers.GPT2LMHeadModel.from_pretrained(str(folder / "start"))
    model = peft.PeftModel.from_pretrained(base, str(adapters)).merge_and_unload()
    return {name: value.clone() for name, value in model.state_dict().items()}


def merged_in_place(run: transformers.Trainer) -> dict[str, torch.Tensor]:
    """Under ZeRO-3: parameters are gathered, every rank merges the same, and unmerges to train on."""
    import deepspeed

    model = run.accelerator.unwrap_model(run.model)
    with deepspeed.zero.GatheredParameters(list(model.parameters())):
        model.merge_adapter()
        whole = {
            name: value.detach().clone() for name, value in model.state_dict().items() if "lora" not in name
        }
        model.unmerge_adapter()
    return {name.removeprefix("base_model.model.").replace(".base_layer", ""): v for name, v in whole.items()}


def generated(run: transformers.Trainer) -> tuple[list[int], torch.Tensor]:
    """Ranks ask for different lengths; transformers keeps them in step on its own under ZeRO-3."""
    rank = int(os.environ["RANK"])
    model = run.accelerator.unwrap_model(run.model)
    model.eval()
    prompt = torch.arange(1, 5).view(1, -1)
    found = model.generate(
        input_ids=prompt, max_new_tokens=3 + 5 * rank, do_sample=False, pad_token_id=0, eos_token_id=None
    )
    lengths = [torch.zeros(1, dtype=torch.long) for _ in range(2)]
    torch.distributed.all_gather(lengths, torch.tensor([found.shape[1] - 4]))
    return [int(length) for length in lengths], found[:, : 4 + 3]


def through(folder: Path, stage: int | None) -> dict[str, Any]:
    result: dict[str, Any] = {}
    run = trainer(folder, f"whole-{stage}", stage)
    run.train()
    result["losses"], result["eval"] = losses(run), run.evaluate()["eval_loss"]
    out = folder / f"lora-{stage}"
    run.save_model(str(out))
    result["adapters"] = saved(out)
    result["files"] = sorted(path.name for path in out.iterdir())
    result["lengths"], result["text"] = generated(run)
    if stage == 3:
        result["merged in place"] = merged_in_place(run)
        result["eval after merging"] = run.evaluate()["eval_loss"]
    resumed = trainer(folder, f"whole-{stage}", stage)
    resumed.train(resume_from_checkpoint=str(folder / f"whole-{stage}" / "checkpoint-2"))
    result["resumed"] = losses(resumed)
    resumed.save_model(str(folder / f"resumed-{stage}"))
    result["resumed adapters"] = saved(folder / f"resumed-{stage}")
    transformers.integrations.deepspeed.unset_hf_deepspeed_config()
    os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)
    result["merged"] = merged(folder, out)
    return result


def main(folder: Path) -> None:
    transformers.TrainingArguments(output_dir=str(folder), use_cpu=not torch.cuda.is_available()).device  # noqa: B018
    if int(os.environ["RANK"]) == 0:
        new_model().save_pretrained(folder / "start")
        first_adapters(folder)
    torch.distributed.barrier()
    results = {stage: through(folder, stage) for stage in (None, 2, 3)}
    if int(os.environ["RANK"]) == 0:
        torch.save(results, folder / "results.pt")
    torch.distributed.barrier()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
