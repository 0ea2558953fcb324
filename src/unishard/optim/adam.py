"""Adam and AdamW, in both conventions of weight decay.

A config's `Adam` means what DeepSpeed means by it: decoupled decay, that is AdamW, unless `adam_w_mode` is
false. Options left out have DeepSpeed's defaults: `weight_decay` is 0, where `torch.optim.AdamW` has 0.01.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from typing import Any, final

import torch
from torch import Tensor
from torch.optim import Optimizer

from unishard.errors import ConfigError
from unishard.optim.base import register, with_fused
from unishard.optim.foreach import buckets, grads_of

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class AdamOptions:
    """Options of a config's `Adam` and `AdamW`.

    Attributes:
        lr, betas, eps, amsgrad, maximize: as in `torch.optim.AdamW`.
        weight_decay: None means 0, or torch's default for the class when `torch_adam` is set.
        bias_correction: divide the moments by 1 - β^step.
        adam_w_mode: decoupled decay (None and True) or an L2 term in the gradient (False).
        torch_adam: DeepSpeed's switch to torch's classes, which are used in any case; it changes one default.
        fp32_optimizer_states, set_grad_none: accepted as true, which is how unishard works.
        foreach, fused, capturable, differentiable: torch's choice of implementation.
    """

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float | None = None
    amsgrad: bool = False
    maximize: bool = False
    bias_correction: bool = True
    adam_w_mode: bool | None = None
    torch_adam: bool = False
    fp32_optimizer_states: bool = True
    set_grad_none: bool = True
    foreach: bool | None = None
    fused: bool | None = None
    capturable: bool = False
    differentiable: bool = False

    def __post_init__(self) -> None:
        if not self.fp32_optimizer_states:
            raise ConfigError(
                "fp32_optimizer_states: false is not supported; moments have the master weights' dtype"
            )
        if not self.set_grad_none:
            raise ConfigError(
                "set_grad_none: false is not supported; remove it, gradients are released after a step"
            )


_PER_RUN = frozenset(
    {"adam_w_mode", "bias_correction", "torch_adam", "fp32_optimizer_states", "set_grad_none"}
)


@register("AdamW", accepts=AdamOptions, per_run=_PER_RUN)
def build_adamw(groups: list[dict[str, Any]], options: dict[str, Any]) -> Optimizer:
    """Build AdamW (Loshchilov, Hutter 2019, arXiv:1711.05101, Algorithm 2).

    Raises:
        ConfigError: `adam_w_mode` false, which contradicts the name.
    """
    chosen = AdamOptions(**options)
    if chosen.adam_w_mode is False:
        raise ConfigError(
            "adam_w_mode: false contradicts the name (DeepSpeed ignores it there). "
            "For L2 decay use type 'Adam' with adam_w_mode: false; for decoupled decay remove the option"
        )
    return _build(groups, chosen, decoupled=True)


@register("Adam", accepts=AdamOptions, per_run=_PER_RUN)
def build_adam(groups: list[dict[str, Any]], options: dict[str, Any]) -> Optimizer:
    """Build AdamW unless `adam_w_mode` is false; then Adam (Kingma, Ba 2015) with an L2 term."""
    chosen = AdamOptions(**options)
    decays = chosen.weight_decay or any(group.get("weight_decay") for group in groups)
    if chosen.adam_w_mode is None and decays:
        _log.warning(
            "optimizer Adam decays weights as AdamW does, as in DeepSpeed; write type 'AdamW' to say so, "
            "or adam_w_mode: false for L2 decay"
        )
    return _build(groups, chosen, decoupled=chosen.adam_w_mode is not False)


def _build(groups: list[dict[str, Any]], chosen: AdamOptions, decoupled: bool) -> Optimizer:
    cls = torch.optim.AdamW if decoupled else torch.optim.Adam
    options = {
        field.name: getattr(chosen, field.name) for field in fields(chosen) if field.name not in _PER_RUN
    }
    if chosen.weight_decay is None:
        options["weight_decay"] = 0.01 if chosen.torch_adam and decoupled else 0.0
    if chosen.bias_correction:
        return cls(groups, **with_fused(cls, groups, options))
    for name in ("foreach", "fused", "capturable", "differentiable"):
        if options.pop(name):
            raise ConfigError(f"{name}: true needs bias_correction: true; remove one of the two")
    return UncorrectedAdam(groups, decoupled_weight_decay=decoupled, **options)


@final
class UncorrectedAdam(Optimizer):
    """Adam or AdamW without bias correction: `w -= lr·m / (√v + eps)`, as BERT was trained.

    State: `exp_avg`, `exp_avg_sq` and, with `amsgrad`, `max_exp_avg_sq`, of the parameter's shape and dtype.

    Args:
        params: tensors of any shape, or parameter groups.
        options: `lr`, `betas`, `eps`, `weight_decay`, `amsgrad`, `maximize` and `decoupled_weight_decay`,
            with the meaning and the defaults of `torch.optim.Adam`.

    Raises:
        ValueError, TypeError: an option that `torch.optim.Adam` refuses.

    >>> w = torch.nn.Parameter(torch.ones(1))
    >>> w.grad = torch.ones(1)
    >>> UncorrectedAdam([w], lr=0.1, betas=(0.0, 0.75)).step(); w.detach()
    tensor([0.8000])
    """

    def __init__(self, params: Iterable[Tensor] | Iterable[dict[str, Any]], **options: Any) -> None:
        # torch's own constructor checks names and ranges.
        checked = torch.optim.Adam([{"params": []}], **options).defaults
        dropped = ("foreach", "fused", "capturable", "differentiable")
        super().__init__(params, {key: value for key, value in checked.items() if key not in dropped})

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
        lr, decay = float(group["lr"]), group["weight_decay"]
        grads = grads_of(params)
        if group["maximize"]:
            grads = list(torch._foreach_neg(grads))
        if decay and group["decoupled_weight_decay"]:
            torch._foreach_mul_(params, 1 - lr * decay)
        elif decay:
            grads = list(torch._foreach_add(grads, params, alpha=decay))
        first, second = self._moments(params, "exp_avg"), self._moments(params, "exp_avg_sq")
        torch._foreach_lerp_(first, grads, 1 - beta1)
        torch._foreach_mul_(second, beta2)
        torch._foreach_addcmul_(second, grads, grads, 1 - beta2)
        if group["amsgrad"]:
            largest = self._moments(params, "max_exp_avg_sq")
            torch._foreach_maximum_(largest, second)
            second = largest
        denominator = torch._foreach_sqrt(second)
        torch._foreach_add_(denominator, group["eps"])
        torch._foreach_addcdiv_(params, first, denominator, -lr)

    def _moments(self, params: list[Tensor], name: str) -> list[Tensor]:
        for param in params:
            if name not in self.state[param]:
                self.state[param][name] = torch.zeros_like(param)
        return [self.state[param][name] for param in params]
