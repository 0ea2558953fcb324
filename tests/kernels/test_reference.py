"""The plain torch implementation against torch's own optimizers and formulas: the others are compared with it."""

from __future__ import annotations

import pytest
import torch
from tests.kernels.cases import FP32, RULES, assert_near, make_target

from unishard.kernels import AdagradRule, AdamRule, LionRule, Rule, SgdRule, Target, reference
from unishard.optim.adam import UncorrectedAdam
from unishard.optim.lion import Lion


def torch_optimizer(rule: Rule, param: torch.nn.Parameter) -> torch.optim.Optimizer:
    """The optimizer that `rule` promises to equal."""
    if isinstance(rule, AdamRule):
        options = {"lr": rule.lr, "betas": rule.betas, "eps": rule.eps, "weight_decay": rule.weight_decay}
        if not rule.bias_correction:
            return UncorrectedAdam([param], decoupled_weight_decay=rule.decoupled, **options)
        cls = torch.optim.AdamW if rule.decoupled else torch.optim.Adam
        return cls([param], fused=True, **options)
    if isinstance(rule, LionRule):
        return Lion([param], lr=rule.lr, betas=rule.betas, weight_decay=rule.weight_decay)
    if isinstance(rule, AdagradRule):
        return torch.optim.Adagrad(
            [param], lr=rule.lr, lr_decay=rule.lr_decay, eps=rule.eps, weight_decay=rule.weight_decay
        )
    assert isinstance(rule, SgdRule)
    return torch.optim.SGD(
        [param],
        lr=rule.lr,
        momentum=rule.momentum,
        dampening=rule.dampening,
        weight_decay=rule.weight_decay,
        nesterov=rule.nesterov,
    )


@pytest.mark.parametrize("name", RULES)
def test_five_steps_equal_torch_optimizers(name):
    rule = RULES[name]
    target = make_target(rule, (FP32, FP32, FP32, None), 1001)
    for state in target.state:
        state.zero_()
    theirs = torch.nn.Parameter(target.param.clone())
    optimizer = torch_optimizer(rule, theirs)
    for step in range(1, 6):
        grad = torch.randn(1001, generator=torch.Generator().manual_seed(step))
        theirs.grad = grad * 0.25
        optimizer.step()
        getattr(reference, rule.op)([target._replace(grad=grad)], rule, step, 0.25)
    assert_near(name, target.param, theirs.detach())
    if target.state and rule.op != "sgd":
        for key, state in zip(rule.state_names, target.state, strict=True):
            assert_near(key, state, optimizer.state[theirs][key])


def test_sixteen_bit_parameters_step_in_fp32_and_round_once():
    rule = AdamRule(lr=1e-2)
    target = make_target(rule, (torch.bfloat16, torch.bfloat16, FP32, None), 257)
    exact = Target(
        target.param.float(),
        target.grad.float(),
        tuple(s.clone() for s in target.state),
        target.param.clone(),
    )
    reference.adam([target], rule, 1, 0.5)
    reference.adam([exact], rule, 1, 0.5)
    assert exact.copy is not None
    assert torch.equal(target.param, exact.copy)


def test_temporaries_are_bounded(monkeypatch):
    """In chunks of 64 elements, nothing larger than a chunk is allocated on the way."""
    from torch.utils._python_dispatch import TorchDispatchMode

    rule = AdamRule()
    target = make_target(rule, (FP32, torch.bfloat16, torch.bfloat16, torch.float16), 1000)
    inputs = {tensor.untyped_storage().data_ptr() for _, tensor in target.tensors()}
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and result.untyped_storage().data_ptr() not in inputs:
                largest = max(largest, result.numel())
            return result

    monkeypatch.setattr(reference, "CHUNK", 64)
    with Watch():
        reference.adam([target], rule, 1, 1.0)
        reference.squared_norm([target.grad])
        reference.sum_pieces(target.param, [target.grad, target.grad], 0.5, 1.0)
        reference.pack(target.param, [target.grad], 0.5)
    assert largest == 64
