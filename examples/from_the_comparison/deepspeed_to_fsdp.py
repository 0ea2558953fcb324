"""Migration Guide, From DeepSpeed to FSDP: deepspeed_to_fsdp.json is the configuration that the code below replaces.

Both run here one after the other. The batch size of the configuration is reached by accumulation in DeepSpeed; the FSDP
code, as in the original, steps after each micro-batch of 4.

Edits: the import lines; a tiny GPT-2 and its data; gloo; the wrap policy that the original leaves open. In the
configuration: `initial_scale_power`, so that a few steps are enough to find a loss scale.
"""

import functools
from pathlib import Path

import torch
from tiny_gpt2 import GPT2Block, dataloader, dataset, tiny_gpt2
from torch.utils.data import DataLoader, DistributedSampler

import unishard.deepspeed as deepspeed
from unishard.fsdp import CPUOffload, MixedPrecision, ShardingStrategy
from unishard.fsdp import FullyShardedDataParallel as FSDP
from unishard.fsdp.wrap import transformer_auto_wrap_policy

# Before
model_engine, _, _, _ = deepspeed.initialize(
    model=tiny_gpt2(), config=str(Path(__file__).with_suffix(".json"))
)
deepspeed_losses = []
for batch in dataloader(batch_size=4, steps=4 * model_engine.gradient_accumulation_steps()):
    loss = model_engine(batch).loss
    model_engine.backward(loss)
    model_engine.step()
    deepspeed_losses.append(loss.item())

# After
model = tiny_gpt2()
wrapping_policy = functools.partial(transformer_auto_wrap_policy, transformer_layer_cls={GPT2Block})

# Mixed precision (fp16)
mixed_precision = MixedPrecision(
    param_dtype=torch.float16, reduce_dtype=torch.float16, buffer_dtype=torch.float16
)

# Wrap model (stage 3 = FULL_SHARD)
model = FSDP(
    model,
    sharding_strategy=ShardingStrategy.FULL_SHARD,
    mixed_precision=mixed_precision,
    cpu_offload=CPUOffload(offload_params=True),  # CPU offload
    auto_wrap_policy=wrapping_policy,
)

# Optimizer (manual)
optimizer = torch.optim.AdamW(model.parameters(), lr=2e-5)

# Batch size (manual in DataLoader)
train_dataloader = DataLoader(
    dataset,
    batch_size=4,  # micro_batch_size_per_gpu
    sampler=DistributedSampler(dataset, shuffle=False),
)

losses = []
for batch in train_dataloader:
    optimizer.zero_grad()
    loss = model(batch).loss
    loss.backward()
    optimizer.step()
    losses.append(loss.item())

print(f"loss {losses[0]:.4f} -> {losses[-1]:.4f}")
