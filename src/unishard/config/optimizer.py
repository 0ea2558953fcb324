"""`optimizer`: types, and the parameters each type takes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from unishard.config.fields import (
    Auto,
    Betas,
    Honoured,
    NonNegative,
    Refused,
    Section,
    Translated,
)

_NO_KERNEL_CHOICE = Translated("there is one implementation, with the same arithmetic")
_NEEDS_GIVEN = Auto("override")


class OptimizerParams(Section):
    """Parameters common to every optimizer that unishard builds."""

    weight_decay: Annotated[NonNegative, Auto(), Honoured()] = 0.0
    maximize: Annotated[bool, Honoured()] = False
    set_grad_none: Annotated[bool, Translated("gradients are always dropped after a step")] = True
    max_grad_norm: Annotated[
        float | None, Refused("clipping is not the optimizer's", "set gradient_clipping at the top level")
    ] = None
    fp32_optimizer_states: Annotated[bool, Refused("optimizer states are fp32", "set it to true")] = True


class TorchParams(OptimizerParams):
    """Choices of implementation that torch's own classes take."""

    foreach: Annotated[bool | None, Honoured()] = None
    fused: Annotated[bool | None, Honoured()] = None
    differentiable: Annotated[bool, Honoured()] = False


class AdamWParams(TorchParams):
    """`optimizer.params` of AdamW; without weight_decay none, as in DeepSpeed (torch: 0.01)."""

    lr: Annotated[NonNegative, _NEEDS_GIVEN, Honoured()] = 1e-3
    betas: Annotated[Betas, Auto(), Honoured()] = (0.9, 0.999)
    eps: Annotated[NonNegative, Auto(), Honoured()] = 1e-8
    adam_w_mode: Annotated[
        bool,
        Translated("type AdamW decays weights apart from the gradient in any case; for L2 use type Adam"),
    ] = True
    torch_adam: Annotated[
        bool, Translated("torch's classes are used in any case; without weight_decay, their default holds")
    ] = False
    bias_correction: Annotated[bool, Honoured()] = True
    amsgrad: Annotated[bool, Honoured()] = False
    capturable: Annotated[bool, Honoured()] = False


class AdamParams(AdamWParams):
    """`optimizer.params` of Adam: AdamW unless `adam_w_mode` is false, as DeepSpeed has it."""

    adam_w_mode: Annotated[bool, Honoured()] = True


class SGDParams(TorchParams):
    """`optimizer.params` of SGD."""

    lr: Annotated[NonNegative, _NEEDS_GIVEN, Honoured()] = 1e-3
    momentum: Annotated[NonNegative, Auto(), Honoured()] = 0.0
    dampening: Annotated[float, Honoured()] = 0.0
    nesterov: Annotated[bool, Honoured()] = False


class LionParams(OptimizerParams):
    """`optimizer.params` of Lion; defaults are DeepSpeed's, not the paper's."""

    lr: Annotated[NonNegative, _NEEDS_GIVEN, Honoured()] = 1e-3
    betas: Annotated[Betas, Auto(), Honoured()] = (0.9, 0.999)
    foreach: Annotated[bool | None, _NO_KERNEL_CHOICE] = None
    fused: Annotated[bool | None, _NO_KERNEL_CHOICE] = None


class AdagradParams(TorchParams):
    """`optimizer.params` of Adagrad."""

    lr: Annotated[NonNegative, _NEEDS_GIVEN, Honoured()] = 1e-2
    lr_decay: Annotated[NonNegative, Honoured()] = 0.0
    initial_accumulator_value: Annotated[NonNegative, Honoured()] = 0.0
    eps: Annotated[NonNegative, Auto(), Honoured()] = 1e-10


QUIET = ("maximize", "foreach", "fused", "differentiable", "capturable")
"""Parameters left out of the resolved config while they are at their default."""


@dataclass(frozen=True)
class Unavailable:
    """A type that DeepSpeed or torch knows and that is refused."""

    reason: str
    instead: str


_LATER = "is not available in this version"
_WHOLE_TENSOR = "needs whole matrices or the whole model at once, and optimizers here see shards"

OPTIMIZERS: dict[str, type[OptimizerParams]] = {
    "AdamW": AdamWParams,
    "Adam": AdamParams,
    "SGD": SGDParams,
    "Lion": LionParams,
    "Adagrad": AdagradParams,
}
"""Types built here, by canonical spelling; any case is accepted."""

TORCH_OPTIMIZERS = ("Adadelta", "Adamax", "ASGD", "NAdam", "RAdam", "RMSprop", "Rprop")
"""Elementwise optimizers of torch.optim, accepted without their module as DeepSpeed does."""

UNAVAILABLE_OPTIMIZERS: dict[str, Unavailable] = {
    "OneBitAdam": Unavailable(_LATER, "AdamW"),
    "ZeroOneAdam": Unavailable(_LATER, "AdamW"),
    "OneBitLamb": Unavailable(_LATER, "AdamW"),
    "Lamb": Unavailable(_LATER, "AdamW"),
    "FusedLamb": Unavailable(_LATER, "AdamW"),
    "FusedAdam": Unavailable("is the name of a kernel", "AdamW"),
    "CPUAdam": Unavailable("is the name of a kernel", "AdamW"),
    "DeepSpeedCPUAdam": Unavailable("is the name of a kernel", "AdamW"),
    "Muon": Unavailable(_LATER, "AdamW"),
    "MuAdam": Unavailable(_LATER, "AdamW, with learning rates of your own per parameter group"),
    "MuAdamW": Unavailable(_LATER, "AdamW, with learning rates of your own per parameter group"),
    "MuSGD": Unavailable(_LATER, "SGD, with learning rates of your own per parameter group"),
    "LBFGS": Unavailable(_WHOLE_TENSOR, "AdamW"),
    "Adafactor": Unavailable(_WHOLE_TENSOR, "AdamW"),
    "SparseAdam": Unavailable("needs sparse gradients, which are not reduced here", "AdamW or Adagrad"),
}


class Optimizer(Section):
    """`optimizer`: a type by name or import path, and its parameters."""

    type: Annotated[str, Honoured()]
    params: Annotated[dict[str, Any], Honoured()] = {}
    legacy_fusion: Annotated[bool, Translated("there is one fp16 path")] = False


class OptimizerKeys(Section):
    """Top-level keys about the optimizer."""

    optimizer: Annotated[Optimizer | None, Honoured()] = None
    gradient_clipping: Annotated[NonNegative | None, Auto(), Honoured()] = 0.0
