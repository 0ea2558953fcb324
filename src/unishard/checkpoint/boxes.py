"""N-dimensional boxes of a tensor: how a shard's contiguous run of elements is cut, and what two boxes share.

Pure arithmetic: checkpoints of any layout meet here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod
from typing import NamedTuple


class Box(NamedTuple):
    """Elements [offset, offset + size) along each dim of a tensor; no dims for a scalar."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    @property
    def numel(self) -> int:
        return prod(self.sizes)


def whole(shape: Sequence[int]) -> Box:
    """The box of a whole tensor.

    >>> whole((2, 3))
    Box(offsets=(0, 0), sizes=(2, 3))
    """
    return Box((0,) * len(shape), tuple(shape))


def boxes_of_run(shape: Sequence[int], start: int, stop: int) -> list[Box]:
    """Elements [start, stop) of a row-major tensor as boxes, in element order, each contiguous in memory.

    Whole rows of the first dim make one box; what is cut off at either end is cut along the next dim, and so on: at
    most 2 n - 1 boxes for n dims.

    >>> boxes_of_run((4, 10), 7, 32)
    [Box(offsets=(0, 7), sizes=(1, 3)), Box(offsets=(1, 0), sizes=(2, 10)), Box(offsets=(3, 0), sizes=(1, 2))]
    """
    return list(_cut(tuple(shape), start, stop))


def _cut(shape: tuple[int, ...], start: int, stop: int) -> Iterator[Box]:
    if start >= stop:
        return
    if not shape:
        yield Box((), ())
        return
    row = prod(shape[1:])
    first, last = -(-start // row), stop // row
    if first > last:  # within one row
        yield from _inside(shape, last, start - last * row, stop - last * row)
        return
    if start < first * row:
        yield from _inside(shape, first - 1, start - (first - 1) * row, row)
    if first < last:
        rest = shape[1:]
        yield Box((first, *([0] * len(rest))), (last - first, *rest))
    if last * row < stop:
        yield from _inside(shape, last, 0, stop - last * row)


def _inside(shape: tuple[int, ...], row: int, start: int, stop: int) -> Iterator[Box]:
    for box in _cut(shape[1:], start, stop):
        yield Box((row, *box.offsets), (1, *box.sizes))


def intersection(a: Box, b: Box) -> Box | None:
    """What both cover, or `None`.

    >>> intersection(Box((0, 0), (4, 4)), Box((2, 1), (5, 2)))
    Box(offsets=(2, 1), sizes=(2, 2))
    """
    offsets, sizes = [], []
    for start_a, size_a, start_b, size_b in zip(a.offsets, a.sizes, b.offsets, b.sizes, strict=True):
        start, stop = max(start_a, start_b), min(start_a + size_a, start_b + size_b)
        if start >= stop:
            return None
        offsets.append(start)
        sizes.append(stop - start)
    return Box(tuple(offsets), tuple(sizes))


def within(box: Box, outer: Box) -> tuple[slice, ...]:
    """`box` as slices of a tensor that holds `outer`.

    >>> within(Box((2, 1), (2, 2)), Box((2, 0), (3, 4)))
    (slice(0, 2, None), slice(1, 3, None))
    """
    starts = [a - b for a, b in zip(box.offsets, outer.offsets, strict=True)]
    return tuple(slice(start, start + size) for start, size in zip(starts, box.sizes, strict=True))


def row_strides(sizes: Sequence[int]) -> tuple[int, ...]:
    """Elements between neighbours of each dim of a row-major tensor.

    >>> row_strides((4, 2, 3))
    (6, 3, 1)
    """
    strides, step = [], 1
    for size in reversed(sizes):
        strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(strides))


def pieces(shape: Sequence[int], most: int) -> Iterator[Box]:
    """A tensor cut into boxes of at most `most` elements, in element order, each contiguous in a row-major tensor.

    >>> [(b.offsets, b.sizes) for b in pieces((1, 5, 2), 4)]
    [((0, 0, 0), (1, 2, 2)), ((0, 2, 0), (1, 2, 2)), ((0, 4, 0), (1, 1, 2))]
    """
    if prod(shape) <= most or not shape:
        yield whole(shape)
        return
    row, rest = prod(shape[1:]), shape[1:]
    if row > most:
        for first in range(shape[0]):
            for box in pieces(rest, most):
                yield Box((first, *box.offsets), (1, *box.sizes))
        return
    step = most // row
    for first in range(0, shape[0], step):
        yield Box((first, *([0] * len(rest))), (min(step, shape[0] - first), *rest))


def split_rows(box: Box, parts: int) -> list[Box]:
    """`box` cut along its first dim into `parts` boxes of nearly equal length; some may be empty (size 0).

    >>> [b.sizes for b in split_rows(Box((0, 0), (5, 2)), 2)]
    [(3, 2), (2, 2)]
    """
    if not box.sizes:
        return [box] + [Box((), ())] * 0
    rows, found, start = box.sizes[0], [], 0
    for part in range(parts):
        size = rows // parts + (part < rows % parts)
        found.append(Box((box.offsets[0] + start, *box.offsets[1:]), (size, *box.sizes[1:])))
        start += size
    return found
