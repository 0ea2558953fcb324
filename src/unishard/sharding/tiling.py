"""A linear layer too large to gather whole, as a grid of small ones (memory-centric tiling).

Rajbhandari et al. 2021, "ZeRO-Infinity: Breaking the GPU Memory Wall for Extreme Scale Deep Learning", section 5.1.3.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from unishard.errors import ShardingError


def split_sizes(total: int, parts: int) -> list[int]:
    """`parts` sizes that differ by at most one, larger ones first.

    >>> split_sizes(10, 3)
    [4, 3, 3]
    """
    small, larger = divmod(total, parts)
    return [small + 1] * larger + [small] * (parts - larger)


class TiledLinear(nn.Module):
    """`nn.Linear(in_features, out_features)` as `in_splits` times `out_splits` linear layers, each a module of its own.

    `tiles[o][i]` holds the weights from input part `i` to output part `o`; `tiles[o][-1]` has that part's bias. With
    each tile sharded by itself, few are whole at a time, forward and backward:

        for row in layer.tiles:
            for tile in row:
                fully_shard(tile)

    Args:
        in_features, out_features, bias: as in `nn.Linear`.
        in_splits, out_splits: parts of input and output; they need not divide the features.
        input_is_already_split: `forward` takes a sequence of `in_splits` parts instead of one tensor.
        combine_out_splits: without it `forward` returns the list of `out_splits` parts.
        linear_cls: makes a tile, called like `nn.Linear`. One that returns (output, bias) leaves adding it to the
            caller, and so does this layer.
        init_linear: a linear layer of the whole size to copy weights from; by default tiles are initialised as parts of
            an `nn.Linear` of the whole size are, which one of their own size would not be.
        kwargs: for `linear_cls`: device, dtype.

    Raises:
        ShardingError: more splits than features, or fewer than one.

    >>> layer = TiledLinear(6, 4, in_splits=2, out_splits=2)
    >>> whole = nn.Linear(6, 4)
    >>> layer.copy_params_from(whole)
    >>> x = torch.randn(3, 6)
    >>> torch.allclose(layer(x), whole(x), atol=1e-6)
    True
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        in_splits: int = 1,
        out_splits: int = 1,
        input_is_already_split: bool = False,
        combine_out_splits: bool = True,
        linear_cls: Callable[..., nn.Module] = nn.Linear,
        init_linear: nn.Linear | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        for name, splits, features in (
            ("in_splits", in_splits, in_features),
            ("out_splits", out_splits, out_features),
        ):
            if not 1 <= splits <= features:
                raise ShardingError(
                    f"TiledLinear: {name}={splits} has to lie between 1 and the {features} features"
                )
        self.in_features, self.out_features = in_features, out_features
        self.in_splits, self.out_splits = in_splits, out_splits
        self.use_bias = bias
        self.input_is_already_split, self.combine_out_splits = input_is_already_split, combine_out_splits
        self.in_sizes = split_sizes(in_features, in_splits)
        self.out_sizes = split_sizes(out_features, out_splits)
        self.tiles = nn.ModuleList(
            nn.ModuleList(
                linear_cls(width, height, bias=bias and column == in_splits - 1, **kwargs)
                for column, width in enumerate(self.in_sizes)
            )
            for height in self.out_sizes
        )
        if init_linear is not None:
            self.copy_params_from(init_linear)
        elif linear_cls is nn.Linear:
            self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise as `nn.Linear` of the whole size: uniform within 1 / sqrt(in_features)."""
        bound = 1 / math.sqrt(self.in_features)
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -bound, bound)

    def forward(self, input: torch.Tensor | Sequence[torch.Tensor]) -> Any:
        """The product and bias of the whole layer.

        Args:
            input: shape (..., in_features), or `in_splits` parts of it along the last dim.

        Returns:
            Shape (..., out_features), or a list of `out_splits` parts; with tiles that return their bias apart, a pair
            of that and the bias in the same form (`None` without).
        """
        parts = self._parts(input)
        rows = [self._row(row, parts) for row in self.tiles]
        outputs: Any = [output for output, _, _ in rows]
        biases: Any = [bias for _, bias, _ in rows]
        if self.combine_out_splits:
            outputs = torch.cat(outputs, dim=-1)
            biases = None if biases[0] is None else torch.cat(biases)
        returns_bias = rows[0][2]
        return (outputs, biases) if returns_bias else outputs

    def _row(self, row: Any, parts: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor | None, bool]:
        """One part of the output, the bias that its tiles return, and whether they return any."""
        total: torch.Tensor | None = None
        bias, returns_bias, own = None, False, False
        for tile, part in zip(row, parts, strict=True):
            product = tile(part)
            if isinstance(product, tuple):
                returns_bias, (product, bias) = True, product
            if total is None:
                total = product
            elif own:
                total.add_(product)  # a sum's terms are not saved for backward
            else:
                total, own = total + product, True  # what a tile returns may be a view that hooks watch
        assert total is not None  # there is at least one split
        return total, bias, returns_bias

    def _parts(self, input: torch.Tensor | Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        if self.input_is_already_split:
            if isinstance(input, torch.Tensor) or [part.shape[-1] for part in input] != self.in_sizes:
                found = (
                    "a tensor" if isinstance(input, torch.Tensor) else [tuple(part.shape) for part in input]
                )
                raise ShardingError(
                    f"TiledLinear: expects parts with last dims {self.in_sizes}, and was given {found}"
                )
            return input
        if not isinstance(input, torch.Tensor) or input.shape[-1] != self.in_features:
            found = tuple(input.shape) if isinstance(input, torch.Tensor) else type(input).__name__
            raise ShardingError(
                f"TiledLinear: expects a tensor of shape (..., {self.in_features}), and was given {found}; pass "
                "input_is_already_split=True for parts"
            )
        return input.split(self.in_sizes, dim=-1)

    @torch.no_grad()
    def copy_params_from(self, other: nn.Linear) -> None:
        """Copy the weights and bias of a whole layer. Raises `ShardingError` if it is of another size."""
        expected = (self.out_features, self.in_features)
        if tuple(other.weight.shape) != expected or (other.bias is not None) != self.use_bias:
            raise ShardingError(
                f"TiledLinear: a weight of shape {tuple(other.weight.shape)} {_with(other.bias is not None)} a bias "
                f"does not fit {expected} {_with(self.use_bias)} one"
            )
        rows = zip(self.tiles, other.weight.split(self.out_sizes), strict=True)
        for row, weights in rows:
            for tile, weight in zip(row, weights.split(self.in_sizes, dim=1), strict=True):  # pyright: ignore
                tile.weight.copy_(weight)
        if self.use_bias:
            for row, bias in zip(self.tiles, other.bias.split(self.out_sizes), strict=True):
                row[-1].bias.copy_(bias)  # pyright: ignore

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.use_bias}"


def _with(there: bool) -> str:
    return "with" if there else "without"
