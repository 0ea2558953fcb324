"""The contestants' data: sequences with something to learn, made from the seed alone."""

from __future__ import annotations

import torch
from torch import Tensor

from unishard.bench.plan import Plan

Batch = tuple[Tensor, Tensor]
"""Inputs and targets, each (B, T) int64."""


def micro_batches(plan: Plan, step: int, rank: int) -> list[Batch]:
    """What `rank` trains on in `step`: one batch for each accumulation step.

    >>> [(x.shape, y.shape) for x, y in micro_batches(Plan(size="tiny"), step=0, rank=0)]
    [(torch.Size([2, 32]), torch.Size([2, 32]))]
    """
    shape = plan.shape
    generator = torch.Generator().manual_seed((plan.seed * 1_000_003 + step) * 4099 + rank)
    count = shape.micro_batch * plan.accumulation
    tokens = _sequences(count, shape.sequence + 1, shape.vocabulary, generator)
    parts = tokens.chunk(plan.accumulation)
    return [(part[:, :-1].contiguous(), part[:, 1:].contiguous()) for part in parts]


def global_batches(plan: Plan, step: int) -> list[Batch]:
    """The same data for one process that trains alone: all ranks' sequences in each batch."""
    per_rank = [micro_batches(plan, step, rank) for rank in range(plan.ranks)]
    return [
        (torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches]))
        for batches in zip(*per_rank, strict=True)
    ]


def _sequences(count: int, length: int, vocabulary: int, generator: torch.Generator) -> Tensor:
    # Frequencies fall like Zipf's, and every second token follows from the one before: both can be learnt.
    uniform = torch.rand(count, length, generator=generator)
    tokens = (vocabulary**uniform).long().clamp_(1, vocabulary) - 1
    follows = torch.rand(count, length, generator=generator) < 0.5
    for i in range(1, length):
        tokens[:, i] = torch.where(follows[:, i], (5 * tokens[:, i - 1] + 7) % vocabulary, tokens[:, i])
    return tokens
