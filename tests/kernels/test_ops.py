"""What the public operations refuse, in words, before an address is used."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from unishard.errors import KernelError
from unishard.kernels import (
    AdagradRule,
    AdamRule,
    LionRule,
    SgdRule,
    Target,
    pack,
    squared_norm,
    sum_pieces,
    update,
)


def f32(n: int = 4) -> torch.Tensor:
    return torch.ones(n)


def adam_target(**changes: object) -> Target:
    return Target(f32(), f32(), (f32(), f32()))._replace(**changes)


def released(n: int = 4) -> torch.Tensor:
    """A view past the start of a storage that was resized to nothing: its address is not null."""
    whole = torch.ones(2 * n)
    view = whole[n:]
    whole.untyped_storage().resize_(0)
    return view


class Wrapped(torch.Tensor):
    pass


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (adam_target(state=(f32(),)), "1 state tensors were given; AdamRule has: exp_avg, exp_avg_sq"),
        (
            adam_target(grad=torch.ones(4, dtype=torch.float64)),
            "grad is float64; it must be one of bfloat16, float16",
        ),
        (
            adam_target(state=(f32(), torch.ones(4).half())),
            r"state\[1\] is float16; it must be one of bfloat16, float32",
        ),
        (adam_target(copy=f32()), "copy is float32; it must be one of bfloat16, float16"),
        (adam_target(grad=f32(5)), "grad has 5 elements and param 4; pass equal lengths"),
        (adam_target(grad=torch.ones(4, 2)[:, 0]), r"strides \(2,\); pass contiguous memory"),
        (adam_target(grad=torch.ones(4, device="meta")), "grad is on meta and param on cpu; move them"),
        (adam_target(grad=released()), "the storage of grad is released; gather it first"),
        (adam_target(param=f32().as_subclass(Wrapped)), "param is a Wrapped; pass the plain local tensor"),
        (
            adam_target(param=torch.ones(4).bfloat16(), copy=torch.ones(4).half()),
            "copy was given for a torch.bfloat16 param",
        ),
    ],
)
def test_update_refuses(target, message):
    good = adam_target()
    with pytest.raises(KernelError, match=message):
        update([good, target], AdamRule())
    assert torch.equal(good.param, f32()), "something was updated before the refusal"


def test_update_refuses_targets_on_two_devices_and_step_zero():
    elsewhere = Target(
        *(torch.ones(4, device="meta") for _ in range(2)), tuple(torch.ones(2, 4, device="meta"))
    )
    with pytest.raises(KernelError, match="on meta and param on cpu"):
        update([adam_target(), elsewhere], AdamRule())
    with pytest.raises(KernelError, match="step is 0; the first step is number 1"):
        update([adam_target()], AdamRule(), step=0)


def test_other_operations_refuse():
    with pytest.raises(KernelError, match=r"tensors\[1\] is int64"):
        squared_norm([f32(), torch.ones(3, dtype=torch.int64)])
    with pytest.raises(KernelError, match="out is bfloat16; it must be one of float32"):
        sum_pieces(f32().bfloat16(), [f32()])
    with pytest.raises(KernelError, match="there are no pieces"):
        sum_pieces(f32(), [])
    with pytest.raises(KernelError, match=r"pieces\[1\] is torch.float16 and pieces\[0\] torch.float32"):
        sum_pieces(f32(), [f32(), f32().half()])
    with pytest.raises(KernelError, match=r"pieces\[0\] has 3 elements and out 4"):
        sum_pieces(f32(), [f32(3)])
    with pytest.raises(KernelError, match="the tensors have 7 elements together and out 8"):
        pack(f32(8), [f32(4), f32(3)])
    with pytest.raises(KernelError, match="storage of out is released"):
        pack(released(), [f32(4)])


def test_nothing_to_do_is_fine():
    update([], AdamRule())
    update([Target(f32(0), f32(0), (f32(0), f32(0)))], AdamRule())
    assert squared_norm([]).item() == 0.0
    assert squared_norm([f32(0), f32(3)]).item() == 3.0
    sum_pieces(f32(0), [f32(0)])
    pack(f32(0), [])


def test_parameters_and_matrices_are_taken():
    weight = nn.Parameter(torch.ones(2, 3))
    update([Target(weight, torch.ones(2, 3))], SgdRule(lr=0.5))
    assert torch.equal(weight, torch.full((2, 3), 0.5))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AdamRule(lr=-1.0), "AdamRule: lr is -1.0; it must be finite and >= 0"),
        (lambda: AdamRule(eps=math.nan), "eps is nan"),
        (lambda: AdamRule(betas=(0.9, 1.0)), r"betas is \(0.9, 1.0\); it must be two numbers in \[0, 1\)"),
        (lambda: LionRule(weight_decay=-0.1), "weight_decay is -0.1"),
        (lambda: AdagradRule(lr_decay=-0.1), "lr_decay is -0.1"),
        (lambda: SgdRule(nesterov=True), "nesterov is True; it must be False without momentum"),
        (lambda: SgdRule(momentum=0.9, dampening=0.1, nesterov=True), "nesterov is True"),
    ],
)
def test_rules_refuse_options_out_of_range(make, message):
    with pytest.raises(KernelError, match=message):
        make()
