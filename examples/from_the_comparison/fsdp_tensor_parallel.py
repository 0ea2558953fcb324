"""Advanced Topics, Hybrid Parallelism: FSDP + Tensor Parallelism.

Edits: the import line; a tiny model with the plan's module names, its data, and the device mesh that the original
leaves open: tensor parallel pairs, and FSDP across the pairs; whole outputs of `attn.qkv`.
"""

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from unishard.fsdp import FullyShardedDataParallel as FSDP


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(16, 48, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        query, key, value = self.qkv(x).chunk(3, dim=-1)
        return nn.functional.scaled_dot_product_attention(query, key, value)


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(16, 64)
        self.fc2 = nn.Linear(64, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(nn.functional.gelu(self.fc1(x)))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = Attention()
        self.mlp = MLP()
        self.head = nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attn(x)
        return self.head(x + self.mlp(x))


def batch_of(group: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The batch of a tensor-parallel group: inputs (4, 8, 16) and targets (4, 8, 4)."""
    generator = torch.Generator().manual_seed(group)
    return torch.randn(4, 8, 16, generator=generator), torch.randn(4, 8, 4, generator=generator)


if __name__ == "__main__":
    torch.distributed.init_process_group(backend="gloo")
    world = torch.distributed.get_world_size()
    device_mesh = init_device_mesh("cpu", (world // 2, 2), mesh_dim_names=("dp", "tp"))
    torch.manual_seed(0)
    model = Model()

    # 1. Apply tensor parallelism first
    parallelize_plan = {
        "mlp.fc1": ColwiseParallel(),
        "mlp.fc2": RowwiseParallel(),
        # Its rows are query, key and value one after another, so that a half of them is no half of the heads.
        "attn.qkv": ColwiseParallel(output_layouts=Replicate()),
    }

    tp_model = parallelize_module(model, device_mesh["tp"], parallelize_plan)

    # 2. Then wrap with FSDP
    fsdp_model = FSDP(tp_model, device_mesh=device_mesh["dp"])

    optimizer = torch.optim.AdamW(fsdp_model.parameters(), lr=1e-2)
    losses = []
    for _ in range(6):
        inputs, targets = batch_of(device_mesh["dp"].get_local_rank())
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(fsdp_model(inputs), targets)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())

    print(f"loss {losses[0]:.4f} -> {losses[-1]:.4f}")
