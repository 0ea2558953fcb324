"""The compiled CPU kernels (csrc/): tensors in, addresses out.

They run on as many threads as `torch.get_num_threads()` says, those of torch's own OpenMP team where there is one, and
release the interpreter meanwhile.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

import unishard._native as _native
from unishard.kernels.rules import AdagradRule, AdamRule, LionRule, SgdRule
from unishard.kernels.target import Target

_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_ABSENT = (0, 0)


def adam(targets: Sequence[Target], rule: AdamRule, step: int, grad_scale: float) -> None:
    _native.adam(
        [_target(target) for target in targets],
        grad_scale,
        rule.keep,
        rule.l2,
        *rule.betas,
        rule.root_correction(step),
        rule.eps,
        rule.step_size(step),
        torch.get_num_threads(),
    )


def lion(targets: Sequence[Target], rule: LionRule, step: int, grad_scale: float) -> None:
    _native.lion(
        [_target(target) for target in targets],
        grad_scale,
        rule.keep,
        *rule.betas,
        rule.lr,
        torch.get_num_threads(),
    )


def adagrad(targets: Sequence[Target], rule: AdagradRule, step: int, grad_scale: float) -> None:
    _native.adagrad(
        [_target(target) for target in targets],
        grad_scale,
        rule.weight_decay,
        rule.eps,
        rule.step_size(step),
        torch.get_num_threads(),
    )


def sgd(targets: Sequence[Target], rule: SgdRule, step: int, grad_scale: float) -> None:
    _native.sgd(
        [_target(target) for target in targets],
        grad_scale,
        rule.weight_decay,
        rule.lr,
        rule.momentum,
        rule.dampening,
        rule.nesterov,
        step == 1,
        torch.get_num_threads(),
    )


def squared_norm(tensors: Sequence[Tensor]) -> Tensor:
    total = _native.squared_norm([_piece(tensor) for tensor in tensors], torch.get_num_threads())
    return torch.tensor(total, dtype=torch.float64)


def sum_pieces(out: Tensor, pieces: Sequence[Tensor], scale: float, beta: float) -> None:
    arrays = [_array(piece) for piece in pieces]
    _native.sum_pieces(out.data_ptr(), out.numel(), arrays, scale, beta, torch.get_num_threads())


def pack(out: Tensor, tensors: Sequence[Tensor], scale: float) -> None:
    _native.pack(_array(out), [_piece(tensor) for tensor in tensors], scale, torch.get_num_threads())


def instruction_set() -> str:
    """The instruction set in use, the fastest that was compiled and that this processor has."""
    return _native.isa()


def thread_team() -> str:
    """Whose threads do the work: "OpenMP" for torch's, "own" for a pool (in forked processes)."""
    return _native.team()


def _array(tensor: Tensor) -> tuple[int, int]:
    return tensor.data_ptr(), _CODES[tensor.dtype]


def _piece(tensor: Tensor) -> tuple[int, int, int]:
    return tensor.data_ptr(), _CODES[tensor.dtype], tensor.numel()


def _target(target: Target) -> tuple[int, ...]:
    states = [_array(state) for state in target.state] + [_ABSENT, _ABSENT]
    copy = _ABSENT if target.copy is None else _array(target.copy)
    return (target.param.numel(), *_array(target.param), *_array(target.grad), *states[0], *states[1], *copy)
