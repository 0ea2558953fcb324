"""A model that `init_sharded` released runs forward before anything shards it, one module gathered at a time."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import unishard
from unishard.sharding.hooks import gathering_singles


class Tied(nn.Module):
    """Direct parameters at the root, a tied weight, and a module that may fail."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((4,), 2.0))
        self.embed = nn.Embedding(7, 4)
        self.block = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embed.weight
        self.fails = False

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        hidden = self.block(self.embed(ids)) * self.scale
        if self.fails:
            raise ValueError("as asked")
        assert self.block[0].weight.numel() == 0, "only what runs is whole"
        return self.head(hidden)


def forward_of_a_released_model() -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    ids = torch.tensor([[1, 2, 3]])
    torch.manual_seed(3)
    with unishard.init_sharded():
        model = Tied()
    with unishard.gather(model):
        reference = {name: value.clone() for name, value in model.state_dict().items()}
    with gathering_singles(model), torch.no_grad():
        found = model(ids)
        again = model(ids)
        model.fails = True
        with pytest.raises(ValueError, match="as asked"):
            model(ids)
    assert torch.equal(found, again)
    hidden = reference["embed.weight"][ids] @ reference["block.0.weight"].T + reference["block.0.bias"]
    expected = torch.tanh(hidden) * reference["scale"] @ reference["embed.weight"].T
    hooks = sum(len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules())
    assert hooks == 0
    return found, expected, [p.numel() for p in model.parameters()]


@pytest.mark.parametrize("size", [1, 2])
def test_forward_without_gradients_before_sharding(ranks, size):
    for found, expected, left in ranks(forward_of_a_released_model, world_size=size):
        torch.testing.assert_close(found, expected)
        assert not any(left), "parameters stayed whole"
