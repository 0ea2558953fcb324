"""Code Examples, Advanced Configurations: DeepSpeed ZeRO-3 with CPU offload of optimizer and parameters, and bf16.

Edits: the import line; a tiny GPT-2 and its data. `train_batch_size` stays: with micro-batches of 4 on two processes it
means 16 accumulation steps, which the configuration works out.
"""

from tiny_gpt2 import dataloader, tiny_gpt2

import unishard.deepspeed as deepspeed

model = tiny_gpt2()

ds_config = {
    "train_batch_size": 128,
    "train_micro_batch_size_per_gpu": 4,
    "bf16": {"enabled": True},
    "zero_optimization": {
        "stage": 3,
        # Communication optimization
        "overlap_comm": True,
        "contiguous_gradients": True,
        "reduce_bucket_size": 50000000,
        # ZeRO-3 specific
        "stage3_prefetch_bucket_size": 50000000,
        "stage3_param_persistence_threshold": 100000,
        "stage3_max_live_parameters": 1000000000,
        "stage3_max_reuse_distance": 1000000000,
        # CPU offloading
        "offload_optimizer": {"device": "cpu", "pin_memory": True, "buffer_count": 4, "fast_init": False},
        "offload_param": {"device": "cpu", "pin_memory": True, "buffer_count": 5, "buffer_size": 100000000},
    },
    # Activation checkpointing
    "activation_checkpointing": {
        "partition_activations": True,
        "cpu_checkpointing": True,
        "contiguous_memory_optimization": True,
        "number_checkpoints": 4,
    },
    "optimizer": {"type": "AdamW", "params": {"lr": 2e-5}},
}

model_engine, _, _, _ = deepspeed.initialize(model=model, config=ds_config)

losses = []
for batch in dataloader(batch_size=4, steps=16 * 4):
    loss = model_engine(batch).loss
    model_engine.backward(loss)
    model_engine.step()
    losses.append(loss.item())

print(f"loss {losses[0]:.4f} -> {losses[-1]:.4f}")
