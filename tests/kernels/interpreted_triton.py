"""Cases for the Triton kernels under its interpreter, which must be chosen before Triton is imported.

`test_triton.py` runs this file in a process of its own, with TRITON_INTERPRET=1.
"""

from __future__ import annotations

import math

import pytest
import torch
from tests.kernels.cases import (
    BF16,
    DTYPE_IDS,
    DTYPE_PAIRS,
    DTYPES,
    FLOATS,
    FP32,
    RULES,
    assert_near,
    assert_same_target,
    clone,
    make_target,
    pieces,
    undecided_signs,
)

from unishard.kernels import AdamRule, reference, table
from unishard.kernels import triton as kernels

SIZES = (1, 17, 1024, 2049)


@pytest.mark.parametrize("dtypes", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize("name", RULES)
def test_steps_equal_the_reference(name, dtypes):
    rule = RULES[name]
    for step, numel in enumerate(SIZES, start=1):
        ours = make_target(rule, dtypes, numel, seed=step, offset=step % 2)
        theirs = clone(ours)
        undecided = undecided_signs(rule, ours, 0.25)
        getattr(kernels, rule.op)([ours], rule, step, 0.25)
        getattr(reference, rule.op)([theirs], rule, step, 0.25)
        assert_same_target(ours, theirs, undecided)


@pytest.mark.parametrize("name", RULES)
def test_non_finite_gradients(name):
    rule = RULES[name]
    for bad in (math.nan, math.inf, -math.inf):
        ours = make_target(rule, (FP32, FP32, FP32, BF16), 37)
        ours.grad[5] = bad
        theirs = clone(ours)
        getattr(kernels, rule.op)([ours], rule, 2, 1.0)
        getattr(reference, rule.op)([theirs], rule, 2, 1.0)
        assert_same_target(ours, theirs)


@pytest.mark.parametrize("dtype", FLOATS)
def test_squared_norm(dtype, monkeypatch):
    monkeypatch.setattr(
        "unishard.kernels.triton.flat.PROGRAMS", 3
    )  # so that programs go around more than once
    tensors = [piece for numel in (*SIZES, 9001) for piece in pieces(1, dtype, numel)]
    exact = sum(tensor.double().square().sum().item() for tensor in tensors)
    assert kernels.squared_norm(tensors).item() == pytest.approx(exact, rel=1e-12)
    for bad in (math.nan, math.inf):
        tensors[-1][-1] = bad
        assert not kernels.squared_norm(tensors).isfinite()


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("count", [1, 3, 17])
def test_sum_pieces(dtype, count):
    for numel in SIZES:
        parts = pieces(count, dtype, numel)
        for scale, beta in ((1.0, 0.0), (0.25, 0.5)):
            ours = torch.full((numel,), math.nan if beta == 0 else 2.0)
            theirs = ours.clone()
            kernels.sum_pieces(ours, parts, scale, beta)
            reference.sum_pieces(theirs, parts, scale, beta)
            assert_near(f"{numel} elements, scale {scale}, beta {beta}", ours, theirs)


def test_sum_pieces_into_one_of_the_pieces():
    parts = pieces(4, FP32, 2049)
    expected = torch.empty(2049)
    reference.sum_pieces(expected, parts, 1.0, 0.0)
    kernels.sum_pieces(parts[2], parts, 1.0, 0.0)
    assert torch.equal(parts[2], expected)


@pytest.mark.parametrize(("source", "destination"), DTYPE_PAIRS)
def test_pack(source, destination):
    for scale in (1.0, 0.3):
        tensors = [piece for i, n in enumerate(SIZES) for piece in pieces(1, source, n, seed=i)]
        ours = torch.zeros(sum(SIZES), dtype=destination)
        theirs = torch.zeros_like(ours)
        kernels.pack(ours, tensors, scale)
        reference.pack(theirs, tensors, scale)
        # Near, not equal: the interpreter cuts fp32 to bf16 where a GPU rounds to nearest even.
        assert_near(f"scale {scale}", ours, theirs)


def test_forced_by_the_environment_they_serve_the_cpu(monkeypatch):
    monkeypatch.setenv(table.VARIABLE, "triton")
    table._module.cache_clear()
    assert table.implementation(AdamRule.op, "cpu") is kernels.adam
    table._module.cache_clear()
