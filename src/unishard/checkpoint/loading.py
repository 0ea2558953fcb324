"""Loading: compare what is wanted with what is there, then let every rank read the boxes it holds."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from unishard.checkpoint.catalog import Catalog, read_catalog
from unishard.checkpoint.entries import Entry, in_memory
from unishard.checkpoint.meeting import Meeting
from unishard.checkpoint.storage import Progress, Reader, missing_files, unlisted_files
from unishard.errors import CheckpointError, CorruptCheckpointError

if TYPE_CHECKING:
    from unishard.checkpoint.convert.format import Hints, Opened

log = logging.getLogger("unishard")

_MOST_ROWS = 40


def open_catalog(folder: Path, meeting: Meeting) -> Catalog:
    """Read the catalog on every rank and check that its files are there. All ranks call together."""
    catalog, failure = Catalog(), None
    try:
        catalog = read_catalog(folder)
        wrong = [*missing_files(folder, catalog), *unlisted_files(folder, catalog, shards_only=True)]
        if wrong:
            raise CorruptCheckpointError(f"{folder} is damaged: {'; '.join(wrong)}; load another checkpoint")
    except Exception as error:
        failure = error
    meeting.meet(f"open {folder}", failure)
    return catalog


def open_any(folder: Path, meeting: Meeting, hints: Hints) -> Opened:
    """As `open_catalog`, for checkpoints of every format that `unishard.checkpoint.convert` knows, under our keys.

    Where a format keeps checksums of whole records, the ranks divide its files and compare them, once.
    """
    from unishard.checkpoint.convert.registry import open_checkpoint

    opened, failure = None, None
    try:
        opened = open_checkpoint(folder, hints=hints)
        wrong = [
            *missing_files(opened.folder, opened.catalog),
            *unlisted_files(opened.folder, opened.catalog, shards_only=True),
        ]
        if not wrong and opened.format != "unishard":
            wrong = list(_changed_in_share(opened, meeting))
        if wrong:
            raise CorruptCheckpointError(f"{folder} is damaged: {'; '.join(wrong)}; load another checkpoint")
    except Exception as error:
        failure = error
    meeting.meet(f"open {folder}", failure)
    if opened is None:
        raise CheckpointError(f"{folder} was not opened")
    for note in opened.notes if meeting.rank == 0 else ():
        log.warning("unishard: %s: %s", folder, note)
    return opened


def _changed_in_share(opened: Opened, meeting: Meeting) -> Sequence[str]:
    from unishard.checkpoint.convert.registry import get

    mine = dict(list(opened.catalog.files.items())[meeting.rank :: meeting.size])
    part = replace(opened, catalog=replace(opened.catalog, files=mine))
    return list(get(opened.format).verify(part, lambda done: None))


def differences(
    catalog: Catalog, wanted: Mapping[str, tuple[int, ...]], present: Iterable[str]
) -> list[tuple[str, str, str]]:
    """(key, in the checkpoint, here) of what does not match: `wanted` shapes by key, and `present` keys to use up."""
    rows = []
    for key, shape in wanted.items():
        info = catalog.find(key)
        if info is None:
            # Of a tensor without elements nothing is written.
            rows += [(key, "missing", str(tuple(shape)))] if prod(shape) else []
        elif info.shape != tuple(shape):
            rows.append((key, str(info.shape), str(tuple(shape))))
    known = {catalog.aliases.get(key, key) for key in wanted}
    for key in present:
        if catalog.aliases.get(key, key) not in known:
            info = catalog.find(key)
            rows.append((key, str(info.shape) if info is not None else "a value", "unexpected"))
    return rows


def table(rows: list[tuple[str, str, str]], folder: Path) -> str:
    """A message of what does not match."""
    width = max((len(row[0]) for row in rows), default=0)
    lines = [f"{folder} does not fit what it is loaded into:", f"  {'':{width}}  checkpoint -> here"]
    lines += [f"  {key:{width}}  {stored} -> {here}" for key, stored, here in rows[:_MOST_ROWS]]
    if len(rows) > _MOST_ROWS:
        lines.append(f"  and {len(rows) - _MOST_ROWS} more")
    return "\n".join(lines)


def require_match(rows: list[tuple[str, str, str]], folder: Path, meeting: Meeting) -> None:
    """Raise `CheckpointError` with a table on every rank if any has rows."""
    meeting.meet(f"match {folder}", CheckpointError(table(rows, folder)) if rows else None)


def read_entries(
    folder: Path,
    catalog: Catalog,
    entries: Iterable[Entry],
    meeting: Meeting,
    *,
    then: Callable[[Reader], Any] | None = None,
    verify: bool = True,
    fresh: bool = False,
    progress: Progress = lambda done: None,
) -> Any:
    """Fill everything that `entries` hold here; `then` reads more and its result is returned.

    All ranks call together, and check everything before any of them changes anything: if a rank finds damage, all raise
    and all are as they were. With `verify=False` the caller has checked already; with `fresh` as well, bytes are
    compared as they come, into memory that the caller drops if this raises.
    """
    wanted = list(entries)
    result = check_entries(folder, catalog, wanted, meeting, then=then) if verify else None
    failure = None
    try:
        with (
            Reader(folder, catalog, verify=fresh, progress=progress) as reader,
            torch.no_grad(),
            closing(in_memory(wanted, changed=True)) as opened,
        ):
            fill = reader.fill_fresh if fresh else reader.fill
            for entry in opened:
                for box, tensor in entry.held:
                    fill(entry.key, box, tensor.view(box.sizes) if tensor.dim() != len(box.sizes) else tensor)
            if not verify and then is not None:
                result = then(reader)
    except Exception as error:
        failure = error
    meeting.meet(f"read {folder}", failure)
    return result


def check_entries(
    folder: Path,
    catalog: Catalog,
    entries: Iterable[Entry],
    meeting: Meeting,
    *,
    then: Callable[[Reader], Any] | None = None,
) -> Any:
    """Compare the checksums of everything that `entries` hold here; return what `then` reads. Changes nothing.

    All ranks call together; raises on all or on none.
    """
    failure, result = None, None
    try:
        with Reader(folder, catalog) as reader:
            for entry in entries:
                for box, _ in entry.held:
                    reader.check(entry.key, box)
            result = then(reader) if then is not None else None
    except Exception as error:
        failure = error
    meeting.meet(f"check {folder}", failure)
    return result
