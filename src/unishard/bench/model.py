"""The contestants' model: a pre-norm GPT with learned positions and a tied head (Radford et al. 2019, section 2.3)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from unishard.bench.plan import Plan, Size


class Block(nn.Module):
    """Attention and MLP, (B, T, width) to the same. With `recompute`, what is inside is computed again in backward.

    Recomputation is inside the block, so that hooks of sharding libraries, which sit on its boundary, run once.
    """

    def __init__(self, size: Size, recompute: bool) -> None:
        super().__init__()
        self.heads = size.heads
        self.recompute = recompute
        self.attention_norm = nn.LayerNorm(size.width)
        self.qkv = nn.Linear(size.width, 3 * size.width)
        self.out = nn.Linear(size.width, size.width)
        self.mlp_norm = nn.LayerNorm(size.width)
        self.up = nn.Linear(size.width, 4 * size.width)
        self.down = nn.Linear(4 * size.width, size.width)

    def _attend(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        q, k, v = self.qkv(x).view(batch, length, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(mixed.transpose(1, 2).reshape(batch, length, width))

    def _compute(self, x: Tensor) -> Tensor:
        x = x + self._attend(self.attention_norm(x))
        return x + self.down(functional.gelu(self.up(self.mlp_norm(x))))

    def forward(self, x: Tensor) -> Tensor:
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(self._compute, x, use_reentrant=False)  # pyright: ignore[reportReturnType]
        return self._compute(x)


class GPT(nn.Module):
    """Token ids (B, T) and targets (B, T) to the mean cross-entropy, fp32."""

    def __init__(self, size: Size, recompute: bool = False) -> None:
        super().__init__()
        self.tokens = nn.Embedding(size.vocabulary, size.width)
        self.positions = nn.Embedding(size.context, size.width)
        self.blocks = nn.ModuleList(Block(size, recompute) for _ in range(size.depth))
        self.norm = nn.LayerNorm(size.width)
        self.head = nn.Linear(size.width, size.vocabulary, bias=False)
        self.apply(_initialise)
        self.head.weight = self.tokens.weight

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        x = self.tokens(ids) + self.positions(torch.arange(ids.shape[1], device=ids.device))
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.norm(x))
        return functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)


def build_model(plan: Plan) -> GPT:
    """The plan's model, with the same weights on every rank and for every contestant.

    >>> sum(p.numel() for p in build_model(Plan(size="tiny")).parameters())
    118528
    """
    torch.manual_seed(plan.seed)
    return GPT(plan.shape, plan.recompute)
