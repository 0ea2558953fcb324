"""Moving bytes between memory and a file, many blocks at a time, while Python does something else.

| engine | where | checksums |
|---|---|---|
| `NativeTransfers` | the compiled extension (csrc/swap.cpp) | 64 bits, at the speed of memory |
| `PythonTransfers` | everywhere | CRC-32 of zlib |

Both cut a transfer into blocks, keep one checksum a block, and compare it with what a read brings.
"""

from __future__ import annotations

import ctypes
import enum
import importlib
import logging
import os
import zlib
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple, Protocol

import torch

from unishard.offload.aligned import aligned_empty
from unishard.sharding.host_memory import padded

_log = logging.getLogger("unishard")
_BOUNCE = 1 << 20  # bytes
_PATIENCE = 0.2  # seconds in the extension before Python may look at signals


class Ending(enum.IntEnum):
    """How a transfer ended. The numbers are part of the interface with csrc/swap.h."""

    WELL = 0
    FAILED = 1
    """The operating system refused; `Outcome.error` is its errno."""
    TRUNCATED = 2
    """The file ended early."""
    CHANGED = 3
    """The bytes are not those that were written."""


class Outcome(NamedTuple):
    """What became of a transfer; `offset` in the file says where, if it ended badly."""

    ending: Ending
    error: int = 0
    offset: int = 0


@dataclass(frozen=True)
class Place:
    """Where in which open file, and what alignment of memory, offsets and lengths the file asks for."""

    descriptor: int
    offset: int
    alignment: int


class Transfers(Protocol):
    """An engine. Tensor and checksums stay alive, and unchanged by others, until `finish` has returned."""

    block: int
    """Bytes of a block. Checksums have one element of 8 bytes for each block of a tensor."""

    def start(self, place: Place, tensor: torch.Tensor, checksums: torch.Tensor, *, writes: bool) -> Any: ...

    def done(self, handle: Any) -> bool: ...

    def finish(self, handle: Any) -> Outcome: ...

    def close(self) -> None: ...


class NativeTransfers:
    """Blocks are moved by `depth` threads of the extension, which wait in the kernel without Python's lock."""

    def __init__(self, block: int, depth: int) -> None:
        self.block = block
        self._swap: Any = _native().Swap(depth, block)

    def start(self, place: Place, tensor: torch.Tensor, checksums: torch.Tensor, *, writes: bool) -> int:
        return self._swap.start(
            place.descriptor,
            writes,
            tensor.data_ptr(),
            tensor.numel() * tensor.element_size(),
            place.offset,
            checksums.data_ptr(),
            place.alignment,
        )

    def done(self, handle: int) -> bool:
        return self._swap.done(handle)

    def finish(self, handle: int) -> Outcome:
        while True:
            found = self._swap.wait(handle, _PATIENCE)
            if found is not None:
                return Outcome(Ending(found[0]), *found[1:])

    def close(self) -> None:
        self._swap = None


class PythonTransfers:
    """The same with Python's threads: reads, writes and checksums release the interpreter, what is between does not."""

    def __init__(self, block: int, depth: int) -> None:
        self.block = block
        self._threads = ThreadPoolExecutor(depth, thread_name_prefix="unishard-swap")

    def start(
        self, place: Place, tensor: torch.Tensor, checksums: torch.Tensor, *, writes: bool
    ) -> list[Future[Outcome]]:
        memory, sums = _bytes_of(tensor), _bytes_of(checksums).cast("q")
        move = _write_block if writes else _read_block
        return [
            self._threads.submit(move, place, memory[start : start + self.block], start, sums, index)
            for index, start in enumerate(range(0, len(memory), self.block))
        ]

    def done(self, handle: list[Future[Outcome]]) -> bool:
        return all(future.done() for future in handle)

    def finish(self, handle: list[Future[Outcome]]) -> Outcome:
        wait_for(handle)
        outcomes = [future.result() for future in handle]
        return next((outcome for outcome in outcomes if outcome.ending != Ending.WELL), Outcome(Ending.WELL))

    def close(self) -> None:
        self._threads.shutdown()


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    array: Any = tensor.detach().view(torch.uint8).numpy()
    return memoryview(array)


def _address(memory: memoryview) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))


def _write_block(place: Place, block: memoryview, start: int, sums: memoryview, index: int) -> Outcome:
    sums[index] = zlib.crc32(block)
    return _aligned(
        place, block, start, lambda part, at: os.pwritev(place.descriptor, [part], at), copy_in=True
    )


def _read_block(place: Place, block: memoryview, start: int, sums: memoryview, index: int) -> Outcome:
    outcome = _aligned(
        place, block, start, lambda part, at: os.preadv(place.descriptor, [part], at), copy_in=False
    )
    if outcome.ending == Ending.WELL and zlib.crc32(block) != sums[index]:
        return Outcome(Ending.CHANGED, offset=place.offset + start)
    return outcome


def _aligned(
    place: Place, block: memoryview, start: int, move: Callable[[memoryview, int], int], *, copy_in: bool
) -> Outcome:
    """Move `block`, what the alignment allows from its own memory and the rest through a buffer."""
    straight = 0 if _address(block) % place.alignment else len(block) // place.alignment * place.alignment
    at = place.offset + start
    outcome = _all_of(block[:straight], at, move)
    rest = block[straight:]
    if outcome.ending != Ending.WELL or not len(rest):
        return outcome
    bounce = _bytes_of(aligned_empty(min(_BOUNCE, padded(len(rest))), torch.uint8))
    for begin in range(0, len(rest), _BOUNCE):
        part = rest[begin : begin + _BOUNCE]
        if copy_in:
            bounce[: len(part)] = part
        whole = bounce[: -(-len(part) // place.alignment) * place.alignment]
        outcome = _all_of(whole, at + straight + begin, move)
        if outcome.ending != Ending.WELL:
            return outcome
        if not copy_in:
            part[:] = bounce[: len(part)]
    return outcome


def _all_of(memory: memoryview, at: int, move: Callable[[memoryview, int], int]) -> Outcome:
    done = 0
    while done < len(memory):
        try:
            count = move(memory[done:], at + done)
        except OSError as error:
            return Outcome(Ending.FAILED, error.errno or 0, at + done)
        if count == 0:
            return Outcome(Ending.TRUNCATED, offset=at + done)
        done += count
    return Outcome(Ending.WELL)


def _native() -> Any:
    return importlib.import_module("unishard._native")


@cache
def _native_is_there() -> bool:
    try:
        _native()
    except ImportError as error:
        _log.warning(
            "nvme tier: transfers run on Python threads, slower and with more processor time, since the compiled "
            "extension is not there (%s); install a wheel of unishard, or reinstall it where a C++17 compiler is at "
            "hand",
            error,
        )
        return False
    return True


def best_transfers(block: int, depth: int) -> Transfers:
    """The compiled engine if it is there, else Python's, which the log says once.

    >>> best_transfers(1 << 20, 2).block
    1048576
    """
    return NativeTransfers(block, depth) if _native_is_there() else PythonTransfers(block, depth)
