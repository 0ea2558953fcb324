"""Code Examples, Hugging Face Integration: DeepSpeed with HF Trainer.

Start it with `unishard run -n 2 --as-deepspeed`: the script itself has no import to change. The configuration is
deepspeed_hf_trainer.json, which the original leaves open: ZeRO-2 with Hugging Face's "auto" values,
and a first loss scale that few steps can settle from.

Edits: a tiny GPT-2 and its data, and logging as often as fits it; `evaluation_strategy` is `eval_strategy` in
transformers 5; the CPU.
"""

from pathlib import Path

import torch
from tiny_gpt2 import Rows, causal_lm
from transformers import Trainer, TrainingArguments

training_args = TrainingArguments(
    output_dir="./output",
    num_train_epochs=3,
    per_device_train_batch_size=4,
    gradient_accumulation_steps=4,
    learning_rate=2e-5,
    fp16=True,
    # DeepSpeed config
    deepspeed=str(Path(__file__).with_suffix(".json")),  # Or pass dict directly
    # Other args
    logging_steps=1,
    save_steps=3,
    eval_strategy="steps",
    eval_steps=3,
    report_to=[],
    use_cpu=not torch.cuda.is_available(),
)

model = causal_lm()
train_dataset, eval_dataset = Rows(96), Rows(16)

trainer = Trainer(model=model, args=training_args, train_dataset=train_dataset, eval_dataset=eval_dataset)

trainer.train()

losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
eval_losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
