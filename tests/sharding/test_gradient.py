"""Gradients of one group on their way: what must not depend on how they travelled."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tests.sharding.step_harness import inputs_for
from tests.sharding.test_cost import shard
from tests.sharding.test_step import Stack
from torch import Tensor

from unishard.testing.transport import through_sockets

PRESETS = ["NO_SHARD", "ZERO1", "ZERO2", "ZERO3"]


def mean_gradients(preset: str, predivide: float, unreduced: int) -> list[Tensor]:
    """Of three micro-batches, the first `unreduced` of which stay on their rank."""
    torch.manual_seed(0)
    sharded = shard(Stack(), preset)
    for group in sharded.groups:
        group.gradients.predivide = predivide
    for micro in range(3):
        for unit in sharded.units:
            unit.reduce_gradients = unit.reduce_across_replicas = micro >= unreduced
        sharded.module(inputs_for(dist.get_rank(), micro)).pow(2).mean().backward()
    return [g.gradients.shard for g in sharded.groups if g.gradients.shard is not None]


def dividing_before_or_after(preset: str, transport: str) -> None:
    with through_sockets() if transport == "sockets" else nullcontext():
        expected = mean_gradients(preset, 1.0, 0)
        assert len(expected) == 4
        for predivide, unreduced in ((4.0, 0), (4.0, 2), (1.0, 2)):
            found = mean_gradients(preset, predivide, unreduced)
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("transport", ["memory", "sockets"])
@pytest.mark.parametrize("preset", PRESETS)
def test_prescaling_and_accumulation_change_nothing(
    preset: str, transport: str, ranks: Callable[..., Any]
) -> None:
    ranks(dividing_before_or_after, preset, transport)


def packed_beside_single() -> None:
    """The first rank accumulated locally, the second had nothing to accumulate: they publish differently."""
    for preset in ("ZERO2", "ZERO3"):
        sharded = shard(Stack(), preset)
        torch.manual_seed(0)
        reference = Stack()
        with torch.no_grad():
            for group in sharded.groups:
                group.unshard()
                group.wait()
            named = dict(sharded.module.named_parameters())
            for name, param in reference.named_parameters():
                param.copy_(named[name])
        for group in sharded.groups:
            group.reshard()
        first = sharded.groups[1]
        for unit in sharded.units:
            unit.reduce_gradients = False
        sharded.module(inputs_for(dist.get_rank(), 0)).pow(2).mean().backward()
        if dist.get_rank() == 1:
            first.gradients.forget_fresh()  # as if this rank had not used the block
        for unit in sharded.units:
            unit.reduce_gradients = True
        sharded.module(inputs_for(dist.get_rank(), 1)).pow(2).mean().backward()
        world = dist.get_world_size()
        for rank in range(world):
            for micro in (0, 1):
                if micro == 1 or rank == 0:
                    (reference(inputs_for(rank, micro)).pow(2).mean() / world).backward()
        layout = first.buffer.layout
        found = first.gradients.shard
        assert found is not None
        for index, registration in enumerate(first.registrations):
            grad: Any = dict(reference.named_parameters())[registration.fqn].grad
            piece = [p for p in layout.pieces(dist.get_rank()) if p.index == index]  # pyright: ignore
            for p in piece:
                expected = grad.flatten()[p.param_start : p.param_start + p.numel]
                torch.testing.assert_close(first.buffer.local(index, found), expected, rtol=1e-5, atol=1e-7)


def test_ranks_may_publish_packed_and_single(ranks: Callable[..., Any]) -> None:
    ranks(packed_beside_single)
