"""How fast each operation runs here, and how much faster than in plain torch."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from unishard.kernels import reference
from unishard.kernels.rules import AdagradRule, AdamRule, LionRule, Rule, SgdRule
from unishard.kernels.table import active, implementation
from unishard.kernels.target import Target


@dataclass(frozen=True)
class Case:
    """One operation on one choice of dtypes.

    Attributes:
        label: what is measured, in words.
        op: name in the table.
        bytes: what has to cross the memory bus, reads and writes, in one call.
        arguments: of the implementation.
    """

    label: str
    op: str
    bytes: int
    arguments: tuple[Any, ...]


@dataclass(frozen=True)
class Measured:
    """A case with what was found: the fastest of several calls."""

    case: Case
    implementation: str
    gigabytes_per_second: float
    speedup: float
    """The reference's time divided by this one's."""


def cases(numel: int, device: torch.device) -> Iterator[Case]:
    """The cases that `python -m unishard.kernels` measures, each over `numel` elements."""

    def fresh(dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.ones(numel, dtype=dtype, device=device)

    param, first, second = fresh(), fresh(), fresh()
    grad, short_grad, copy = fresh(), fresh(torch.bfloat16), fresh(torch.bfloat16)

    def step(label: str, rule: Rule, target: Target) -> Case:
        read = sum(t.element_size() for _, t in target.tensors() if t is not target.copy)
        written = sum(t.element_size() for _, t in target.tensors() if t is not target.grad)
        return Case(label, rule.op, numel * (read + written), ([target], rule, 2, 0.5))

    moments = (first, second)
    yield step("AdamW, fp32", AdamRule(weight_decay=0.1), Target(param, grad, moments))
    mixed = Target(param, short_grad, moments, copy)
    yield step("AdamW, bf16 gradient, bf16 copy", AdamRule(weight_decay=0.1), mixed)
    yield step("Lion, fp32", LionRule(), Target(param, grad, (first,)))
    yield step("Adagrad, fp32", AdagradRule(), Target(param, grad, (first,)))
    yield step("SGD with momentum, fp32", SgdRule(momentum=0.9), Target(param, grad, (first,)))
    yield Case("squared norm, fp32", "squared_norm", 4 * numel, ([grad],))
    yield Case("squared norm, bf16", "squared_norm", 2 * numel, ([short_grad],))
    yield Case("sum of 4 bf16 pieces", "sum_pieces", 12 * numel, (param, [short_grad, copy] * 2, 0.25, 0.0))
    yield Case("pack, fp32 to bf16", "pack", 6 * numel, (copy, [grad], 1.0))
    yield Case("pack, bf16 to fp32", "pack", 6 * numel, (param, [short_grad], 1.0))


def measure(case: Case, device: torch.device, budget: float = 0.3) -> Measured:
    """Time the active implementation and the reference in turns for `budget` seconds, once each at least."""
    kernel = implementation(case.op, device.type)
    plain: Callable[..., Any] = getattr(reference, case.op)
    seconds(kernel, case, device)
    pairs = []
    end = time.perf_counter() + budget
    while not pairs or (time.perf_counter() < end and len(pairs) < 20):
        pairs.append((seconds(kernel, case, device), seconds(plain, case, device)))
    # The fastest, since other programs only ever make it slower.
    ours, theirs = (min(times) for times in zip(*pairs, strict=True))
    return Measured(case, active(device.type), case.bytes / ours / 1e9, theirs / ours)


def seconds(kernel: Callable[..., Any], case: Case, device: torch.device) -> float:
    """Wall time of one call, including what the device has queued."""
    _finish(device)
    start = time.perf_counter()
    kernel(*case.arguments)
    _finish(device)
    return time.perf_counter() - start


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
