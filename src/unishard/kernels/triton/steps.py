"""Optimizer steps: one launch for each target, each element read and written once.

Division and square root are rounded as IEEE says and multiply-adds are not fused, which costs nothing beside the memory
traffic, so that a step on a GPU is the step of the compiled CPU kernels.
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from unishard.kernels.rules import AdagradRule, AdamRule, LionRule, SgdRule
from unishard.kernels.target import Target
from unishard.kernels.triton.launch import blocks, launch


@triton.jit
def _places(numel, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    return at, at < numel


@triton.jit
def _get(pointer, at, inside):
    return tl.load(pointer + at, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _put(pointer, at, inside, value):
    tl.store(pointer + at, value.to(pointer.dtype.element_ty), mask=inside)


@triton.jit
def _lerp(value, target, weight, complement):
    """From the nearer end, as torch does: exact at weights 0 and 1."""
    difference = target - value
    return tl.where(weight < 0.5, value + weight * difference, target - complement * difference)


@triton.jit
def adam_kernel(
    param,
    grad,
    first,
    second,
    copy,
    numel,
    grad_scale,
    keep,
    l2,
    beta1,
    one_minus_beta1,
    beta2,
    one_minus_beta2,
    root_correction,
    eps,
    step_size,
    HAS_L2: tl.constexpr,
    HAS_COPY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    at, inside = _places(numel, BLOCK)
    w = _get(param, at, inside)
    g = _get(grad, at, inside) * grad_scale
    if HAS_L2:
        g += w * l2
    m = _lerp(_get(first, at, inside), g, one_minus_beta1, beta1)
    v = _get(second, at, inside) * beta2 + one_minus_beta2 * g * g
    denominator = tl.div_rn(tl.sqrt_rn(v), root_correction) + eps
    w = w * keep - step_size * tl.div_rn(m, denominator)
    _put(first, at, inside, m)
    _put(second, at, inside, v)
    _put(param, at, inside, w)
    if HAS_COPY:
        _put(copy, at, inside, w)


@triton.jit
def lion_kernel(
    param,
    grad,
    momentum,
    copy,
    numel,
    grad_scale,
    keep,
    beta1,
    one_minus_beta1,
    beta2,
    one_minus_beta2,
    lr,
    HAS_COPY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    at, inside = _places(numel, BLOCK)
    g = _get(grad, at, inside) * grad_scale
    m = _get(momentum, at, inside)
    direction = _lerp(m, g, one_minus_beta1, beta1)
    sign = tl.where(
        direction > 0, 1.0, tl.where(direction < 0, -1.0, 0.0)
    )  # NaN has no sign, as in torch.sign
    w = _get(param, at, inside) * keep - lr * sign
    _put(momentum, at, inside, _lerp(m, g, one_minus_beta2, beta2))
    _put(param, at, inside, w)
    if HAS_COPY:
        _put(copy, at, inside, w)


@triton.jit
def adagrad_kernel(
    param,
    grad,
    total,
    copy,
    numel,
    grad_scale,
    l2,
    eps,
    step_size,
    HAS_L2: tl.constexpr,
    HAS_COPY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    at, inside = _places(numel, BLOCK)
    w = _get(param, at, inside)
    g = _get(grad, at, inside) * grad_scale
    if HAS_L2:
        g += w * l2
    s = _get(total, at, inside) + g * g
    w -= step_size * tl.div_rn(g, tl.sqrt_rn(s) + eps)
    _put(total, at, inside, s)
    _put(param, at, inside, w)
    if HAS_COPY:
        _put(copy, at, inside, w)


@triton.jit
def sgd_kernel(
    param,
    grad,
    buffer,
    copy,
    numel,
    grad_scale,
    l2,
    lr,
    momentum,
    one_minus_dampening,
    HAS_L2: tl.constexpr,
    HAS_BUFFER: tl.constexpr,
    FIRST: tl.constexpr,
    NESTEROV: tl.constexpr,
    HAS_COPY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    at, inside = _places(numel, BLOCK)
    w = _get(param, at, inside)
    g = _get(grad, at, inside) * grad_scale
    if HAS_L2:
        g += w * l2
    if HAS_BUFFER:
        b = g
        if not FIRST:
            b = _get(buffer, at, inside) * momentum + g * one_minus_dampening
        _put(buffer, at, inside, b)
        g = g + b * momentum if NESTEROV else b
    w -= g * lr
    _put(param, at, inside, w)
    if HAS_COPY:
        _put(copy, at, inside, w)


def adam(targets: Sequence[Target], rule: AdamRule, step: int, grad_scale: float) -> None:
    beta1, beta2 = rule.betas
    for target in targets:
        launch(
            adam_kernel,
            blocks(target.param.numel()),
            target.param,
            target.grad,
            *target.state,
            *_copy(target),
            target.param.numel(),
            grad_scale,
            rule.keep,
            rule.l2,
            beta1,
            1 - beta1,
            beta2,
            1 - beta2,
            rule.root_correction(step),
            rule.eps,
            rule.step_size(step),
            HAS_L2=rule.l2 != 0,
            HAS_COPY=target.copy is not None,
        )


def lion(targets: Sequence[Target], rule: LionRule, step: int, grad_scale: float) -> None:
    beta1, beta2 = rule.betas
    for target in targets:
        launch(
            lion_kernel,
            blocks(target.param.numel()),
            target.param,
            target.grad,
            *target.state,
            *_copy(target),
            target.param.numel(),
            grad_scale,
            rule.keep,
            beta1,
            1 - beta1,
            beta2,
            1 - beta2,
            rule.lr,
            HAS_COPY=target.copy is not None,
        )


def adagrad(targets: Sequence[Target], rule: AdagradRule, step: int, grad_scale: float) -> None:
    for target in targets:
        launch(
            adagrad_kernel,
            blocks(target.param.numel()),
            target.param,
            target.grad,
            *target.state,
            *_copy(target),
            target.param.numel(),
            grad_scale,
            rule.weight_decay,
            rule.eps,
            rule.step_size(step),
            HAS_L2=rule.weight_decay != 0,
            HAS_COPY=target.copy is not None,
        )


def sgd(targets: Sequence[Target], rule: SgdRule, step: int, grad_scale: float) -> None:
    for target in targets:
        launch(
            sgd_kernel,
            blocks(target.param.numel()),
            target.param,
            target.grad,
            *(target.state or (target.param,)),
            *_copy(target),
            target.param.numel(),
            grad_scale,
            rule.weight_decay,
            rule.lr,
            rule.momentum,
            1 - rule.dampening,
            HAS_L2=rule.weight_decay != 0,
            HAS_BUFFER=bool(target.state),
            FIRST=step == 1,
            NESTEROV=rule.nesterov,
            HAS_COPY=target.copy is not None,
        )


def _copy(target: Target) -> tuple[Tensor]:
    # A kernel needs some pointer; without a copy it is never followed.
    return (target.param if target.copy is None else target.copy,)
