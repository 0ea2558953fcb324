"""What goes into a checkpoint, as this rank sees it: tensors by key and the boxes of them that lie here."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from unishard.checkpoint.boxes import Box, boxes_of_run, split_rows, whole
from unishard.sharding.parameter import is_dtensor, place_of

_ALIGNED = 64  # bytes, for whole cache lines


class Part(NamedTuple):
    """A box of a tensor and the memory here that holds it: contiguous, of the box's sizes or flat."""

    box: Box
    tensor: torch.Tensor


@dataclass
class Entry:
    """One tensor. `held` is all of it that this rank has, `written` what this rank saves of that."""

    key: str
    shape: tuple[int, ...]
    held: list[Part]
    written: list[Part]
    away: Away | None = None
    """Where the memory comes and goes: parts then show boxes and sizes, and no values."""


class Away(NamedTuple):
    """How to get the memory of an entry."""

    opened: Callable[[bool], AbstractContextManager[Any]]
    """Brings it, and that of all entries with an equal one; the argument tells whether values will change."""
    now: Callable[[], Entry]
    """The entry with its values, while it is there."""


def in_memory(entries: Iterable[Entry], *, changed: bool) -> Generator[Entry, None, None]:
    """Each of `entries` while its memory is there; neighbours that come together are brought once."""
    for opened, members in itertools.groupby(entries, lambda e: None if e.away is None else e.away.opened):
        with nullcontext() if opened is None else opened(changed):
            for entry in members:
                yield entry if entry.away is None else entry.away.now()


@dataclass
class Contents:
    """A whole checkpoint's worth: tensors, values, and keys that are further names of a tensor."""

    entries: dict[str, Entry] = field(default_factory=dict)
    blobs: dict[str, Any] = field(default_factory=dict)
    """Values that this rank saves."""
    aliases: dict[str, str] = field(default_factory=dict)

    def add(self, entry: Entry) -> None:
        self.entries[entry.key] = entry

    @property
    def nbytes(self) -> int:
        """Bytes of tensors that this rank writes."""
        return sum(
            p.tensor.numel() * p.tensor.element_size() for e in self.entries.values() for p in e.written
        )

    @property
    def all_here(self) -> bool:
        """Whether every tensor is in memory, so that a snapshot can be had."""
        return all(entry.away is None for entry in self.entries.values())

    def snapshot(self, staging: Staging) -> Contents:
        """The same with copies in host memory of everything written: what changes later does not change these."""
        copied = iter(staging.copy([p.tensor for e in self.entries.values() for p in e.written]))
        copies = {
            key: Entry(key, e.shape, [], [Part(p.box, next(copied)) for p in e.written])
            for key, e in self.entries.items()
        }
        return Contents(copies, dict(self.blobs), dict(self.aliases))


class Staging:
    """Host memory for one snapshot after another. It is kept between them: memory that the system has to hand out
    afresh, page by page, takes several times as long to fill as the same memory again."""

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8)

    def copy(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Flat copies, valid until the next call."""
        starts = list(itertools.accumulate((-(-t.nbytes // _ALIGNED) * _ALIGNED for t in tensors), initial=0))
        if self._memory.numel() < starts[-1]:
            self._memory = torch.empty(0, dtype=torch.uint8)  # gone before there is more
            pinned = any(t.is_cuda for t in tensors)
            self._memory = torch.empty(starts[-1], dtype=torch.uint8, pin_memory=pinned)
        copies = []
        for tensor, start in zip(tensors, starts, strict=False):
            target = self._memory[start : start + tensor.nbytes].view(tensor.dtype)
            copies.append(target.copy_(tensor.detach().reshape(-1)))
        return copies


def run_parts(shape: tuple[int, ...], start: int, flat: torch.Tensor) -> list[Part]:
    """The elements of a row-major tensor from `start` on, which `flat` (1-D) holds, as boxes over its memory."""
    parts, position = [], 0
    for box in boxes_of_run(shape, start, start + flat.numel()):
        parts.append(Part(box, flat[position : position + box.numel]))
        position += box.numel
    return parts


def share(parts: Iterable[Part], replica: int, replicas: int) -> list[Part]:
    """The part of `parts` that one of several ranks that all hold them writes: rows are divided evenly."""
    if replicas == 1:
        return list(parts)
    mine = []
    for box, tensor in parts:
        if not box.sizes:
            mine += [Part(box, tensor)] if replica == 0 else []
            continue
        piece = split_rows(box, replicas)[replica]
        row = box.numel // box.sizes[0]
        start = (piece.offsets[0] - box.offsets[0]) * row
        if piece.numel:
            mine.append(Part(piece, tensor.reshape(-1)[start : start + piece.numel]))
    return mine


def replicated(key: str, tensor: torch.Tensor, rank: int, ranks: int) -> Entry:
    """A tensor that all ranks hold alike."""
    local = tensor.detach().contiguous()
    parts = [Part(whole(tuple(tensor.shape)), local)]
    shape = tuple(tensor.shape)
    # Small ones are not worth dividing, but need not all be the first rank's either.
    if local.numel() < 4096:
        mine = parts if rank == _spread(key, ranks) else []
    else:
        mine = share(parts, rank, ranks)
    return Entry(key, shape, [Part(parts[0].box, tensor.detach())], mine)


def _spread(key: str, ranks: int) -> int:
    return sum(key.encode()) % ranks


def entries_of(state: Mapping[str, Any], rank: int, ranks: int) -> Contents:
    """Read a nested state of tensors, DTensors and values, as `torch.distributed.checkpoint` users have it.

    Keys are the paths joined by dots. Plain tensors and values are taken to be the same on all ranks.
    """
    contents = Contents()
    for key, value in flatten(state).items():
        if not isinstance(value, torch.Tensor):
            if rank == _spread(key, ranks):
                contents.blobs[key] = value
        elif is_dtensor(value):
            contents.add(_distributed(key, value))
        else:
            contents.add(replicated(key, value, rank, ranks))
    return contents


@dataclass(frozen=True)
class _Placed:
    """Brings what rests of a group of the code door: parameters, and what optimizers keep."""

    resting: Any

    @contextmanager
    def __call__(self, changed: bool) -> Iterator[None]:
        from unishard.sharding.resting import desk

        desk.clear()
        with self.resting.opened(changed=changed):
            yield
        self.resting.settle()


def _distributed(key: str, value: Any, local: torch.Tensor | None = None) -> Entry:
    """A DTensor; with `local`, that in the place of its own part."""
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    mesh, placements = value.device_mesh, value.placements
    sizes, offsets = compute_local_shape_and_global_offset(value.shape, mesh, placements)
    box = Box(tuple(offsets), tuple(sizes))
    place = place_of(value)
    if local is None and place is not None and place.rests:
        entry = _distributed(key, value, torch.empty(box.sizes, dtype=value.dtype, device="meta"))
        entry.away = Away(_Placed(place.resting), lambda: _distributed(key, value, place.local()))
        return entry
    here: torch.Tensor = value.to_local().detach() if local is None else local
    held = [Part(box, here)] if box.numel and mesh.get_coordinate() is not None else []
    replicas, replica = 1, 0
    for dim, placement in enumerate(placements):
        if isinstance(placement, Replicate):
            replicas, replica = replicas * mesh.size(dim), replica * mesh.size(dim) + mesh.get_local_rank(dim)
    written = share([Part(box, tensor.contiguous()) for box, tensor in held], replica, replicas)
    return Entry(key, tuple(value.shape), held, written)


def flatten(state: Any) -> dict[str, Any]:
    """Leaves by their path: mappings are followed, and sequences that hold mappings or tensors.

    >>> flatten({"a": {"b": 1, "c": [1, 2]}, "d": [{"e": 3}]})
    {'a.b': 1, 'a.c': [1, 2], 'd.0.e': 3}
    """
    found: dict[str, Any] = {}

    def visit(value: Any, path: str) -> None:
        inner: Iterable[tuple[Any, Any]] = ()
        if isinstance(value, Mapping):
            inner = value.items()
        elif isinstance(value, list | tuple) and any(isinstance(x, Mapping | torch.Tensor) for x in value):
            inner = enumerate(value)
        children = list(inner)
        if not children:
            found[path] = value
        for key, child in children:
            visit(child, f"{path}.{key}" if path else str(key))

    visit(state, "")
    return found
