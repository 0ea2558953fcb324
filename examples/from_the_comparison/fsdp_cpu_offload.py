"""Code Examples, Advanced Configurations: FSDP with CPU offload, bf16, wrapping by size and activation checkpointing.

Edits: the import lines; a tiny GPT-2 and its data; gloo and the CPU; `functools.partial` around the wrap policy, with a
threshold that a tiny model's blocks reach (the original's is 100000).
"""

import functools

import torch
from tiny_gpt2 import GPT2Block, dataloader, tiny_gpt2
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    apply_activation_checkpointing,
    checkpoint_wrapper,
)

from unishard.fsdp import BackwardPrefetch, CPUOffload, MixedPrecision, ShardingStrategy
from unishard.fsdp import FullyShardedDataParallel as FSDP
from unishard.fsdp.wrap import size_based_auto_wrap_policy

torch.distributed.init_process_group(backend="gloo")
model = tiny_gpt2()

model = FSDP(
    model,
    # Sharding strategy
    sharding_strategy=ShardingStrategy.FULL_SHARD,
    # CPU offload (parameters only)
    cpu_offload=CPUOffload(offload_params=True),
    # Mixed precision
    mixed_precision=MixedPrecision(
        param_dtype=torch.bfloat16, reduce_dtype=torch.bfloat16, buffer_dtype=torch.bfloat16
    ),
    # Auto-wrapping (by size)
    auto_wrap_policy=functools.partial(
        size_based_auto_wrap_policy,
        min_num_params=10000,  # Wrap modules with >10k params
    ),
    # Prefetching
    backward_prefetch=BackwardPrefetch.BACKWARD_PRE,
    forward_prefetch=True,
    # Memory optimization
    limit_all_gathers=True,
    use_orig_params=False,  # Memory efficient
    device_id=torch.device("cpu"),
)

# Activation checkpointing (separate)
check_fn = lambda submodule: isinstance(submodule, GPT2Block)  # noqa: E731 - as the original has it

apply_activation_checkpointing(model, checkpoint_wrapper_fn=checkpoint_wrapper, check_fn=check_fn)

optimizer = torch.optim.AdamW(model.parameters(), lr=2e-5)
losses = []
for batch in dataloader(batch_size=4, steps=12):
    optimizer.zero_grad()
    loss = model(batch).loss
    loss.backward()
    optimizer.step()
    losses.append(loss.item())

print(f"loss {losses[0]:.4f} -> {losses[-1]:.4f}")
