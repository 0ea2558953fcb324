"""Every wait is needed: with side work as late as it may be, training is right, and without any one wait it is not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tests.sharding.step_harness import check_parity, inputs_for
from tests.sharding.test_cost import shard
from tests.sharding.test_step import UNITS, Stack, plain, squared

import unishard
from unishard.dist.collectives import Works
from unishard.dist.in_place import InPlaceAllReduce, InPlaceGather, InPlaceReduce
from unishard.sharding.schedule import ReductionQueue, Schedule
from unishard.testing import RankFailure
from unishard.testing.transport import late_reads, natively_late

Ranks = Callable[..., Any]


def trains() -> None:
    check_parity(plain, squared, UNITS, presets=["NO_SHARD", "ZERO1", "ZERO2", "SHARD_GRAD_OP", "ZERO3"])


def writes_after_evaluation() -> None:
    """Parameters may be written right after a forward without gradients."""
    sharded = shard(Stack(), "ZERO3")
    inputs = inputs_for(0, 0)
    with torch.no_grad():
        expected = sharded.module(inputs)
        for _ in range(6):
            found = sharded.module(inputs)
            for group in sharded.groups:
                group.buffer.shard.mul_(-1.0)
                group.buffer.shard.mul_(-1.0)
            assert torch.equal(found, expected)
            for factor in (2.0, 0.5):
                for group in sharded.groups:
                    group.buffer.shard.mul_(factor)
                sharded.module(inputs)


def writes_after_step() -> None:
    """And right after a step, which gathers what it updated."""
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "sharding": "ZERO1",
        "optimizer": {"type": "SGD", "params": {"lr": 0.0}},
    }
    engine = unishard.initialize(model=Stack(), config=config).engine
    before = [p.detach().clone() for p in engine.module.parameters()]
    for step in range(6):
        engine.backward(engine(inputs_for(0, step)).sum())
        engine.step()
        with torch.no_grad():
            for param in engine.module.parameters():
                param.mul_(2.0 if step % 2 == 0 else 0.5)
    for param, value in zip(engine.module.parameters(), before, strict=True):
        torch.testing.assert_close(param, value, rtol=1e-5, atol=1e-6)


def writes_gradients() -> None:
    """All-reduced gradients may be scaled right after backward."""
    sharded = shard(Stack(), "NO_SHARD")
    expected: list[torch.Tensor] = []
    for _ in range(6):
        sharded.module(inputs_for(0, 0)).sum().backward()
        shards = [group.gradients.shard for group in sharded.groups]
        found = [shard.clone() for shard in shards if shard is not None]
        for gradient in shards:
            assert gradient is not None
            gradient.mul_(-1.0)
        torch.testing.assert_close(found, expected or found)
        expected = found
        for group in sharded.groups:
            group.gradients.clear()


SCENARIOS: dict[str, Callable[[], None]] = {
    "trains": trains,
    "writes_after_evaluation": writes_after_evaluation,
    "writes_after_step": writes_after_step,
    "writes_gradients": writes_gradients,
}


def nothing(*args: Any, **kwargs: Any) -> None:
    return None


def half_done(self: Any) -> None:
    """The first phase only."""
    self._reduce.wait()


def finish_without_waiting(self: Works) -> None:
    finish, self._finish = self._finish, None
    if finish is not None:
        finish()


def end_without_flush(self: ReductionQueue) -> None:
    for group in self.sequence[self._position :]:
        if group in self._across:
            self._take_turn(group)
    self._launch_small()


MUTATIONS: dict[str, tuple[str, str, type, str, Any]] = {
    "a gather is not waited for": ("trains", "memory", InPlaceGather, "wait", nothing),
    "a reduction is not waited for": ("trains", "memory", InPlaceReduce, "wait", nothing),
    "an all-reduce is left after its first phase": ("trains", "memory", InPlaceAllReduce, "wait", half_done),
    "the end of backward does not wait for reductions": (
        "trains", "memory", ReductionQueue, "flush", end_without_flush,
    ),
    "the end of backward does not wait for readers": ("writes_gradients", "memory", Schedule, "drain", nothing),
    "an evaluation does not wait for readers": (
        "writes_after_evaluation", "memory", Schedule, "drain", nothing,
    ),
    "a step does not wait for readers": ("writes_after_step", "memory", Schedule, "drain", nothing),
    "a native collective is not waited for": ("trains", "native", Works, "wait", finish_without_waiting),
}  # fmt: skip


@contextmanager
def mutated(name: str | None) -> Iterator[None]:
    if name is None:
        yield
        return
    _, _, owner, attribute, replacement = MUTATIONS[name]
    original = getattr(owner, attribute)
    setattr(owner, attribute, replacement)
    try:
        yield
    finally:
        setattr(owner, attribute, original)


def run(scenario: str, transport: str, mutation: str | None) -> None:
    with late_reads() if transport == "memory" else natively_late():
        with mutated(mutation):
            SCENARIOS[scenario]()


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_late_reads_change_nothing(scenario: str, ranks: Ranks) -> None:
    ranks(run, scenario, "memory", None, world_size=3)


def test_late_collectives_change_nothing(ranks: Ranks) -> None:
    ranks(run, "trains", "native", None, world_size=3)


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_without_a_wait_training_is_wrong(mutation: str, ranks: Ranks) -> None:
    scenario, transport = MUTATIONS[mutation][:2]
    with pytest.raises(RankFailure):
        ranks(run, scenario, transport, mutation, world_size=3, timeout=30)
