"""Migration Guide, From PyTorch DDP to FSDP: the wrapper changes, the training loop does not.

Edits: the import lines; a tiny GPT-2 and its data (`TransformerBlock` is its block); gloo; `functools.partial` around
the wrap policy.
"""

import functools

import torch
from tiny_gpt2 import GPT2Block as TransformerBlock
from tiny_gpt2 import dataloader, tiny_gpt2

from unishard.fsdp import FullyShardedDataParallel as FSDP
from unishard.fsdp import MixedPrecision, ShardingStrategy
from unishard.fsdp.wrap import transformer_auto_wrap_policy

torch.distributed.init_process_group(backend="gloo")
model = tiny_gpt2()

mixed_precision = MixedPrecision(
    param_dtype=torch.float16, reduce_dtype=torch.float16, buffer_dtype=torch.float16
)

model = FSDP(
    model,
    mixed_precision=mixed_precision,
    sharding_strategy=ShardingStrategy.FULL_SHARD,
    auto_wrap_policy=functools.partial(
        transformer_auto_wrap_policy, transformer_layer_cls={TransformerBlock}
    ),
)

optimizer = torch.optim.AdamW(model.parameters(), lr=2e-5)
losses = []
for batch in dataloader(batch_size=4, steps=12):
    optimizer.zero_grad()
    loss = model(batch).loss
    loss.backward()
    optimizer.step()
    losses.append(loss.item())

print(f"loss {losses[0]:.4f} -> {losses[-1]:.4f}")
