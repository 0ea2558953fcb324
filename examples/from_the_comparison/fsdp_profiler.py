"""Advanced Topics, Memory Profiling: the PyTorch profiler with FSDP.

Edits: the import line; a tiny GPT-2 and its data; gloo, and the CPU's activity instead of the GPU's.
"""

import torch
from tiny_gpt2 import GPT2Block, dataloader, tiny_gpt2
from torch.profiler import ProfilerActivity, profile, schedule

from unishard.fsdp import FullyShardedDataParallel as FSDP
from unishard.fsdp.wrap import ModuleWrapPolicy

torch.distributed.init_process_group(backend="gloo")
model = FSDP(tiny_gpt2(), auto_wrap_policy=ModuleWrapPolicy({GPT2Block}))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
train_dataloader = dataloader(batch_size=4, steps=8)

losses = []
with profile(
    activities=[ProfilerActivity.CPU],
    schedule=schedule(wait=1, warmup=1, active=3, repeat=1),
    on_trace_ready=torch.profiler.tensorboard_trace_handler("./log"),
    record_shapes=True,
    profile_memory=True,
    with_stack=True,
) as prof:
    for step, batch in enumerate(train_dataloader):
        if step >= (1 + 1 + 3) * 1:
            break

        loss = model(batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())

        prof.step()

# View in TensorBoard
table = prof.key_averages().table(sort_by="cpu_time_total", row_limit=10)
print(table)
