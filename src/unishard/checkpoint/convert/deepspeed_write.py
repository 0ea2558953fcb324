"""Writes what DeepSpeed's engine loads under ZeRO-1 and 2, at one number of ranks.

Each parameter group is one flat vector, cut evenly over the ranks; each rank's file has its part of the masters and of
every kind of optimizer state.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch

from unishard.checkpoint.catalog import TensorInfo
from unishard.checkpoint.commit import write_durably
from unishard.checkpoint.convert.aside import aside
from unishard.checkpoint.convert.format import Options
from unishard.checkpoint.convert.source import PIECE, Source
from unishard.checkpoint.convert.torch_write import Streamed, write_torch_file
from unishard.checkpoint.convert.universal import VERSION, counter_of, model_content
from unishard.checkpoint.keys import MODEL, STATE
from unishard.errors import CheckpointError

_ALIGNED = 2  # elements: of which each rank's part is a multiple
_COMPUTE = {"bf16": torch.bfloat16, "fp16": torch.float16}


def write_flat_groups(source: Source, target: Path, options: Options) -> tuple[Path, list[str]]:
    """Write a checkpoint for ZeRO-1 or 2 on `options.ranks` ranks; returns where it is, and notes.

    Raises `CheckpointError` for a source without optimizer state, or that does not say how many ranks wrote it.
    """
    groups = source.groups()
    ranks = source.about.get("ranks") if options.ranks is None else options.ranks
    if not groups:
        raise CheckpointError(
            "the checkpoint has no optimizer state, which DeepSpeed's loader needs; write torch or safetensors, and "
            "load that into the model before deepspeed.initialize"
        )
    if not ranks or ranks < 1:
        raise CheckpointError(
            f"DeepSpeed's files are of one number of ranks, and ranks={ranks!r}; pass --ranks (ranks=...)"
        )
    kind = next((name for name in _COMPUTE if _enabled(source, name)), "fp32")
    prefix = "bf16_" if kind == "bf16" else ""
    tag = options.tag or f"global_step{source.step()}"
    flats = [Flat.of(source, _trained(source, group), ranks) for group in groups]
    with aside(target / tag, folder=True, overwrite=options.overwrite) as draft:
        draft.mkdir(exist_ok=True)
        write_torch_file(draft / "mp_rank_00_model_states.pt", _model(source, kind, ranks))
        for rank in range(ranks):
            content = {
                "optimizer_state_dict": _optimizer(
                    source, groups, flats, (rank, ranks), counter_of(source, options)
                ),
                "ds_config": source.about.get("config"),
                "ds_version": VERSION,
            }
            write_torch_file(draft / f"{prefix}zero_pp_rank_{rank}_mp_rank_00_optim_states.pt", content)
    write_durably(target / "latest", tag.encode())
    notes = [
        f"load it under ZeRO-1 or 2, on {ranks} ranks, with {kind} weights and the same parameter groups"
    ]
    if (source.engine().get("loss_scale") or {}).get("hysteresis_left") is not None:
        notes.append("the dynamic loss scale starts anew")
    return target / tag, notes


class Flat(NamedTuple):
    """One parameter group end to end: names, sizes, and the length of each rank's part."""

    names: list[str]
    numels: list[int]
    part: int

    @classmethod
    def of(cls, source: Source, names: list[str], ranks: int) -> Flat:
        weights = source.weights()
        missing = [name for name in names if name not in weights]
        if missing:
            raise CheckpointError(f"the optimizer steps {missing[0]}, which the checkpoint does not hold")
        numels = [prod(weights[name].shape) for name in names]
        return cls(names, numels, -(-sum(numels) // (ranks * _ALIGNED)) * _ALIGNED)

    def filled(self, rank: int) -> int:
        """Elements of a rank's part that are of parameters."""
        return max(0, min(self.part, sum(self.numels) - rank * self.part))

    def read(self, source: Source, rank: int, kind: str | None, length: int) -> Iterator[torch.Tensor]:
        """The first `length` elements of a rank's part of weights or of a kind of state; zeros where it is missing."""
        start, stop, position = rank * self.part, rank * self.part + length, 0
        for name, numel in zip(self.names, self.numels, strict=True):
            first, last = max(start, position), min(stop, position + numel)
            key = f"{MODEL}.{name}" if kind is None else f"{STATE}.{name}.{kind}"
            if first < last and key in source.opened.catalog.tensors:
                yield from source.run(key, first - position, last - position, torch.float32)
            elif first < last:
                yield from _zeros(last - first)
            position += numel
        yield from _zeros(stop - max(start, position))


def _trained(source: Source, group: Mapping[str, Any]) -> list[str]:
    frozen = set(source.about.get("frozen") or ())
    return [name for name in group["params"] if name not in frozen]


def _zeros(count: int) -> Iterator[torch.Tensor]:
    for start in range(0, count, PIECE):
        yield torch.zeros(min(PIECE, count - start))


def _enabled(source: Source, kind: str) -> bool:
    return bool(((source.about.get("config") or {}).get(kind) or {}).get("enabled"))


def _optimizer(
    source: Source, groups: list[dict[str, Any]], flats: list[Flat], place: tuple[int, int], step: Any
) -> dict[str, Any]:
    states, (rank, ranks) = source.states(), place
    state, options, masters = {}, [], []
    for position, (group, flat) in enumerate(zip(groups, flats, strict=True)):
        shaped = {kind for name in flat.names for kind, info in states.get(name, {}).items() if info.shape}
        values: dict[str, Any] = {kind: _part(source, flat, rank, kind, flat.part) for kind in sorted(shaped)}
        # One that groups shared would count for each of them.
        counter = step.clone() if isinstance(step, torch.Tensor) else step
        state[position] = {"step": counter, **values} if values else {}
        options.append({**{k: v for k, v in group.items() if k != "params"}, "params": [position]})
        masters.append(_part(source, flat, rank, None, flat.filled(rank)))
    return {
        "base_optimizer_state": {"state": {p: s for p, s in state.items() if s}, "param_groups": options},
        "single_partition_of_fp32_groups": masters,
        "zero_stage": 2,
        "group_paddings": [flat.part - flat.filled(rank) for flat in flats],
        "partition_count": [ranks] * len(flats),
        "ds_version": VERSION,
    }


def _part(source: Source, flat: Flat, rank: int, kind: str | None, length: int) -> Streamed:
    return Streamed(torch.float32, (length,), lambda: flat.read(source, rank, kind, length))


def _model(source: Source, kind: str, ranks: int) -> dict[str, Any]:
    weights, compute = source.weights(), _COMPUTE.get(kind, torch.float32)

    def streamed(name: str, info: TensorInfo) -> Streamed:
        key, dtype = f"{MODEL}.{name}", compute if info.dtype.is_floating_point else info.dtype
        return Streamed(dtype, info.shape, lambda: (t for _, t in source.pieces(key, dtype)), key)

    module = {name: streamed(name, info) for name, info in weights.items()}
    module |= {alias: module[name] for alias, name in source.ties().items() if name in module}
    frozen: Mapping[str, Streamed] = {n: module[n] for n in source.about.get("frozen") or () if n in module}
    shapes = {name: torch.Size(value.shape) for name, value in frozen.items()}
    groups = [_trained(source, group) for group in source.groups()]
    return {
        **model_content(source, module, ranks),
        "param_shapes": [{name: torch.Size(weights[name].shape) for name in names} for names in groups],
        "frozen_param_shapes": shapes,
        "frozen_param_fragments": dict(frozen),
    }
