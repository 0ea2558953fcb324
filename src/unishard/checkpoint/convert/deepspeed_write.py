"""Writes what DeepSpeed's engine loads at one number of ranks.

Stages 1 and 2 keep each parameter group as one flat vector, cut evenly over the ranks. Stage 3 cuts each parameter
evenly, and keeps a rank's pieces end to end in sub groups. Each rank's file has its part of the masters and of every
kind of optimizer state.
"""

from __future__ import annotations

import copyreg
import pkgutil
from collections.abc import Iterator, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any, Protocol

import torch

from unishard.checkpoint.commit import write_durably
from unishard.checkpoint.convert.aside import aside
from unishard.checkpoint.convert.format import Options
from unishard.checkpoint.convert.source import PIECE, Source
from unishard.checkpoint.convert.torch_write import Streamed, write_torch_file
from unishard.checkpoint.convert.universal import VERSION, counter_of, model_content
from unishard.checkpoint.keys import MODEL, STATE
from unishard.errors import CheckpointError, UnsupportedError

_ALIGNED = 2  # elements: of which each rank's part of a flat vector is a multiple
_SUB_GROUP = 10**9  # elements of a rank in one sub group, unless the configuration says otherwise
_SCALER = "deepspeed.runtime.fp16.loss_scaler:LossScaler"
_COMPUTE = {"bf16": torch.bfloat16, "fp16": torch.float16}


def write_stage(source: Source, target: Path, options: Options) -> tuple[Path, list[str]]:
    """Write a checkpoint for `options.zero_stage` on `options.ranks` ranks; returns where it is, and notes.

    Raises `CheckpointError` for a source without optimizer state, or that does not say how many ranks wrote it;
    `UnsupportedError` for stage 3 in fp16.
    """
    ranks, stage = _ranks(source, options), _stage(source, options)
    kind = next((name for name in _COMPUTE if _section(source, name).get("enabled")), "fp32")
    if stage == 3 and kind == "fp16":
        raise UnsupportedError(
            "files for ZeRO-3 in fp16 hold DeepSpeed's dynamic loss scale, which is not written; write "
            "deepspeed-universal, or pass --zero-stage 2 and load it under ZeRO-2"
        )
    tag = options.tag or f"global_step{source.step()}"
    with aside(target / tag, folder=True, overwrite=options.overwrite) as draft:
        write = _write_partitioned if stage == 3 else _write_flat
        write(draft, source, kind, ranks, counter_of(source, options))
    write_durably(target / "latest", tag.encode())
    stages = "ZeRO-3" if stage == 3 else "ZeRO-1 or 2"
    notes = [f"load it under {stages}, on {ranks} ranks, with {kind} weights and the same parameter groups"]
    if (source.engine().get("loss_scale") or {}).get("hysteresis_left") is not None:
        notes.append("the dynamic loss scale starts anew")
    return target / tag, notes


def _ranks(source: Source, options: Options) -> int:
    if not source.groups():
        raise CheckpointError(
            "the checkpoint has no optimizer state, which DeepSpeed's loader needs; write torch or safetensors, and "
            "load that into the model before deepspeed.initialize"
        )
    ranks = source.about.get("ranks") if options.ranks is None else options.ranks
    if not ranks or ranks < 1:
        raise CheckpointError(
            f"DeepSpeed's files are of one number of ranks, and ranks={ranks!r}; pass --ranks (ranks=...)"
        )
    return ranks


def _stage(source: Source, options: Options) -> int:
    configured = _section(source, "zero_optimization").get("stage") or 2
    stage = configured if options.zero_stage is None else options.zero_stage
    if stage not in (1, 2, 3):
        raise CheckpointError(
            f"zero_stage={stage!r}: DeepSpeed's files are of stage 1, 2 or 3; pass --zero-stage (zero_stage=...)"
        )
    return stage


def _section(source: Source, name: str) -> Mapping[str, Any]:
    return (source.about.get("config") or {}).get(name) or {}


def _trained(source: Source) -> list[list[str]]:
    """The names of each parameter group, without frozen ones."""
    frozen, weights = set(source.about.get("frozen") or ()), source.weights()
    groups = [[name for name in group["params"] if name not in frozen] for group in source.groups()]
    missing = [name for names in groups for name in names if name not in weights]
    if missing:
        raise CheckpointError(f"the optimizer steps {missing[0]}, which the checkpoint does not hold")
    return groups


# how parameters are cut -----------------------------------------------------------------------------------------


class Cut(Protocol):
    """Some parameters, and which of their elements each rank has, in one flat tensor."""

    names: list[str]

    def length(self) -> int:
        """Elements of each rank's tensor."""
        ...

    def read(self, source: Source, rank: int, kind: str | None) -> Iterator[torch.Tensor]:
        """A rank's elements of the weights, or of a kind of state; zeros where it is missing, and to fill up."""
        ...


class Flat:
    """One vector, cut evenly."""

    def __init__(self, source: Source, names: list[str], ranks: int) -> None:
        self.names, self._numels = names, _numels(source, names)
        self._part = -(-sum(self._numels) // (ranks * _ALIGNED)) * _ALIGNED

    def length(self) -> int:
        return self._part

    def filled(self, rank: int) -> int:
        """Elements of a rank that are of parameters."""
        return max(0, min(self._part, sum(self._numels) - rank * self._part))

    def read(self, source: Source, rank: int, kind: str | None) -> Iterator[torch.Tensor]:
        start, stop, position = rank * self._part, (rank + 1) * self._part, 0
        for name, numel in zip(self.names, self._numels, strict=True):
            first, last = max(start, position), min(stop, position + numel)
            yield from _elements(source, name, kind, first - position, last - position)
            position += numel
        yield from _zeros(self._part - self.filled(rank))


class SubGroup:
    """Each parameter cut evenly, the pieces end to end."""

    def __init__(self, source: Source, names: list[str], ranks: int) -> None:
        self.names, self._numels = names, _numels(source, names)
        self._parts = [-(-numel // ranks) for numel in self._numels]

    def length(self) -> int:
        return sum(self._parts)

    def read(self, source: Source, rank: int, kind: str | None) -> Iterator[torch.Tensor]:
        for name, numel, part in zip(self.names, self._numels, self._parts, strict=True):
            first = min(rank * part, numel)
            last = min(first + part, numel)
            yield from _elements(source, name, kind, first, last)
            yield from _zeros(part - (last - first))


def _numels(source: Source, names: Sequence[str]) -> list[int]:
    weights = source.weights()
    return [prod(weights[name].shape) for name in names]


def _elements(source: Source, name: str, kind: str | None, first: int, last: int) -> Iterator[torch.Tensor]:
    key = f"{MODEL}.{name}" if kind is None else f"{STATE}.{name}.{kind}"
    if first < last and key in source.opened.catalog.tensors:
        yield from source.run(key, first, last, torch.float32)
    else:
        yield from _zeros(last - first)


def _zeros(count: int) -> Iterator[torch.Tensor]:
    for start in range(0, count, PIECE):
        yield torch.zeros(min(PIECE, count - start))


def _streamed(source: Source, cut: Cut, rank: int, kind: str | None, length: int) -> Streamed:
    def pieces() -> Iterator[torch.Tensor]:
        left = length
        for piece in cut.read(source, rank, kind):
            yield piece[:left]
            left -= min(left, piece.numel())

    return Streamed(torch.float32, (length,), pieces)


# files ------------------------------------------------------------------------------------------------------------


def _write_flat(draft: Path, source: Source, kind: str, ranks: int, step: Any) -> None:
    draft.mkdir(exist_ok=True)
    flats = [Flat(source, names, ranks) for names in _trained(source)]
    module = _module(source, kind)
    frozen = {name: module[name] for name in source.about.get("frozen") or () if name in module}
    content = _model_file(source, module, frozen, flats, ranks)
    write_torch_file(draft / "mp_rank_00_model_states.pt", content)
    for rank in range(ranks):
        content = {
            "base_optimizer_state": _inner(source, [[flat] for flat in flats], rank, step),
            "single_partition_of_fp32_groups": [
                _streamed(source, flat, rank, None, flat.filled(rank)) for flat in flats
            ],
            "zero_stage": 2,
            "group_paddings": [flat.length() - flat.filled(rank) for flat in flats],
            "partition_count": [ranks] * len(flats),
            "ds_version": VERSION,
        }
        _write_rank(draft, source, kind, rank, content)


def _write_partitioned(draft: Path, source: Source, kind: str, ranks: int, step: Any) -> None:
    draft.mkdir(exist_ok=True)
    groups = [_sub_groups(source, names, ranks) for names in _trained(source)]
    cuts = [cut for group in groups for cut in group]
    whole = _module(source, kind)
    if source.about.get("frozen") is None:
        raise CheckpointError(
            f"{source.opened.folder} does not say which weights are frozen, which files for ZeRO-3 keep apart from "
            "buffers; pass --zero-stage 2, or write deepspeed-universal"
        )
    frozen = [name for name in source.about["frozen"] if name in whole]
    owned = {name for cut in cuts for name in cut.names} | set(frozen)
    owned |= {alias for alias, name in source.ties().items() if name in owned}
    # DeepSpeed's modules hold nothing of a parameter that is away.
    module = {n: torch.empty(0, dtype=v.dtype) if n in owned else v for n, v in whole.items()}
    for rank in range(ranks):
        fragments = {name: _fragment(source, name, whole[name], rank, ranks) for name in frozen}
        content = _model_file(source, module, fragments, cuts, ranks)
        write_torch_file(draft / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt", content)
        content = {
            "zero_stage": 3,
            "loss_scaler": _NoScaling(),
            "dynamic_loss_scale": False,
            "overflow": False,
            "partition_count": ranks,
            "optimizer_state_dict": _inner(source, groups, rank, step),
            "fp32_flat_groups": [_streamed(source, cut, rank, None, cut.length()) for cut in cuts],
        }
        _write_rank(draft, source, kind, rank, content)


def _sub_groups(source: Source, names: list[str], ranks: int) -> list[SubGroup]:
    """A group's parameters in order, as many as reach the configured size."""
    most = _section(source, "zero_optimization").get("sub_group_size") or _SUB_GROUP
    parts: list[list[str]] = [[]]
    held = 0
    for name, numel in zip(names, _numels(source, names), strict=True):
        if held >= most:
            parts.append([])
            held = 0
        parts[-1].append(name)
        held += -(-numel // ranks)
    return [SubGroup(source, part, ranks) for part in parts]


def _fragment(source: Source, name: str, like: Streamed, rank: int, ranks: int) -> Streamed:
    cut = SubGroup(source, [name], ranks)
    return Streamed(like.dtype, (cut.length(),), lambda: cut.read(source, rank, None))


def _write_rank(draft: Path, source: Source, kind: str, rank: int, content: Mapping[str, Any]) -> None:
    prefix = "bf16_" if kind == "bf16" else ""
    write_torch_file(
        draft / f"{prefix}zero_pp_rank_{rank}_mp_rank_00_optim_states.pt",
        {
            "optimizer_state_dict": dict(content),
            "ds_config": source.about.get("config"),
            "ds_version": VERSION,
        },
    )


def _inner(source: Source, groups: Sequence[Sequence[Cut]], rank: int, step: Any) -> dict[str, Any]:
    """The state dict of a torch optimizer over one flat tensor for each cut."""
    states, state, options = source.states(), {}, []
    for group, stored in zip(groups, source.groups(), strict=True):
        numbers = list(range(len(state), len(state) + len(group)))
        options.append({**{k: v for k, v in stored.items() if k != "params"}, "params": numbers})
        for number, cut in zip(numbers, group, strict=True):
            infos = [states.get(name, {}) for name in cut.names]
            shaped = sorted({kind for kinds in infos for kind, info in kinds.items() if info.shape})
            # A counter that several shared would count for each of them.
            counter = step.clone() if isinstance(step, torch.Tensor) else step
            state[number] = {
                "step": counter,
                **{kind: _streamed(source, cut, rank, kind, cut.length()) for kind in shaped},
            }
    return {"state": state, "param_groups": options}


def _module(source: Source, kind: str) -> dict[str, Streamed]:
    """All weights and buffers, floating ones in the dtype that the run computes in."""
    compute = _COMPUTE.get(kind, torch.float32)
    found: dict[str, Streamed] = {}
    for name, info in source.weights().items():
        key, dtype = f"{MODEL}.{name}", compute if info.dtype.is_floating_point else info.dtype
        found[name] = Streamed(dtype, info.shape, _whole(source, key, dtype), key)
    return found | {alias: found[name] for alias, name in source.ties().items() if name in found}


def _whole(source: Source, key: str, dtype: torch.dtype) -> Any:
    return lambda: (piece for _, piece in source.pieces(key, dtype))


def _model_file(
    source: Source,
    module: Mapping[str, Any],
    fragments: Mapping[str, Streamed],
    cuts: Sequence[Cut],
    ranks: int,
) -> dict[str, Any]:
    weights = source.weights()
    trained = {name for cut in cuts for name in cut.names}
    shapes = [{name: torch.Size(weights[name].shape) for name in cut.names} for cut in cuts]
    return {
        **model_content(source, module, ranks),
        "buffer_names": [name for name in weights if name not in trained and name not in fragments],
        "param_shapes": shapes,
        "frozen_param_shapes": {name: torch.Size(weights[name].shape) for name in fragments},
        "frozen_param_fragments": dict(fragments),
    }


class _NoScaling:
    """Stands for DeepSpeed's object of a loss scale of 1, which is made when the file is loaded."""

    def __reduce__(self) -> Any:
        state = {"cur_scale": 1.0, "dynamic": False}
        return copyreg._reconstructor, (_Class(_SCALER), object, None), state  # pyright: ignore[reportAttributeAccessIssue]


class _Class:
    """Stands for a class that need not be here."""

    def __init__(self, path: str) -> None:
        self._path = path

    def __reduce__(self) -> Any:
        return pkgutil.resolve_name, (self._path,)
