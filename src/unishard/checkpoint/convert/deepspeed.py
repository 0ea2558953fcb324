"""Checkpoints that DeepSpeed's engine wrote: ZeRO stages 0 to 3, at any number of ranks.

Stages 1 and 2 keep each parameter group as one flat vector, cut evenly over the ranks. Stage 3 cuts each parameter evenly
over the ranks, padded, and lays a rank's pieces end to end in sub groups. Weights are the fp32 masters; what the
optimizer does not own (frozen weights, buffers) is in the model files. DeepSpeed itself is not needed to read them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import torch

from unishard.checkpoint.catalog import Catalog, TensorInfo
from unishard.checkpoint.convert.deepspeed_values import put_values
from unishard.checkpoint.convert.format import (
    Hints,
    Opened,
    Options,
    Progress,
    Run,
    chunks_of_run,
    note_files,
    put_groups,
    scalar,
    whole_tensor,
)
from unishard.checkpoint.convert.matching import members_of
from unishard.checkpoint.convert.records import verify_records
from unishard.checkpoint.convert.torch_read import Archive, Stored
from unishard.checkpoint.keys import MODEL, STATE
from unishard.errors import CheckpointError, CorruptCheckpointError, UnsupportedError

_MODEL = re.compile(r"(?:zero_pp_rank_(\d+)_)?mp_rank_(\d+)_model_states\.pt")
_OPTIM = re.compile(r"(?:bf16_|fp16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt")


@dataclass
class _Files:
    """The structure of every file of one checkpoint, by rank."""

    folder: Path
    models: list[Archive]
    optims: list[Archive] = field(default_factory=list)

    @property
    def model(self) -> Mapping[str, Any]:
        return self.models[0].content

    @property
    def zero(self) -> list[Mapping[str, Any]]:
        return [archive.content["optimizer_state_dict"] for archive in self.optims]


class DeepSpeedFormat:
    """`global_stepN/mp_rank_*_model_states.pt` and `*zero_pp_rank_*_optim_states.pt`."""

    name = "deepspeed"
    title = "DeepSpeed ZeRO"

    def detect(self, path: Path) -> bool:
        return (
            path.is_dir()
            and any(_MODEL.fullmatch(p.name) for p in path.iterdir())
            and not (path / "zero").is_dir()
        )

    def open(self, path: Path, hints: Hints) -> Opened:
        files = _read_files(path)
        opened = Opened(path, catalog=_new_catalog(files), format=self.name)
        stage = _stage(files)
        opened.catalog.about["zero_stage"] = stage
        if stage == 0:
            _open_replicated(files, opened, hints)
        elif stage in (1, 2):
            _open_flat_groups(files, opened)
        elif stage == 3:
            _open_partitioned(files, opened)
        else:
            raise UnsupportedError(f"{path}: ZeRO stage {stage} is not known")
        _add_unoptimized(files, opened, stage)
        put_values(files.model, files.zero[0] if files.optims else {}, opened)
        return note_files(opened)

    def verify(self, opened: Opened, progress: Progress) -> Iterator[str]:
        """Compares each record with the CRC-32 that torch stored with it."""
        return verify_records(opened, progress)

    def write(self, source: Any, target: Path, options: Options) -> tuple[Path, list[str]]:
        raise UnsupportedError(
            "DeepSpeed's files of one number of ranks are only read; write deepspeed-universal, which its "
            'load_checkpoint takes at any number of ranks and stage with "checkpoint": {"load_universal": true}'
        )


def _read_files(path: Path) -> _Files:
    models = _by_rank(path, _MODEL)
    optims = _by_rank(path, _OPTIM)
    files = _Files(path, [Archive(p) for p in models])
    if not files.models or "module" not in files.model:
        raise CorruptCheckpointError(
            f"{path}: {models[0].name if models else 'model_states.pt'} has no 'module'"
        )
    files.optims = [Archive(p) for p in optims]
    for archive in files.optims:
        if "optimizer_state_dict" not in archive.content:
            raise CorruptCheckpointError(f"{archive.path} has no 'optimizer_state_dict'")
    ranks = int(files.model.get("dp_world_size", 1))
    partitioned = len(models) > 1 or models[0].name.startswith("zero_pp_rank")
    if partitioned:
        _require_ranks(path, models, ranks, "model_states.pt")
    if optims or files.model.get("param_shapes") is not None:
        _require_ranks(path, optims, ranks, "optim_states.pt")
    return files


def _by_rank(path: Path, pattern: re.Pattern[str]) -> list[Path]:
    found: dict[int, Path] = {}
    for file in sorted(path.iterdir()):
        match = pattern.fullmatch(file.name)
        if match is None:
            continue
        if int(match[2]):
            raise UnsupportedError(
                f"{file}: the model is split over tensor-parallel ranks; merge it with DeepSpeed's ds_to_universal.py "
                "first, whose result is read"
            )
        rank = int(match[1] or 0)
        if rank in found:
            raise CheckpointError(
                f"{path}: {found[rank].name} and {file.name} are both of rank {rank}; remove one"
            )
        found[rank] = file
    return [found[rank] for rank in sorted(found)]


def _require_ranks(path: Path, files: Sequence[Path], ranks: int, kind: str) -> None:
    there = [int(match[1]) for file in files if (match := re.search(r"zero_pp_rank_(\d+)", file.name))]
    missing, more = sorted(set(range(ranks)) - set(there)), sorted(set(there) - set(range(ranks)))
    if missing:
        raise CorruptCheckpointError(
            f"{path} was written by {ranks} ranks, and *zero_pp_rank_{missing[0]}_mp_rank_00_{kind} is missing"
            + (f", as are those of ranks {missing[1:]}" if missing[1:] else "")
        )
    if more:
        raise CorruptCheckpointError(
            f"{path} was written by {ranks} ranks, and there is a *zero_pp_rank_{more[0]}_mp_rank_00_{kind}, which is "
            "of another checkpoint; remove it"
        )


def _new_catalog(files: _Files) -> Catalog:
    model = files.model
    config = model.get("ds_config")
    about = {
        "writer": "deepspeed",
        "version": model.get("ds_version"),
        "ranks": model.get("dp_world_size"),
        "step": model.get("global_steps"),
        "samples": model.get("global_samples"),
        "buffers": list(model.get("buffer_names") or ()),
        "config": config if isinstance(config, dict) else None,
    }
    return Catalog(about=about)


def _stage(files: _Files) -> int:
    if not files.optims:
        return 0
    stage = files.zero[0].get("zero_stage", 1)
    return int(getattr(stage, "args", (stage,))[0])


# stages 1 and 2 ----------------------------------------------------------------------------------------------


def _open_flat_groups(files: _Files, opened: Opened) -> None:
    shapes_of_groups = [_shapes(group) for group in files.model["param_shapes"]]
    zero = files.zero
    for position, shapes in enumerate(shapes_of_groups):
        runs = {"": Run([sd["single_partition_of_fp32_groups"][position] for sd in zero])}
        scalars: dict[str, Any] = {}
        for kind in _flat_state(zero[0], position):
            values = [_flat_state(sd, position)[kind] for sd in zero]
            if isinstance(values[0], Stored) and values[0].shape:
                runs[kind] = Run(values)
            else:
                scalars[kind] = values[0].read() if isinstance(values[0], Stored) else values[0]
        paddings = (zero[0].get("param_alignment_paddings") or {position: [0] * len(shapes)})[position]
        start = 0
        for (name, shape), padding in zip(shapes.items(), paddings, strict=True):
            for kind, run in runs.items():
                numel = prod(shape)
                chunks = chunks_of_run(files.folder, shape, 0, run.segments(start, numel))
                _put(opened, name, kind, shape, chunks, run.dtype)
            _put_scalars(opened, name, scalars)
            start += prod(shape) + padding
    groups = zero[0]["base_optimizer_state"]
    if isinstance(groups, dict):
        put_groups(opened.catalog, groups["param_groups"], [list(shapes) for shapes in shapes_of_groups])


def _flat_state(zero: Mapping[str, Any], position: int) -> Mapping[str, Any]:
    base = zero["base_optimizer_state"]
    if isinstance(base, list):  # "elastic": unpadded, by group
        return {
            **base[position],
            **({"step": zero["base_optimizer_state_step"]} if "base_optimizer_state_step" in zero else {}),
        }
    group = base["param_groups"][position]
    state = base["state"].get(group["params"][0], {})
    return {**({"step": group["step"]} if "step" in group else {}), **state}


# stage 3 -----------------------------------------------------------------------------------------------------


def _open_partitioned(files: _Files, opened: Opened) -> None:
    zero, ranks = files.zero, len(files.optims)
    sub_groups = [_shapes(group) for group in files.model["param_shapes"]]
    inner = [sd["optimizer_state_dict"] for sd in zero]
    order = [index for group in inner[0]["param_groups"] for index in group["params"]]
    states = [[sd["state"].get(index, {}) for index in order] for sd in inner]
    flats = [sd["fp32_flat_groups"] for sd in zero]
    if any(not isinstance(flat, Stored) for rank in flats for flat in rank):
        raise UnsupportedError(
            f"{files.folder}: the fp32 weights are not in the files (optimizer offloaded to NVMe?); save the checkpoint "
            "without offload_optimizer on nvme, or use DeepSpeed's ds_to_universal.py"
        )
    masters = [Run(flat) for flat in flats]
    kinds = [kind for kind, value in (states[0][0] if states[0] else {}).items() if _is_flat(value)]
    runs = {"": masters}
    for kind in kinds:
        runs[kind] = [Run([state[kind] for state in rank]) for rank in states]
    start = 0
    for sub, shapes in enumerate(sub_groups):
        first = states[0][sub] if sub < len(states[0]) else {}
        scalars = {k: v.read() if isinstance(v, Stored) else v for k, v in first.items() if not _is_flat(v)}
        scalars |= _step_of_group(inner[0], order[sub] if sub < len(order) else None)
        for name, shape in shapes.items():
            each = -(-prod(shape) // ranks)
            for kind, by_rank in runs.items():
                chunks = []
                for rank, run in enumerate(by_rank):
                    numel = max(0, min(each, prod(shape) - rank * each))
                    chunks += chunks_of_run(files.folder, shape, rank * each, run.segments(start, numel))
                _put(opened, name, kind, shape, chunks, by_rank[0].dtype)
            _put_scalars(opened, name, scalars)
            start += each
    members, position = [], 0
    for group in inner[0]["param_groups"]:
        count = len(group["params"])
        members.append([name for shapes in sub_groups[position : position + count] for name in shapes])
        position += count
    put_groups(opened.catalog, inner[0]["param_groups"], members)


def _is_flat(value: Any) -> bool:
    return isinstance(value, Stored) and len(value.shape) == 1


def _step_of_group(inner: Mapping[str, Any], index: int | None) -> dict[str, Any]:
    """Some optimizers count steps in the options of the group."""
    for group in inner["param_groups"]:
        if index in group["params"] and "step" in group:
            return {"step": group["step"]}
    return {}


# without ZeRO ------------------------------------------------------------------------------------------------


def _open_replicated(files: _Files, opened: Opened, hints: Hints) -> None:
    saved = files.model.get("optimizer")
    if saved is None:
        return
    inner = saved.get("optimizer_state_dict", saved)
    parameters = _unique_parameters(files)
    if "fp32_groups_flat" in saved:
        raise UnsupportedError(
            f"{files.folder}: stage 0 with fused 16-bit optimizer keeps state of whole groups at once, which is not read; "
            "load it with load_module_only, or save the run with ZeRO stage 1 first"
        )
    groups = inner["param_groups"]
    masters = [m for group in saved.get("fp32_groups", []) for m in group]
    order = [index for group in groups for index in group["params"]]
    shapes = {index: master.shape for index, master in zip(order, masters, strict=False)}
    shapes |= {i: v.shape for i, state in inner["state"].items() for v in state.values() if _is_shaped(v)}
    members = members_of(groups, shapes, parameters, str(files.folder), hints.members)
    names = [name for group in members for name in group]
    for index, name in zip(order, names, strict=True):
        for kind, value in inner["state"].get(index, {}).items():
            key = f"{STATE}.{name}.{kind}"
            shaped = _is_shaped(value)
            opened.catalog.tensors[key] = (
                whole_tensor(files.folder, value)
                if shaped
                else scalar(value.read() if isinstance(value, Stored) else value)
            )
    for name, master in zip(names, masters, strict=False):
        opened.catalog.tensors[f"{MODEL}.{name}"] = whole_tensor(files.folder, master)
    put_groups(opened.catalog, groups, members)


def _is_shaped(value: Any) -> bool:
    return isinstance(value, Stored) and bool(value.shape)


def _unique_parameters(files: _Files) -> dict[str, tuple[int, ...]]:
    buffers, seen = set(files.model.get("buffer_names") or ()), set()
    found: dict[str, tuple[int, ...]] = {}
    for name, stored in files.model["module"].items():
        place = (stored.record, stored.data)
        if name not in buffers and place not in seen:
            found[name] = stored.shape
            seen.add(place)
    return found


# what the optimizer does not own -------------------------------------------------------------------------------


def _add_unoptimized(files: _Files, opened: Opened, stage: int) -> None:
    """Frozen weights and buffers; further names of tied weights."""
    catalog, model = opened.catalog, files.model
    by_place: dict[tuple[str, int], str] = {}
    for alias, name in _shared(model.get("shared_params")):
        if f"{MODEL}.{name}" in catalog.tensors:
            catalog.aliases[f"{MODEL}.{alias}"] = f"{MODEL}.{name}"
    frozen = {} if stage < 3 else _shapes(model.get("frozen_param_shapes") or {})
    for name, shape in frozen.items():
        each = -(-prod(shape) // len(files.models))
        chunks = []
        for rank, archive in enumerate(files.models):
            run = Run([archive.content["frozen_param_fragments"][name]])
            numel = max(0, min(each, prod(shape) - rank * each))
            chunks += chunks_of_run(files.folder, shape, rank * each, run.segments(0, numel))
        stored = model["frozen_param_fragments"][name]
        _put(opened, name, "", shape, chunks, stored.dtype)
    for name, stored in model["module"].items():
        key = f"{MODEL}.{name}"
        if not isinstance(stored, Stored):
            opened.notes.append(f"{name} is no tensor and was left out")
            continue
        if stage == 3 and name not in (model.get("buffer_names") or ()):
            continue
        place = (stored.record, stored.data)
        first = by_place.setdefault(place, key) if stored.numel else key
        if catalog.find(key) is None:
            if first != key and catalog.find(first) is not None and catalog.find(first).shape == stored.shape:  # pyright: ignore[reportOptionalMemberAccess]
                catalog.aliases[key] = first
            else:
                catalog.tensors[key] = whole_tensor(files.folder, stored)
    _require_parameters(files, opened)


def _require_parameters(files: _Files, opened: Opened) -> None:
    lost = [name for name in files.model["module"] if opened.catalog.find(f"{MODEL}.{name}") is None]
    if lost:
        opened.notes.append(
            f"{len(lost)} tensors are not in the files ({', '.join(lost[:5])}): frozen and excluded?"
        )
        opened.catalog.about["frozen_excluded"] = True


def _shared(pairs: Any) -> list[tuple[str, str]]:
    return list(pairs.items()) if isinstance(pairs, Mapping) else [tuple(pair) for pair in pairs or ()]


def _shapes(group: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(shape) for name, shape in group.items()}


def _put(
    opened: Opened, name: str, kind: str, shape: tuple[int, ...], chunks: list[Any], dtype: torch.dtype
) -> None:
    key = f"{STATE}.{name}.{kind}" if kind else f"{MODEL}.{name}"
    held = sum(chunk.box.numel for chunk in chunks)
    if held != prod(shape):
        raise CorruptCheckpointError(
            f"{opened.folder}: the files hold {held} of the {prod(shape)} elements of {key}; the shards are not those of "
            "one checkpoint"
        )
    opened.catalog.tensors[key] = TensorInfo(shape, dtype, chunks)


def _put_scalars(opened: Opened, name: str, scalars: Mapping[str, Any]) -> None:
    for kind, value in scalars.items():
        if isinstance(value, int | float | torch.Tensor):
            opened.catalog.tensors[f"{STATE}.{name}.{kind}"] = scalar(value)
