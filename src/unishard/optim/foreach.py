"""Batching tensors for multi-tensor updates without holding temporaries for the whole shard."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import Tensor

BUCKET_NUMEL = 2**22
"""Elements whose temporaries may be alive at once (16 MiB in fp32), unless one tensor has more."""


def buckets(params: Iterable[Tensor], numel: int = BUCKET_NUMEL) -> Iterator[list[Tensor]]:
    """Yield the parameters that have a gradient, in order, in lists of at most `numel` elements each.

    A tensor larger than `numel` makes a list of its own. Nothing is yielded when no parameter has a gradient.

    >>> import torch
    >>> params = [torch.zeros(n) for n in (3, 2, 9)]
    >>> for p in params: p.grad = torch.zeros_like(p)
    >>> [[p.numel() for p in bucket] for bucket in buckets(params, numel=5)]
    [[3, 2], [9]]
    """
    bucket: list[Tensor] = []
    filled = 0
    for param in params:
        if param.grad is None:
            continue
        if bucket and filled + param.numel() > numel:
            yield bucket
            bucket, filled = [], 0
        bucket.append(param)
        filled += param.numel()
    if bucket:
        yield bucket


def grads_of(bucket: Iterable[Tensor]) -> list[Tensor]:
    """The gradients of a bucket, in its order."""
    return [param.grad for param in bucket if param.grad is not None]
