"""Advanced Topics, Checkpoint Management: converting a DeepSpeed checkpoint to Hugging Face's format.

Edits: the import lines (`transformers.deepspeed` is `transformers.integrations` since transformers 4.33, and finds
DeepSpeed through `install()`; the original imports `HfDeepSpeedConfig` and does not use it either); a tiny GPT-2
instead of `from_pretrained`; a checkpoint to convert, which the script makes first.
"""

from tiny_gpt2 import causal_lm, dataloader

import unishard.deepspeed as deepspeed

deepspeed.install()

from transformers.integrations import HfDeepSpeedConfig  # noqa: E402, F401

ds_config = {
    "train_micro_batch_size_per_gpu": 4,
    "zero_optimization": {"stage": 2},
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
}

# A checkpoint of some training
model_engine, _, _, _ = deepspeed.initialize(model=causal_lm(), config=ds_config)
losses = []
for batch in dataloader(batch_size=4, steps=4):
    loss = model_engine(**batch).loss
    model_engine.backward(loss)
    model_engine.step()
    losses.append(loss.item())
model_engine.save_checkpoint("./checkpoints")
trained = {name: value.cpu() for name, value in model_engine.module_state_dict().items()}

# Load DeepSpeed checkpoint
model = causal_lm(seed=1, use_cache=False)

model_engine, _, _, _ = deepspeed.initialize(model=model, config=ds_config)
model_engine.load_checkpoint("./checkpoints")

# Save as HF format
model_engine.module.save_pretrained("./hf_model")
