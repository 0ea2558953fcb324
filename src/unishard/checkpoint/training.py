"""A sharded model and its optimizer as checkpoint contents, whatever preset, mesh and number of ranks they run under.

Keys are those that torch's `get_state_dict` helpers give: `model.<name>`, `optim.state.<name>.<state>`,
`optim.param_groups.<i>.<option>`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import nn

from unishard.checkpoint.boxes import whole
from unishard.checkpoint.catalog import Catalog, keys_of
from unishard.checkpoint.entries import Away, Contents, Entry, Part, replicated, run_parts, share
from unishard.checkpoint.keys import GROUPS, MODEL, STATE
from unishard.dist.collectives import Communicator
from unishard.errors import UnsupportedError
from unishard.optim.flat import Piece
from unishard.optim.sharded import ShardedOptimizer
from unishard.sharding.group import WEIGHTS, ShardGroup
from unishard.sharding.resting import is_absent


class Names:
    """What parameters are called: a first name for each, and further ones of tied parameters."""

    def __init__(self, module: nn.Module) -> None:
        self.first: dict[int, str] = {}
        self.aliases: dict[str, str] = {}
        for name, param in module.named_parameters(remove_duplicate=False):
            known = self.first.setdefault(id(param), name)
            if known != name:
                self.aliases[name] = known

    def of(self, group: ShardGroup, index: int) -> str:
        return self.first[id(group.registrations[index].visible)]


def model_contents(
    module: nn.Module, groups: Sequence[ShardGroup], world: Communicator, *, exclude_frozen: bool = False
) -> Contents:
    """Parameters (master weights) and persistent buffers of a model that the config door sharded."""
    names, contents = Names(module), Contents()
    sharded: set[int] = set()
    for group in groups:
        for index, registration in enumerate(group.registrations):
            sharded.add(id(registration.visible))
            if not (exclude_frozen and not registration.visible.requires_grad):
                contents.add(_weight_entry(f"{MODEL}.{names.of(group, index)}", group, index))
    for name, param in module.named_parameters():
        if id(param) not in sharded:
            contents.add(replicated(f"{MODEL}.{name}", param, world.rank, world.size))
    for name, buffer in persistent_buffers(module):
        contents.add(replicated(f"{MODEL}.{name}", buffer, world.rank, world.size))
    held = contents.entries
    contents.aliases = {
        f"{MODEL}.{alias}": f"{MODEL}.{name}"
        for alias, name in names.aliases.items()
        if f"{MODEL}.{name}" in held
    }
    return contents


def persistent_buffers(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """The buffers that a state dict would hold."""
    for prefix, owner in module.named_modules():
        for name, buffer in owner._buffers.items():
            if buffer is not None and name not in owner._non_persistent_buffers_set:
                yield (f"{prefix}.{name}" if prefix else name), buffer


@dataclass(frozen=True)
class _Weights:
    """Brings the weights of a group that rest on a tier."""

    group: ShardGroup

    @contextmanager
    def __call__(self, changed: bool) -> Iterator[None]:
        with self.group.in_memory(WEIGHTS, changed=changed):
            yield
            if changed:
                self.group.buffer.carry_over()


def _weight_entry(key: str, group: ShardGroup, index: int) -> Entry:
    def now() -> Entry:
        return _shard_entry(key, group, index, group.buffer.shard)

    entry = now()
    if group.resting is not None and is_absent(group.buffer.shard):
        entry.away = Away(_Weights(group), now)
    return entry


def _shard_entry(key: str, group: ShardGroup, index: int, flat: torch.Tensor) -> Entry:
    """One parameter's part of a flat shard, or of something laid out like it."""
    shape = tuple(group.buffer.layout.shapes[index])
    parts: list[Part] = []
    span = _spans(group).get(index)
    if span is not None:
        parts = run_parts(shape, span.source, flat[span.target : span.target + span.numel])
    replicas = group.axes.replicate
    return Entry(key, shape, parts, share(parts, replicas.rank, replicas.size))


def _spans(group: ShardGroup) -> Mapping[int, Any]:
    spans = group.buffer.own_spans
    if spans is None:
        raise UnsupportedError(
            f"{group.name}: parameters split along other dims than the first are saved as DTensors, with "
            "unishard.checkpoint.save(state, folder)"
        )
    return spans


def adopt_names(catalog: Catalog, aliases: Mapping[str, str]) -> None:
    """Let a checkpoint of other origin, which may know tied weights by another of their names, know them by ours.

    Args:
        aliases: of this model, as `Contents` has them.
    """
    for alias, key in aliases.items():
        if catalog.find(key) is None and catalog.find(alias) is not None:
            catalog.aliases[key] = catalog.aliases.get(alias, alias)
        other, name = (
            f"{STATE}.{alias.removeprefix(MODEL + '.')}.",
            f"{STATE}.{key.removeprefix(MODEL + '.')}.",
        )
        for state in [k for k in catalog.tensors if k.startswith(other) and "." not in k[len(other) :]]:
            catalog.tensors.setdefault(name + state[len(other) :], catalog.tensors[state])
            del catalog.tensors[state]


def optimizer_contents(optimizer: ShardedOptimizer, module: nn.Module, world: Communicator) -> Contents:
    """State by parameter name, and the options of each parameter group."""
    names, contents = Names(module), Contents()
    for piece in optimizer.pieces:
        name = names.of(piece.group, piece.index)
        for kind, value in (optimizer.inner.state.get(piece.param) or {}).items():
            key = f"{STATE}.{name}.{kind}"
            _add_state(contents, key, piece, value)
            if isinstance(value, torch.Tensor) and is_absent(value):
                contents.entries[key].away = _away_state(optimizer, key, piece, kind)
    if world.rank == 0:
        for position, options in enumerate(optimizer.inner.param_groups):
            members = [names.of(piece.group, piece.index) for piece in optimizer.members[position]]
            for option, value in {**options, "params": members}.items():
                contents.blobs[f"{GROUPS}.{position}.{option}"] = value
    return contents


def _add_state(contents: Contents, key: str, piece: Piece, value: Any) -> None:
    group, index = piece.group, piece.index
    span = _spans(group).get(index)
    first = group.axes.replicate.rank == 0 and span is not None and span.source == 0
    if not isinstance(value, torch.Tensor):
        if first:
            contents.blobs[key] = value
    elif value.numel() == piece.param.numel() and value.dim() == 1:
        shape = tuple(group.buffer.layout.shapes[index])
        parts = run_parts(shape, span.source, value.detach()) if span is not None else []
        replicas = group.axes.replicate
        contents.add(Entry(key, shape, parts, share(parts, replicas.rank, replicas.size)))
    else:
        scalar = Part(whole(tuple(value.shape)), value.detach())
        contents.add(Entry(key, tuple(value.shape), [scalar], [scalar] if first else []))


@dataclass(frozen=True)
class _State:
    """Brings the state of a group that rests on a tier."""

    optimizer: ShardedOptimizer
    group: ShardGroup

    def __call__(self, changed: bool) -> AbstractContextManager[None]:
        return self.optimizer.shown(self.group, changed=changed)


def _away_state(
    optimizer: ShardedOptimizer, key: str, piece: Piece, kind: str, dtype: torch.dtype | None = None
) -> Away:
    """With `dtype`, state that is made where there is none yet."""

    def now() -> Entry:
        contents = Contents()
        if dtype is None:
            value = optimizer.inner.state[piece.param][kind]
        else:
            value = optimizer.state_slot(piece, kind, dtype)
        _add_state(contents, key, piece, value)
        return contents.entries[key]

    return Away(_State(optimizer, piece.group), now)


def optimizer_differences(
    catalog: Catalog, optimizer: ShardedOptimizer, module: nn.Module, stored: Mapping[int, Mapping[str, Any]]
) -> list[tuple[str, str, str]]:
    """What does not match between the checkpoint's optimizer and this one: parameters, groups, kinds of state."""
    names = Names(module)
    mine = {names.of(piece.group, piece.index): piece for members in optimizer.members for piece in members}
    # An optimizer may have been given frozen parameters or not: it has nothing to keep for them.
    frozen = {name for name, param in module.named_parameters() if not param.requires_grad}
    rows = []
    if len(stored) != len(optimizer.members):
        rows.append((GROUPS, f"{len(stored)} groups", f"{len(optimizer.members)} groups"))
    for position, (options, members) in enumerate(zip(stored.values(), optimizer.members, strict=False)):
        here = [names.of(piece.group, piece.index) for piece in members]
        for name in sorted((set(options["params"]) ^ set(here)) - frozen):
            there = name in options["params"]
            rows.append(
                (f"{GROUPS}.{position}", name if there else "missing", name if not there else "missing")
            )
    known = optimizer.state_names()
    for key in keys_of(STATE, catalog.tensors):
        name, _, kind = key.rpartition(".")
        info = catalog.tensors[f"{STATE}.{key}"]
        if name not in mine:
            rows.append((f"{STATE}.{key}", str(info.shape), "unexpected"))
        elif prod(info.shape) != 1 and not _by_element(tuple(info.shape), mine[name]):
            shape = tuple(mine[name].group.buffer.layout.shapes[mine[name].index])
            rows.append((f"{STATE}.{key}", str(info.shape), str(shape)))
        elif known is not None and kind not in known:
            rows.append(
                (f"{STATE}.{key}", kind, f"{type(optimizer.inner).__name__} keeps {', '.join(known)}")
            )
    return rows


def optimizer_parts(catalog: Catalog, optimizer: ShardedOptimizer, module: nn.Module) -> list[Entry]:
    """What `optimizer_entries` will ask for, without places: the optimizer stays as it is."""
    names, contents = Names(module), Contents()
    kinds = _stored_kinds(catalog)
    for piece in optimizer.pieces:
        name = names.of(piece.group, piece.index)
        for kind in kinds.get(name, ()) if piece.param.numel() else ():
            key = f"{STATE}.{name}.{kind}"
            stored = tuple(catalog.tensors[key].shape)
            shape = (piece.param.numel(),) if _by_element(stored, piece) else stored
            _add_state(contents, key, piece, torch.empty(shape, device="meta"))
    return list(contents.entries.values())


def _by_element(stored: tuple[int, ...], piece: Piece) -> bool:
    """Whether state of this shape has a value for each element of the parameter, rather than some for all of it."""
    return stored == tuple(piece.group.buffer.layout.shapes[piece.index]) and stored != ()


def _stored_kinds(catalog: Catalog) -> dict[str, list[str]]:
    """The kinds of state that are stored of each parameter."""
    kinds: dict[str, list[str]] = {}
    for key in keys_of(STATE, catalog.tensors):
        name, _, kind = key.rpartition(".")
        kinds.setdefault(name, []).append(kind)
    return kinds


def optimizer_entries(catalog: Catalog, optimizer: ShardedOptimizer, module: nn.Module) -> list[Entry]:
    """Places for the stored state in the optimizer, made where there are none yet."""
    names, kinds = Names(module), _stored_kinds(catalog)
    optimizer.make_room(lambda piece: kinds.get(names.of(piece.group, piece.index), ()))
    contents = Contents()
    for piece in optimizer.pieces:
        name = names.of(piece.group, piece.index)
        for kind in kinds.get(name, ()) if piece.param.numel() else ():
            key = f"{STATE}.{name}.{kind}"
            info = catalog.tensors[key]
            by_element = _by_element(tuple(info.shape), piece)
            if by_element and piece.group.resting is not None:
                _add_state(contents, key, piece, torch.empty(piece.param.numel(), device="meta"))
                contents.entries[key].away = _away_state(optimizer, key, piece, kind, info.dtype)
                continue
            slot = optimizer.state_slot(piece, kind, info.dtype, None if by_element else tuple(info.shape))
            _add_state(contents, key, piece, slot)
    return list(contents.entries.values())


def put_plain_state(optimizer: ShardedOptimizer, module: nn.Module, values: Mapping[str, Any]) -> None:
    """Give the optimizer back its state that is not tensors; keys are a parameter's name, a dot, and the kind."""
    names = Names(module)
    pieces = {names.of(piece.group, piece.index): piece for piece in optimizer.pieces}
    for key, value in values.items():
        name, _, kind = key.rpartition(".")
        piece = pieces.get(name)
        if piece is not None and piece.param.numel():
            optimizer.inner.state[piece.param][kind] = value
