"""Advanced Topics, Checkpoint Management: FSDP checkpointing with one whole state dict.

Edits: the import line; a tiny GPT-2 and its data; gloo; a barrier before other ranks read what rank 0 writes, which the
original leaves to chance.
"""

import torch
import torch.distributed as dist
from tiny_gpt2 import GPT2Block, dataloader, tiny_gpt2

from unishard.fsdp import FullStateDictConfig, StateDictType
from unishard.fsdp import FullyShardedDataParallel as FSDP
from unishard.fsdp.wrap import ModuleWrapPolicy

dist.init_process_group(backend="gloo")
model = FSDP(tiny_gpt2(), auto_wrap_policy=ModuleWrapPolicy({GPT2Block}))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
losses = []
for batch in dataloader(batch_size=4, steps=4):
    optimizer.zero_grad()
    loss = model(batch).loss
    loss.backward()
    optimizer.step()
    losses.append(loss.item())

# Save full state dict (rank 0 only)
save_policy = FullStateDictConfig(offload_to_cpu=True, rank0_only=True)

with FSDP.state_dict_type(model, StateDictType.FULL_STATE_DICT, save_policy):
    state_dict = model.state_dict()
    if dist.get_rank() == 0:
        torch.save(state_dict, "model.pt")

dist.barrier()

# Load checkpoint
trained, model = model, FSDP(tiny_gpt2(seed=1), auto_wrap_policy=ModuleWrapPolicy({GPT2Block}))
with FSDP.state_dict_type(model, StateDictType.FULL_STATE_DICT):
    state_dict = torch.load("model.pt")
    model.load_state_dict(state_dict)
