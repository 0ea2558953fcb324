"""Appendix, Troubleshooting: FSDP OOM with small model. What `print(model)` shows, and a policy by size.

Edits: the import line; a tiny GPT-2; gloo; `functools.partial` around the wrap policy, with a threshold that a tiny
model's blocks reach (the original's is 1000000).
"""

import functools

import torch
from tiny_gpt2 import dataloader, tiny_gpt2

from unishard.fsdp import FullyShardedDataParallel as FSDP
from unishard.fsdp.wrap import size_based_auto_wrap_policy

torch.distributed.init_process_group(backend="gloo")

# Try size-based policy
wrap_policy = functools.partial(size_based_auto_wrap_policy, min_num_params=10000)
model = FSDP(tiny_gpt2(), auto_wrap_policy=wrap_policy)

# Check wrapping policy - might be wrapping too aggressively
print(model)  # Should see nested FSDP modules

optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
losses = []
for batch in dataloader(batch_size=4, steps=4):
    optimizer.zero_grad()
    loss = model(batch).loss
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
