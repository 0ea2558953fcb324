"""The compiled kernels against the reference, and against themselves on other instruction sets and thread counts."""

from __future__ import annotations

import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from tests.kernels.cases import (
    BF16,
    DTYPE_IDS,
    DTYPE_PAIRS,
    DTYPES,
    FLOATS,
    FP16,
    FP32,
    RULES,
    SIZES,
    assert_near,
    assert_same_bits,
    assert_same_target,
    clone,
    make_target,
    pieces,
    undecided_signs,
)

from unishard.kernels import AdamRule, SgdRule, Target, reference

native = pytest.importorskip("unishard.kernels.native", reason="the extension was not compiled")
_native = native._native

ISAS = _native.isas()


@pytest.fixture(params=ISAS)
def isa(request):
    before = _native.isa()
    _native.set_isa(request.param)
    yield request.param
    _native.set_isa(before)


@pytest.mark.parametrize("dtypes", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize("name", RULES)
def test_steps_equal_the_reference(name, dtypes):
    rule = RULES[name]
    for step, numel in enumerate(SIZES, start=1):
        ours = make_target(rule, dtypes, numel, seed=step, offset=step % 2)
        theirs = clone(ours)
        undecided = undecided_signs(rule, ours, 0.25)
        getattr(native, rule.op)([ours], rule, step, 0.25)
        getattr(reference, rule.op)([theirs], rule, step, 0.25)
        assert_same_target(ours, theirs, undecided)


@pytest.mark.parametrize("name", RULES)
def test_instruction_sets_give_the_same_bits(name, isa):
    rule = RULES[name]
    for dtypes in ((FP32, FP32, FP32, None), (FP32, BF16, BF16, FP16), (FP16, FP16, FP32, None)):
        ours = make_target(rule, dtypes, 33_003)
        wanted = clone(ours)
        getattr(native, rule.op)([ours], rule, 3, 0.25)
        _native.set_isa(ISAS[0])
        getattr(native, rule.op)([wanted], rule, 3, 0.25)
        _native.set_isa(isa)
        assert_same_bits_everywhere(ours, wanted)


@pytest.mark.parametrize("name", ["adamw", "lion", "adagrad", "sgd_momentum"])
@pytest.mark.parametrize("count", [2, 3])
def test_any_number_of_threads_gives_the_same_bits(name, count):
    rule = RULES[name]
    ours = make_target(rule, (FP32, BF16, FP32, BF16), 200_003)
    wanted = clone(ours)
    getattr(native, rule.op)([wanted], rule, 3, 0.25)
    torch.set_num_threads(count)
    getattr(native, rule.op)([ours], rule, 3, 0.25)
    assert_same_bits_everywhere(ours, wanted)


def assert_same_bits_everywhere(ours: Target, wanted: Target) -> None:
    for (name, mine), (_, theirs) in zip(ours.tensors(), wanted.tensors(), strict=True):
        assert_same_bits(mine, theirs, name)


def test_many_targets_of_different_lengths_and_dtypes_step_together():
    rule = AdamRule(weight_decay=0.1)
    targets = [
        make_target(rule, dtypes, numel, seed=i)
        for i, (dtypes, numel) in enumerate(zip(DTYPES, (5, 40_000, 1, 600, 100_000, 7), strict=False))
    ]
    theirs = [clone(target) for target in targets]
    native.adam(targets, rule, 2, 0.5)
    reference.adam(theirs, rule, 2, 0.5)
    for ours, wanted in zip(targets, theirs, strict=True):
        assert_same_target(ours, wanted)


@pytest.mark.parametrize("name", RULES)
def test_non_finite_gradients_reach_what_torch_lets_them_reach(name, isa):
    rule = RULES[name]
    for bad in (math.nan, math.inf, -math.inf):
        ours = make_target(rule, (FP32, FP32, FP32, BF16), 37)
        ours.grad[5] = ours.grad[33] = bad
        theirs = clone(ours)
        getattr(native, rule.op)([ours], rule, 2, 1.0)
        getattr(reference, rule.op)([theirs], rule, 2, 1.0)
        assert_same_target(ours, theirs)
        assert ours.param[:5].isfinite().all()


def test_infinite_weights_do_not_spoil_the_moments_without_decay():
    rule = AdamRule(decoupled=False)
    target = make_target(rule, (FP32, FP32, FP32, None), 4)
    target.param[1] = math.inf
    native.adam([target], rule, 1, 1.0)
    assert target.state[0].isfinite().all()
    assert target.param[1] == math.inf


def test_the_first_momentum_is_the_gradient_and_is_not_read():
    rule = SgdRule(lr=1.0, momentum=0.9, dampening=0.5)
    target = Target(torch.zeros(3), torch.ones(3), (torch.full((3,), math.nan),))
    native.sgd([target], rule, 1, 2.0)
    assert target.state[0].tolist() == [2.0] * 3
    assert target.param.tolist() == [-2.0] * 3


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("numel", SIZES[1:])
def test_squared_norm(dtype, numel, isa):
    tensors = [*pieces(2, dtype, numel), *pieces(1, dtype, 3)]
    exact = sum(tensor.double().square().sum().item() for tensor in tensors)
    results = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        results.append(native.squared_norm(tensors).item())
    assert results[0] == pytest.approx(exact, rel=3e-7)
    assert len(set(results)) == 1
    _native.set_isa(ISAS[0])
    assert native.squared_norm(tensors).item() == results[0]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("position", [0, 63, 64, 1000, 1001])
def test_squared_norm_is_not_finite_exactly_when_an_element_is_not(dtype, position, isa):
    tensor = torch.full((1002,), torch.finfo(dtype).max, dtype=dtype)
    exact = 1002 * float(torch.finfo(dtype).max) ** 2
    assert native.squared_norm([tensor]).item() == pytest.approx(exact, rel=1e-6)
    for bad in (math.nan, math.inf, -math.inf):
        spoiled = tensor.clone()
        spoiled[position] = bad
        assert not math.isfinite(native.squared_norm([spoiled]).item())


@settings(max_examples=60)
@given(
    exponent=st.integers(-140, 120),
    spread=st.integers(0, 20),
    numel=st.integers(1, 3000),
    dtype=st.sampled_from([FP32, BF16]),
)
def test_squared_norm_is_right_at_any_magnitude(exponent, spread, numel, dtype):
    random = torch.Generator().manual_seed(numel)
    exponents = exponent + torch.randint(0, spread + 1, (numel,), generator=random)
    tensor = torch.ldexp(torch.rand(numel, generator=random) + 1, exponents).to(dtype)
    exact = tensor.double().square().sum().item()
    assert native.squared_norm([tensor]).item() == pytest.approx(exact, rel=1e-6, abs=0)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("count", [1, 2, 3, 8, 9, 17])
def test_sum_pieces(dtype, count, isa):
    for numel in (*SIZES, 2_200_000 if count == 2 else 0):  # the last is written around the caches
        torch.set_num_threads(2 if numel == 2_200_000 else 1)
        parts = pieces(count, dtype, numel)
        for scale, beta in ((1.0, 0.0), (0.25, 0.0), (0.25, 0.5)):
            ours = torch.full((numel,), math.nan if beta == 0 else 2.0)
            theirs = ours.clone()
            native.sum_pieces(ours, parts, scale, beta)
            reference.sum_pieces(theirs, parts, scale, beta)
            assert_same_bits(ours, theirs, f"{numel} elements, scale {scale}, beta {beta}")


def test_sum_pieces_into_one_of_the_pieces():
    parts = pieces(10, FP32, 70_001)
    expected = torch.empty(70_001)
    reference.sum_pieces(expected, parts, 1.0, 0.0)
    native.sum_pieces(parts[3], parts, 1.0, 0.0)
    assert_same_bits(parts[3], expected)


@pytest.mark.parametrize(("source", "destination"), DTYPE_PAIRS)
def test_pack(source, destination, isa):
    for scale in (1.0, 0.3):
        for sizes in ((0, 1, 17, 511), (33_000, 3, 70_001)):
            tensors = [piece for i, n in enumerate(sizes) for piece in pieces(1, source, n, seed=i)]
            ours = torch.zeros(sum(sizes), dtype=destination)
            theirs = torch.zeros_like(ours)
            native.pack(ours, tensors, scale)
            reference.pack(theirs, tensors, scale)
            assert_same_bits(ours, theirs, f"{sizes}, scale {scale}")


@pytest.mark.parametrize(("source", "destination"), [(FP32, BF16), (FP16, FP32), (FP32, FP32)])
def test_large_packs_are_written_around_the_caches(source, destination, isa):
    torch.set_num_threads(2)
    tensors = [
        *pieces(1, source, 5),
        *pieces(1, source, 4_300_001),
    ]  # so that the second starts off any boundary
    ours = torch.zeros(4_300_006, dtype=destination)
    native.pack(ours, tensors, 0.5)
    assert_same_bits(ours, (torch.cat(tensors).float() * 0.5).to(destination))


@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_every_sixteen_bit_pattern_widens_and_narrows_as_torch_does(dtype, isa):
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    wide = torch.empty(every.numel())
    native.pack(wide, [every], 1.0)
    assert_same_bits(wide, every.float())
    # Scaled by one and a bit, so that the cast is not skipped; every value and every tie between two values.
    ties = (every.float()[1:] / 2 + every.float()[:-1] / 2)[every.float()[1:].isfinite()]
    both = torch.cat([every.float(), ties, torch.nextafter(ties, ties * 2), torch.nextafter(ties, ties * 0)])
    narrow = torch.empty(both.numel(), dtype=dtype)
    native.pack(narrow, [both], 1.0)
    assert_same_bits(narrow, both.to(dtype))


@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_random_floats_narrow_as_torch_does(dtype, isa):
    random = torch.Generator().manual_seed(0)
    patterns = torch.randint(-(2**31), 2**31, (300_000,), generator=random, dtype=torch.int64)
    floats = patterns.to(torch.int32).view(FP32)
    narrow = torch.empty(floats.numel(), dtype=dtype)
    native.pack(narrow, [floats], 1.0)
    assert_same_bits(narrow, floats.to(dtype))


def test_an_unknown_instruction_set_is_refused():
    with pytest.raises(ValueError, match="mmx"):
        _native.set_isa("mmx")
    assert _native.isa() in ISAS


def test_flush_to_zero_is_the_callers_on_every_thread():
    """A worker with its own floating-point modes would make results depend on who did the work."""
    torch.set_num_threads(3)
    tiny = torch.full((400_000,), 1e-38)
    out = torch.empty_like(tiny)
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor does not flush subnormal numbers")
    try:
        native.pack(out, [tiny], 0.1)
    finally:
        torch.set_flush_denormal(False)
    assert torch.equal(out, torch.zeros_like(out))
    native.pack(out, [tiny], 0.1)
    assert out.min() > 0


def test_nothing_is_dispatched_to_torch_and_no_tensor_moves():
    from torch.utils._python_dispatch import TorchDispatchMode

    class Refuse(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            raise AssertionError(f"{func} was called")

    for rule in RULES.values():
        target = make_target(rule, (FP32, BF16, FP32, BF16), 1000)
        before = [tensor.data_ptr() for _, tensor in target.tensors()]
        versions = [tensor._version for _, tensor in target.tensors()]
        with Refuse():
            getattr(native, rule.op)([target], rule, 1, 1.0)
            native.sum_pieces(target.param, [target.grad], 1.0, 0.0)
            native.pack(target.param, [target.grad], 1.0)
        assert [tensor.data_ptr() for _, tensor in target.tensors()] == before
        assert [tensor._version for _, tensor in target.tensors()] == versions


def test_what_lies_around_the_arrays_is_not_touched(isa):
    rule = AdamRule()
    for numel in (1, 15, 17, 31, 513):
        backing = [torch.full((numel + 64,), 7.0) for _ in range(4)]
        views = [tensor[32 : 32 + numel] for tensor in backing]
        native.adam([Target(views[0], views[1], (views[2], views[3]))], rule, 1, 1.0)
        native.sum_pieces(views[1], [views[0]], 1.0, 0.0)
        native.pack(views[1], [views[0]], 0.5)
        for tensor in backing:
            assert (tensor[:32] == 7).all()
            assert (tensor[32 + numel :] == 7).all()


def test_near_is_near(isa):
    """The comparison itself can fail."""
    with pytest.raises(AssertionError):
        assert_near("x", torch.tensor([1.0]), torch.tensor([1.0001]))
