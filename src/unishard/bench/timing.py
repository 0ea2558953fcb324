"""Throughput of one contestant in one round, in rank processes that all contestants share."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist

from unishard.bench.contestant import Contestant, Trainer
from unishard.bench.data import Batch, global_batches, micro_batches
from unishard.bench.memory import live_bytes, trim
from unishard.bench.plan import Plan
from unishard.sharding.host_memory import reset_heap

_REFERENCE_WIDTH = 1024
_REFERENCE_REPEATS = 4


@dataclass(frozen=True)
class RankTiming:
    """One rank's measurement of one round. Seconds; the reference product in GFLOP/s; bytes left after closing."""

    seconds: float
    step_seconds: list[float]
    losses: list[float]
    reference: float
    left_behind: int


def time_contestant(contestant: Contestant, plan: Plan) -> RankTiming:
    """Build, warm up, time `plan.steps` steps between barriers, tear down. All ranks call together.

    Contestants that run alone are called on one rank only, and get all ranks' threads.
    """
    threads = torch.get_num_threads()
    if contestant.alone:
        torch.set_num_threads(threads * plan.ranks)
    try:
        trim()
        reset_heap()  # unishard sets it up for itself, and other contestants share the process
        before = live_bytes()
        timing = _time(contestant, plan)
    finally:
        torch.set_num_threads(threads)
    trim()
    return RankTiming(*timing, left_behind=max(0, live_bytes() - before))


def _time(contestant: Contestant, plan: Plan) -> tuple[float, list[float], list[float], float]:
    trainer = contestant.build(plan)
    batches = [batches_of(contestant, plan, step) for step in range(plan.warmup + plan.steps)]
    meet = (lambda: None) if contestant.alone else dist.barrier
    try:
        references = [reference_product()]
        losses = [trainer.step(batch) for batch in batches[: plan.warmup]]
        seconds, step_seconds, timed = _timed_steps(trainer, batches[plan.warmup :], meet)
        references.append(reference_product())
    finally:
        trainer.close()
    return seconds, step_seconds, losses + timed, sum(references) / len(references)


def _timed_steps(
    trainer: Trainer, batches: list[list[Batch]], meet: Callable[[], object]
) -> tuple[float, list[float], list[float]]:
    step_seconds, losses = [], []
    meet()
    started = last = time.perf_counter()
    for batch in batches:
        losses.append(trainer.step(batch))
        now = time.perf_counter()
        step_seconds.append(now - last)
        last = now
    meet()
    return time.perf_counter() - started, step_seconds, losses


def batches_of(contestant: Contestant, plan: Plan, step: int) -> list[Batch]:
    """This rank's micro-batches of `step`, or everybody's for a contestant that runs alone."""
    if contestant.alone:
        return global_batches(plan, step)
    return micro_batches(plan, step, dist.get_rank())


def reference_product() -> float:
    """GFLOP/s of fp32 products of two 1024 x 1024 matrices: how fast the machine is at this moment.

    All ranks compute it at the same time, as they do the model.
    """
    a = torch.ones(_REFERENCE_WIDTH, _REFERENCE_WIDTH)
    torch.mm(a, a)
    started = time.perf_counter()
    for _ in range(_REFERENCE_REPEATS):
        torch.mm(a, a)
    seconds = time.perf_counter() - started
    return _REFERENCE_REPEATS * 2 * _REFERENCE_WIDTH**3 / seconds / 1e9
