"""A tiled linear layer is the whole one: forward, gradients, initial distribution; and each tile can be sharded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from unishard import TiledLinear
from unishard.errors import ShardingError

WIDTH, HEIGHT = 11, 7


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


def whole_gradient(layer: TiledLinear) -> torch.Tensor:
    rows = [torch.cat([tile.weight.grad for tile in row], dim=1) for row in layer.tiles]  # type: ignore
    return torch.cat(rows)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("splits", [(1, 1), (3, 2), (11, 7), (1, 4), (5, 1)])
@pytest.mark.parametrize("already_split", [True, False])
@pytest.mark.parametrize("combine", [True, False])
def test_equals_linear(bias: bool, splits: tuple[int, int], already_split: bool, combine: bool) -> None:
    torch.manual_seed(0)
    whole = nn.Linear(WIDTH, HEIGHT, bias=bias)
    layer = TiledLinear(
        WIDTH,
        HEIGHT,
        bias,
        in_splits=splits[0],
        out_splits=splits[1],
        input_is_already_split=already_split,
        combine_out_splits=combine,
        init_linear=whole,
    )
    x, y = (torch.randn(2, 3, WIDTH, generator=torch.Generator().manual_seed(1)) for _ in range(2))
    x.requires_grad_()
    y.requires_grad_()
    found = layer(x.split(layer.in_sizes, -1) if already_split else x)
    if not combine:
        assert [part.shape[-1] for part in found] == layer.out_sizes
        found = torch.cat(found, -1)
    expected = whole(y)
    assert relative(found, expected) < 1e-6
    found.square().sum().backward()
    expected.square().sum().backward()
    assert x.grad is not None
    assert y.grad is not None
    assert whole.weight.grad is not None
    assert relative(x.grad, y.grad) < 1e-6
    assert relative(whole_gradient(layer), whole.weight.grad) < 1e-6
    if bias:
        biases = torch.cat([row[-1].bias.grad for row in layer.tiles])  # type: ignore
        assert whole.bias.grad is not None
        assert relative(biases, whole.bias.grad) < 1e-6
    assert sum(p.numel() for p in layer.parameters()) == sum(p.numel() for p in whole.parameters())


def test_tiles_start_as_parts_of_a_whole_layer() -> None:
    layer = TiledLinear(4096, 64, in_splits=64, out_splits=2)
    weights = torch.cat([p.flatten() for p in layer.parameters()])
    assert weights.abs().max() <= 1 / 64
    assert weights.std().item() == pytest.approx(nn.Linear(4096, 64).weight.std().item(), rel=0.02)


class BiasApart(nn.Linear):
    """As Megatron-LM's layers return it."""

    def forward(self, input: torch.Tensor) -> Any:
        return nn.functional.linear(input, self.weight), self.bias


@pytest.mark.parametrize("combine", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_tiles_that_return_their_bias(combine: bool, bias: bool) -> None:
    whole = nn.Linear(WIDTH, HEIGHT, bias=bias)
    layer = TiledLinear(
        WIDTH, HEIGHT, bias, 3, 2, combine_out_splits=combine, linear_cls=BiasApart, init_linear=whole
    )
    x = torch.randn(5, WIDTH)
    output, apart = layer(x)
    if not combine:
        output = torch.cat(output, -1)
        apart = torch.cat(apart) if bias else apart
    if bias:
        output = output + apart
    else:
        assert apart == (None if combine else [None, None])
    assert relative(output, whole(x)) < 1e-6


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: TiledLinear(4, 4, in_splits=5), "in_splits=5 has to lie between 1 and the 4"),
        (lambda: TiledLinear(4, 4, out_splits=0), "out_splits=0"),
        (lambda: TiledLinear(4, 4)(torch.zeros(2, 5)), r"\(\.\.\., 4\), and was given \(2, 5\)"),
        (lambda: TiledLinear(4, 4)([torch.zeros(2, 4)]), "given list; pass input_is_already_split"),
        (
            lambda: TiledLinear(4, 4, in_splits=2, input_is_already_split=True)(torch.zeros(2, 4)),
            r"last dims \[2, 2\], and was given a tensor",
        ),
        (
            lambda: TiledLinear(4, 4).copy_params_from(nn.Linear(4, 5)),
            r"\(5, 4\) with a bias .* \(4, 4\) with",
        ),
        (lambda: TiledLinear(4, 4).copy_params_from(nn.Linear(4, 4, bias=False)), "without a bias"),
    ],
)
def test_refusals(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ShardingError, match=message):
        call()


class Tiled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = TiledLinear(16, 32, in_splits=2, out_splits=3), nn.Linear(32, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.tanh(self.up(x)))


def train(rank: int, world_size: int, shard: bool) -> tuple[list[float], int]:
    from torch.distributed.tensor import DTensor

    import unishard

    torch.manual_seed(0)
    model: Any = Tiled()
    largest = [0]
    if shard:
        tiles = [tile for row in model.up.tiles for tile in row]
        for tile in tiles:
            unishard.fully_shard(tile)

            def count(*_: Any) -> None:
                whole = [t for t in tiles if not isinstance(t.weight, DTensor)]
                largest[0] = max(largest[0], len(whole))

            tile.register_forward_pre_hook(count)
        unishard.fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for step in range(3):
        data = torch.randn(8, 16, generator=torch.Generator().manual_seed(step))
        loss = model(data).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, largest[0]


def sharded(shard: bool = True) -> tuple[list[float], int]:
    return train(torch.distributed.get_rank(), torch.distributed.get_world_size(), shard)


def test_each_tile_can_be_a_shard_group(ranks: Callable[..., Any]) -> None:
    expected, _ = train(0, 1, shard=False)
    for losses, whole_at_once in ranks(sharded, world_size=2):
        assert losses == pytest.approx(expected, rel=1e-5)
        assert 1 <= whole_at_once < 6, "not all tiles are whole at once"
