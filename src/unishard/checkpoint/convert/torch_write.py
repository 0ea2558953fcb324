"""Writes files that `torch.load(weights_only=True)` reads, tensor data streamed in pieces.

`torch.save` wants every tensor in memory. A file of it is a zip archive of stored records: the pickled structure, and
one record for the bytes of each tensor's storage.
"""

from __future__ import annotations

import io
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch._utils import _rebuild_tensor_v2

from unishard.checkpoint.archive import storage_kind
from unishard.checkpoint.boxes import row_strides
from unishard.checkpoint.storage import raw_bytes

_ALIGNMENT = 64  # for memory mapping
_ROOT = "archive"


@dataclass(frozen=True)
class Streamed:
    """Stands for a tensor in the structure to be written: its pieces come later, in element order."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    pieces: Callable[[], Iterable[torch.Tensor]]
    key: str = ""
    """Tensors with the same key share one storage, as tied weights do."""


class _Tensor:
    def __init__(self, streamed: Streamed, record: str) -> None:
        self._streamed, self._record = streamed, record

    def __reduce__(self) -> Any:
        dtype, shape = self._streamed.dtype, self._streamed.shape
        storage = _Storage(("storage", storage_kind(dtype), self._record, "cpu", prod(shape)))
        return _rebuild_tensor_v2, (storage, 0, torch.Size(shape), row_strides(shape), False, OrderedDict())


@dataclass
class _Storage:
    identity: tuple[Any, ...]


class _Pickler(pickle.Pickler):
    def __init__(self, file: Any, records: dict[str, Streamed]) -> None:
        super().__init__(file, protocol=2)
        self._records = records
        self._names: dict[Any, str] = {}

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, torch.Tensor):
            held = obj.detach().contiguous().cpu()
            obj = Streamed(held.dtype, tuple(held.shape), lambda: (held,))
        if not isinstance(obj, Streamed):
            return NotImplemented
        name = self._names.setdefault(obj.key or id(obj), str(len(self._names)))
        self._records[name] = obj
        return _Tensor(obj, name).__reduce__()

    def persistent_id(self, obj: Any) -> Any:
        return obj.identity if isinstance(obj, _Storage) else None


def write_torch_file(path: Path, content: Any) -> None:
    """Write `content`, a structure with `Streamed` in the place of large tensors, as `torch.save` would.

    >>> import tempfile
    >>> rows = Streamed(torch.float32, (2, 2), lambda: iter([torch.ones(2), torch.zeros(2)]))
    >>> file = Path(tempfile.mkdtemp()) / "w.pt"
    >>> write_torch_file(file, {"w": rows, "step": 3})
    >>> torch.load(file, weights_only=True)
    {'w': tensor([[1., 1.],
            [0., 0.]]), 'step': 3}
    """
    records: dict[str, Streamed] = {}
    pickled = io.BytesIO()
    _Pickler(pickled, records).dump(content)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        _add(archive, f"{_ROOT}/data.pkl", [pickled.getvalue()])
        _add(archive, f"{_ROOT}/byteorder", [b"little"])
        for name, streamed in records.items():
            _add(archive, f"{_ROOT}/data/{name}", _bytes(streamed))
        _add(archive, f"{_ROOT}/version", [b"3\n"])


def _bytes(streamed: Streamed) -> Iterable[Any]:
    for piece in streamed.pieces():
        yield raw_bytes(piece.to(streamed.dtype).contiguous())


def _add(archive: zipfile.ZipFile, name: str, content: Iterable[Any]) -> None:
    info = zipfile.ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0))
    # The size is not known beforehand, so the header has room for a long one: 20 bytes, before the padding.
    position = archive.fp.tell() + 30 + len(name) + 20  # pyright: ignore[reportOptionalMemberAccess]
    padding = -(position + 4) % _ALIGNMENT
    info.extra = b"FB" + padding.to_bytes(2, "little") + b"Z" * padding
    with archive.open(info, "w", force_zip64=True) as record:
        for part in content:
            record.write(part)
