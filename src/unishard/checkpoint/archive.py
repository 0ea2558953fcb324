"""The bytes around a tensor that make it loadable by `torch.load`: torch's zip format, written without copying.

Stored records of a zip archive are contiguous and uncompressed, so a tensor goes to disk as a short head, its own
memory and a short tail; and a part of it can be read from disk without the rest.
"""

from __future__ import annotations

import io
import pickle
import struct
from collections import OrderedDict
from typing import Any, NamedTuple

import torch
from torch._utils import _rebuild_tensor_v2

from unishard.errors import CheckpointError

_ALIGNMENT = 64  # torch aligns storages so, for memory mapping
_LOCAL, _CENTRAL, _END = 0x04034B50, 0x02014B50, 0x06054B50
_DATA = "archive/data/0"
LARGEST = (1 << 32) - (1 << 16)
"""Bytes: larger ones would need the zip64 format. Tensors are cut into chunks below this."""


class Envelope(NamedTuple):
    """What stands before and after a tensor's raw bytes."""

    head: bytes
    tail: bytes


class _Storage:
    """Stands for the storage in the pickle: an empty tensor's own would carry its size."""

    def __init__(self, kind: Any, numel: int) -> None:
        self.persistent = ("storage", kind, "0", "cpu", numel)


class _Tensor:
    def __init__(self, dtype: torch.dtype, sizes: tuple[int, ...]) -> None:
        self._dtype, self._sizes = dtype, sizes

    def __reduce__(self) -> Any:
        numel, strides = 1, []
        for size in reversed(self._sizes):
            strides.append(numel)
            numel *= max(size, 1)
        numel = 0 if 0 in self._sizes else numel
        kind = storage_kind(self._dtype)
        arguments = (_Storage(kind, numel), 0, self._sizes, tuple(reversed(strides)), False, OrderedDict())
        return _rebuild_tensor_v2, arguments


def storage_kind(dtype: torch.dtype) -> Any:
    """torch's class for untyped memory of `dtype`, as pickles name it. Raises `CheckpointError` if there is none."""
    found = torch.storage._dtype_to_storage_type_map().get(dtype)
    if found is None:
        raise CheckpointError(f"tensors of {dtype} cannot be saved; convert them first")
    return getattr(torch, found)


class _Pickler(pickle.Pickler):
    def persistent_id(self, obj: Any) -> Any:
        return obj.persistent if isinstance(obj, _Storage) else None


def envelope(dtype: torch.dtype, sizes: tuple[int, ...], nbytes: int) -> Envelope:
    """Head and tail for a contiguous tensor of `nbytes` raw bytes.

    Raises `CheckpointError` for tensors of 4 GiB and more.

    >>> one = torch.tensor([1.0, 2.0])
    >>> head, tail = envelope(one.dtype, (2,), 8)
    >>> torch.load(io.BytesIO(head + one.numpy().tobytes() + tail), weights_only=True)
    tensor([1., 2.])
    """
    if nbytes > LARGEST:
        raise CheckpointError(f"a chunk of {nbytes} bytes is too large for one record; save it in pieces")
    pickled = io.BytesIO()
    _Pickler(pickled, protocol=2).dump(_Tensor(dtype, tuple(sizes)))
    records = [("archive/data.pkl", pickled.getvalue()), ("archive/byteorder", b"little")]
    head, central = bytearray(), bytearray()
    for name, content in records:
        central += _directory(name, len(content), len(head))
        head += _local_header(name, len(content), len(head)) + content
    central += _directory(_DATA, nbytes, len(head))
    head += _local_header(_DATA, nbytes, len(head))
    version_at = len(head) + nbytes
    central += _directory("archive/version", 2, version_at)
    tail = _local_header("archive/version", 2, version_at) + b"3\n"
    directory_at, count = version_at + len(tail), len(records) + 2
    end = struct.pack("<IHHHHIIH", _END, 0, 0, count, count, len(central), directory_at, 0)
    return Envelope(bytes(head), tail + bytes(central) + end)


def _local_header(name: str, size: int, position: int) -> bytes:
    encoded = name.encode()
    padding = -(position + 30 + len(encoded) + 4) % _ALIGNMENT
    extra = struct.pack("<2sH", b"FB", padding) + b"Z" * padding
    fields = (_LOCAL, 0, 0x800, 0, 0, 0, 0, size, size, len(encoded), len(extra))
    return struct.pack("<IHHHHHIIIHH", *fields) + encoded + extra


def _directory(name: str, size: int, position: int) -> bytes:
    # Checksums are zero: torch does not read them, and ours are kept by block in the manifest.
    encoded = name.encode()
    fields = (_CENTRAL, 0, 0, 0x800, 0, 0, 0, 0, size, size, len(encoded), 0, 0, 0, 0, 0, position)
    return struct.pack("<IHHHHHHIIIHHHHHII", *fields) + encoded


def data_offset(head: bytes, sizes: tuple[int, ...]) -> int | None:
    """Where the raw bytes of a row-major tensor of `sizes` begin in an archive that starts with `head`.

    `None` if the archive holds something else, or does not say so plainly: then `torch.load` has to read it.

    >>> head = envelope(torch.float32, (2,), 8).head
    >>> data_offset(head, (2,)) == len(head), data_offset(head, (1,))
    (True, None)
    """
    position, plain = 0, False
    while position + 30 <= len(head):
        magic, _, flags, method, _, _, _, size, _, names, extras = struct.unpack_from(
            "<IHHHHHIIIHH", head, position
        )
        if magic != _LOCAL or method != 0:
            return None
        name = head[position + 30 : position + 30 + names]
        start = position + 30 + names + extras
        if name.endswith(b"/data.pkl"):
            plain = _is_row_major(head[start:], sizes)
        if name.endswith(b"/data/0"):
            return start if plain else None
        if flags & 0x8 or size == 0xFFFFFFFF:
            # The size follows the data (torch streams its records), so the next header has to be looked for.
            position = head.find(struct.pack("<I", _LOCAL), start)
            if position < 0:
                return None
        else:
            position = start + size
    return None


class _Unpickler(pickle.Unpickler):
    """Finds out how a pickled tensor lies in its storage, and can make nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda storage, offset, sizes, strides, *rest: (
                storage,
                offset,
                tuple(sizes),
                tuple(strides),
            )
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        return (module, name)

    def persistent_load(self, pid: Any) -> Any:
        return pid


def _is_row_major(pickled: bytes, sizes: tuple[int, ...]) -> bool:
    try:
        _, offset, found, strides = _Unpickler(io.BytesIO(pickled)).load()
    except Exception:  # whatever else was pickled: torch.load reads it
        return False
    expected, step = [], 1
    for size in reversed(sizes):
        expected.append(step)
        step *= max(size, 1)
    ordered = tuple(reversed(expected))
    fits = all(a == b or size <= 1 for a, b, size in zip(strides, ordered, sizes, strict=False))
    return offset == 0 and found == tuple(sizes) and len(strides) == len(sizes) and fits
