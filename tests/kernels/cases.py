"""The cases that every implementation must pass: rules, dtypes, lengths, and how close is close enough."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from unishard.kernels import AdagradRule, AdamRule, LionRule, Rule, SgdRule, Target

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
FLOATS = (FP32, BF16, FP16)

# 0, 1, odd, not a multiple of a register, just around a block (512) and a chunk (32768), several chunks and threads.
SIZES = (0, 1, 3, 17, 511, 513, 32769, 140_001)

RULES: dict[str, Rule] = {
    "adamw": AdamRule(lr=1e-2, weight_decay=0.1),
    "adam_l2": AdamRule(lr=1e-2, weight_decay=0.1, decoupled=False),
    "adamw_uncorrected": AdamRule(lr=1e-2, weight_decay=0.1, bias_correction=False),
    "adam_uncorrected": AdamRule(lr=1e-2, betas=(0.3, 0.6), decoupled=False, bias_correction=False),
    "lion": LionRule(lr=1e-2, weight_decay=0.1),
    "lion_fast": LionRule(lr=1e-2, betas=(0.4, 0.3)),
    "adagrad": AdagradRule(lr=1e-2, lr_decay=0.1, weight_decay=0.1),
    "sgd": SgdRule(lr=1e-2, weight_decay=0.1),
    "sgd_momentum": SgdRule(lr=1e-2, momentum=0.9, dampening=0.1, weight_decay=0.1),
    "sgd_nesterov": SgdRule(lr=1e-2, momentum=0.9, nesterov=True),
}

# param, grad, state, copy
DTYPES = [
    *((FP32, grad, state, copy) for grad in FLOATS for state in (FP32, BF16) for copy in (None, BF16, FP16)),
    *((param, grad, state, None) for param in (BF16, FP16) for grad in FLOATS for state in (FP32, BF16)),
]

DTYPE_IDS = ["-".join("none" if d is None else str(d).removeprefix("torch.") for d in row) for row in DTYPES]

# Results of one fp32 operation more or less, and then at most one unit in the last place of the stored dtype.
RELATIVE = {FP32: 4e-6, BF16: 2**-7, FP16: 2**-10, torch.float64: 1e-6}


def make_target(
    rule: Rule, dtypes: tuple[torch.dtype, ...], numel: int, *, seed: int = 0, offset: int = 0
) -> Target:
    """Random tensors; `offset` elements into their storages, so that addresses are not aligned."""
    param, grad, state, copy = dtypes
    random = torch.Generator().manual_seed(seed)

    def fresh(dtype: torch.dtype, scale: float = 1.0) -> Tensor:
        values = torch.randn(numel + offset, generator=random) * scale
        return values.to(dtype)[offset:]

    # Second moments and sums of squares are not negative.
    states = tuple(fresh(state).abs() * 0.1 for _ in rule.state_names)
    return Target(
        fresh(param), fresh(grad, 4.0), states, None if copy is None else torch.zeros_like(fresh(copy))
    )


def clone(target: Target) -> Target:
    return Target(
        target.param.clone(),
        target.grad.clone(),
        tuple(state.clone() for state in target.state),
        None if target.copy is None else target.copy.clone(),
    )


def assert_near(name: str, got: Tensor, wanted: Tensor) -> None:
    assert got.dtype == wanted.dtype, name
    relative = RELATIVE[wanted.dtype]
    torch.testing.assert_close(
        got, wanted, rtol=relative, atol=relative / 8, equal_nan=True, msg=lambda text: f"{name}: {text}"
    )


def assert_same_target(got: Target, wanted: Target, undecided: Tensor | None = None) -> None:
    """Near in every tensor; parameters only where `undecided` is false."""
    for (name, mine), (_, theirs) in zip(got.tensors(), wanted.tensors(), strict=True):
        if undecided is not None and name in ("param", "copy"):
            mine, theirs = mine[~undecided], theirs[~undecided]
        assert_near(name, mine, theirs)


def undecided_signs(rule: Rule, before: Target, grad_scale: float) -> Tensor | None:
    """Where Lion's direction cancels to rounding error, whose sign is nobody's business."""
    if not isinstance(rule, LionRule):
        return None
    beta, momentum, grad = rule.betas[0], before.state[0].double(), before.grad.double() * grad_scale
    return (beta * momentum + (1 - beta) * grad).abs() < 1e-6 * (momentum.abs() + grad.abs())


def bits(tensor: Tensor) -> Tensor:
    return tensor.view(torch.int32 if tensor.element_size() == 4 else torch.int16)


def assert_same_bits(got: Tensor, wanted: Tensor, name: str = "") -> None:
    """Equal bit for bit, except that any NaN equals any other."""
    nan = got.isnan() & wanted.isnan()
    assert torch.equal(bits(got)[~nan], bits(wanted)[~nan]), name


def pieces(count: int, dtype: torch.dtype, numel: int, seed: int = 1) -> list[Tensor]:
    random = torch.Generator().manual_seed(seed)
    return [torch.randn(numel, generator=random).to(dtype) for _ in range(count)]


DTYPE_PAIRS = list(itertools.product(FLOATS, FLOATS))
