"""The operations: check what was given, then call the implementation of the tensors' device."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from unishard.kernels.checks import (
    FLOATS,
    check_device,
    check_packed,
    check_pieces,
    check_targets,
    check_tensor,
    fail,
    is_fake,
)
from unishard.kernels.rules import Rule
from unishard.kernels.table import implementation
from unishard.kernels.target import Target


def update(targets: Sequence[Target], rule: Rule, *, step: int = 1, grad_scale: float = 1.0) -> None:
    """One optimizer step on every target, each element read and written once.

    Arithmetic is fp32 whatever the dtypes; what is stored in 16 bits is rounded to nearest even.

    Args:
        targets: flat ranges on one device; each has its own dtypes. May be empty.
        rule: which optimizer, with its options; the same for all targets.
        step: number of this step for all targets, counted from 1. SGD's momentum starts at step 1.
        grad_scale: factor on the gradient: 1/loss scale × clip factor. The gradient itself is not written.

    Raises:
        KernelError: a dtype, device, length or layout that kernels do not take, or `step` below 1.

    >>> from unishard.kernels import AdamRule
    >>> w, m, v = torch.ones(3), torch.zeros(3), torch.zeros(3)
    >>> update([Target(w, torch.full((3,), 8.0), (m, v))], AdamRule(lr=0.5), step=1, grad_scale=0.125); w
    tensor([0.5000, 0.5000, 0.5000])
    """
    who = f"update({type(rule).__name__})"
    if step < 1:
        fail(who, f"step is {step}", "the first step is number 1")
    check_targets(who, targets, rule)
    filled = [target for target in targets if target.param.numel()]
    if filled:
        first = filled[0].param
        kernel = implementation(rule.op, first.device.type, fake=is_fake(first))
        kernel(filled, rule, step, grad_scale)


def squared_norm(tensors: Sequence[Tensor]) -> Tensor:
    """The sum of squares over all elements of all tensors, read once.

    Right to 1e-6 of itself (most of the sum is in fp64), and not finite exactly if some element is not finite: there is
    no need to look for infinities separately. On the CPU the same tensors give the same bits for any number of threads.

    Args:
        tensors: fp32, bf16 or fp16, on one device; may be empty.

    Returns:
        A new fp64 tensor without dimensions, on the tensors' device.

    Raises:
        KernelError: a dtype, device or layout that kernels do not take.

    >>> squared_norm([torch.tensor([3.0]), torch.tensor([4.0], dtype=torch.bfloat16)])
    tensor(25., dtype=torch.float64)
    >>> squared_norm([torch.tensor([1.0, float("inf")])]).isfinite().item()
    False
    """
    for index, tensor in enumerate(tensors):
        check_tensor("squared_norm", f"tensors[{index}]", tensor, FLOATS)
    device = check_device("squared_norm", ((f"tensors[{i}]", tensor) for i, tensor in enumerate(tensors)))
    filled = [tensor for tensor in tensors if tensor.numel()]
    if not filled:
        return torch.zeros((), dtype=torch.float64, device=device)
    return implementation("squared_norm", device.type, fake=is_fake(filled[0]))(filled)


def sum_pieces(out: Tensor, pieces: Sequence[Tensor], *, scale: float = 1.0, beta: float = 0.0) -> None:
    """`out = beta·out + scale·(pieces[0] + pieces[1] + …)`, added in that order in fp32, read once.

    Args:
        out: fp32. Not read when `beta` is 0. May be one of the pieces, not overlap one otherwise.
        pieces: one or more tensors of one dtype (fp32, bf16 or fp16), each as long as `out`.
        scale, beta: applied in fp32.

    Raises:
        KernelError: a dtype, device, length or layout that kernels do not take, or no pieces.

    >>> out = torch.tensor([10.0])
    >>> sum_pieces(out, [torch.tensor([1.0]), torch.tensor([2.0])], scale=0.5, beta=1.0); out
    tensor([11.5000])
    """
    check_pieces("sum_pieces", out, pieces)
    named = [("out", out), *((f"pieces[{i}]", piece) for i, piece in enumerate(pieces))]
    device = check_device("sum_pieces", named)
    if out.numel():
        kernel = implementation("sum_pieces", device.type, fake=is_fake(out))
        kernel(out, pieces, scale, beta)


def pack(out: Tensor, tensors: Sequence[Tensor], *, scale: float = 1.0) -> None:
    """Lay `tensors` end to end in `out`, cast and scaled, each element read and written once.

    Args:
        out: fp32, bf16 or fp16; as many elements as the tensors together. Must not overlap them.
        tensors: fp32, bf16 or fp16, in any shapes.
        scale: multiplied in fp32, before rounding to nearest even.

    Raises:
        KernelError: a dtype, device, length or layout that kernels do not take.

    >>> out = torch.empty(3, dtype=torch.bfloat16)
    >>> pack(out, [torch.ones(1), torch.full((2, 1), 2.0)], scale=0.5); out
    tensor([0.5000, 1.0000, 1.0000], dtype=torch.bfloat16)
    """
    check_packed("pack", out, tensors)
    named = [("out", out), *((f"tensors[{i}]", tensor) for i, tensor in enumerate(tensors))]
    device = check_device("pack", named)
    filled = [tensor for tensor in tensors if tensor.numel()]
    if filled:
        implementation("pack", device.type, fake=is_fake(out))(out, filled, scale)


def power_sum(shards: Sequence[torch.Tensor], norm_type: float, device: torch.device) -> torch.Tensor:
    """The sum of p-th powers, or the largest element, of `shards`: fp64, no dimensions.

    >>> power_sum([torch.tensor([3.0, 4.0])], 2.0, torch.device("cpu"))
    tensor(25., dtype=torch.float64)
    """
    if norm_type == 2.0 and device.type == "cpu" and all(s.dtype != torch.float64 for s in shards):
        return squared_norm(shards) if shards else torch.zeros((), dtype=torch.float64, device=device)
    total = torch.zeros((), dtype=torch.float64, device=device)
    for shard in shards:
        if shard.numel():
            norm = torch.linalg.vector_norm(shard, norm_type, dtype=torch.float32).double()
            total = join_powers(total, norm if math.isinf(norm_type) else norm**norm_type, norm_type)
    return total


def join_powers(one: torch.Tensor, other: torch.Tensor, norm_type: float) -> torch.Tensor:
    """The `power_sum` of two disjoint parts together."""
    return torch.maximum(one, other) if math.isinf(norm_type) else one + other
