"""Host memory that devices and disks read and write directly: whole pages, reused."""

from __future__ import annotations

import mmap
import weakref
from collections import deque
from collections.abc import Sequence
from contextlib import suppress

import numpy as np
import torch

from unishard.errors import OffloadError
from unishard.sharding.host_memory import map_pages, memory_share, padded, trim_with_heap


def aligned_empty(numel: int, dtype: torch.dtype) -> torch.Tensor:
    """An uninitialised CPU tensor, shape (numel,), at the start of a page, that goes back to the system when freed.

    Large ones ask for huge pages: a direct transfer pins every page, and half of its processor time went there.

    >>> aligned_empty(10, torch.float16).data_ptr() % 4096
    0
    """
    nbytes = numel * dtype.itemsize
    if nbytes == 0:
        return torch.empty(0, dtype=dtype)
    return torch.frombuffer(_pages(nbytes), dtype=dtype, count=numel)


def _pages(nbytes: int) -> mmap.mmap:
    try:
        return map_pages(nbytes)
    except OSError as error:
        raise OffloadError(
            f"{nbytes} bytes of host memory for a buffer cannot be had ({error.strerror}); use fewer or smaller "
            "buffers (buffer_count), or rest less state in host memory"
        ) from error


def carve(buffer: torch.Tensor, parts: Sequence[tuple[int, torch.dtype]]) -> list[torch.Tensor]:
    """Views of `buffer` (bytes), one for each (numel, dtype), each at the start of a page.

    >>> views = carve(aligned_empty(8192, torch.uint8), [(3, torch.float32), (1, torch.int8)])
    >>> [view.data_ptr() - views[0].data_ptr() for view in views]
    [0, 4096]
    """
    views, start = [], 0
    for numel, dtype in parts:
        nbytes = numel * dtype.itemsize
        views.append(buffer[start : start + nbytes].view(dtype))
        start += padded(nbytes)
    return views


def carved_size(parts: Sequence[tuple[int, torch.dtype]]) -> int:
    """Bytes that `carve` needs for `parts`."""
    return sum(padded(numel * dtype.itemsize) for numel, dtype in parts)


class RecycledPages:
    """Makes tensors as `aligned_empty` does, of memory that was freed before where there is some of that size.

    The system clears every page that it hands out, which takes as long as reading it from a good disk, and longer where
    it first has to make huge pages of small ones. Freed memory is kept up to `limit` bytes, by default 1/24 of a rank's
    share of host memory or 64 MiB, until `trim_heap()`.

    >>> pages = RecycledPages()
    >>> first = pages.empty(10, torch.float32)
    >>> address = first.data_ptr()
    >>> del first
    >>> pages.empty(20, torch.int16).data_ptr() == address
    True
    """

    def __init__(self, limit: int | None = None) -> None:
        self._limit = max(memory_share() // 24, 64 << 20) if limit is None else limit
        self._free: deque[mmap.mmap] = deque()
        trim_with_heap(self)

    def empty(self, numel: int, dtype: torch.dtype) -> torch.Tensor:
        """An uninitialised CPU tensor, shape (numel,), at the start of a page."""
        nbytes = numel * dtype.itemsize
        if nbytes == 0:
            return torch.empty(0, dtype=dtype)
        memory = self._taken(padded(nbytes)) or _pages(nbytes)
        # A tensor's storage holds the array that it was made from, whatever views there are.
        array = np.frombuffer(memory, dtype=np.uint8, count=nbytes)
        weakref.finalize(array, self._take_back, memory).atexit = False
        return torch.from_numpy(array).view(dtype)

    def _taken(self, nbytes: int) -> mmap.mmap | None:
        # Other threads free memory too, which may happen between any two lines here.
        for memory in list(self._free):
            if len(memory) == nbytes:
                with suppress(ValueError):
                    self._free.remove(memory)
                    return memory
        return None

    def _take_back(self, memory: mmap.mmap) -> None:
        self._free.append(memory)
        while sum(len(memory) for memory in list(self._free)) > self._limit:
            with suppress(IndexError):
                self._free.popleft()

    def trim(self) -> None:
        """Give back to the system what nobody uses."""
        self._free.clear()


class PinnedBudget:
    """Bytes of host memory that may be page-locked; shared by what is given the same budget.

    By default a quarter of the host's memory, divided among the ranks on it (LOCAL_WORLD_SIZE).

    The system cannot move or swap page-locked memory, so what is beyond the budget is ordinary memory.

    >>> budget = PinnedBudget(100)
    >>> budget.take(60), budget.take(60), budget.taken
    (True, False, 60)
    """

    def __init__(self, limit: int | float | None = None) -> None:
        self.limit = memory_share() // 4 if limit is None else limit
        self.taken = 0

    def take(self, nbytes: int) -> bool:
        """Whether `nbytes` more fit; they are taken if so."""
        if self.taken + nbytes > self.limit:
            return False
        self.taken += nbytes
        return True

    def give(self, nbytes: int) -> None:
        self.taken -= nbytes
