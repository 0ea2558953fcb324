"""Host memory: what the C heap does with what is freed, and pages of their own for what others read.

The next step needs freed memory again, unless memory is what a run is short of.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import os
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import torch


class Trimmed(Protocol):
    """Keeps freed memory too."""

    def trim(self) -> None:
        """Give it back to the system."""
        ...


_others: weakref.WeakSet[Trimmed] = weakref.WeakSet()


def trim_with_heap(other: Trimmed) -> None:
    """From now on `trim_heap` trims `other` too, as long as it lives."""
    _others.add(other)


def trim_heap() -> None:
    """Give free pages of the C heap back to the system, where its library can (glibc's `malloc_trim`)."""
    for other in list(_others):
        other.trim()
    _trim()(0)


def trim_after_step() -> None:
    """As `trim_heap` if memory is scarce; otherwise what the next step reads into stays.

    Whoever lets state rest elsewhere wants the C heap's memory more than the time of getting it again (4 % of a step).
    """
    if _keeps_little:
        trim_heap()
    else:
        _trim()(0)


def prepare_heap(elements_away: int) -> bool:
    """Set the heap up for training in which `elements_away` of this rank rest elsewhere; whether memory is scarce.

    It is if they would take more than half of this rank's share of the memory: 16 bytes each, for fp32 weights,
    gradients and two moments. The heap is then kept small. Otherwise it keeps what is freed.

    >>> prepare_heap(1)
    False
    """
    scarce = 2 * 16 * elements_away > memory_share()
    if scarce:
        _keep_little()
    else:
        _keep_all()
    return scarce


def memory_share() -> int:
    """Bytes of host memory for each rank here: the host's, or fewer if a control group says so, by LOCAL_WORLD_SIZE."""
    return _memory_limit() // max(int(os.environ.get("LOCAL_WORLD_SIZE", "1")), 1)


def _memory_limit() -> int:
    host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min([host, *_limits_of_groups()])


def _limits_of_groups() -> list[int]:
    """The limits of this process's memory control group and of those around it, versions 1 and 2."""
    found: list[int] = []
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return found
    for _, kind, path in (line.split(":", 2) for line in lines):
        group = Path(path.lstrip("/"))
        for folder in (group, *group.parents) if kind in _HIERARCHIES else ():
            root, name = _HIERARCHIES[kind]
            try:
                said = (root / folder / name).read_text().strip()
            except OSError:
                continue  # a container sees its own group as the root
            found += [int(said)] if said.isdigit() else []
    return found


_HIERARCHIES = {
    "": (Path("/sys/fs/cgroup"), "memory.max"),
    "memory": (Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes"),
}

# glibc's malloc.h
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_LARGEST, _MIB, _NEVER = 32 << 20, 1 << 20, 2**31 - 1
_keeps_little = False


def _keep_little() -> None:
    """Let every block of a MiB or more go back to the system when it is freed, from here on, in the whole process.

    By itself glibc raises that bound to the largest block it has seen freed, and keeps what is below; getting pages
    anew instead costs about a tenth of a training step on a CPU.
    """
    global _keeps_little
    _keeps_little = True
    _set(_M_MMAP_THRESHOLD, _MIB)
    _set(_M_TRIM_THRESHOLD, _MIB)


def _keep_all() -> None:
    """Let freed memory stay in the process for the next step, as caching allocators of accelerators do.

    By itself glibc gives the end of its heap back whenever much of it is free, and the next forward gets it anew, page
    by page: 2 to 6 % of a training step. Whoever set the heap's bounds in the environment knows better.
    """
    if not _keeps_little and not _set_by_user():
        _set(_M_MMAP_THRESHOLD, _LARGEST)
        _set(_M_TRIM_THRESHOLD, _NEVER)


def _set_by_user() -> bool:
    """Whether the environment says what the heap does with freed memory."""
    names = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_")
    return any(name in os.environ for name in names) or "glibc.malloc." in os.environ.get(
        "GLIBC_TUNABLES", ""
    )


def reset_heap() -> None:
    """Set the bounds that glibc arrives at by itself once it has seen large blocks freed."""
    global _keeps_little
    _keeps_little = False
    if not _set_by_user():
        _set(_M_MMAP_THRESHOLD, _LARGEST)
        _set(_M_TRIM_THRESHOLD, 2 * _LARGEST)


def _set(parameter: int, value: int) -> None:
    _glibc("mallopt", lambda parameter, value: 1)(parameter, value)


@functools.cache
def _trim() -> Callable[[int], int]:
    return _glibc("malloc_trim", lambda pad: 0)


def _glibc(name: str, otherwise: Callable[..., int]) -> Callable[..., int]:
    if not sys.platform.startswith("linux"):
        return otherwise
    return getattr(ctypes.CDLL(None), name, otherwise)


PAGE = 4096
"""Bytes. Alignment of buffers, and of extents in a file; a multiple of what O_DIRECT asks of any usual disk."""
_HUGE_PAGE = 2 << 20


def padded(nbytes: int) -> int:
    """`nbytes` in whole pages.

    >>> padded(0), padded(1), padded(4096)
    (0, 4096, 4096)
    """
    return -(-nbytes // PAGE) * PAGE


def map_pages(nbytes: int) -> mmap.mmap:
    """Fresh pages for `nbytes` (not 0), huge ones where there is room for them. Raises `OSError` if there are none."""
    memory = mmap.mmap(-1, padded(nbytes), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if nbytes >= _HUGE_PAGE and hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


def published_empty(numel: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """An uninitialised tensor, shape (numel,), for weights that other ranks of the host will read again and again.

    The kernel pins every page that it copies to another process: from huge pages that takes half as long as from the C
    heap (measured: 12 GB/s in place of 6). Its storage cannot be resized where it is on huge pages.

    >>> published_empty(1 << 20, torch.float32, torch.device("cpu")).shape
    torch.Size([1048576])
    """
    nbytes = numel * dtype.itemsize
    if device.type != "cpu" or nbytes < _HUGE_PAGE:
        return torch.empty(numel, dtype=dtype, device=device)
    try:
        memory = map_pages(nbytes)
    except OSError:
        return torch.empty(numel, dtype=dtype, device=device)  # or its error, which users know
    return torch.frombuffer(memory, dtype=dtype, count=numel)
