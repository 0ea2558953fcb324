"""Advanced Topics, Gradient Compression, FSDP Alternative: a hook that quantizes every parameter's gradient.

A hook gets the rank's whole gradient of a backward before it is reduced, as in one process. What travels afterwards is
in the reduce dtype still: the values are coarser, not the messages smaller.

The original's first way, torch's PowerSGD hook for DDP, is an import with the remark that FSDP cannot use it.

Edits: the import line; a tiny GPT-2 and its data; gloo; a `quantize`, which the original leaves open (8 bits here).
"""

import torch
from tiny_gpt2 import GPT2Block, dataloader, tiny_gpt2

from unishard.fsdp import FullyShardedDataParallel as FSDP
from unishard.fsdp.wrap import ModuleWrapPolicy

torch.distributed.init_process_group(backend="gloo")
model = FSDP(tiny_gpt2(), auto_wrap_policy=ModuleWrapPolicy({GPT2Block}))
seen: set[tuple[int, ...]] = set()


def quantize(grad: torch.Tensor) -> torch.Tensor:
    scale = grad.abs().max().clamp(min=1e-12) / 127
    seen.add(tuple(grad.shape))
    return torch.round(grad / scale) * scale


# Register backward hook for gradient compression
def compress_gradients(grad: torch.Tensor) -> torch.Tensor:
    # Quantize to 8-bit or 1-bit
    return quantize(grad)


for param in model.parameters():
    param.register_hook(compress_gradients)

optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
losses = []
for batch in dataloader(batch_size=4, steps=4):
    optimizer.zero_grad()
    loss = model(batch).loss
    loss.backward()
    optimizer.step()
    losses.append(loss.item())

print(f"loss {losses[0]:.4f} -> {losses[-1]:.4f}")
