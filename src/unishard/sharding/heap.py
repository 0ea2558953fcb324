"""The C heap keeps freed memory for later; where memory is what matters, it is given back."""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Callable


def trim_heap() -> None:
    """Give free pages of the C heap back to the system, where its library can (glibc's `malloc_trim`)."""
    _trim()(0)


@functools.cache
def _trim() -> Callable[[int], int]:
    if not sys.platform.startswith("linux"):
        return lambda pad: 0
    return getattr(ctypes.CDLL(None), "malloc_trim", lambda pad: 0)
