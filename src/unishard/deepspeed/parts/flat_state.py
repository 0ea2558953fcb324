"""State of a sharded optimizer as DeepSpeed's scripts expect it: one flat tensor for each kind and parameter group.

Flat tensors are equally long on all ranks, so that `all_gather` takes them; what a rank lacks at the end is zero.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from unishard.optim.flat import Piece
from unishard.optim.sharded import ShardedOptimizer


def show_flat_state(optimizer: ShardedOptimizer) -> None:
    """Let `optimizer.inner` give its state flat, and take it back so."""
    inner = optimizer.inner
    inner.register_state_dict_post_hook(lambda _, state: flattened(optimizer.members, state))
    inner.register_load_state_dict_pre_hook(lambda _, state: parted(optimizer.members, state))


def flattened(members: Sequence[Sequence[Piece]], state_dict: Mapping[str, Any]) -> dict[str, Any] | None:
    """`state_dict` of an optimizer over pieces with one parameter for each group.

    `None`, for it to be left as it is, where pieces of a group count their steps differently: flat there is no place
    for that.
    """
    state: dict[int, dict[str, Any]] = {}
    groups = []
    for position, (pieces, options) in enumerate(zip(members, state_dict["param_groups"], strict=True)):
        here = _places(pieces, options["params"])
        kept = {n: state_dict["state"][n] for n in here if state_dict["state"].get(n)}
        groups.append({**options, "params": [position]})
        if not kept:
            continue
        found: dict[str, Any] = {}
        for kind in dict.fromkeys(kind for values in kept.values() for kind in values):
            given = {n: values[kind] for n, values in kept.items() if kind in values}
            if all(_is_flat(value, here[n]) for n, value in given.items()):
                found[kind] = _joined(here, given, _length(pieces))
            elif len(given) < len(kept) or not _same(list(given.values())):
                return None
            else:
                found[kind] = next(iter(given.values()))
        state[position] = found
    return {**state_dict, "state": state, "param_groups": groups}


def parted(members: Sequence[Sequence[Piece]], state_dict: Mapping[str, Any]) -> dict[str, Any] | None:
    """What `flattened` gave, for an optimizer over pieces again; `None` for a state dict that is so already."""
    if any(len(group["params"]) != 1 for group in state_dict["param_groups"]):
        return None
    state: dict[int, dict[str, Any]] = {}
    groups, count = [], 0
    for pieces, options in zip(members, state_dict["param_groups"], strict=True):
        own = [piece for piece in pieces if piece.param.numel()]
        numbers = list(range(count, count + len(own)))
        count += len(own)
        groups.append({**options, "params": numbers})
        values = state_dict["state"].get(options["params"][0], {})
        here, position = _places(pieces, numbers), 0
        for number, piece in here.items():
            end = position + piece.param.numel()
            state[number] = {kind: _part(value, position, end, _held(here)) for kind, value in values.items()}
            position = end
    return {**state_dict, "state": state, "param_groups": groups}


def flat_masters(members: Sequence[Sequence[Piece]]) -> list[torch.Tensor]:
    """This rank's fp32 elements of each parameter group, flat as the state is: copies."""
    found = []
    for pieces in members:
        here = _places(pieces, range(len(pieces)))
        given = {number: piece.param.detach() for number, piece in here.items()}
        found.append(_joined(here, given, _length(pieces)) if given else torch.zeros(_length(pieces)))
    return found


@torch.no_grad()
def put_masters(members: Sequence[Sequence[Piece]], flats: Sequence[torch.Tensor]) -> None:
    """Write what `flat_masters` gave back to the pieces."""
    for pieces, flat in zip(members, flats, strict=True):
        position = 0
        for piece in _places(pieces, range(len(pieces))).values():
            piece.param.copy_(flat[position : position + piece.param.numel()])
            position += piece.param.numel()


def _places(pieces: Sequence[Piece], numbers: Sequence[int]) -> dict[int, Piece]:
    """The trained pieces that are on this rank, by number in the state dict, in the order in which they lie."""
    own = zip((piece for piece in pieces if piece.param.numel()), numbers, strict=False)
    order = {group: place for place, group in enumerate(dict.fromkeys(piece.group for piece in pieces))}
    trained = [(number, piece) for piece, number in own if piece.index in piece.group.trainable]
    trained.sort(key=lambda pair: (order[pair[1].group], pair[1].param.storage_offset()))
    return dict(trained)


def _held(here: Mapping[int, Piece]) -> int:
    return sum(piece.param.numel() for piece in here.values())


def _part(value: Any, start: int, stop: int, held: int) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    return value[start:stop].clone() if value.dim() and value.numel() >= held else value.clone()


def _length(pieces: Sequence[Piece]) -> int:
    """Elements of a parameter group on the rank that has most of them."""
    wanted: dict[Any, set[int]] = {}
    for piece in pieces:
        if piece.index in piece.group.trainable:
            wanted.setdefault(piece.group, set()).add(piece.index)
    ranks = max((group.axes.shard.size for group in wanted), default=1)
    totals = [0] * ranks
    for group, indices in wanted.items():
        for rank in range(group.axes.shard.size):
            spans = group.buffer.shard_spans(rank) or ()
            totals[rank] += sum(span.numel for span in spans if span.index in indices)
    return max(totals)


def _is_flat(value: Any, piece: Piece) -> bool:
    return isinstance(value, torch.Tensor) and value.dim() == 1 and value.numel() == piece.param.numel()


def _joined(here: Mapping[int, Piece], given: Mapping[int, torch.Tensor], length: int) -> torch.Tensor:
    like = next(iter(given.values()))
    flat, position = like.new_zeros(max(length, _held(here))), 0
    for number, piece in here.items():
        end = position + piece.param.numel()
        if number in given:
            flat[position:end] = given[number]
        position = end
    return flat


def _same(values: Sequence[Any]) -> bool:
    first = values[0]
    if isinstance(first, torch.Tensor):
        return all(isinstance(v, torch.Tensor) and torch.equal(v, first) for v in values)
    return all(type(v) is type(first) and v == first for v in values)
