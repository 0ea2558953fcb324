"""Our CRC-32 against zlib's."""

from __future__ import annotations

import random
import zlib

import pytest

from unishard.kernels import crc32 as module
from unishard.kernels.crc32 import crc32

CONTENT = random.Random(0).randbytes((1 << 20) + 77)


@pytest.fixture(params=["compiled", "zlib"])
def _either(request, monkeypatch):
    if request.param == "zlib":
        monkeypatch.setattr(module, "_native", None)
    elif module._native is None or not module._native.has_crc32():
        pytest.skip("not compiled, or not for this processor")
    else:
        monkeypatch.setattr(module, "_SHORT", 0)


@pytest.mark.usefixtures("_either")
def test_every_short_length_at_every_alignment():
    view = memoryview(CONTENT)
    wrong = [
        (s, n) for s in range(17) for n in range(300) if crc32(view[s : s + n]) != zlib.crc32(view[s : s + n])
    ]
    assert not wrong


@pytest.mark.usefixtures("_either")
@pytest.mark.parametrize("size", [1 << 12, (1 << 16) + 1, 1 << 20, len(CONTENT)])
def test_long(size):
    assert crc32(CONTENT[:size]) == zlib.crc32(CONTENT[:size])
    assert crc32(bytearray(size)) == zlib.crc32(bytes(size))
