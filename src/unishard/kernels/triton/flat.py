"""Norms, sums and packing over flat memory."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from unishard.kernels.triton.launch import blocks, launch

# Programs that share one tensor's squares: enough to fill a GPU, few enough that adding their sums costs nothing.
# A constant, so that the order of additions, and with it the last bit, does not depend on the device.
PROGRAMS = 1024


@triton.jit
def squares_kernel(tensor, sums, numel, BLOCK: tl.constexpr):
    total = tl.zeros((BLOCK,), dtype=tl.float64)
    first = tl.program_id(0).to(tl.int64) * BLOCK
    stride = tl.num_programs(0).to(tl.int64) * BLOCK
    for start in range(first, numel, stride):
        at = start + tl.arange(0, BLOCK)
        x = tl.load(tensor + at, mask=at < numel, other=0.0).to(tl.float32).to(tl.float64)
        total += x * x
    tl.store(sums + tl.program_id(0), tl.sum(total))


@triton.jit
def sum_kernel(
    out,
    addresses,
    like,
    count,
    numel,
    scale,
    beta,
    HAS_BETA: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """`like` is one of the pieces, for its dtype; all are found through `addresses`."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < numel
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for index in range(count):
        piece = tl.load(addresses + index).to(tl.pointer_type(like.dtype.element_ty))
        if ALIGNED:
            piece = tl.multiple_of(piece, 16)
        total += tl.load(piece + at, mask=inside, other=0.0).to(tl.float32)
    total *= scale
    if HAS_BETA:
        total += tl.load(out + at, mask=inside, other=0.0) * beta
    tl.store(out + at, total, mask=inside)


@triton.jit
def convert_kernel(out, tensor, numel, scale, SCALED: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < numel
    value = tl.load(tensor + at, mask=inside, other=0.0)
    if SCALED:
        value = value.to(tl.float32) * scale
    tl.store(out + at, value.to(out.dtype.element_ty), mask=inside)


def squared_norm(tensors: Sequence[Tensor]) -> Tensor:
    programs = [min(PROGRAMS, blocks(tensor.numel())) for tensor in tensors]
    sums = torch.empty(sum(programs), dtype=torch.float64, device=tensors[0].device)
    start = 0
    for tensor, count in zip(tensors, programs, strict=True):
        launch(squares_kernel, count, tensor, sums[start:], tensor.numel())
        start += count
    return sums.sum()


def sum_pieces(out: Tensor, pieces: Sequence[Tensor], scale: float, beta: float) -> None:
    listed = [piece.data_ptr() for piece in pieces]
    launch(
        sum_kernel,
        blocks(out.numel()),
        out,
        torch.tensor(listed, dtype=torch.int64, device=out.device),
        pieces[0],
        len(pieces),
        out.numel(),
        scale,
        beta,
        HAS_BETA=beta != 0,
        ALIGNED=all(address % 16 == 0 for address in listed),
    )


def pack(out: Tensor, tensors: Sequence[Tensor], scale: float) -> None:
    flat, start = out.view(-1), 0
    for tensor in tensors:
        numel = tensor.numel()
        home = flat[start : start + numel]
        launch(convert_kernel, blocks(numel), home, tensor, numel, scale, SCALED=scale != 1.0)
        start += numel
