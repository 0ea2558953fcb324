"""Where DeepSpeed's ZeRO stages keep parameters and optimizer state.

Stages 1 and 2 keep each parameter group as one flat vector, cut evenly over the ranks. Stage 3 cuts each parameter
evenly over the ranks, padded, and lays a rank's pieces end to end in sub groups. Stage 0 keeps the optimizer's own
state dict.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import torch

from unishard.checkpoint.catalog import TensorInfo
from unishard.checkpoint.convert.format import (
    Hints,
    Opened,
    Run,
    chunks_of_run,
    put_groups,
    scalar,
    whole_tensor,
)
from unishard.checkpoint.convert.matching import members_of
from unishard.checkpoint.convert.torch_read import Archive, Stored
from unishard.checkpoint.keys import MODEL, STATE
from unishard.errors import CheckpointError, CorruptCheckpointError, UnsupportedError


@dataclass
class Files:
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


# stages 1 and 2 ----------------------------------------------------------------------------------------------


def open_flat_groups(files: Files, opened: Opened) -> None:
    """Describe stages 1 and 2."""
    shapes_of_groups = [shapes_of(group) for group in files.model["param_shapes"]]
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
                put(opened, name, kind, shape, chunks, run.dtype)
            put_scalars(opened, name, scalars)
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


def open_partitioned(files: Files, opened: Opened) -> None:
    """Describe stage 3."""
    zero, ranks = files.zero, len(files.optims)
    sub_groups = [shapes_of(group) for group in files.model["param_shapes"]]
    inner = [sd["optimizer_state_dict"] for sd in zero]
    order = [index for group in inner[0]["param_groups"] for index in group["params"]]
    states = [[sd["state"].get(index, {}) for index in order] for sd in inner]
    flats = [sd["fp32_flat_groups"] for sd in zero]
    if any(not isinstance(flat, Stored) for rank in flats for flat in rank):
        raise UnsupportedError(
            f"{files.folder}: the fp32 weights are not in the files (optimizer offloaded to NVMe?); save the run "
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
                put(opened, name, kind, shape, chunks, by_rank[0].dtype)
            put_scalars(opened, name, scalars)
            start += each
    groups = inner[0]["param_groups"]
    put_groups(opened.catalog, groups, members_of_sub_groups(groups, sub_groups))


def members_of_sub_groups(
    groups: Sequence[Mapping[str, Any]], sub_groups: Sequence[Mapping[str, Any]]
) -> list[list[str]]:
    """The parameter names of each group of the optimizer, each of whose `params` is one of stage 3's sub groups."""
    members, position = [], 0
    for group in groups:
        count = len(group["params"])
        members.append([name for shapes in sub_groups[position : position + count] for name in shapes])
        position += count
    return members


def put_frozen_fragments(opened: Opened, models: Sequence[Mapping[str, Any]]) -> None:
    """Enter the frozen weights of stage 3, of which every rank's model file has a piece."""
    for name, shape in shapes_of(models[0].get("frozen_param_shapes") or {}).items():
        each = -(-prod(shape) // len(models))
        chunks = []
        for rank, model in enumerate(models):
            numel = max(0, min(each, prod(shape) - rank * each))
            segments = Run([model["frozen_param_fragments"][name]]).segments(0, numel)
            chunks += chunks_of_run(opened.folder, shape, rank * each, segments)
        put(opened, name, "", shape, chunks, models[0]["frozen_param_fragments"][name].dtype)


def _is_flat(value: Any) -> bool:
    return isinstance(value, Stored) and len(value.shape) == 1


def _step_of_group(inner: Mapping[str, Any], index: int | None) -> dict[str, Any]:
    """Some optimizers count steps in the options of the group."""
    for group in inner["param_groups"]:
        if index in group["params"] and "step" in group:
            return {"step": group["step"]}
    return {}


# without ZeRO ------------------------------------------------------------------------------------------------


def open_replicated(files: Files, opened: Opened, hints: Hints) -> None:
    """Describe a run without ZeRO."""
    saved = files.model.get("optimizer")
    if saved is None:
        return
    inner = saved.get("optimizer_state_dict", saved)
    parameters = _unique_parameters(files)
    if "fp32_groups_flat" in saved:
        _open_fused(files, opened, hints)
        return
    groups = inner["param_groups"]
    masters = [m for group in saved.get("fp32_groups", []) for m in group]
    order = [index for group in groups for index in group["params"]]
    shapes = {index: master.shape for index, master in zip(order, masters, strict=False)}
    shapes |= {i: v.shape for i, state in inner["state"].items() for v in state.values() if _is_shaped(v)}
    members = members_of(groups, shapes, parameters, str(files.folder), hints.members, hints.frozen)
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


def _open_fused(files: Files, opened: Opened, hints: Hints) -> None:
    """A fused 16-bit optimizer: the masters and the state of each group are one flat vector, in the group's order."""
    saved, parameters = files.model["optimizer"], _unique_parameters(files)
    inner, flats = saved["optimizer_state_dict"], saved["fp32_groups_flat"]
    named = hints.members or [list(parameters)]
    members = [[name for name in names if name not in hints.frozen] for names in named]
    held = [sum(prod(parameters.get(name, (0,))) for name in names) for names in members]
    if held != [flat.numel for flat in flats]:
        raise CheckpointError(
            f"{files.folder}: the optimizer keeps its groups as vectors of {[flat.numel for flat in flats]} elements, "
            f"and those named have {held}. Load it through the engine that will train on, or name the parameters: "
            "--groups FILE, a JSON list of each group's parameter names"
        )
    for position, (options, names) in enumerate(zip(inner["param_groups"], members, strict=True)):
        state = inner["state"].get(options["params"][0], {})
        runs = {"": Run([flats[position]]), **{k: Run([v]) for k, v in state.items() if _is_flat(v)}}
        scalars = {k: v.read() if isinstance(v, Stored) else v for k, v in state.items() if not _is_flat(v)}
        start = 0
        for name in names:
            shape = parameters[name]
            for kind, run in runs.items():
                chunks = chunks_of_run(files.folder, shape, 0, run.segments(start, prod(shape)))
                put(opened, name, kind, shape, chunks, run.dtype)
            put_scalars(opened, name, scalars)
            start += prod(shape)
    put_groups(opened.catalog, inner["param_groups"], members)


def _is_shaped(value: Any) -> bool:
    return isinstance(value, Stored) and bool(value.shape)


def _unique_parameters(files: Files) -> dict[str, tuple[int, ...]]:
    buffers, seen = set(files.model.get("buffer_names") or ()), set()
    found: dict[str, tuple[int, ...]] = {}
    for name, stored in files.model["module"].items():
        place = (stored.record, stored.data)
        if name not in buffers and place not in seen:
            found[name] = stored.shape
            seen.add(place)
    return found


# entering -------------------------------------------------------------------------------------------------------


def shapes_of(group: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Shapes by name, as plain tuples."""
    return {name: tuple(shape) for name, shape in group.items()}


def put(
    opened: Opened, name: str, kind: str, shape: tuple[int, ...], chunks: list[Any], dtype: torch.dtype
) -> None:
    """Enter a weight, or a `kind` of its state.

    Raises `CorruptCheckpointError` if the chunks are not all of it.
    """
    key = f"{STATE}.{name}.{kind}" if kind else f"{MODEL}.{name}"
    held = sum(chunk.box.numel for chunk in chunks)
    if held != prod(shape):
        raise CorruptCheckpointError(
            f"{opened.folder}: the files hold {held} of the {prod(shape)} elements of {key}; the shards are not "
            "those of one checkpoint"
        )
    opened.catalog.tensors[key] = TensorInfo(shape, dtype, chunks)


def put_scalars(opened: Opened, name: str, scalars: Mapping[str, Any]) -> None:
    """Enter counters of one parameter."""
    for kind, value in scalars.items():
        if isinstance(value, int | float | torch.Tensor):
            opened.catalog.tensors[f"{STATE}.{name}.{kind}"] = scalar(value)
