"""Buckets keep order, skip what has no gradient, and bound what is alive at once."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from unishard.optim.foreach import buckets, grads_of


@given(st.lists(st.tuples(st.integers(0, 9), st.booleans()), max_size=12), st.integers(1, 12))
def test_buckets(pieces: list[tuple[int, bool]], limit: int) -> None:
    params = []
    for numel, has_grad in pieces:
        param = torch.nn.Parameter(torch.zeros(numel))
        param.grad = torch.zeros(numel) if has_grad else None
        params.append(param)
    made = list(buckets(params, limit))
    kept = [param for param in params if param.grad is not None]
    assert [id(p) for bucket in made for p in bucket] == [id(p) for p in kept]
    assert all(bucket and (len(bucket) == 1 or sum(p.numel() for p in bucket) <= limit) for bucket in made)
    assert [id(g) for bucket in made for g in grads_of(bucket)] == [id(p.grad) for p in kept]
