"""Code Examples, Basic Training Setup: DeepSpeed (ZeRO-2, fp16, AdamW and a warm-up from the configuration).

Edits: the import line; a tiny GPT-2 and its data instead of `from_pretrained`; `train_batch_size` is that of two
processes (the original's 128 = 16 x 8 GPUs).
"""

from tiny_gpt2 import dataloader, tiny_gpt2

import unishard.deepspeed as deepspeed

# 1. Load model
model = tiny_gpt2()

# 2. DeepSpeed configuration (ds_config.json)
ds_config = {
    "train_batch_size": 32,
    "train_micro_batch_size_per_gpu": 16,
    "gradient_accumulation_steps": 1,
    "fp16": {"enabled": True},
    "zero_optimization": {
        "stage": 2,
        "overlap_comm": True,
        "contiguous_gradients": True,
        "reduce_bucket_size": 50000000,
        "allgather_bucket_size": 50000000,
    },
    "optimizer": {
        "type": "AdamW",
        "params": {"lr": 2e-5, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.01},
    },
    "scheduler": {
        "type": "WarmupDecayLR",
        "params": {"total_num_steps": 10000, "warmup_num_steps": 1000},
    },
}

# 3. Initialize DeepSpeed
model_engine, optimizer, _, _ = deepspeed.initialize(model=model, config=ds_config)

# 4. Training loop
losses = []
for batch in dataloader(batch_size=16, steps=12):
    outputs = model_engine(batch)
    loss = outputs.loss

    model_engine.backward(loss)
    model_engine.step()
    losses.append(loss.item())

print(f"loss {losses[0]:.4f} -> {losses[-1]:.4f}")
