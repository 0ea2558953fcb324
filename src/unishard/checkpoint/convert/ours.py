"""unishard's own checkpoints: a folder with a manifest."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from unishard.checkpoint import commit
from unishard.checkpoint.boxes import Box
from unishard.checkpoint.catalog import MANIFEST, read_catalog
from unishard.checkpoint.convert.format import Hints, Opened, Options, Progress
from unishard.checkpoint.convert.source import PIECE, Source
from unishard.checkpoint.keys import CLIENT, ENGINE, GROUPS, MODEL, STATE, TRUST
from unishard.checkpoint.storage import RankFile, Reader, missing_files, unlisted_files
from unishard.errors import CheckpointError, CorruptCheckpointError
from unishard.version import __version__


class UnishardFormat:
    """Read as it is, written with checksums and committed in one step, as the engine does."""

    name = "unishard"
    title = "unishard"
    honours = frozenset({"dtype", "weights_only", "exclude_frozen", "overwrite", "tag"})

    def detect(self, path: Path) -> bool:
        return (path / MANIFEST).is_file()

    def open(self, path: Path, hints: Hints) -> Opened:
        catalog = read_catalog(path)
        wrong = list(missing_files(path, catalog))
        if wrong:
            raise CorruptCheckpointError(f"{path} is damaged: {'; '.join(wrong)}")
        return Opened(path, catalog, self.name)

    def verify(self, opened: Opened, progress: Progress) -> Iterator[str]:
        """Reads everything and compares each MiB with its checksum in the manifest."""
        yield from unlisted_files(opened.folder, opened.catalog)
        catalog = opened.catalog
        with Reader(opened.folder, catalog, progress=progress) as reader:
            for key, info in catalog.tensors.items():
                for chunk in info.chunks:
                    try:
                        for start in range(0, chunk.box.numel * info.dtype.itemsize, PIECE):
                            size = min(PIECE, chunk.box.numel * info.dtype.itemsize - start)
                            reader._raw(key, info, chunk, start, size)
                    except CorruptCheckpointError as error:
                        yield str(error)
            for key in catalog.blobs:
                try:
                    reader.blob(key, trust=os.environ.get(TRUST) == "1")
                except CorruptCheckpointError as error:
                    yield str(error)
                except Exception:  # classes that are not trusted: the checksum was compared before
                    continue

    def write(self, source: Source, target: Path, options: Options) -> tuple[Path, list[str]]:
        tag = options.tag or f"global_step{source.step()}"
        if (target / tag).exists() and not options.overwrite:
            raise CheckpointError(
                f"{target / tag} exists; choose another place, or pass --overwrite (overwrite=True)"
            )
        draft = commit.new_draft(target.absolute(), tag)
        try:
            with RankFile(draft, "__0_0.distcp") as file:
                _write_tensors(source, file)
                _write_values(source, file)
            catalog = file.catalog
            catalog.aliases = {f"{MODEL}.{a}": f"{MODEL}.{n}" for a, n in source.ties().items()}
            catalog.about = _about(source)
            catalog.require_covered()
            final = commit.commit(draft, catalog, target.absolute(), tag)
        except BaseException:
            commit.discard(draft)
            raise
        commit.point_latest(target.absolute(), tag)
        return final, []


def _write_tensors(source: Source, file: RankFile) -> None:
    for name, info in source.weights().items():
        add_in_pieces(file, f"{MODEL}.{name}", info.shape, source.weight_pieces(name))
    for name, kinds in source.states().items():
        for kind, info in kinds.items():
            key = f"{STATE}.{name}.{kind}"
            add_in_pieces(file, key, info.shape, source.pieces(key))


def add_in_pieces(
    file: RankFile, key: str, shape: tuple[int, ...], pieces: Iterator[tuple[Box, torch.Tensor]]
) -> None:
    """Write a tensor of which only one piece is in memory at a time."""
    for box, tensor in pieces:
        file.add_tensor(key, shape, box, tensor)


def _write_values(source: Source, file: RankFile) -> None:
    for position, options in enumerate(source.groups()):
        for option, value in options.items():
            file.add_blob(f"{GROUPS}.{position}.{option}", value)
    for name, kinds in source.state_values().items():
        for kind, value in kinds.items():
            file.add_blob(f"{STATE}.{name}.{kind}", value)
    if source.engine():
        file.add_blob(ENGINE, source.engine())
    file.add_blob(CLIENT, source.client_state())


def _about(source: Source) -> dict[str, Any]:
    carried = ("samples", "frozen_excluded", "frozen", "config", "sharding")
    kept = {k: v for k, v in source.about.items() if k in carried}
    return {
        **kept,
        "writer": "unishard",
        "version": __version__,
        "torch": torch.__version__,
        "ranks": 1,
        "time": time.time(),
        "step": source.step(),
        "converted_from": source.opened.format,
        "written_by": source.about.get("writer"),
    }
