"""Host memory that devices and disks read and write directly: whole pages, reused."""

from __future__ import annotations

import mmap
import os
from collections import deque
from collections.abc import Sequence

import torch

from unishard.errors import OffloadError

PAGE = 4096
"""Bytes. Alignment of buffers, and of extents in a file; a multiple of what O_DIRECT asks of any usual disk."""
_HUGE_PAGE = 2 << 20


def padded(nbytes: int) -> int:
    """`nbytes` in whole pages.

    >>> padded(0), padded(1), padded(4096)
    (0, 4096, 4096)
    """
    return -(-nbytes // PAGE) * PAGE


def aligned_empty(numel: int, dtype: torch.dtype) -> torch.Tensor:
    """An uninitialised CPU tensor, shape (numel,), at the start of a page, that goes back to the system when freed.

    Large ones ask for huge pages: a direct transfer pins every page, and half of its processor time went there.

    >>> aligned_empty(10, torch.float16).data_ptr() % PAGE
    0
    """
    nbytes = numel * dtype.itemsize
    if nbytes == 0:
        return torch.empty(0, dtype=dtype)
    try:
        memory = mmap.mmap(-1, padded(nbytes), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise OffloadError(
            f"{nbytes} bytes of host memory for a buffer cannot be had ({error.strerror}); use fewer or smaller "
            "buffers (buffer_count), or rest less state in host memory"
        ) from error
    if nbytes >= _HUGE_PAGE and hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype, count=numel)


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


class HostBuffers:
    """Aligned memory that is used again: up to `keep` buffers wait for the next that asks for as many pages.

    >>> buffers = HostBuffers(keep=1)
    >>> first = buffers.take(10, torch.float32)
    >>> address = first.data_ptr()
    >>> buffers.give(first)
    >>> buffers.take(20, torch.int16).data_ptr() == address
    True
    """

    def __init__(self, keep: int) -> None:
        self._keep = keep
        self._free: deque[torch.Tensor] = deque()

    def take(self, numel: int, dtype: torch.dtype) -> torch.Tensor:
        """An uninitialised CPU tensor, shape (numel,), at the start of a page."""
        nbytes = numel * dtype.itemsize
        whole = next((memory for memory in self._free if memory.numel() == padded(nbytes)), None)
        if whole is None:
            whole = aligned_empty(padded(nbytes), torch.uint8)
        else:
            self._free = deque(memory for memory in self._free if memory is not whole)
        return whole[:nbytes].view(dtype)

    def give(self, tensor: torch.Tensor) -> None:
        """Nobody uses `tensor`, which came from `take`, any more."""
        if self._keep and tensor.numel():
            whole = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())
            self._free.append(whole)
            while len(self._free) > self._keep:
                self._free.popleft()


class PinnedBudget:
    """Bytes of host memory that may be page-locked; shared by what is given the same budget.

    By default a quarter of the host's memory, divided among the ranks on it (LOCAL_WORLD_SIZE).

    The system cannot move or swap page-locked memory, so what is beyond the budget is ordinary memory.

    >>> budget = PinnedBudget(100)
    >>> budget.take(60), budget.take(60), budget.taken
    (True, False, 60)
    """

    def __init__(self, limit: int | float | None = None) -> None:
        self.limit = _share_of_memory() if limit is None else limit
        self.taken = 0

    def take(self, nbytes: int) -> bool:
        """Whether `nbytes` more fit; they are taken if so."""
        if self.taken + nbytes > self.limit:
            return False
        self.taken += nbytes
        return True

    def give(self, nbytes: int) -> None:
        self.taken -= nbytes


def _share_of_memory() -> int:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return memory // 4 // max(int(os.environ.get("LOCAL_WORLD_SIZE", "1")), 1)
