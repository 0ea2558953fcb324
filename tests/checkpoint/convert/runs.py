"""One small run that unishard, DeepSpeed, FSDP1 and FSDP2 all train, so that each can continue another's."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

GLOBAL_BATCH, WORDS = 12, 37
STEPS, MORE = 3, 2


class Model(nn.Module):
    """Tied ends, a frozen layer, a buffer, shapes that two ranks do not divide."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, 12)
        self.up = nn.Linear(12, 17)
        self.down = nn.Linear(17, 12)
        self.norm = nn.LayerNorm(12)
        self.frozen = nn.Linear(12, 12)
        self.frozen.requires_grad_(False)
        self.head = nn.Linear(12, WORDS, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("scale", torch.full((3,), 0.5))

    def forward(self, words: Tensor) -> Tensor:
        hidden = self.embed(words)
        hidden = self.norm(hidden + self.down(torch.tanh(self.up(hidden))))
        return self.head(self.frozen(hidden)) * self.scale.sum().to(hidden.dtype)


def build(seed: int = 0) -> Model:
    """Frozen weights are alike whatever the seed: not every format restores them."""
    torch.manual_seed(seed)
    model = Model()
    torch.manual_seed(1)
    model.frozen.reset_parameters()
    return model


def groups(model: nn.Module, one: bool = False) -> list[dict[str, Any]]:
    """Weight decay for matrices alone; or one group of all."""
    trained = [p for p in model.parameters() if p.requires_grad]
    if one:
        return [{"params": trained}]
    matrices, others = [p for p in trained if p.dim() > 1], [p for p in trained if p.dim() < 2]
    return [{"params": matrices}, {"params": others, "weight_decay": 0.0}]


def config(stage: int, dtype: str, zero: Any = (), **more: Any) -> dict[str, Any]:
    """A ds_config that DeepSpeed and unishard read alike."""
    zero = dict(zero)
    found: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": GLOBAL_BATCH // world()[1],
        "gradient_clipping": 0.5,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "eps": 1e-3, "weight_decay": 0.1}},
        "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 6, "warmup_max_lr": 1e-2}},
        "zero_optimization": {"stage": stage, **zero},
        "zero_allow_untested_optimizer": True,
        **more,
    }
    if dtype != "fp32":
        found[dtype] = {"enabled": True}
    return found


def world() -> tuple[int, int]:
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def batch(step: int) -> Tensor:
    rank, size = world()
    draw = torch.Generator().manual_seed(step)
    return torch.randint(WORDS, (GLOBAL_BATCH, 7), generator=draw).chunk(size)[rank]


def train(engine: Any, steps: range) -> list[float]:
    """Losses over all ranks, of an engine with backward and step."""
    losses = []
    for step in steps:
        loss = engine(batch(step)).float().pow(2).mean()
        engine.backward(loss)
        engine.step()
        losses.append(mean(loss))
    return losses


def mean(loss: Tensor) -> float:
    total = loss.detach().clone()
    if dist.is_initialized():
        dist.all_reduce(total)
    return total.item() / world()[1]


BEFORE, AFTER = range(STEPS), range(STEPS, STEPS + MORE)
