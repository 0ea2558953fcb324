"""Lion against Algorithm 2 of its paper, written out."""

from __future__ import annotations

import pytest
import torch

from unishard.optim.base import build_optimizer
from unishard.optim.lion import Lion


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_lion_follows_the_algorithm(decay: float, maximize: bool) -> None:
    grads = torch.randn(6, 19, generator=torch.Generator().manual_seed(4))
    param = torch.nn.Parameter(torch.linspace(-1, 1, 19))
    expected, momentum = param.detach().double(), torch.zeros(19, dtype=torch.float64)
    optimizer = Lion([param], lr=0.05, betas=(0.7, 0.95), weight_decay=decay, maximize=maximize)
    for grad in grads:
        param.grad = grad.clone()
        optimizer.step()
        assert torch.equal(param.grad, grad), "a step must not change gradients"
        g = (-grad if maximize else grad).double()
        expected = expected - 0.05 * ((0.7 * momentum + 0.3 * g).sign() + decay * expected)
        momentum = 0.95 * momentum + 0.05 * g
    torch.testing.assert_close(param.detach().double(), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(optimizer.state[param]["exp_avg"].double(), momentum, rtol=1e-5, atol=1e-6)


def test_defaults_are_the_papers_in_code_and_deepspeeds_in_a_config() -> None:
    assert Lion([{"params": []}]).defaults["betas"] == (0.9, 0.99)
    group = build_optimizer("lion", [], {"weight_decay": 0.1}).param_groups[0]
    assert (group["lr"], group["betas"], group["weight_decay"]) == (1e-3, (0.9, 0.999), 0.1)
