"""Advanced Topics, Checkpoint Management: sharded FSDP checkpointing, each rank its own file.

Edits: the import line; a tiny GPT-2 and its data; gloo; `weights_only=False`, which torch itself needs since 2.6 to
read sharded tensors back.
"""

import torch
import torch.distributed as dist
from tiny_gpt2 import GPT2Block, dataloader, tiny_gpt2

from unishard.fsdp import FullyShardedDataParallel as FSDP
from unishard.fsdp import ShardedStateDictConfig, StateDictType
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

# Each rank saves its shard
save_policy = ShardedStateDictConfig(offload_to_cpu=True)

with FSDP.state_dict_type(model, StateDictType.SHARDED_STATE_DICT, save_policy):
    state_dict = model.state_dict()
    torch.save(state_dict, f"model_rank_{dist.get_rank()}.pt")

# Load sharded checkpoint
trained, model = model, FSDP(tiny_gpt2(seed=1), auto_wrap_policy=ModuleWrapPolicy({GPT2Block}))
with FSDP.state_dict_type(model, StateDictType.SHARDED_STATE_DICT):
    state_dict = torch.load(f"model_rank_{dist.get_rank()}.pt", weights_only=False)
    model.load_state_dict(state_dict)
