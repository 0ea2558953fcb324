"""Loading safetensors files so that each rank reads its own rows only."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from unishard.dist.agree import agree
from unishard.dist.collectives import SOLO, Communicator
from unishard.errors import ShardingError
from unishard.sharding.dim_layout import DimLayout
from unishard.sharding.group import WEIGHTS, ShardGroup
from unishard.sharding.layout import Piece, matrix_shape
from unishard.sharding.unit import units_under


@dataclass(frozen=True)
class Target:
    """Where a stored tensor goes: a parameter of a group, or a plain tensor (a buffer, an unsharded parameter)."""

    shape: tuple[int, ...]
    group: ShardGroup | None = None
    index: int = 0
    tensor: torch.Tensor | None = None
    key: int = 0
    """Tells tied names: the same for all names of one tensor."""


def load_safetensors(
    model: nn.Module,
    path: str | Path,
    *,
    strict: bool = True,
    rename: Callable[[str], str] | None = None,
) -> None:
    """Load parameters and buffers from safetensors into a model, sharded through either door or not at all.

    Each rank reads the rows of its own shards and nothing else of them; whole copies at rest are then gathered again.

    Args:
        path: a `.safetensors` file, or a folder with one or several (and Hugging Face's index, if there).
        strict: refuse missing and unexpected names. Shapes must always fit.
        rename: stored name -> the model's name.

    Raises:
        ShardingError: on every rank, with a table of what is missing, unexpected or of another shape, before anything
            is changed.

    >>> import tempfile, safetensors.torch
    >>> file = Path(tempfile.mkdtemp()) / "m.safetensors"
    >>> safetensors.torch.save_file({"weight": torch.ones(2, 2), "bias": torch.zeros(2)}, file)
    >>> model = nn.Linear(2, 2)
    >>> load_safetensors(model, file)
    >>> model.weight.sum().item()
    4.0
    """
    from safetensors import safe_open

    groups = [group for unit in units_under(model) for group in unit.groups]
    comm = groups[0].axes.shard if groups else SOLO
    with ExitStack() as stack:
        stored: dict[str, Any] = {}
        with agree(comm, f"open {path}"):
            for file in _files(Path(path)):
                handle = stack.enter_context(safe_open(file, framework="pt"))  # pyright: ignore[reportArgumentType]
                for name in handle.keys():  # noqa: SIM118
                    stored[rename(name) if rename else name] = handle.get_slice(name)
        targets = _targets(model)
        chosen = _match(stored, targets, strict, comm, str(path))
        with agree(comm, f"read {path}"), torch.no_grad():
            _read_all(stored, chosen)
    for group in groups:
        group.forget_gathered()
        torch.autograd.graph.increment_version([group.buffer.shard])
        if group.resident:
            group.unshard()
            group.wait()
            if not group.registrations[0].in_place:
                group.show_sharded()


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    index = path / "model.safetensors.index.json"
    if index.is_file():
        names = set(json.loads(index.read_text())["weight_map"].values())
        files = [path / name for name in sorted(names)]
    else:
        files = sorted(path.glob("*.safetensors"))
    missing = [str(f) for f in files if not f.is_file()]
    if missing or not files:
        raise ShardingError(
            f"{path}: {', '.join(missing) or 'no *.safetensors file'} not found; check the path"
        )
    return files


def _targets(model: nn.Module) -> dict[str, Target]:
    """Every name under which a parameter or buffer could be stored; tied ones have several."""
    sharded: dict[int, tuple[ShardGroup, int]] = {}
    for unit in units_under(model):
        for group in unit.groups:
            for index, registration in enumerate(group.registrations):
                sharded[id(registration.visible)] = sharded[id(registration.whole)] = (group, index)
    targets: dict[str, Target] = {}
    for name, param in model.named_parameters(remove_duplicate=False):
        home = sharded.get(id(param))
        if home is None:
            targets[name] = Target(tuple(param.shape), tensor=param.detach(), key=id(param))
        else:
            group, index = home
            targets[name] = Target(tuple(group.buffer.layout.shapes[index]), group, index, key=id(param))
    persistent = model.state_dict(keep_vars=True).keys()
    for name, buffer in model.named_buffers(remove_duplicate=False):
        if name in persistent:
            targets[name] = Target(tuple(buffer.shape), tensor=buffer, key=id(buffer))
    return targets


def _match(
    stored: Mapping[str, Any], targets: Mapping[str, Target], strict: bool, comm: Communicator, path: str
) -> dict[str, Target]:
    chosen = {name: target for name, target in targets.items() if name in stored}
    covered = {target.key for target in chosen.values()}
    rows = [
        f"  {name}: stored {tuple(stored[name].get_shape())}, the model has {target.shape}"
        for name, target in chosen.items()
        if tuple(stored[name].get_shape()) != target.shape
    ]
    if strict:
        rows += [f"  {n}: missing in the file" for n, t in targets.items() if t.key not in covered]
        rows += [
            f"  {name}: unexpected, the model has no such name" for name in stored if name not in targets
        ]
    with agree(comm, f"match {path} with the model"):
        if rows:
            raise ShardingError(f"{path} does not fit the model:\n" + "\n".join(rows))
    return chosen


def _read_all(stored: Mapping[str, Any], chosen: Mapping[str, Target]) -> None:
    """Group by group: weights that rest on a tier are in memory for one group at a time."""
    by_group: dict[ShardGroup | None, list[tuple[str, Target]]] = {}
    for name, target in chosen.items():
        by_group.setdefault(target.group, []).append((name, target))
    for group, members in by_group.items():
        with nullcontext() if group is None else group.in_memory(WEIGHTS, changed=True):
            for name, target in members:
                _read(stored[name], target)
            if group is not None:
                group.buffer.carry_over()


def _read(source: Any, target: Target) -> None:
    """Copy the part of the stored tensor that belongs here."""
    group = target.group
    if group is None:
        assert target.tensor is not None  # a Target has one of the two
        target.tensor.copy_(source[:] if target.shape else source[...])
        return
    local = group.buffer.local(target.index, group.buffer.shard)
    if not local.numel():
        return
    layout = group.buffer.layout
    if isinstance(layout, DimLayout):
        start, length = layout.chunk(target.index, group.axes.shard.rank)
        slices = [slice(None)] * len(target.shape)
        slices[layout.dims[target.index]] = slice(start, start + length)
        local.copy_(source[tuple(slices)])
        return
    piece = next(p for p in layout.pieces(group.axes.shard.rank) if p.index == target.index)
    _read_rectangles(source, target.shape, piece, local)


def _read_rectangles(source: Any, shape: tuple[int, ...], piece: Piece, local: torch.Tensor) -> None:
    """A contiguous run of elements is up to three rectangles of rows; whole rows are read, partial ones cut."""
    _, columns = matrix_shape(shape)
    position = 0
    for part in piece.rectangles:
        rows = source[part.row_start : part.row_stop] if shape else source[...]
        cut = rows.reshape(part.row_stop - part.row_start, columns)[
            :, part.col_start : part.col_stop
        ].reshape(-1)
        local[position : position + part.numel].copy_(cut)
        position += part.numel
