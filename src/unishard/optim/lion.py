"""Lion: steps of constant size in the sign of an interpolated momentum."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from unishard.optim.base import register
from unishard.optim.foreach import buckets, grads_of


class Lion(Optimizer):
    """Lion with decoupled weight decay (Chen et al. 2023, arXiv:2302.06675, Algorithm 2).

    With gradient g, momentum m and weight w: `c = β1·m + (1-β1)·g`, `w -= lr·(sign(c) + λ·w)`,
    `m = β2·m + (1-β2)·g`. The state is one tensor, `exp_avg`, of the parameter's shape and dtype.

    Args:
        params: tensors of any shape, or parameter groups.
        lr: step size; a third to a tenth of AdamW's, with `weight_decay` raised by the same factor.
        betas: β1 and β2; the paper's defaults.
        weight_decay: λ.
        maximize: step along the gradient instead of against it.

    Raises:
        ValueError: an option out of range.

    >>> w = torch.nn.Parameter(torch.tensor([1.0, 1.0]))
    >>> w.grad = torch.tensor([0.3, -7.0])
    >>> Lion([w], lr=0.1).step(); w.detach()
    tensor([0.9000, 1.1000])
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        maximize: bool = False,
    ) -> None:
        if lr < 0 or weight_decay < 0:
            raise ValueError(f"lr and weight_decay must be >= 0, got {lr} and {weight_decay}")
        if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas must be two numbers in [0, 1), got {betas}")
        defaults = {"lr": lr, "betas": betas, "weight_decay": weight_decay, "maximize": maximize}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # pyright: ignore
        """Update every parameter that has a gradient; return the closure's loss, if one is given."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for bucket in buckets(group["params"]):
                self._update(bucket, group)
        return loss

    def _update(self, params: list[Tensor], group: dict[str, Any]) -> None:
        beta1, beta2 = group["betas"]
        lr = float(group["lr"])
        grads = grads_of(params)
        if group["maximize"]:
            grads = list(torch._foreach_neg(grads))
        momenta = [self._momentum(param) for param in params]
        direction = torch._foreach_lerp(momenta, grads, 1 - beta1)
        torch._foreach_sign_(direction)
        if group["weight_decay"]:
            torch._foreach_mul_(params, 1 - lr * group["weight_decay"])
        torch._foreach_add_(params, direction, alpha=-lr)
        torch._foreach_lerp_(momenta, grads, 1 - beta2)

    def _momentum(self, param: Tensor) -> Tensor:
        state = self.state[param]
        if "exp_avg" not in state:
            state["exp_avg"] = torch.zeros_like(param)
        return state["exp_avg"]


# A config's "Lion" means DeepSpeed's, whose defaults are not the paper's.
_CONFIG_DEFAULTS = {"lr": 1e-3, "betas": (0.9, 0.999)}


@register("Lion", accepts=Lion)
def build_lion(groups: list[dict[str, Any]], options: dict[str, Any]) -> Optimizer:
    """Build `Lion` with DeepSpeed's defaults (lr 1e-3, betas 0.9 and 0.999) for options left out."""
    return Lion(groups, **{**_CONFIG_DEFAULTS, **options})
