"""Writing beside the target and giving it its name at the end, so that nobody finds half a result."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from unishard.errors import CheckpointError


@contextmanager
def aside(target: Path, *, folder: bool, overwrite: bool = False) -> Iterator[Path]:
    """A new file, or folder, beside `target`, which becomes `target` when the block ends well and is removed otherwise.

    Raises `CheckpointError` if there is something at `target` already, unless it may be overwritten.
    """
    occupied = target.exists() and not (target.is_dir() and not any(target.iterdir()))
    if occupied and not overwrite:
        raise CheckpointError(f"{target} exists; choose another place, or pass --overwrite (overwrite=True)")
    target.parent.mkdir(parents=True, exist_ok=True)
    draft = target.with_name(f".{target.name}.part-{uuid.uuid4().hex[:12]}")
    try:
        if folder:
            draft.mkdir()
        yield draft
        _sync(draft)
        if target.is_dir():
            shutil.rmtree(target)
        draft.replace(target)
    finally:
        if draft.is_dir():
            shutil.rmtree(draft, ignore_errors=True)
        else:
            draft.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    files = [p for p in path.rglob("*") if p.is_file()] if path.is_dir() else [path]
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
