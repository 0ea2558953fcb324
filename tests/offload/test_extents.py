"""Room in a swap file, against a list of bytes."""

from __future__ import annotations

import random

import pytest

from unishard.offload.extents import Extents


@pytest.mark.parametrize("seed", range(20))
def test_extents_never_overlap_and_join_when_freed(seed: int) -> None:
    numbers = random.Random(seed)
    room, held, owner = Extents(), {}, {}
    for step in range(300):
        if held and numbers.random() < 0.5:
            offset = numbers.choice(list(held))
            size = held.pop(offset)
            for byte in range(offset, offset + size):
                assert owner.pop(byte) == offset
            room.give(offset, size)
            continue
        size = numbers.randint(1, 9)
        offset = room.take(size)
        if offset is None:
            free = [byte for byte in range(room.end) if byte not in owner]
            assert not any(set(range(b, b + size)) <= set(free) for b in free), f"step {step}: there was room"
            room.grow(room.missing(size))
            offset = room.take(size)
        assert offset is not None
        assert offset + size <= room.end
        for byte in range(offset, offset + size):
            assert byte not in owner
            owner[byte] = offset
        held[offset] = size
    for offset, size in held.items():
        room.give(offset, size)
    assert room.take(room.end) == 0, "all of it is one extent again"
