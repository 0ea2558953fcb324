"""What a checkpoint holds and where: written as our manifest and as torch.distributed.checkpoint's metadata."""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from unishard.checkpoint.boxes import Box
from unishard.errors import CheckpointError, CorruptCheckpointError

MANIFEST = "manifest.json"
"""Written last: a folder with one is a whole checkpoint."""
METADATA = ".metadata"
FORMAT = 1
BLOCK = 1 << 20
"""Bytes that one checksum covers."""


@dataclass(frozen=True)
class Chunk:
    """A box of one tensor in one file: `length` bytes from `offset` that `torch.load` reads, raw data from `data`."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    offset: int
    length: int
    data: int | None = None
    checksums: tuple[int, ...] = ()
    """CRC-32 of each block of raw bytes; none in checkpoints of other origin."""
    strides: tuple[int, ...] | None = None
    """Elements between neighbours of each dim, where another program did not store the box row by row."""

    @property
    def box(self) -> Box:
        return Box(self.offsets, self.sizes)


@dataclass
class TensorInfo:
    """Global shape, dtype and chunks of one tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    chunks: list[Chunk] = field(default_factory=list)
    value: torch.Tensor | None = None
    """The tensor itself, in place of chunks, where another format has it only as a number (counters)."""

    @property
    def nbytes(self) -> int:
        numel = 1
        for size in self.shape:
            numel *= size
        return numel * self.dtype.itemsize


@dataclass(frozen=True)
class Blob:
    """A value that is no tensor: `length` bytes of `torch.save` from `offset`."""

    file: str
    offset: int
    length: int
    checksum: int | None = None


@dataclass(frozen=True)
class Known:
    """A value that a catalog of another format has by itself: found where no bytes of `torch.save` stand for it."""

    value: Any


@dataclass
class Catalog:
    """Everything in one checkpoint, by key. `aliases` are further keys of tied tensors."""

    tensors: dict[str, TensorInfo] = field(default_factory=dict)
    blobs: dict[str, Blob | Known] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)
    files: dict[str, int] = field(default_factory=dict)
    """Bytes of each file."""
    about: dict[str, Any] = field(default_factory=dict)
    """Who wrote it, when, at which step, with which configuration."""

    def merge(self, other: Catalog) -> None:
        """Add what another rank wrote."""
        for key, info in other.tensors.items():
            known = self.tensors.setdefault(key, TensorInfo(info.shape, info.dtype))
            if (known.shape, known.dtype) != (info.shape, info.dtype):
                raise CheckpointError(
                    f"{key}: ranks disagree, one has {known.shape} {known.dtype}, another {info.shape} {info.dtype}; "
                    "save the same state on every rank"
                )
            known.chunks += info.chunks
        self.blobs |= other.blobs
        self.aliases |= other.aliases
        self.files |= other.files

    def find(self, key: str) -> TensorInfo | None:
        """A tensor by its key or by an alias."""
        return self.tensors.get(self.aliases.get(key, key))

    def require_covered(self) -> None:
        """Raise `CheckpointError` unless every element of every tensor was written exactly once."""
        for key, info in self.tensors.items():
            written = sum(chunk.box.numel for chunk in info.chunks)
            expected = info.nbytes // info.dtype.itemsize
            if written != expected:
                raise CheckpointError(
                    f"{key}: the ranks together gave {written} of {expected} elements; every rank must save its part"
                )

    # our manifest ------------------------------------------------------------------------------------------

    def to_json(self) -> str:
        tensors = {
            key: {
                "shape": info.shape,
                "dtype": str(info.dtype).removeprefix("torch."),
                "chunks": [_written(chunk) for chunk in info.chunks],
            }
            for key, info in self.tensors.items()
        }
        blobs = {key: asdict(blob) for key, blob in self.blobs.items()}
        content = {"format": FORMAT, "about": self.about, "files": self.files, "aliases": self.aliases}
        return json.dumps({**content, "blobs": blobs, "tensors": tensors}, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str, where: str) -> Catalog:
        """Raises `CorruptCheckpointError` for anything but a manifest of this format."""
        try:
            content = json.loads(text)
            if content["format"] != FORMAT:
                raise CheckpointError(
                    f"{where} has format {content['format']}, this version reads {FORMAT}; upgrade unishard"
                )
            return cls(
                tensors={key: _info(entry) for key, entry in content["tensors"].items()},
                blobs={key: Blob(**entry) for key, entry in content["blobs"].items()},
                aliases=content["aliases"],
                files=content["files"],
                about=content["about"],
            )
        except (ValueError, KeyError, TypeError) as error:
            raise CorruptCheckpointError(f"{where} is damaged ({type(error).__name__}: {error})") from error

    # torch.distributed.checkpoint --------------------------------------------------------------------------

    def to_dcp(self) -> bytes:
        """The pickled metadata that torch's `FileSystemReader` expects."""
        from torch.distributed.checkpoint.filesystem import _StorageInfo
        from torch.distributed.checkpoint.metadata import (
            BytesStorageMetadata,
            ChunkStorageMetadata,
            Metadata,
            MetadataIndex,
            StorageMeta,
            TensorProperties,
            TensorStorageMetadata,
        )

        entries: dict[str, Any] = {}
        storage: dict[Any, Any] = {}
        named = [*self.tensors.items(), *((alias, self.tensors[key]) for alias, key in self.aliases.items())]
        for key, info in named:
            sizes = [ChunkStorageMetadata(torch.Size(c.offsets), torch.Size(c.sizes)) for c in info.chunks]
            entries[key] = TensorStorageMetadata(
                TensorProperties(dtype=info.dtype), torch.Size(info.shape), sizes
            )
            for position, chunk in enumerate(info.chunks):
                index = MetadataIndex(key, torch.Size(chunk.offsets), position)
                storage[index] = _StorageInfo(chunk.file, chunk.offset, chunk.length)
        for key, blob in self.blobs.items():
            if isinstance(blob, Known):
                raise CheckpointError(f"{key} is not in any file; write it before the catalog")
            entries[key] = BytesStorageMetadata()
            storage[MetadataIndex(key)] = _StorageInfo(blob.file, blob.offset, blob.length)
        paths = {key: _path(key) for key in entries}
        return pickle.dumps(
            Metadata(entries, planner_data=paths, storage_data=storage, storage_meta=StorageMeta())
        )

    @classmethod
    def from_dcp(cls, folder: Path) -> Catalog:
        """Read the metadata of a checkpoint that torch.distributed.checkpoint wrote."""
        from torch.distributed.checkpoint import FileSystemReader
        from torch.distributed.checkpoint.metadata import MetadataIndex, TensorStorageMetadata

        metadata = FileSystemReader(folder).read_metadata()
        places: Mapping[Any, Any] = metadata.storage_data
        catalog = cls(about={"writer": "torch.distributed.checkpoint"})
        for key, entry in metadata.state_dict_metadata.items():
            if not isinstance(entry, TensorStorageMetadata):
                place = places[MetadataIndex(key)]
                catalog.blobs[key] = Blob(place.relative_path, place.offset, place.length)
                continue
            info = TensorInfo(tuple(entry.size), entry.properties.dtype)
            for chunk in entry.chunks:
                place = places[MetadataIndex(key, chunk.offsets)]
                info.chunks.append(
                    Chunk(
                        tuple(chunk.offsets),
                        tuple(chunk.sizes),
                        place.relative_path,
                        place.offset,
                        place.length,
                    )
                )
            catalog.tensors[key] = info
        return catalog


def _written(chunk: Chunk) -> dict[str, Any]:
    fields = asdict(chunk)
    del fields["strides"]  # what we write is row by row
    return fields


def _info(entry: Mapping[str, Any]) -> TensorInfo:
    chunks = [
        Chunk(
            **{
                **c,
                "offsets": tuple(c["offsets"]),
                "sizes": tuple(c["sizes"]),
                "checksums": tuple(c["checksums"]),
            }
        )
        for c in entry["chunks"]
    ]
    return TensorInfo(tuple(entry["shape"]), getattr(torch, entry["dtype"]), chunks)


def _path(key: str) -> tuple[Any, ...]:
    """Where a key stands in the nested state that torch's planner would flatten: model and optimizer by their parts."""
    root, _, rest = key.partition(".")
    if root == "optim" and rest.startswith("state."):
        name, _, kind = rest.removeprefix("state.").rpartition(".")
        return ("optim", "state", name, kind)
    if root == "optim" and rest.startswith("param_groups."):
        _, index, option = rest.split(".", 2)
        return ("optim", "param_groups", int(index), option)
    return (root, rest) if rest else (root,)


def read_catalog(folder: Path) -> Catalog:
    """The catalog of a checkpoint of ours or of torch.distributed.checkpoint's.

    Raises `CheckpointError` if the folder holds neither.
    """
    manifest = folder / MANIFEST
    if manifest.is_file():
        return Catalog.from_json(manifest.read_text(encoding="utf-8"), str(manifest))
    if (folder / METADATA).is_file():
        return Catalog.from_dcp(folder)
    found = sorted(p.name for p in folder.iterdir())[:8] if folder.is_dir() else []
    raise CheckpointError(
        f"{folder} holds no checkpoint: neither {MANIFEST} nor {METADATA} is there"
        + (f", but {', '.join(found)}" if found else "; check the path")
        + _how_to_convert(folder)
    )


def _how_to_convert(folder: Path) -> str:
    from unishard.checkpoint.convert.registry import detect

    known = detect(folder)
    if known is None:
        return ""
    return (
        f". `unishard ckpt convert {folder} TARGET --to unishard` makes one of this {known.title} checkpoint"
    )


def keys_of(prefix: str, keys: Iterable[str]) -> list[str]:
    """Keys under `prefix.`, without it.

    >>> keys_of("model", ["model.a", "optim.b"])
    ['a']
    """
    return [key[len(prefix) + 1 :] for key in keys if key.startswith(prefix + ".")]
