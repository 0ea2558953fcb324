"""Saving: every rank writes its part aside, all of them agree, and the first one commits."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from unishard.checkpoint import commit
from unishard.checkpoint.catalog import Catalog
from unishard.checkpoint.entries import Contents, in_memory
from unishard.checkpoint.meeting import Meeting
from unishard.checkpoint.storage import Progress, RankFile
from unishard.version import __version__


@dataclass(frozen=True)
class Place:
    """Where a checkpoint goes and what is told about it."""

    parent: Path
    tag: str
    about: Mapping[str, Any]
    latest: bool = True
    keep_last: int | None = None
    scripts: Mapping[str, str] = field(default_factory=dict)
    """Files that stand beside all checkpoints, by name; existing ones stay."""
    files: Mapping[str, bytes] = field(default_factory=dict)
    """Further files of this one, by name."""


def begin(place: Place, meeting: Meeting) -> Path:
    """Make the draft folder. All ranks call together; raises on all or on none."""
    draft, failure = None, None
    if meeting.rank == 0:
        try:
            draft = str(commit.new_draft(place.parent, place.tag))
        except Exception as error:
            failure = error
    return Path(meeting.meet(f"prepare {place.parent / place.tag}", failure, draft)[0])


def finish(
    place: Place, draft: Path, contents: Contents, meeting: Meeting, progress: Progress = lambda done: None
) -> Path:
    """Write this rank's part and commit when all have. All ranks call together; raises on all or on none."""
    final = place.parent / place.tag
    catalog, failure = None, None
    try:
        catalog = _write(draft, contents, meeting.rank, progress)
    except Exception as error:
        failure = error
    try:
        catalogs = meeting.meet(f"write {final}", failure, catalog)
    except Exception:
        if meeting.rank == 0:
            commit.discard(draft)
        raise
    failure = None
    if meeting.rank == 0:
        try:
            _commit(place, draft, catalogs)
        except Exception as error:
            failure = error
            commit.discard(draft)
    meeting.meet(f"commit {final}", failure)
    return final


def _write(draft: Path, contents: Contents, rank: int, progress: Progress) -> Catalog:
    with RankFile(draft, f"__{rank}_0.distcp", progress) as file:
        with closing(in_memory(contents.entries.values(), changed=False)) as entries:
            for entry in entries:
                for box, tensor in entry.written:
                    file.add_tensor(entry.key, entry.shape, box, tensor)
        for key, value in contents.blobs.items():
            file.add_blob(key, value)
    file.catalog.aliases = dict(contents.aliases)
    return file.catalog


def _commit(place: Place, draft: Path, catalogs: list[Catalog]) -> None:
    catalog = Catalog(about={**_writer(len(catalogs)), **place.about})
    for each in catalogs:
        catalog.merge(each)
    catalog.require_covered()
    for name, content in place.scripts.items():
        if not (place.parent / name).exists():
            commit.write_aside(place.parent / name, content.encode(), draft / name)
            (place.parent / name).chmod(0o755)
    for name, content in place.files.items():
        commit.write_durably(draft / name, content)
    commit.commit(draft, catalog, place.parent, place.tag)
    if place.latest:
        commit.point_latest(place.parent, place.tag)
    if place.keep_last is not None:
        commit.retain(place.parent, place.keep_last)


def _writer(ranks: int) -> dict[str, Any]:
    return {
        "writer": "unishard",
        "version": __version__,
        "torch": torch.__version__,
        "ranks": ranks,
        "time": time.time(),
    }
