"""CRC-32 of memory: compiled where the processor has instructions for it, zlib's otherwise, with the same result."""

from __future__ import annotations

import zlib
from typing import Any

import numpy

try:
    from unishard.kernels.native import _native
except ImportError:  # not compiled
    _native = None

_SHORT = 256  # bytes below which finding an address costs more than it saves


def crc32(content: Any) -> int:
    """The CRC-32 of any contiguous buffer.

    >>> hex(crc32(b"123456789"))
    '0xcbf43926'
    """
    view = memoryview(content).cast("B")
    if _native is None or view.nbytes < _SHORT or not _native.has_crc32():
        return zlib.crc32(view)
    return _native.crc32(numpy.frombuffer(view, numpy.uint8).ctypes.data, view.nbytes)
