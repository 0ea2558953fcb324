"""Migration Guide, From PyTorch DDP to DeepSpeed: the original with torch's DDP, then the migrated code.

The configuration is ddp_to_deepspeed.json: a ZeRO stage and the optimizer, as the guide's first step says, with the
original's (that is, AdamW's own) weight decay and no clipping, so that both end with the same weights.

Edits: the import line; a tiny GPT-2 and its data; gloo and the CPU.
"""

from pathlib import Path

import torch
import torch.distributed as dist
from tiny_gpt2 import dataloader, tiny_gpt2
from torch.nn.parallel import DistributedDataParallel as DDP

import unishard.deepspeed as deepspeed


def original() -> torch.nn.Module:
    # Initialize
    dist.init_process_group(backend="gloo")
    model = DDP(tiny_gpt2())

    # Training
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-5)
    for batch in dataloader(batch_size=4, steps=6):
        optimizer.zero_grad()
        loss = model(batch).loss
        loss.backward()
        optimizer.step()
    return model.module


def migrated() -> deepspeed.DeepSpeedEngine:
    # Initialize (no manual dist init needed)
    model_engine, _optimizer, _, _ = deepspeed.initialize(
        model=tiny_gpt2(),
        config=str(Path(__file__).with_suffix(".json")),  # Optimizer config here
    )

    # Training (identical except model_engine methods)
    for batch in dataloader(batch_size=4, steps=6):
        loss = model_engine(batch).loss
        model_engine.backward(loss)
        model_engine.step()
        losses.append(loss.item())
    return model_engine


losses: list[float] = []
ddp_model = original()
model_engine = migrated()

print(f"loss {losses[0]:.4f} -> {losses[-1]:.4f}")
