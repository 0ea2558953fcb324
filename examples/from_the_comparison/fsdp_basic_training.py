"""Code Examples, Basic Training Setup: PyTorch FSDP (FULL_SHARD, fp16, one unit for each transformer block).

Edits: the import lines; a tiny GPT-2 and its data; NCCL and the GPU become gloo and the CPU; `functools.partial` around
the wrap policy.
"""

import functools

import torch
from tiny_gpt2 import GPT2Block, dataloader, tiny_gpt2

from unishard.fsdp import FullyShardedDataParallel as FSDP
from unishard.fsdp import MixedPrecision, ShardingStrategy
from unishard.fsdp.wrap import transformer_auto_wrap_policy

# 1. Initialize distributed
torch.distributed.init_process_group(backend="gloo")

# 2. Load model
model = tiny_gpt2()

# 3. Configure FSDP
mixed_precision_policy = MixedPrecision(
    param_dtype=torch.float16, reduce_dtype=torch.float16, buffer_dtype=torch.float16
)

wrapping_policy = functools.partial(transformer_auto_wrap_policy, transformer_layer_cls={GPT2Block})

model = FSDP(
    model,
    mixed_precision=mixed_precision_policy,
    auto_wrap_policy=wrapping_policy,
    sharding_strategy=ShardingStrategy.FULL_SHARD,  # Like ZeRO-3
    device_id=torch.device("cpu"),
    limit_all_gathers=True,
)

# 4. Optimizer
optimizer = torch.optim.AdamW(model.parameters(), lr=2e-5, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01)

# 5. Training loop
losses = []
for batch in dataloader(batch_size=16, steps=12):
    optimizer.zero_grad()

    outputs = model(batch)
    loss = outputs.loss

    loss.backward()
    optimizer.step()
    losses.append(loss.item())

print(f"loss {losses[0]:.4f} -> {losses[-1]:.4f}")
