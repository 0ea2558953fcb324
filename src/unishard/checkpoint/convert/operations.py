"""What can be done with checkpoints of any format, in one process and bounded memory."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

import torch

from unishard.checkpoint.boxes import pieces
from unishard.checkpoint.catalog import Catalog
from unishard.checkpoint.convert.format import Format, Hints, Opened, Options
from unishard.checkpoint.convert.registry import get, open_checkpoint
from unishard.checkpoint.convert.source import PIECE, Source
from unishard.checkpoint.keys import GROUPS, TRUST
from unishard.checkpoint.progress import bar
from unishard.checkpoint.storage import Reader
from unishard.errors import CheckpointError, CorruptCheckpointError


class Converted(NamedTuple):
    """Where the result is, and what it could not carry."""

    path: Path
    notes: list[str]


def convert(
    source: str | Path,
    target: str | Path,
    to: str,
    options: Options | None = None,
    *,
    tag: str | None = None,
    format: str | None = None,
    hints: Hints | None = None,
    check: bool = True,
) -> Converted:
    """Write a checkpoint of any format as one of format `to`, a few MB at a time, on one process.

    Args:
        source: a checkpoint, or a folder of several: then `tag`, or what `latest` names.
        target: a file or folder that does not exist; for unishard and DeepSpeed the folder above `global_step<N>`.
        check: read everything once before and compare with the checksums that the format has.

    Raises:
        CheckpointError: nothing to convert, a target that exists, something that `to` cannot hold.
        CorruptCheckpointError: bytes that are not those that were written, with file and parameter.

    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> torch.save({"w": torch.ones(2)}, folder / "w.pt")
    >>> convert(folder / "w.pt", folder / "w.safetensors", "safetensors").path.name
    'w.safetensors'
    """
    writer = get(to)
    opened = open_checkpoint(source, tag=tag, format=format, hints=hints)
    options = options or Options()
    _require_honoured(writer, options)
    if check and opened.format != "unishard":  # ours is compared while it is read
        problems = list(verify(opened))
        if problems:
            raise CorruptCheckpointError(f"{opened.folder}: {'; '.join(problems)}")
    total = Source(opened, options).nbytes()
    with (
        bar(f"converting to {writer.title}", total) as progress,
        Source(opened, options, progress, trust=os.environ.get(TRUST) == "1") as reading,
    ):
        path, notes = writer.write(reading, Path(target), options)
    return Converted(path, [*opened.notes, *notes])


def _require_honoured(writer: Format, options: Options) -> None:
    given = [f.name for f in fields(Options) if getattr(options, f.name) != f.default]
    if writer.honours:  # a format that is only read says so itself
        for name in given:
            if name not in writer.honours:
                raise CheckpointError(
                    f"{name}={getattr(options, name)!r} has no meaning for {writer.title}; leave it out"
                )


def verify(opened: Opened) -> Iterator[str]:
    """What is wrong with the bytes of a checkpoint, one line each; none if all is well."""
    total = sum(size for size in opened.catalog.files.values() if size > 0)
    with bar("verifying", total) as progress:
        yield from get(opened.format).verify(opened, progress)


class Difference(NamedTuple):
    """One key in which two checkpoints differ. `largest` is the largest absolute difference, if shapes are equal."""

    key: str
    first: str
    second: str
    largest: float | None = None


def compare(first: Opened, second: Opened, *, values: bool = True) -> Iterator[Difference]:
    """Where two checkpoints of any formats differ: tensors that one lacks, shapes, elements, options of the optimizer.

    Args:
        values: compare elements too, which reads both.
    """
    a, b = first.catalog, second.catalog
    keys = [*a.tensors, *(k for k in b.tensors if a.find(k) is None)]
    total = sum(info.nbytes for info in a.tensors.values())
    # As float64 every stored number is exact but integers beyond 2^53. One allocation for all keys: many of this
    # size would leave holes in the C heap.
    room = torch.empty(2, PIECE // 8, dtype=torch.float64)
    with (
        bar("comparing", total) as progress,
        Reader(first.folder, a, progress=progress) as one,
        Reader(second.folder, b) as two,
    ):
        for key in keys:
            known, other = a.find(key), b.find(key)
            if known is None or other is None or known.shape != other.shape:
                yield Difference(key, _shape(known), _shape(other))
            elif values and (largest := _largest_difference(key, (a, one), (b, two), room)):
                yield Difference(key, _shape(known), _shape(other), largest)
        for key in sorted({k for k in (*a.blobs, *b.blobs) if k.startswith(f"{GROUPS}.")}):
            said = [_value(catalog, reader, key) for catalog, reader in ((a, one), (b, two))]
            if said[0] != said[1]:
                yield Difference(key, said[0], said[1])


def _shape(info: Any) -> str:
    return "missing" if info is None else f"{info.shape} {str(info.dtype).removeprefix('torch.')}"


def _value(catalog: Catalog, reader: Reader, key: str) -> str:
    if key not in catalog.blobs:
        return "missing"
    try:
        value = reader.blob(key)
    except CheckpointError:
        return "not read"
    if key.endswith(".params"):  # whose order says nothing, as state goes by name
        value = sorted(value)
    return repr(list(value) if isinstance(value, tuple) else value)


def _largest_difference(
    key: str, a: tuple[Catalog, Reader], b: tuple[Catalog, Reader], room: torch.Tensor
) -> float:
    info = a[0].find(key)
    largest = 0.0
    for box in pieces(info.shape if info is not None else (), PIECE // 8):
        one, two = (half[: box.numel].view(box.sizes) for half in room)
        for (catalog, reader), target in ((a, one), (b, two)):
            reader.fill(catalog.aliases.get(key, key), box, target)
        same = (one == two) | (one.isnan() & two.isnan())
        if not same.all():
            difference = torch.where(same, 0.0, (one - two).abs()).nan_to_num(nan=torch.inf)
            largest = max(largest, difference.max().item())
    return largest
