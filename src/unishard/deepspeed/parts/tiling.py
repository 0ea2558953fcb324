"""`zero.TiledLinear`: a linear layer in tiles, each gathered by itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from unishard.deepspeed.parts.numerics import partition_uniform

LinearModuleForZeroStage3 = nn.Linear
zero3_linear_wrap = nn.functional.linear


def split_tensor_along_last_dim(
    tensor: Tensor, partitions: Sequence[int], contiguous_split_chunks: bool = False
) -> tuple[Tensor, ...]:
    """Chunks of the last dimension of the given sizes."""
    chunks = torch.split(tensor, list(partitions), dim=-1)
    return tuple(chunk.contiguous() for chunk in chunks) if contiguous_split_chunks else chunks


class TiledLinear(nn.Module):
    """A linear layer as `in_splits` x `out_splits` smaller ones.

    Args:
        in_features, out_features, bias: of the whole layer.
        in_splits, out_splits: tiles along input and output; as even as possible.
        input_is_already_split: the input is a list, one tensor for each of `in_splits`.
        combine_out_splits: concatenate the outputs; otherwise a list, one for each of `out_splits`.
        linear_cls: class of a tile, called with (in_features, out_features, bias=..., **kwargs).
        init_linear: a whole layer to take the weights from.

    >>> layer = TiledLinear(4, 6, in_splits=2, out_splits=3)
    >>> layer(torch.ones(2, 4)).shape
    torch.Size([2, 6])
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
        linear_cls: Any = nn.Linear,
        init_linear: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        for name, splits, features in (("in", in_splits, in_features), ("out", out_splits, out_features)):
            if not 1 <= splits <= features:
                raise RuntimeError(f"{name}_splits={splits} must be between 1 and {name}_features={features}")
        self.in_features, self.out_features, self.use_bias = in_features, out_features, bias
        self.in_splits, self.out_splits = in_splits, out_splits
        self.input_is_already_split, self.combine_out_splits = input_is_already_split, combine_out_splits
        self.in_parts = partition_uniform(in_features, in_splits)
        self.out_parts = partition_uniform(out_features, out_splits)
        self.linears = nn.ModuleList(
            nn.ModuleList(
                linear_cls(
                    self.in_parts[i + 1] - self.in_parts[i],
                    self.out_parts[o + 1] - self.out_parts[o],
                    # One bias for each output, in the last input's tile.
                    bias=bias and i == in_splits - 1,
                    **kwargs,
                )
                for i in range(in_splits)
            )
            for o in range(out_splits)
        )
        if init_linear is not None:
            self.copy_params_from(init_linear)

    def forward(self, input_: Any) -> Any:
        inputs = input_
        if not self.input_is_already_split:
            sizes = [b - a for a, b in zip(self.in_parts, self.in_parts[1:], strict=False)]
            inputs = split_tensor_along_last_dim(input_, sizes)
        outputs: list[Any] = []
        for row in self.linears:
            tiles: Any = row
            total = None
            for tile, part in zip(tiles, inputs, strict=True):
                total = self._reduce_local_output(total, tile(part))
            outputs.append(total)
        return self._combine_output_splits(outputs) if self.combine_out_splits else outputs

    def _reduce_local_output(self, current: Any, new: Any) -> Any:
        return new if current is None else current + new

    def _combine_output_splits(self, outputs: Sequence[Any]) -> Any:
        return torch.cat(list(outputs), dim=-1)

    @torch.no_grad()
    def copy_params_from(self, other: nn.Module) -> None:
        """Take the weights of `other`, a whole linear layer."""
        weight, bias = other.weight, getattr(other, "bias", None)
        for o, row in enumerate(self.linears):
            rows = slice(self.out_parts[o], self.out_parts[o + 1])
            tiles: Any = row
            for i, tile in enumerate(tiles):
                columns = slice(self.in_parts[i], self.in_parts[i + 1])
                tile.weight.copy_(weight[rows, columns])  # pyright: ignore
                if tile.bias is not None and bias is not None:
                    tile.bias.copy_(bias[rows])


class TiledLinearReturnBias(TiledLinear):
    """For tiles that return (output, bias): so does the whole."""

    def _reduce_local_output(self, current: Any, new: Any) -> Any:
        output, bias = new
        if current is None:
            return output, bias
        return current[0] + output, bias if current[1] is None else current[1]

    def _combine_output_splits(self, outputs: Sequence[Any]) -> Any:
        whole = torch.cat([output for output, _ in outputs], dim=-1)
        biases = [bias for _, bias in outputs if bias is not None]
        return whole, torch.cat(biases, dim=-1) if biases else None
