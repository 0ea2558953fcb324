"""Where each parameter of a group lies in its flat buffer, decided from shapes alone.

Every rank's shard is one contiguous slice of equal length, so collectives copy nothing in or out; and a
shard boundary inside a parameter falls on a whole row of it where that costs little padding, else on a
whole block of elements. Pure arithmetic: neither torch nor a process group is needed, so the planner and
the checkpoint converter use it too.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from math import gcd, inf, lcm, prod
from operator import index as as_index
from typing import Literal

from unishard.errors import ShardingError
from unishard.sharding.layout_search import (
    Placement,
    Problem,
    common_block,
    divisors_descending,
    search,
)

DEFAULT_BLOCK = 256  # elements: the block of blockwise 8-bit optimizers and quantized collectives
ALIGNMENT = 16  # elements: 64 bytes of fp32, one cache line


@dataclass(frozen=True)
class Rectangle:
    """Rows [row_start, row_stop) x columns [col_start, col_stop) of a parameter seen as a matrix.

    The matrix is `matrix_shape(shape)`: (dim 0, product of the other dims).
    """

    row_start: int
    row_stop: int
    col_start: int
    col_stop: int

    @property
    def numel(self) -> int:
        return (self.row_stop - self.row_start) * (self.col_stop - self.col_start)


@dataclass(frozen=True)
class Piece:
    """The part of one parameter that lies in one rank's shard (all counts in elements).

    `index` is the parameter's place in `FlatLayout.shapes`, `param_start` the piece's first element in the
    flattened parameter, `shard_start` its place in the shard. `rectangles` (1 to 3, in element order)
    cover exactly [param_start, param_start + numel).
    """

    index: int
    param_start: int
    shard_start: int
    numel: int
    rectangles: tuple[Rectangle, ...]


@dataclass(frozen=True)
class Granularity:
    """Where shard boundaries may fall inside a parameter.

    `"rows"`: on whole rows of dim 0; `"blocks"`: on whole blocks only. With either name, every boundary
    inside a parameter also lies a multiple of `block` elements from its start, so values encoded in blocks
    of any divisor of `block` elements never straddle two ranks.
    """

    name: Literal["rows", "blocks"]
    block: int


@dataclass(frozen=True)
class FlatLayout:
    """Offsets of parameters in a buffer of `world_size * shard_numel` elements; see `plan_layout`.

    Parameter i occupies [offsets[i], offsets[i] + prod(shapes[i])), row-major; the shard of rank r is
    [r * shard_numel, (r + 1) * shard_numel). Offsets need not follow the order of `shapes`.
    """

    shapes: tuple[tuple[int, ...], ...]
    offsets: tuple[int, ...]
    world_size: int
    shard_numel: int
    granularity: Granularity

    @property
    def numel(self) -> int:
        """Elements of the full buffer, padding included."""
        return self.world_size * self.shard_numel

    @cached_property
    def numels(self) -> tuple[int, ...]:
        """Elements of each parameter."""
        return tuple(map(prod, self.shapes))

    @cached_property
    def payload(self) -> int:
        """Elements that belong to parameters."""
        return sum(self.numels)

    @property
    def padding(self) -> int:
        """Elements that belong to no parameter."""
        return self.numel - self.payload

    @property
    def waste(self) -> float:
        """Padding as a fraction of the payload (0 when both are empty)."""
        return self.padding / self.payload if self.payload else (inf if self.padding else 0.0)

    @cached_property
    def alignment(self) -> int:
        """Elements (at most `ALIGNMENT`) of which the shard length and every offset are multiples."""
        return gcd(ALIGNMENT, self.shard_numel, *self.offsets)

    @cached_property
    def _order(self) -> tuple[int, ...]:
        live = (i for i, numel in enumerate(self.numels) if numel)
        return tuple(sorted(live, key=lambda i: self.offsets[i]))

    @cached_property
    def _starts(self) -> tuple[int, ...]:
        return tuple(self.offsets[i] for i in self._order)

    @cached_property
    def gaps(self) -> tuple[tuple[int, int], ...]:
        """Stretches [start, stop) of the full buffer that no parameter covers.

        >>> plan_layout([(3,)], world_size=2).gaps
        ((3, 4),)
        """
        stops = [self.offsets[i] + self.numels[i] for i in self._order]
        between = zip([0, *stops], [*self._starts, self.numel], strict=True)
        return tuple((start, stop) for start, stop in between if start < stop)

    def pieces(self, rank: int) -> tuple[Piece, ...]:
        """What lies in the shard of `rank`, in shard order; parameters without elements have no piece.

        Raises ShardingError when `rank` is not in [0, world_size).
        """
        if not 0 <= rank < self.world_size:
            raise ShardingError(
                f"layout: rank {rank} has no shard; this layout has {self.world_size} ranks, "
                f"pass a rank from 0 to {self.world_size - 1} of the sharding group"
            )
        begin, end = rank * self.shard_numel, (rank + 1) * self.shard_numel
        found: list[Piece] = []
        for place in range(max(0, bisect_right(self._starts, begin) - 1), len(self._order)):
            index, offset = self._order[place], self._starts[place]
            if offset >= end:
                break
            start, stop = max(begin, offset), min(end, offset + self.numels[index])
            if start < stop:
                covered = rectangles(self.shapes[index], start - offset, stop - offset)
                found.append(Piece(index, start - offset, start - begin, stop - start, covered))
        return tuple(found)

    def describe(self) -> str:
        """One line for logs: `16 ranks x 443,136 elements, 0.03 % padding, whole rows`."""
        rows = self.granularity.name == "rows"
        kind = "whole rows" if rows else f"blocks of {self.granularity.block:,} elements"
        ranks = "1 rank" if self.world_size == 1 else f"{self.world_size:,} ranks"
        return f"{ranks} x {self.shard_numel:,} elements, {self.waste:.2%} padding, {kind}".replace("%", " %")

    def validate(self) -> None:
        """Raise ShardingError unless every element has one place and boundaries keep the granularity."""
        self._check_fields()
        end = 0
        for index, offset in zip(self._order, self._starts, strict=True):
            if offset < end:
                self._fail(f"parameter {index} starts at {offset}, inside its neighbour that ends at {end}")
            end = offset + self.numels[index]
        if end > self.numel:
            self._fail(f"parameters end at {end}, past the {self.numel} elements of the buffer")
        placement = Placement(self.shard_numel, self.offsets)
        for index in self._order:
            first, count = placement.boundaries(index, self.numels[index])
            distances = (first, self.shard_numel)[: min(count, 2)]
            unit = matrix_shape(self.shapes[index])[1] if self.granularity.name == "rows" else 1
            for multiple in (unit, self.granularity.block):
                if any(distance % multiple for distance in distances):
                    self._fail(
                        f"a shard boundary lies {first} elements inside parameter {index} "
                        f"{self.shapes[index]}, off the multiples of {multiple} of {self.granularity}"
                    )

    def _check_fields(self) -> None:
        if len(self.offsets) != len(self.shapes):
            self._fail(f"{len(self.offsets)} offsets for {len(self.shapes)} parameters")
        if self.world_size < 1 or self.shard_numel < 0 or self.granularity.block < 1:
            sizes = f"world_size {self.world_size}, shard_numel {self.shard_numel}"
            self._fail(f"{sizes}, block {self.granularity.block}: one is too small")
        if self.granularity.name not in ("rows", "blocks"):
            self._fail(f"unknown granularity {self.granularity.name!r}")
        if any(offset < 0 for offset in self.offsets):
            self._fail(f"negative offset {min(self.offsets)}")

    def _fail(self, what: str) -> None:
        raise ShardingError(
            f"layout of {len(self.shapes)} parameters: {what}; make layouts with plan_layout()"
        )


def matrix_shape(shape: Sequence[int]) -> tuple[int, int]:
    """(rows, columns) of a parameter seen as a matrix: dim 0 by the rest; a scalar is 1 x 1.

    >>> matrix_shape((4, 3, 2)), matrix_shape((5,)), matrix_shape(())
    ((4, 6), (5, 1), (1, 1))
    """
    return (shape[0], prod(shape[1:])) if shape else (1, 1)


def rectangles(shape: Sequence[int], start: int, stop: int) -> tuple[Rectangle, ...]:
    """Elements [start, stop) of a flattened parameter as a partial row, whole rows and a partial row.

    Each of the three is present only where it has elements; part of a single row is one rectangle.

    >>> [r.numel for r in rectangles((4, 10), 7, 32)]
    [3, 20, 2]
    """
    if start >= stop:
        return ()
    columns = matrix_shape(shape)[1]
    (row, column), (last_row, last_column) = divmod(start, columns), divmod(stop, columns)
    if row == last_row:
        return (Rectangle(row, row + 1, column, last_column),)
    found: list[Rectangle] = []
    if column:
        found.append(Rectangle(row, row + 1, column, columns))
        row += 1
    if row < last_row:
        found.append(Rectangle(row, last_row, 0, columns))
    if last_column:
        found.append(Rectangle(last_row, last_row + 1, 0, last_column))
    return tuple(found)


def plan_layout(
    shapes: Sequence[Sequence[int]],
    world_size: int,
    *,
    block: int = DEFAULT_BLOCK,
    max_waste: float = 0.03,
) -> FlatLayout:
    """Lay parameters of these shapes end to end over `world_size` equal shards.

    Chosen in this order, the first that keeps padding under `max_waste` of the payload (or at the least
    possible, one shard of ceil(payload / world_size) elements): whole rows, `ALIGNMENT`-aligned; whole rows;
    blocks of `block` elements; blocks of ever smaller divisors of `block`. Blocks of one element always
    reach the least possible, which passes `max_waste` only where each rank holds some tens of elements.
    Parameters keep their order unless another one needs less padding. Deterministic: all ranks agree.

    Args:
        shapes: one shape per parameter; scalars `()` and parameters without elements are fine.
        world_size: number of ranks that share the buffer, at least 1.
        block: elements that blockwise codecs encode together, at least 1.
        max_waste: padding allowed, as a fraction (0 or more) of the payload.

    Raises:
        ShardingError: a negative or non-integer dimension, or a setting outside these limits.

    >>> layout = plan_layout([(8, 4), (8,)], world_size=2)
    >>> layout.offsets, layout.describe()
    ((0, 32), '2 ranks x 20 elements, 0.00 % padding, whole rows')
    >>> [(piece.index, piece.param_start, piece.shard_start, piece.numel) for piece in layout.pieces(1)]
    [(0, 20, 0, 12), (1, 0, 12, 8)]
    """
    dims = tuple(_checked_shape(i, shape) for i, shape in enumerate(shapes))
    _check_settings(world_size, block, max_waste)
    numels = tuple(map(prod, dims))
    live = tuple(i for i, numel in enumerate(numels) if numel)
    payload = sum(numels)
    if world_size == 1 or not live:
        offsets = tuple(accumulate(numels, initial=0))[:-1]
        return FlatLayout(dims, offsets, world_size, payload, Granularity("rows", block))
    packed = tuple(numels[i] for i in live)
    columns = tuple(matrix_shape(dims[i])[1] for i in live)
    shortest = -(-payload // world_size)
    longest = max(shortest, _longest_shard(payload, world_size, max_waste))
    name: Literal["rows", "blocks"] = "rows"
    placement = _by_rows(packed, columns, world_size, block, shortest, longest)
    if placement is None:
        name, placement = "blocks", _by_blocks(packed, world_size, block, shortest, longest)
    places = dict(zip(live, placement.offsets, strict=True))
    offsets = tuple(places.get(i, 0) for i in range(len(dims)))  # without elements: anywhere, so at 0
    granularity = Granularity(name, common_block(placement, packed, block))
    return FlatLayout(dims, offsets, world_size, placement.shard_numel, granularity)


def _by_rows(
    numels: tuple[int, ...],
    columns: tuple[int, ...],
    world_size: int,
    block: int,
    shortest: int,
    longest: int,
) -> Placement | None:
    aligned = search(Problem(numels, columns, world_size, ALIGNMENT), shortest, longest)
    if aligned is None:
        return search(Problem(numels, columns, world_size, 1), shortest, longest)
    # rows that are whole blocks too keep blockwise codecs exact: worth a quarter percent, not more
    nearby = min(longest, aligned.shard_numel + aligned.shard_numel // 400)
    blocks = Problem(numels, columns, world_size, lcm(block, ALIGNMENT))
    return search(blocks, shortest, nearby) or aligned


def _by_blocks(
    numels: tuple[int, ...], world_size: int, block: int, shortest: int, longest: int
) -> Placement:
    for size in divisors_descending(block):
        problem = Problem(numels, (size,) * len(numels), world_size, gcd(size, ALIGNMENT))
        placement = search(problem, shortest, longest)
        if placement is not None:
            return placement
    raise ShardingError(
        f"layout: no place found for {sum(numels)} elements on {world_size} ranks in blocks of one element; "
        "this is a defect of unishard, please report the shapes"
    )


def _longest_shard(payload: int, world_size: int, max_waste: float) -> int:
    longest = int(payload * (1 + max_waste)) // world_size + 1
    while longest > 0 and (longest * world_size - payload) / payload >= max_waste:
        longest -= 1
    return longest


def _checked_shape(position: int, shape: Sequence[int]) -> tuple[int, ...]:
    try:
        dims = tuple(as_index(size) for size in shape)
    except TypeError as error:
        raise ShardingError(
            f"shape {position}: {shape!r} is not a sequence of integers; pass tuple(parameter.shape)"
        ) from error
    if any(size < 0 for size in dims):
        raise ShardingError(f"shape {position}: {dims} has a negative dimension; pass sizes of 0 or more")
    return dims


def _check_settings(world_size: int, block: int, max_waste: float) -> None:
    if world_size < 1:
        raise ShardingError(f"world_size is {world_size}; a layout needs at least 1 rank")
    if block < 1:
        raise ShardingError(f"block is {block}; pass a block of at least 1 element, such as {DEFAULT_BLOCK}")
    if not 0 <= max_waste < inf:
        raise ShardingError(f"max_waste is {max_waste}; pass a fraction of 0 or more, such as 0.03")
