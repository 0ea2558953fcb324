"""Operations that must run at the speed of memory, each in C++ for the CPU, in Triton for GPUs and in plain torch.

| operation | what one pass over memory does |
|---|---|
| `update` | one optimizer step: unscale, clip, decay, moments, master weights, 16-bit copy |
| `squared_norm` | sum of squares, not finite exactly when an element is not |
| `sum_pieces` | fp32 sum of pieces that other ranks sent, into an accumulator if asked |
| `pack` | many tensors end to end into one buffer, cast and scaled |

`table.py` says which implementation serves which device. `python -m unishard.kernels` shows and measures it.
No implementation raises the version counters of what it writes; callers that need that call
`torch.autograd.graph.increment_version`.
"""

from __future__ import annotations

from unishard.kernels.ops import join_powers, pack, power_sum, squared_norm, sum_pieces, update
from unishard.kernels.rules import AdagradRule, AdamRule, LionRule, Rule, SgdRule
from unishard.kernels.target import Target

__all__ = [
    "AdagradRule",
    "AdamRule",
    "LionRule",
    "Rule",
    "SgdRule",
    "Target",
    "join_powers",
    "pack",
    "power_sum",
    "squared_norm",
    "sum_pieces",
    "update",
]
