"""What a checkpoint format can do, and what convert passes around: a catalog over whatever files there are.

A format describes where every tensor's bytes lie in its files, under our keys. Everything else (reading boxes,
comparing, loading into an engine at any number of ranks, writing another format) works on that description.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch

from unishard.checkpoint.boxes import boxes_of_run
from unishard.checkpoint.catalog import Catalog, Chunk, Known, TensorInfo
from unishard.checkpoint.convert.torch_read import Stored
from unishard.checkpoint.keys import CLIENT, ENGINE, GROUPS

Progress = Callable[[int], None]
"""Told of each number of bytes that was read or written."""


def silent(done: int) -> None:
    """No progress is shown."""


@dataclass
class Opened:
    """A checkpoint of any format: a catalog whose files are relative to `folder`."""

    folder: Path
    catalog: Catalog
    format: str
    notes: list[str] = field(default_factory=list)
    """What the checkpoint holds and this description does not, one line each."""


@dataclass(frozen=True)
class Hints:
    """What a format may not say by itself."""

    members: Sequence[Sequence[str]] | None = None
    """The parameters of each optimizer group, in order: for state that is stored by position alone."""
    frozen: frozenset[str] = frozenset()
    """Those of them that are not trained, which the optimizer that was saved may not have had."""


@dataclass(frozen=True)
class Options:
    """How a checkpoint is written."""

    dtype: torch.dtype | None = None
    """Of floating-point weights; None keeps theirs."""
    max_shard_bytes: int = 5 * 10**9
    """Of one file, where the format has several."""
    weights_only: bool = False
    exclude_frozen: bool = False
    """Leave out weights that are not trained."""
    pickled: bool = False
    """For Hugging Face: `pytorch_model.bin` instead of safetensors."""
    like: Path | None = None
    """A Hugging Face model folder whose configuration and tokenizer are copied along."""
    torch_optimizer: bool = False
    """For DeepSpeed: its run steps with one of torch's optimizers, which count steps in tensors."""
    ranks: int | None = None
    """For DeepSpeed: how many load it; None for as many as wrote the source."""
    zero_stage: int | None = None
    """For DeepSpeed: 1 or 2, which are alike, or 3; None for that of the source's configuration."""
    overwrite: bool = False
    tag: str | None = None
    """The folder's name inside the target, for formats with one folder a step."""


class Format(Protocol):
    """One kind of checkpoint. `open` reads structure only, never tensors."""

    name: str
    title: str
    honours: frozenset[str]
    """The fields of `Options` that `write` follows; others are refused."""

    def detect(self, path: Path) -> bool:
        """Whether `path`, a file or a folder, is a checkpoint of this kind, by the names in it."""
        ...

    def open(self, path: Path, hints: Hints) -> Opened:
        """Raises `CorruptCheckpointError` or `CheckpointError` naming the file and what is wrong with it."""
        ...

    def verify(self, opened: Opened, progress: Progress) -> Iterator[str]:
        """What is wrong with the bytes, one line each, with file and parameter."""
        ...

    def write(self, source: Any, target: Path, options: Options) -> tuple[Path, list[str]]:
        """Write a `Source`; returns where it is and notes of what was left out.

        Raises `UnsupportedError` for a format that is only read.
        """
        ...


class Segment(NamedTuple):
    """`numel` elements of a 1-D tensor in a file, from element `start` on."""

    stored: Stored
    start: int
    numel: int


class Run:
    """1-D tensors of several files, end to end."""

    def __init__(self, parts: Sequence[Stored]) -> None:
        self._parts = parts
        self.numel = sum(part.numel for part in parts)
        self.dtype = parts[0].dtype

    def segments(self, start: int, numel: int) -> Iterator[Segment]:
        """Where elements [start, start + numel) lie; fewer if the run ends before."""
        position, stop = 0, start + numel
        for part in self._parts:
            first, last = max(start, position), min(stop, position + part.numel)
            if first < last:
                yield Segment(part, first - position, last - first)
            position += part.numel


def chunks_of_run(folder: Path, shape: tuple[int, ...], at: int, segments: Iterator[Segment]) -> list[Chunk]:
    """Segments that hold a row-major tensor's elements from `at` on, as boxes of it."""
    found: list[Chunk] = []
    for stored, start, numel in segments:
        data = stored.data + start * stored.dtype.itemsize
        for box in boxes_of_run(shape, at, at + numel):
            size = box.numel * stored.dtype.itemsize
            found.append(Chunk(box.offsets, box.sizes, _name(folder, stored.path), data, size, data))
            data += size
        at += numel
    return found


def whole_tensor(folder: Path, stored: Stored) -> TensorInfo:
    """A tensor that one file holds all of."""
    return TensorInfo(stored.shape, stored.dtype, [box_chunk(folder, stored, (0,) * len(stored.shape))])


def box_chunk(folder: Path, stored: Stored, offsets: tuple[int, ...]) -> Chunk:
    """A tensor in a file that is the box at `offsets` of a larger one."""
    size = stored.numel * stored.dtype.itemsize
    strides = None if stored.row_major else stored.strides
    name = _name(folder, stored.path)
    return Chunk(offsets, stored.shape, name, stored.data, size, stored.data, strides=strides)


def scalar(value: Any) -> TensorInfo:
    """A counter, as optimizers keep it."""
    tensor = value if isinstance(value, torch.Tensor) else torch.tensor(float(value))
    return TensorInfo(tuple(tensor.shape), tensor.dtype, value=tensor)


def _name(folder: Path, path: Path) -> str:
    return str(path.relative_to(folder))


def put_groups(
    catalog: Catalog, groups: Sequence[Mapping[str, Any]], members: Sequence[Sequence[str]]
) -> None:
    """Store the optimizer's options by position, with each group's parameter names."""
    for position, (options, names) in enumerate(zip(groups, members, strict=True)):
        for option, value in {**options, "params": list(names)}.items():
            if option != "param_names":
                catalog.blobs[f"{GROUPS}.{position}.{option}"] = Known(value)


def put_counters(catalog: Catalog, client_state: Mapping[str, Any] | None = None, **counters: Any) -> None:
    """Store what a run needs to go on besides tensors; what is not known is left at a start."""
    state = {
        "global_steps": 0,
        "micro_steps": None,
        "global_samples": None,
        "skipped_steps": 0,
        "loss_scale": None,
        "lr_scheduler": None,
    }
    catalog.blobs[ENGINE] = Known({**state, **counters})
    catalog.blobs[CLIENT] = Known(dict(client_state or {}))


def note_files(opened: Opened) -> Opened:
    """Enter the sizes of the files that the catalog speaks of, as they are now."""
    for info in opened.catalog.tensors.values():
        for chunk in info.chunks:
            if chunk.file not in opened.catalog.files:
                path = opened.folder / chunk.file
                opened.catalog.files[chunk.file] = path.stat().st_size if path.is_file() else -1
    return opened
