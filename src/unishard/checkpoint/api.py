"""`unishard.checkpoint`: save and load nested states, as `torch.distributed.checkpoint` users have them."""

from __future__ import annotations

from collections.abc import MutableMapping, MutableSequence
from pathlib import Path
from typing import Any

import torch

from unishard.checkpoint.background import PendingSave, SaveQueue
from unishard.checkpoint.catalog import Catalog, read_catalog
from unishard.checkpoint.entries import entries_of, flatten
from unishard.checkpoint.loading import differences, open_catalog, read_entries, require_match
from unishard.checkpoint.meeting import GroupMeeting, world
from unishard.checkpoint.progress import bar
from unishard.checkpoint.saving import Place, begin, finish
from unishard.checkpoint.storage import Reader
from unishard.errors import UnsupportedError

State = MutableMapping[str, Any]

_queue = SaveQueue()


def _place(folder: str | Path, keep_last: int | None) -> Place:
    path = Path(folder).absolute()
    return Place(path.parent, path.name, about={}, latest=False, keep_last=keep_last)


def save(state: State, folder: str | Path) -> Path:
    """Write a nested state of tensors, DTensors and values to `folder`, which appears whole or not at all.

    An existing checkpoint there is replaced in one step. Every rank writes its own part; plain tensors and values are
    taken to be the same on all ranks. `torch.distributed.checkpoint.load` reads the result. All ranks call together.

    Raises:
        CheckpointError, OSError: on every rank if any rank fails; `folder` is then as it was.

    >>> import tempfile
    >>> folder = save({"model": {"w": torch.ones(2)}, "step": 3}, Path(tempfile.mkdtemp()) / "step3")
    >>> state = {"model": {"w": torch.zeros(2)}, "step": 0}
    >>> load(state, folder); state
    {'model': {'w': tensor([1., 1.])}, 'step': 3}
    """
    comm = world()
    meeting, place = GroupMeeting(comm), _place(folder, None)
    contents = entries_of(state, comm.rank, comm.size)
    with bar(f"saving {place.tag}", contents.nbytes, show=comm.rank == 0) as progress:
        return finish(place, begin(place, meeting), contents, meeting, progress)


def async_save(state: State, folder: str | Path) -> PendingSave:
    """As `save`, in the background: returns once the state is copied, which is all that training waits for.

    A save that is still under way is waited for first. Errors come with `result()` on what this returns.
    """
    comm = world()
    contents = entries_of(state, comm.rank, comm.size)
    if not contents.all_here:
        raise UnsupportedError(
            f"async_save to {folder}: some of the state rests on a tier, and a copy of it would bring all of it into "
            "memory; use unishard.checkpoint.save, which writes group by group"
        )
    return _queue.start(_place(folder, None), contents)


def load(state: State, folder: str | Path, *, strict: bool = True) -> None:
    """Fill `state` in place from a checkpoint of unishard or of torch.distributed.checkpoint.

    Tensors and DTensors are filled where they are, each rank reading what it holds, whatever number of ranks wrote it;
    other values are replaced. All ranks call together.

    Args:
        strict: refuse tensors that are in one of the two only. Shapes must always fit.

    Raises:
        CheckpointError: on every rank, with a table of what does not match, before anything is changed.
        CorruptCheckpointError: bytes that are not those that were written.
    """
    comm = world()
    meeting, path = GroupMeeting(comm), Path(folder)
    catalog = open_catalog(path, meeting)
    contents = entries_of(state, comm.rank, comm.size)
    wanted = {key: entry.shape for key, entry in contents.entries.items()}
    rows = differences(catalog, wanted, catalog.tensors)
    require_match(
        rows if strict else [row for row in rows if "missing" not in row and "unexpected" not in row],
        path,
        meeting,
    )
    entries = [entry for key, entry in contents.entries.items() if catalog.find(key) is not None]
    values = [key for key, value in flatten(state).items() if key in catalog.blobs]

    def read_values(reader: Reader) -> dict[str, Any]:
        return {key: reader.blob(key) for key in values}

    total = sum(part.tensor.nbytes for entry in entries for part in entry.held)
    with bar(f"loading {path.name}", total, show=comm.rank == 0) as progress:
        found = read_entries(path, catalog, entries, meeting, then=read_values, progress=progress)
    for key, value in found.items():
        _put(state, key, value)


def _put(state: Any, key: str, value: Any) -> None:
    """Replace the value at a dotted path; keys may contain dots themselves."""
    if isinstance(state, MutableSequence):
        head, _, rest = key.partition(".")
        index = int(head)
        if rest:
            _put(state[index], rest, value)
        else:
            state[index] = value
        return
    if key in state:
        state[key] = value
        return
    for name in state:
        if key.startswith(f"{name}."):
            _put(state[name], key[len(str(name)) + 1 :], value)
            return


def inspect(folder: str | Path) -> Catalog:
    """What a checkpoint holds: tensors with shapes and dtypes, values, files, who wrote it. One process suffices."""
    return read_catalog(Path(folder))


def read_tensor(folder: str | Path, key: str, *, catalog: Catalog | None = None) -> torch.Tensor:
    """One whole tensor of a checkpoint, in host memory.

    Raises `CheckpointError` if there is no such key.
    """
    from unishard.checkpoint.boxes import whole
    from unishard.errors import CheckpointError

    path = Path(folder)
    known = catalog if catalog is not None else read_catalog(path)
    info = known.find(key)
    if info is None:
        raise CheckpointError(
            f"{path} holds no tensor {key!r}; it has {', '.join(list(known.tensors)[:5])}, ..."
        )
    target = torch.empty(info.shape, dtype=info.dtype)
    with Reader(path, known) as reader:
        reader.fill(key, whole(info.shape), target)
    return target
