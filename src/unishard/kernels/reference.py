"""The same operations in plain torch, on any device: what the other implementations are compared with.

Temporaries are bounded by `CHUNK` elements. Writes go through `.data`, so that version counters stay as they are, as
with the kernels that work on addresses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from unishard.kernels.rules import AdagradRule, AdamRule, LionRule, SgdRule
from unishard.kernels.target import Target

CHUNK = 1 << 18


def adam(targets: Sequence[Target], rule: AdamRule, step: int, grad_scale: float) -> None:
    beta1, beta2 = rule.betas

    def change(param: Tensor, grad: Tensor, state: list[Tensor]) -> None:
        first, second = state
        if rule.l2:
            grad.add_(param, alpha=rule.l2)
        first.lerp_(grad, 1 - beta1)
        second.mul_(beta2).add_(grad.mul(1 - beta2).mul_(grad))
        denominator = second.sqrt().div_(rule.root_correction(step)).add_(rule.eps)
        param.mul_(rule.keep)
        param.sub_(first.div(denominator).mul_(rule.step_size(step)))

    _for_each_chunk(targets, grad_scale, change)


def lion(targets: Sequence[Target], rule: LionRule, step: int, grad_scale: float) -> None:
    def change(param: Tensor, grad: Tensor, state: list[Tensor]) -> None:
        momentum = state[0]
        direction = momentum.lerp(grad, 1 - rule.betas[0]).sign_()
        param.mul_(rule.keep)
        param.sub_(direction.mul_(rule.lr))
        momentum.lerp_(grad, 1 - rule.betas[1])

    _for_each_chunk(targets, grad_scale, change)


def adagrad(targets: Sequence[Target], rule: AdagradRule, step: int, grad_scale: float) -> None:
    def change(param: Tensor, grad: Tensor, state: list[Tensor]) -> None:
        if rule.weight_decay:
            grad.add_(param, alpha=rule.weight_decay)
        state[0].add_(grad.square())
        denominator = state[0].sqrt().add_(rule.eps)
        param.sub_(grad.div_(denominator).mul_(rule.step_size(step)))

    _for_each_chunk(targets, grad_scale, change)


def sgd(targets: Sequence[Target], rule: SgdRule, step: int, grad_scale: float) -> None:
    def change(param: Tensor, grad: Tensor, state: list[Tensor]) -> None:
        if rule.weight_decay:
            grad.add_(param, alpha=rule.weight_decay)
        if state:
            buffer = state[0]
            if step == 1:
                buffer.copy_(grad)
            else:
                buffer.mul_(rule.momentum).add_(grad.mul(1 - rule.dampening))
            grad = grad.add_(buffer.mul(rule.momentum)) if rule.nesterov else buffer
        param.sub_(grad.mul(rule.lr))

    _for_each_chunk(targets, grad_scale, change)


def squared_norm(tensors: Sequence[Tensor]) -> Tensor:
    total = torch.zeros((), dtype=torch.float64, device=tensors[0].device)
    for tensor in tensors:
        flat = _flat(tensor)
        for part in _slices(flat.numel()):
            total += flat[part].double().square_().sum()
    return total


def sum_pieces(out: Tensor, pieces: Sequence[Tensor], scale: float, beta: float) -> None:
    into, flats = _flat(out), [_flat(piece) for piece in pieces]
    for part in _slices(into.numel()):
        total = flats[0][part].to(torch.float32, copy=True)
        for flat in flats[1:]:
            total.add_(flat[part].float())
        total.mul_(scale)
        if beta != 0:
            total.add_(into[part] * beta)
        into[part].copy_(total)


def pack(out: Tensor, tensors: Sequence[Tensor], scale: float) -> None:
    into, start = _flat(out), 0
    for tensor in tensors:
        flat = _flat(tensor)
        home = into[start : start + flat.numel()]
        start += flat.numel()
        if scale == 1.0:
            home.copy_(flat)
            continue
        for part in _slices(flat.numel()):
            home[part].copy_(flat[part].float().mul(scale))


def _flat(tensor: Tensor) -> Tensor:
    return tensor.data.view(-1)


def _slices(numel: int) -> Iterator[slice]:
    for start in range(0, numel, CHUNK):
        yield slice(start, start + CHUNK)


def _for_each_chunk(
    targets: Sequence[Target], grad_scale: float, change: Callable[[Tensor, Tensor, list[Tensor]], None]
) -> None:
    """Call `change(param, grad, state)` with fp32 chunks, and store what it made of param and state."""
    for target in targets:
        kept = [_flat(target.param), *map(_flat, target.state)]
        grad = _flat(target.grad)
        copy = None if target.copy is None else _flat(target.copy)
        for part in _slices(grad.numel()):
            # Views of fp32 memory, fp32 copies of the rest.
            param, *state = (flat[part].float() for flat in kept)
            scaled = grad[part].float() * grad_scale
            change(param, scaled, state)
            for flat, value in zip(kept, (param, *state), strict=True):
                if flat.dtype != torch.float32:
                    flat[part].copy_(value)
            if copy is not None:
                copy[part].copy_(param)
