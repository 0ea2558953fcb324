"""The update rules that kernels know, as values.

A rule holds what stays the same between steps. Which step it is and the factor on the gradient are arguments of
`update`. To ascend instead of descend (torch's `maximize`), negate `grad_scale`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, TypeAlias

from unishard.errors import KernelError


def _require(condition: bool, rule: str, option: str, value: object, wanted: str) -> None:
    if not condition:
        raise KernelError(f"{rule}: {option} is {value!r}; it must be {wanted}")


def _check(rule: object, *not_negative: str) -> None:
    name = type(rule).__name__
    for option in not_negative:
        value = getattr(rule, option)
        _require(value >= 0 and math.isfinite(value), name, option, value, "finite and >= 0")
    betas = getattr(rule, "betas", (0.0, 0.0))
    fits = len(betas) == 2 and all(0 <= beta < 1 for beta in betas)
    _require(fits, name, "betas", betas, "two numbers in [0, 1)")


@dataclass(frozen=True)
class AdamRule:
    """Adam (Kingma, Ba 2015, arXiv:1412.6980) and AdamW (Loshchilov, Hutter 2019, arXiv:1711.05101).

    With g the scaled gradient: `m = β1·m + (1-β1)·g`, `v = β2·v + (1-β2)·g²`,
    `w = w·(1 - lr·λ) - lr/(1-β1^t) · m / (√v/√(1-β2^t) + eps)`, as `torch.optim.AdamW` computes it.

    Attributes:
        lr, betas, eps: as in `torch.optim.AdamW`.
        weight_decay: λ.
        decoupled: False adds λ·w to g instead (`torch.optim.Adam`).
        bias_correction: False replaces both `1-β^t` by 1.

    Raises:
        KernelError: an option out of range.

    >>> AdamRule(lr=1e-4).state_names
    ('exp_avg', 'exp_avg_sq')
    """

    op: ClassVar[str] = "adam"
    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    decoupled: bool = True
    bias_correction: bool = True

    def __post_init__(self) -> None:
        _check(self, "lr", "eps", "weight_decay")

    @property
    def state_names(self) -> tuple[str, ...]:
        return ("exp_avg", "exp_avg_sq")

    @property
    def keep(self) -> float:
        """Decoupled decay: the factor on the weights."""
        return 1 - self.lr * self.weight_decay if self.decoupled else 1.0

    @property
    def l2(self) -> float:
        """Decay in the gradient: the factor on the weights that are added to it."""
        return 0.0 if self.decoupled else self.weight_decay

    def step_size(self, step: int) -> float:
        """What multiplies the ratio of the moments at step `step`, counted from 1."""
        return self.lr / (1 - self.betas[0] ** step) if self.bias_correction else self.lr

    def root_correction(self, step: int) -> float:
        """What divides the root of the second moment at step `step`, counted from 1."""
        return math.sqrt(1 - self.betas[1] ** step) if self.bias_correction else 1.0


@dataclass(frozen=True)
class LionRule:
    """Lion with decoupled decay (Chen et al. 2023, arXiv:2302.06675, Algorithm 2).

    `c = β1·m + (1-β1)·g`, `w = w·(1 - lr·λ) - lr·sign(c)`, `m = β2·m + (1-β2)·g`. The sign of NaN is 0, as in torch.

    Raises:
        KernelError: an option out of range.

    >>> LionRule().state_names
    ('exp_avg',)
    """

    op: ClassVar[str] = "lion"
    lr: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        _check(self, "lr", "weight_decay")

    @property
    def state_names(self) -> tuple[str, ...]:
        return ("exp_avg",)

    @property
    def keep(self) -> float:
        """Decoupled decay: the factor on the weights."""
        return 1 - self.lr * self.weight_decay


@dataclass(frozen=True)
class AdagradRule:
    """Adagrad (Duchi, Hazan, Singer 2011), as `torch.optim.Adagrad`.

    `g = g + λ·w`, `s = s + g²`, `w = w - lr/(1 + (t-1)·lr_decay) · g / (√s + eps)`.

    Raises:
        KernelError: an option out of range.

    >>> AdagradRule(lr=1.0, lr_decay=1.0).step_size(2)
    0.5
    """

    op: ClassVar[str] = "adagrad"
    lr: float = 1e-2
    lr_decay: float = 0.0
    eps: float = 1e-10
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        _check(self, "lr", "lr_decay", "eps", "weight_decay")

    @property
    def state_names(self) -> tuple[str, ...]:
        return ("sum",)

    def step_size(self, step: int) -> float:
        """The decayed learning rate at step `step`, counted from 1."""
        return self.lr / (1 + (step - 1) * self.lr_decay)


@dataclass(frozen=True)
class SgdRule:
    """SGD, with momentum if asked (Sutskever et al. 2013), as `torch.optim.SGD`.

    `g = g + λ·w`; at step 1 `b = g`, later `b = μ·b + (1 - dampening)·g`; `w = w - lr·b`, or with Nesterov
    `w = w - lr·(g + μ·b)`. Without momentum there is no state and `w = w - lr·g`.

    Raises:
        KernelError: an option out of range, or Nesterov without momentum or with dampening.

    >>> SgdRule(lr=0.1).state_names, SgdRule(lr=0.1, momentum=0.9).state_names
    ((), ('momentum_buffer',))
    """

    op: ClassVar[str] = "sgd"
    lr: float = 1e-3
    momentum: float = 0.0
    dampening: float = 0.0
    weight_decay: float = 0.0
    nesterov: bool = False

    def __post_init__(self) -> None:
        _check(self, "lr", "momentum", "weight_decay")
        plain = self.momentum > 0 and self.dampening == 0
        _require(
            plain or not self.nesterov,
            "SgdRule",
            "nesterov",
            True,
            "False without momentum or with dampening",
        )

    @property
    def state_names(self) -> tuple[str, ...]:
        return ("momentum_buffer",) if self.momentum else ()


Rule: TypeAlias = AdamRule | LionRule | AdagradRule | SgdRule
