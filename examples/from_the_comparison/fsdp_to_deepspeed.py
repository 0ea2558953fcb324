"""Migration Guide, From FSDP to DeepSpeed: the FSDP code, then `initialize` with fsdp_to_deepspeed.json instead.

Edits: the import lines; a tiny GPT-2 and its data; gloo. In the configuration: the micro-batch, which DeepSpeed must
know and the original leaves out, and `initial_scale_power`, so that a few steps are enough to find a loss scale.
"""

from pathlib import Path

import torch
from tiny_gpt2 import dataloader, tiny_gpt2

import unishard.deepspeed as deepspeed
from unishard.fsdp import CPUOffload, MixedPrecision, ShardingStrategy
from unishard.fsdp import FullyShardedDataParallel as FSDP

torch.distributed.init_process_group(backend="gloo")

# FSDP code
model = FSDP(
    tiny_gpt2(),
    sharding_strategy=ShardingStrategy.FULL_SHARD,
    cpu_offload=CPUOffload(offload_params=True),
    mixed_precision=MixedPrecision(param_dtype=torch.float16),
)
optimizer = torch.optim.AdamW(model.parameters(), lr=2e-5)

fsdp_losses = []
for batch in dataloader(batch_size=4, steps=12):
    optimizer.zero_grad()
    loss = model(batch).loss
    loss.backward()
    optimizer.step()
    fsdp_losses.append(loss.item())

# DeepSpeed equivalent
model_engine, _, _, _ = deepspeed.initialize(
    model=tiny_gpt2(), config=str(Path(__file__).with_suffix(".json"))
)

losses = []
for batch in dataloader(batch_size=4, steps=12):
    loss = model_engine(batch).loss
    model_engine.backward(loss)
    model_engine.step()
    losses.append(loss.item())

print(f"FSDP {fsdp_losses[0]:.4f} -> {fsdp_losses[-1]:.4f}, DeepSpeed {losses[0]:.4f} -> {losses[-1]:.4f}")
