"""TRL's SFTTrainer on unishard beside a plain one; run on every rank."""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
from datasets import Dataset
from datasets.table import InMemoryTable
from peft import LoraConfig, PeftModel
from tokenizers import Tokenizer, models, pre_tokenizers
from trl import SFTConfig, SFTTrainer

from unishard.integrations.transformers import use_unishard

# Before any model: from_pretrained would import a real DeepSpeed where there is one.
use_unishard()
WORDS = [f"w{n}" for n in range(40)]


def tokenizer() -> Any:
    vocabulary = {word: n for n, word in enumerate(["<pad>", "<eos>", "<unk>", *WORDS])}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )


def rows() -> Any:
    """Sentences in which every word follows from the one before."""
    text = [" ".join(WORDS[(s + 3 * n) % 40] for n in range(12)) for s in range(32)]
    # With a name of its own the table need not be hashed, which not every pair of pyarrow and dill can.
    return Dataset(InMemoryTable.from_pydict({"text": text}), fingerprint="rows")


def start(folder: Path) -> None:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(WORDS) + 3, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=32, pad_token_id=0, eos_token_id=1,
        bos_token_id=None,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer().save_pretrained(folder)


def ds_config(stage: int) -> dict[str, Any]:
    return {
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "zero_optimization": {"stage": stage, "stage3_gather_16bit_weights_on_model_save": True},
    }


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "deepspeed-2": {"deepspeed": ds_config(2)},
    "deepspeed-3": {"deepspeed": ds_config(3)},
    "fsdp": {"fsdp": "full_shard auto_wrap"},
}


def trainer(folder: Path, start: Path, given: dict[str, Any], lora: bool) -> Any:
    arguments = SFTConfig(
        output_dir=str(folder), max_steps=4, per_device_train_batch_size=2, gradient_accumulation_steps=2,
        learning_rate=2e-2, logging_steps=1, report_to=[], use_cpu=not torch.cuda.is_available(), bf16=False,
        seed=1, max_grad_norm=0.5, lr_scheduler_type="constant", disable_tqdm=True, dataloader_pin_memory=False,
        save_steps=2, max_length=16, optim="adamw_torch", **given,
    )  # fmt: skip
    if given:
        use_unishard(arguments)
    return SFTTrainer(
        model=transformers.AutoModelForCausalLM.from_pretrained(str(start)),
        args=arguments,
        train_dataset=rows(),
        processing_class=tokenizer(),
        peft_config=LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"]) if lora else None,
    )


def logged(run: Any, key: str) -> list[float]:
    return [entry[key] for entry in run.state.log_history if key in entry]


def through(folder: Path, start: Path, given: dict[str, Any], lora: bool) -> dict[str, Any]:
    run = trainer(folder, start, given, lora)
    run.train()
    engine = run.model_wrapped
    found: dict[str, Any] = {
        "losses": logged(run, "loss"),
        "engine": f"{type(engine).__module__}.{type(engine).__name__}",
        "preset": getattr(getattr(engine, "config", None), "sharding", None),
    }
    run.save_model(str(folder / "model"))
    torch.distributed.barrier()
    transformers.integrations.deepspeed.unset_hf_deepspeed_config()  # else it would be read sharded
    base = transformers.AutoModelForCausalLM.from_pretrained(str(start if lora else folder / "model"))
    loaded: Any = PeftModel.from_pretrained(base, str(folder / "model")) if lora else base
    found["weights"] = {k: v.clone() for k, v in loaded.state_dict().items()}
    if given:
        resumed = trainer(folder, start, given, lora)
        resumed.train(resume_from_checkpoint=str(folder / "checkpoint-2"))
        found["resumed"] = logged(resumed, "loss")
    return found


def main(folder: Path) -> None:
    warnings.filterwarnings("ignore")
    first = int(os.environ["RANK"]) == 0
    transformers.TrainingArguments(output_dir=str(folder), use_cpu=not torch.cuda.is_available()).device  # noqa: B018
    if first:
        start(folder / "start")
    torch.distributed.barrier()
    results: dict[str, Any] = {}
    for lora in (False, True):
        for name, given in CASES.items():
            if lora and name not in ("plain", "deepspeed-3"):
                continue
            label = f"lora {name}" if lora else name
            results[label] = through(folder / label, folder / "start", given, lora)
            transformers.integrations.deepspeed.unset_hf_deepspeed_config()
            os.environ.pop(
                "ACCELERATE_USE_DEEPSPEED", None
            )  # accelerate leaves it set; the next run may be plain
    if first:
        torch.save(results, folder / "results.pt")
    torch.distributed.barrier()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
