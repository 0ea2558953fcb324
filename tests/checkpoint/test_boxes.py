"""Boxes cover a run of elements once, in order, contiguously; intersections are what both cover."""

from __future__ import annotations

import io
from math import prod

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from unishard.checkpoint.archive import data_offset, envelope
from unishard.checkpoint.boxes import Box, boxes_of_run, intersection, split_rows, within
from unishard.checkpoint.storage import raw_bytes
from unishard.errors import CheckpointError

SHAPES = st.lists(st.integers(1, 5), max_size=4).map(tuple)


@st.composite
def runs(draw):
    shape = draw(SHAPES)
    start = draw(st.integers(0, prod(shape)))
    return shape, start, draw(st.integers(start, prod(shape)))


@given(runs())
def test_boxes_cover_a_run_once_and_in_order(run):
    shape, start, stop = run
    numbers = torch.arange(prod(shape)).reshape(shape)
    boxes = boxes_of_run(shape, start, stop)
    found = [numbers[within(box, Box((0,) * len(shape), shape))] if shape else numbers for box in boxes]
    assert torch.cat([f.reshape(-1) for f in found] or [numbers.reshape(-1)[:0]]).tolist() == list(
        range(start, stop)
    )
    assert all(f.is_contiguous() for f in found)
    assert len(boxes) <= max(2 * len(shape) - 1, 1)


@st.composite
def pairs(draw):
    dims = draw(st.integers(0, 3))
    one = st.tuples(*[st.integers(0, 4)] * dims), st.tuples(*[st.integers(1, 4)] * dims)
    return Box(draw(one[0]), draw(one[1])), Box(draw(one[0]), draw(one[1]))


def elements(box: Box) -> set[tuple[int, ...]]:
    found: set[tuple[int, ...]] = {()}
    for offset, size in zip(box.offsets, box.sizes, strict=True):
        found = {(*point, i) for point in found for i in range(offset, offset + size)}
    return found


@given(pairs())
def test_an_intersection_is_what_both_cover(pair):
    a, b = pair
    shared = intersection(a, b)
    assert (elements(shared) if shared is not None else set()) == elements(a) & elements(b)


@given(st.integers(0, 9), st.integers(1, 5))
def test_rows_are_divided_evenly(rows, parts):
    pieces = split_rows(Box((3, 1), (rows, 2)), parts)
    assert len(pieces) == parts
    assert sum(p.sizes[0] for p in pieces) == rows
    assert max(p.sizes[0] for p in pieces) - min(p.sizes[0] for p in pieces) <= 1


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.bool]
)
@pytest.mark.parametrize("shape", [(), (3,), (2, 0), (4, 3, 2)])
def test_an_envelope_makes_what_torch_loads(dtype, shape):
    value = torch.randint(0, 2, shape).to(dtype)
    raw = bytes(raw_bytes(value))
    head, tail = envelope(dtype, shape, len(raw))
    found = torch.load(io.BytesIO(head + raw + tail), weights_only=True)
    assert torch.equal(found, value)
    assert (found.dtype, found.shape) == (dtype, torch.Size(shape))
    assert data_offset(head, shape) == len(head)


def test_raw_bytes_are_found_in_what_torch_saved():
    value = torch.randn(100, 7)
    buffer = io.BytesIO()
    torch.save(value, buffer)
    content = buffer.getvalue()
    start = data_offset(content[:8192], (100, 7))
    assert start is not None
    assert content[start : start + 2800] == bytes(raw_bytes(value))
    assert data_offset(b"no archive at all" * 10, ()) is None
    turned = io.BytesIO()
    torch.save(value.t(), turned)
    assert data_offset(turned.getvalue()[:8192], (7, 100)) is None


def test_too_large_a_record_is_refused():
    with pytest.raises(CheckpointError, match="too large for one record"):
        envelope(torch.float32, (1 << 31,), 1 << 33)
