"""Weights as `transformers` keeps them: `model.safetensors`, or several with `model.safetensors.index.json`.

A safetensors file is 8 bytes with the length of a JSON header, the header, and the tensors row by row. It is written
here piece by piece, because the library wants all tensors of a file in memory. `pytorch_model.bin` is read as well.
"""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any

import torch

from unishard.checkpoint.catalog import Catalog, Chunk, TensorInfo
from unishard.checkpoint.convert.aside import aside
from unishard.checkpoint.convert.format import Hints, Opened, Options, Progress, note_files
from unishard.checkpoint.convert.records import verify_records
from unishard.checkpoint.convert.source import Source
from unishard.checkpoint.convert.torch_file import put_weights, weights_to_write
from unishard.checkpoint.convert.torch_read import Archive
from unishard.checkpoint.convert.torch_write import write_torch_file
from unishard.checkpoint.keys import MODEL
from unishard.checkpoint.storage import raw_bytes
from unishard.errors import CheckpointError, CorruptCheckpointError

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
_TORCH_INDEX, _TORCH_SINGLE = "pytorch_model.bin.index.json", "pytorch_model.bin"
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_LARGEST_HEADER = 100_000_000


class HuggingFaceFormat:
    """A folder of `transformers`, or one `.safetensors` file."""

    name = "safetensors"
    title = "Hugging Face safetensors"
    honours = frozenset(
        {"dtype", "weights_only", "exclude_frozen", "overwrite", "max_shard_bytes", "like", "pickled"}
    )

    def detect(self, path: Path) -> bool:
        if path.is_file():
            return path.suffix == ".safetensors"
        return path.is_dir() and bool(_weight_files(path))

    def open(self, path: Path, hints: Hints) -> Opened:
        folder = path if path.is_dir() else path.parent
        opened = Opened(folder, Catalog(about={"writer": "safetensors"}), self.name)
        listed = _weight_files(path) if path.is_dir() else [path.name]
        for name in listed:
            if not (folder / name).is_file():
                raise CorruptCheckpointError(f"{folder / name}, which the index names, is missing")
            if name.endswith(".safetensors"):
                _put_file(opened, name)
            else:
                put_weights(opened, Archive(folder / name).content)
        _require_listed(opened, path)
        return note_files(opened)

    def verify(self, opened: Opened, progress: Progress) -> Iterator[str]:
        """safetensors keeps no checksums: sizes and the index were compared when it was opened."""
        files = [name for name in opened.catalog.files if not name.endswith(".safetensors")]
        if files:
            yield from verify_records(opened, progress)

    def write(self, source: Source, target: Path, options: Options) -> tuple[Path, list[str]]:
        weights = source.weights()
        one_file = target.suffix == ".safetensors"
        if one_file and (options.like is not None or options.pickled):
            raise CheckpointError(
                f"{target} is one file; name a folder to have a configuration or other files in it"
            )
        shards = [list(weights)] if one_file else split_shards(weights, options.max_shard_bytes)
        with aside(target, folder=not one_file, overwrite=options.overwrite) as draft:
            if one_file:
                _write_file(draft, source, weights)
                return target, _notes(source)
            if options.like is not None:
                _copy_like(options.like, draft)
            _write_shards(draft, source, shards, pickled=options.pickled)
        return target, _notes(source)


# reading --------------------------------------------------------------------------------------------------------


def _weight_files(folder: Path) -> list[str]:
    for index in (INDEX, _TORCH_INDEX):
        if (folder / index).is_file():
            return sorted(set(_weight_map(folder / index).values()))
    for single in (SINGLE, _TORCH_SINGLE):
        if (folder / single).is_file():
            return [single]
    return sorted(p.name for p in folder.glob("*.safetensors"))


def _weight_map(index: Path) -> dict[str, str]:
    try:
        return json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    except (ValueError, KeyError) as error:
        raise CorruptCheckpointError(f"{index} is damaged ({type(error).__name__}: {error})") from error


def _require_listed(opened: Opened, path: Path) -> None:
    for index in (INDEX, _TORCH_INDEX):
        if path.is_dir() and (path / index).is_file():
            for name, file in _weight_map(path / index).items():
                if opened.catalog.find(f"{MODEL}.{name}") is None:
                    raise CorruptCheckpointError(f"{path / file} lacks {name}, which {index} says it holds")


def _put_file(opened: Opened, name: str) -> None:
    path = opened.folder / name
    header, start = _header(path)
    size = path.stat().st_size
    for key, entry in header.items():
        if key == "__metadata__":
            continue
        shape, (begin, end) = tuple(entry["shape"]), entry["data_offsets"]
        if entry["dtype"] not in _DTYPES:
            raise CheckpointError(f"{path}: {key} has dtype {entry['dtype']}, which is not read")
        dtype = _DTYPES[entry["dtype"]]
        if end - begin != prod(shape) * dtype.itemsize or start + end > size:
            raise CorruptCheckpointError(
                f"{path} is truncated or damaged: {key} needs bytes up to {start + end}, and the file has {size}"
            )
        chunk = Chunk((0,) * len(shape), shape, name, start + begin, end - begin, start + begin)
        opened.catalog.tensors[f"{MODEL}.{key}"] = TensorInfo(shape, dtype, [chunk])


def _header(path: Path) -> tuple[Mapping[str, Any], int]:
    with open(path, "rb") as file:
        first = file.read(8)
        length = struct.unpack("<Q", first)[0] if len(first) == 8 else _LARGEST_HEADER + 1
        if length > _LARGEST_HEADER:
            raise CorruptCheckpointError(f"{path} is truncated or no safetensors file")
        try:
            return json.loads(file.read(length)), 8 + length
        except ValueError as error:
            raise CorruptCheckpointError(f"{path}: its header is damaged ({error})") from error


# writing --------------------------------------------------------------------------------------------------------


def split_shards(weights: Mapping[str, TensorInfo], most: int) -> list[list[str]]:
    """Names of the tensors of each file, in order; a tensor larger than `most` bytes has one of its own."""
    shards: list[list[str]] = [[]]
    held = 0
    for name, info in weights.items():
        if shards[-1] and held + info.nbytes > most:
            shards.append([])
            held = 0
        shards[-1].append(name)
        held += info.nbytes
    return shards


def _write_shards(folder: Path, source: Source, shards: list[list[str]], *, pickled: bool) -> None:
    weights = source.weights()
    weight_map: dict[str, str] = {}
    for name, members in zip(shard_names(len(shards), pickled=pickled), shards, strict=True):
        if pickled:
            # Tied weights share memory in one file, so they are there under all their names.
            state = weights_to_write(source, members)
            write_torch_file(folder / name, state)
            weight_map |= dict.fromkeys(state, name)
        else:
            _write_file(folder / name, source, {m: weights[m] for m in members})
            weight_map |= dict.fromkeys(members, name)
    if len(shards) > 1:
        write_index(folder, weight_map, weights, pickled=pickled)


def _write_file(path: Path, source: Source, weights: Mapping[str, TensorInfo]) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, info in weights.items():
        if info.dtype not in _NAMES:
            raise CheckpointError(f"{name}: safetensors has no {info.dtype}; pass --dtype")
        end = position + info.nbytes
        header[name] = {
            "dtype": _NAMES[info.dtype],
            "shape": list(info.shape),
            "data_offsets": [position, end],
        }
        position = end
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)  # so that tensors are aligned
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        for name in weights:
            for _, piece in source.weight_pieces(name):
                file.write(raw_bytes(piece))


def shard_names(count: int, *, pickled: bool) -> list[str]:
    """What `transformers` calls the files of a model in `count` of them."""
    stem, suffix = ("pytorch_model", "bin") if pickled else ("model", "safetensors")
    if count == 1:
        return [f"{stem}.{suffix}"]
    return [f"{stem}-{i + 1:05d}-of-{count:05d}.{suffix}" for i in range(count)]


def write_index(
    folder: Path, weight_map: Mapping[str, str], weights: Mapping[str, TensorInfo], *, pickled: bool
) -> None:
    """Say which file of a folder has which tensor, as `transformers` reads it."""
    path = folder / (_TORCH_INDEX if pickled else INDEX)
    total = sum(info.nbytes for info in weights.values())
    content = {"metadata": {"total_size": total}, "weight_map": weight_map}
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _copy_like(like: Path, target: Path) -> None:
    """Configuration, tokenizer and code of a model folder, without its weights."""
    if not like.is_dir():
        raise CheckpointError(f"--like {like} is no folder of a Hugging Face model")
    weights = (".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".gguf", ".index.json")
    for path in like.iterdir():
        if path.is_file() and not path.name.endswith(weights) and not path.name.startswith("."):
            shutil.copy2(path, target / path.name)


def _notes(source: Source) -> list[str]:
    notes = []
    if source.opened.catalog.blobs:
        notes.append("only weights and buffers: the optimizer and the counters have no place in safetensors")
    if source.ties():
        ties = ", ".join(f"{alias} = {name}" for alias, name in source.ties().items())
        notes.append(f"tied weights are stored once: {ties}")
    return notes
