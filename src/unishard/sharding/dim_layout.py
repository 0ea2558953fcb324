"""Where each parameter lies when every one is split evenly along a dim of its own: the layout behind DTensors.

Pure arithmetic. Each rank's shard is the concatenation of its chunk of every parameter, so a gather needs one copy
out; in exchange every chunk is an ordinary `Shard(dim)` of its parameter, which all of `torch.distributed.tensor`
understands. `layout.FlatLayout` is the zero-copy sibling.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod

from unishard.errors import ShardingError, UnevenShardingError


@dataclass(frozen=True)
class DimLayout:
    """Parameters of `shapes`, parameter i split along `dims[i]` over `world_size` ranks as `torch.chunk` does.

    Sizes are elements. Chunks are padded to equal length in the shard; a rank past the end of a short dim holds an
    empty chunk.

    >>> layout = DimLayout(((5, 2),), (0,), 2)
    >>> layout.chunk(0, rank=0), layout.chunk(0, rank=1), layout.shard_numel
    ((0, 3), (3, 2), 6)
    """

    shapes: tuple[tuple[int, ...], ...]
    dims: tuple[int, ...]
    world_size: int

    @cached_property
    def _chunk_sizes(self) -> tuple[int, ...]:
        return tuple(
            -(-shape[dim] // self.world_size) if shape else 1
            for shape, dim in zip(self.shapes, self.dims, strict=True)
        )

    @cached_property
    def chunk_numels(self) -> tuple[int, ...]:
        """Padded elements of each parameter's chunk."""
        return tuple(
            size
            * (prod(shape) // shape[dim] if shape and shape[dim] else prod(shape[:dim] + shape[dim + 1 :]))
            for shape, dim, size in zip(self.shapes, self.dims, self._chunk_sizes, strict=True)
        )

    @cached_property
    def shard_offsets(self) -> tuple[int, ...]:
        """Where each parameter's chunk starts in a shard."""
        return _starts(self.chunk_numels)

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        """Where each whole parameter starts in the gathered buffer."""
        return _starts([prod(shape) for shape in self.shapes])

    @cached_property
    def shard_numel(self) -> int:
        return sum(self.chunk_numels)

    @cached_property
    def payload(self) -> int:
        return sum(prod(shape) for shape in self.shapes)

    @cached_property
    def numel(self) -> int:
        """Length of the gathered buffer: the payload, rounded up to a multiple of the ranks."""
        return -(-self.payload // self.world_size) * self.world_size

    @property
    def padding(self) -> int:
        """Elements that all shards together hold beyond the payload."""
        return self.world_size * self.shard_numel - self.payload

    def chunk(self, index: int, rank: int) -> tuple[int, int]:
        """Start and length of `rank`'s chunk along the split dim of parameter `index`."""
        shape = self.shapes[index]
        extent = shape[self.dims[index]] if shape else 1
        start = min(rank * self._chunk_sizes[index], extent)
        return start, min(self._chunk_sizes[index], extent - start)

    def chunk_shape(self, index: int, rank: int) -> tuple[int, ...]:
        """Shape of `rank`'s chunk of parameter `index`, without padding."""
        shape = list(self.shapes[index])
        if shape:
            shape[self.dims[index]] = self.chunk(index, rank)[1]
        return tuple(shape)

    def even(self, index: int) -> bool:
        """Whether all ranks hold equally long, unpadded chunks that are contiguous in the parameter."""
        shape, dim = self.shapes[index], self.dims[index]
        return bool(shape) and dim == 0 and shape[0] % self.world_size == 0

    def describe(self) -> str:
        """One line for people.

        >>> DimLayout(((4, 2),), (0,), 2).describe()
        '2 ranks x 4 elements, split per parameter, 0.0 % padding'
        """
        waste = 100 * self.padding / self.payload if self.payload else 0.0
        return f"{self.world_size} ranks x {self.shard_numel} elements, split per parameter, {waste:.1f} % padding"


def _starts(lengths: Sequence[int]) -> tuple[int, ...]:
    starts, position = [], 0
    for length in lengths:
        starts.append(position)
        position += length
    return tuple(starts)


def plan_dim_layout(
    shapes: Sequence[Sequence[int]], dims: Sequence[int], world_size: int, names: Sequence[str]
) -> DimLayout:
    """Check and build a `DimLayout`. Raises `ShardingError` naming the parameter.

    Splitting along a dim other than 0 needs it to divide evenly: chunks of a middle dim have no padding rows.
    """
    if world_size < 1:
        raise ShardingError(f"world size must be at least 1, not {world_size}")
    for shape, dim, name in zip(shapes, dims, names, strict=True):
        if shape and not 0 <= dim < len(shape):
            raise ShardingError(f"{name}: shape {tuple(shape)} has no dim {dim} to shard")
        if dim != 0 and shape[dim] % world_size:
            raise UnevenShardingError(
                f"{name}: FSDP does not support uneven sharding on dim {dim}, and neither does unishard: {world_size} "
                f"ranks do not divide shape {tuple(shape)} there; shard dim 0 or pad the parameter"
            )
    return DimLayout(tuple(tuple(s) for s in shapes), tuple(dims), world_size)
