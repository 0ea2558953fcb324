"""Reads what `torch.save` wrote without loading it: the structure, and where in the file each tensor's bytes lie.

Pickles are executed with stand-ins for every class but a few harmless ones, so a checkpoint can hold objects of
programs that are not installed, and none of its code runs.
"""

from __future__ import annotations

import io
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch

from unishard.checkpoint.boxes import row_strides
from unishard.errors import CheckpointError, CorruptCheckpointError

_PLAIN = {
    ("collections", "OrderedDict"): OrderedDict,
    ("collections", "defaultdict"): lambda *args: {},
    ("builtins", "set"): set,
    ("builtins", "frozenset"): frozenset,
    ("builtins", "slice"): slice,
    ("builtins", "complex"): complex,
    ("builtins", "bytearray"): bytearray,
    ("torch", "Size"): tuple,
    ("torch", "device"): lambda *args: ":".join(map(str, args)),
    ("torch.serialization", "_get_layout"): lambda name: name,
    ("pathlib", "PosixPath"): lambda *parts: "/".join(parts),
}


@dataclass(frozen=True)
class Stored:
    """A tensor in a file: `record` names its storage, `data` is where element 0 lies."""

    path: Path
    record: str
    data: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def row_major(self) -> bool:
        """Whether the elements follow each other in the file, row by row."""
        expected = row_strides(self.shape)
        return not self.numel or all(
            a == b or n == 1 for a, b, n in zip(self.strides, expected, self.shape, strict=True)
        )

    def read(self) -> torch.Tensor:
        """The whole tensor: for small ones.

        Raises `CorruptCheckpointError` if the file ends too early.
        """
        span = (
            1 + sum((n - 1) * s for n, s in zip(self.shape, self.strides, strict=True)) if self.numel else 0
        )
        with open(self.path, "rb") as file:
            file.seek(self.data)
            content = bytearray(file.read(span * self.dtype.itemsize))
        if len(content) < span * self.dtype.itemsize:
            raise CorruptCheckpointError(
                f"{self.path} is truncated: {self.record} ends after {len(content)} bytes"
            )
        if not span:
            return torch.empty(self.shape, dtype=self.dtype)
        return torch.frombuffer(content, dtype=self.dtype).as_strided(self.shape, self.strides).clone()


class Foreign:
    """Stands for an object of any class: what it was made from, and its state."""

    path: tuple[str, str] = ("", "")

    def __new__(cls, *args: Any, **kwargs: Any) -> Foreign:
        made = super().__new__(cls)
        made.args, made.state, made.items = args, {}, []
        return made

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.args: tuple[Any, ...]
        self.state: Any
        self.items: list[Any]

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __setitem__(self, key: Any, value: Any) -> None:
        self.items.append((key, value))

    def append(self, value: Any) -> None:
        self.items.append(value)

    def extend(self, values: Any) -> None:
        self.items.extend(values)

    def get(self, name: str, default: Any = None) -> Any:
        """An attribute that the object had."""
        return self.state.get(name, default) if isinstance(self.state, dict) else default

    def __repr__(self) -> str:
        return f"<{'.'.join(self.path)} {self.args or self.state}>"

    def __eq__(self, other: Any) -> bool:
        return isinstance(other, Foreign) and (self.path, self.args) == (other.path, other.args)

    def __hash__(self) -> int:
        return hash(self.path)


@dataclass(frozen=True)
class _Storage:
    record: str
    dtype: torch.dtype
    data: int


class Archive:
    """One file of `torch.save`.

    Raises:
        CorruptCheckpointError: the file is cut short or is no such file.
        CheckpointError: written by torch before 1.6, in a format that cannot be read in parts.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with zipfile.ZipFile(path) as archive:
                self._places = {info.filename: info for info in archive.infolist()}
                pickled = next((name for name in self._places if name.endswith("data.pkl")), None)
                if pickled is None or any(info.compress_type for info in self._places.values()):
                    raise CheckpointError(f"{path} is a zip archive, but not one that torch.save wrote")
                self._root = pickled.removesuffix("data.pkl")
                content = archive.read(pickled)
                order = f"{self._root}byteorder"
                if order in self._places and archive.read(order) != b"little":
                    raise CheckpointError(
                        f"{path} was written on a big-endian machine; save it on another one"
                    )
        except (zipfile.BadZipFile, EOFError) as error:
            raise self._unreadable(error) from error
        self._starts: dict[str, int] = {}
        with open(path, "rb") as file:
            self._file = file
            try:
                self.content = _Unpickler(content, self._storage).load()
            except CheckpointError:
                raise
            except Exception as error:
                raise CorruptCheckpointError(
                    f"{path}: its structure cannot be read ({type(error).__name__}: {error})"
                ) from error

    def _unreadable(self, error: Exception) -> CheckpointError:
        with open(self.path, "rb") as file:
            head = file.read(2)
        if head == b"\x80\x02":
            return CheckpointError(
                f"{self.path} is in the format of torch before 1.6; load it and torch.save it again"
            )
        return CorruptCheckpointError(
            f"{self.path} is truncated or no file of torch.save ({error}); restore it, or use another checkpoint"
        )

    def _storage(self, identity: tuple[Any, ...]) -> _Storage:
        _, kind, key, _, _ = identity
        record = f"{self._root}data/{key}"
        if record not in self._places:
            raise CorruptCheckpointError(f"{self.path}: the tensor data {record} is missing")
        if record not in self._starts:
            header = self._places[record].header_offset
            self._file.seek(header)
            names, extras = struct.unpack("<26xHH", self._file.read(30))
            self._starts[record] = header + 30 + names + extras
        return _Storage(record, kind, self._starts[record])

    def extent(self, record: str) -> tuple[int, int]:
        """Where a tensor's storage begins and ends in the file."""
        start = self._starts.get(record, self._places[record].header_offset)
        return start, start + self._places[record].file_size

    def records(self) -> Iterator[str]:
        """Names of the parts of the file that hold tensors."""
        return (name for name in self._places if name.startswith(f"{self._root}data/"))

    def changed_records(self, progress: Callable[[int], None] = lambda done: None) -> Iterator[str]:
        """Records whose bytes are not those that were written, by the file's own CRC-32."""
        with zipfile.ZipFile(self.path) as archive:
            for name in self.records():
                try:
                    with archive.open(name) as record:
                        while block := record.read(1 << 20):
                            progress(len(block))
                except (zipfile.BadZipFile, EOFError):
                    yield name


class _Unpickler(pickle.Unpickler):
    def __init__(self, content: bytes, storage: Callable[[tuple[Any, ...]], _Storage]) -> None:
        super().__init__(io.BytesIO(content), encoding="utf-8")
        self._storage_of = storage
        self._foreign: dict[tuple[str, str], Any] = {}
        self._path: Any = getattr(storage, "__self__", None)

    def persistent_load(self, pid: Any) -> Any:
        return self._storage_of(pid)

    def find_class(self, module: str, name: str) -> Any:
        module = "builtins" if module == "__builtin__" else module
        if (module, name) == ("builtins", "getattr"):
            return self._nested
        if (module, name) in _PLAIN:
            return _PLAIN[module, name]
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if module in ("torch", "torch.storage") and name.endswith("Storage"):
            return _storage_dtype(name)
        if module in ("torch._utils", "torch._tensor") and name in _REBUILD:
            return getattr(self, _REBUILD[name])
        if module.split(".")[0] == "numpy" or (module, name) == ("_codecs", "encode"):
            return _numpy(module, name)
        return self._foreign.setdefault(
            (module, name), type(name.rpartition(".")[2], (Foreign,), {"path": (module, name)})
        )

    def _nested(self, owner: Any, name: str) -> Any:
        """A class inside another."""
        if not (isinstance(owner, type) and issubclass(owner, Foreign)):
            raise CheckpointError(f"the pickle asks for {name!r} of {owner!r}, which is not followed")
        return self.find_class(owner.path[0], f"{owner.path[1]}.{name}")

    def tensor(self, storage: _Storage, offset: int, shape: Any, strides: Any, *rest: Any) -> Stored:
        dtype = next((r for r in rest if isinstance(r, torch.dtype)), storage.dtype)
        data = storage.data + offset * dtype.itemsize
        return Stored(self._path.path, storage.record, data, dtype, tuple(shape), tuple(strides))

    def parameter(self, data: Any, *rest: Any) -> Any:
        return data

    def typed(self, function: Any, kind: Any, args: Any, state: Any) -> Any:
        """Subclasses of Tensor: those with memory of their own are what they hold, others keep their state."""
        made = function(*args)
        if isinstance(made, Foreign):
            made.state = state
        return made

    def wrapper(self, kind: Any, dtype: Any, shape: Any, *rest: Any) -> Any:
        return kind(dtype, tuple(shape))


_REBUILD = {
    "_rebuild_tensor_v2": "tensor",
    "_rebuild_tensor_v3": "tensor",
    "_rebuild_parameter": "parameter",
    "_rebuild_parameter_with_state": "parameter",
    "_rebuild_from_type_v2": "typed",
    "_rebuild_wrapper_subclass": "wrapper",
}


def _storage_dtype(name: str) -> torch.dtype:
    known = {kind: dtype for dtype, kind in torch.storage._dtype_to_storage_type_map().items()}
    return known.get(name, torch.uint8)


def _numpy(module: str, name: str) -> Any:
    """Numbers of numpy, which options and counters may be."""
    import _codecs

    import numpy as np
    from numpy._core import multiarray

    if (module, name) == ("_codecs", "encode"):
        return _codecs.encode
    allowed = {
        "scalar": multiarray.scalar,  # pyright: ignore[reportAttributeAccessIssue]
        "_reconstruct": multiarray._reconstruct,  # pyright: ignore[reportAttributeAccessIssue]
        "dtype": np.dtype,
        "ndarray": np.ndarray,
    }
    if name in allowed:
        return allowed[name]
    if module == "numpy.dtypes":
        return getattr(np.dtypes, name)
    raise CheckpointError(
        f"the file holds {module}.{name}, which is not read; save plain numbers and tensors"
    )
