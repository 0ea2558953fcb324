"""Checks files of `torch.save` against the CRC-32 that torch keeps for each record."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from unishard.checkpoint.convert.format import Opened, Progress
from unishard.checkpoint.convert.torch_read import Archive


def verify_records(opened: Opened, progress: Progress) -> Iterator[str]:
    """What is wrong with each file that the catalog speaks of, one line each, with the parameters it concerns."""
    for name in opened.catalog.files:
        path = opened.folder / name
        if not path.is_file():
            yield f"{name} is missing"
            continue
        archive = Archive(path)
        for record in archive.changed_records(progress):
            keys = _keys_in(opened, name, *archive.extent(record))
            yield f"{name}: the bytes of {_some(keys) or record} are not those that were written (CRC-32)"


def _keys_in(opened: Opened, file: str, start: int, stop: int) -> list[str]:
    return [
        key
        for key, info in opened.catalog.tensors.items()
        if any(c.file == file and c.data is not None and start <= c.data < stop for c in info.chunks)
    ]


def _some(keys: list[str], most: int = 4) -> str:
    return ", ".join(keys[:most]) + (f" and {len(keys) - most} more" if len(keys) > most else "")


def files_below(folder: Path) -> Iterator[Path]:
    """Files in a folder and in those below it, hidden ones left out."""
    for path in sorted(folder.rglob("*")):
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts):
            yield path
