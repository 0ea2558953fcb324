"""The C heap keeps freed memory for later; where memory is what matters, it is given back."""

from __future__ import annotations

import ctypes
import functools
import os
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Protocol


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


def prepare_heap(elements: int) -> bool:
    """Whether training `elements` of this rank, which rest elsewhere, would take more than half of its share of the
    memory: 16 bytes each, for fp32 weights, gradients and two moments. From then on the heap is kept small.

    >>> prepare_heap(1)
    False
    """
    scarce = 2 * 16 * elements > memory_share()
    if scarce:
        keep_heap_small()
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

_M_MMAP_THRESHOLD = -3  # glibc's malloc.h
_LARGE = 1 << 20


def keep_heap_small() -> None:
    """Let every block of a MiB or more go back to the system when it is freed, from here on, in the whole process.

    By itself glibc raises that bound to the largest block it has seen freed, and keeps what is below; getting pages
    anew instead costs about a tenth of a training step on a CPU.
    """
    _glibc("mallopt", lambda parameter, value: 1)(_M_MMAP_THRESHOLD, _LARGE)


@functools.cache
def _trim() -> Callable[[int], int]:
    return _glibc("malloc_trim", lambda pad: 0)


def _glibc(name: str, otherwise: Callable[..., int]) -> Callable[..., int]:
    if not sys.platform.startswith("linux"):
        return otherwise
    return getattr(ctypes.CDLL(None), name, otherwise)
