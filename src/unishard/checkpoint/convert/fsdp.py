"""A folder with one file of `torch.save` for each rank: sharded state dicts of FSDP1, model and optimizer.

Sharded tensors (`ShardedTensor`, or `DTensor` where a mesh was given) say which box of the whole they hold; what is no
sharded tensor is the same on all ranks and taken from the first.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

from unishard.checkpoint.catalog import Catalog, Chunk, TensorInfo
from unishard.checkpoint.convert.deepspeed_values import materialized
from unishard.checkpoint.convert.format import (
    Hints,
    Opened,
    Options,
    Progress,
    box_chunk,
    note_files,
    put_counters,
    put_groups,
    whole_tensor,
)
from unishard.checkpoint.convert.matching import members_of
from unishard.checkpoint.convert.records import verify_records
from unishard.checkpoint.convert.torch_file import is_optimizer, put_state, split
from unishard.checkpoint.convert.torch_read import Archive, Foreign, Stored
from unishard.checkpoint.keys import MODEL, STATE
from unishard.errors import CheckpointError, CorruptCheckpointError, UnsupportedError

_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")


class FsdpFormat:
    """`*rank0.pt`, `*rank1.pt`, ..., whatever their names."""

    name = "fsdp"
    title = "FSDP1 sharded state dicts"
    honours: frozenset[str] = frozenset()

    def detect(self, path: Path) -> bool:
        return path.is_dir() and len(_rank_files(path)) > 0

    def open(self, path: Path, hints: Hints) -> Opened:
        opened = Opened(path, Catalog(about={"writer": "FSDP1"}), self.name)
        client: dict[str, Any] = {}
        groups: list[Mapping[str, Any]] = []
        for file in _rank_files(path):
            content = Archive(file).content
            if not isinstance(content, Mapping):
                raise CheckpointError(f"{file} holds a {type(content).__name__}, not a state dict")
            state, optimizer, rest = ({}, content, {}) if is_optimizer(content) else split(content, str(file))
            for name, value in state.items():
                _put(opened, f"{MODEL}.{name}", value, file)
            for name, kinds in (optimizer or {"state": {}})["state"].items():
                for kind, value in kinds.items():
                    _put(opened, f"{STATE}.{name}.{kind}", value, file)
            groups = groups or list((optimizer or {"param_groups": []})["param_groups"])
            client |= {str(k): materialized(v) for k, v in rest.items() if not isinstance(v, Foreign)}
        _require_sharded(opened)
        opened.catalog.about["ranks"] = len(_rank_files(path))
        put_groups(opened.catalog, groups, members_of(groups, {}, {}, str(path), hints.members))
        put_counters(opened.catalog, client)
        _require_whole(opened)
        return note_files(opened)

    def verify(self, opened: Opened, progress: Progress) -> Iterator[str]:
        """Compares each record with the CRC-32 that torch stored with it."""
        return verify_records(opened, progress)

    def write(self, source: Any, target: Path, options: Options) -> tuple[Path, list[str]]:
        raise UnsupportedError(
            "sharded state dicts of FSDP1 are only read; write dcp, which FSDP1 loads with "
            "torch.distributed.checkpoint, or torch, one file that it loads as a full state dict"
        )


def _rank_files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.is_file() and p.suffix in _SUFFIXES)


def _put(opened: Opened, key: str, value: Any, file: Path) -> None:
    if isinstance(value, Foreign) and value.path[1].endswith("ShardedTensor"):
        shape, parts = _sharded_tensor(value)
    elif isinstance(value, Foreign) and value.path[1].endswith("DTensor"):
        shape, parts = _dtensor(value, file)
    elif isinstance(value, Stored) and value.shape:
        opened.catalog.tensors.setdefault(key, whole_tensor(opened.folder, value))
        return
    else:
        if key not in opened.catalog.tensors:
            put_state(opened, key, value)
        return
    info = opened.catalog.tensors.get(key)
    if info is None:
        dtype = parts[0][1].dtype if parts else value.args[0]
        info = opened.catalog.tensors[key] = TensorInfo(shape, dtype)
    if info.shape != shape:
        raise CorruptCheckpointError(
            f"{file}: {key} has the shape {shape}, and {info.shape} in the files of other ranks; the files are not of "
            "one checkpoint"
        )
    for offsets, stored in parts:
        _add_once(info, box_chunk(opened.folder, stored, offsets))


def _add_once(info: TensorInfo, chunk: Chunk) -> None:
    """Replicas hold the same box."""
    if chunk.box.numel and all(chunk.box != known.box for known in info.chunks):
        info.chunks.append(chunk)


def _sharded_tensor(value: Foreign) -> tuple[tuple[int, ...], list[tuple[tuple[int, ...], Stored]]]:
    local_shards, metadata = value.state[0], value.state[1]
    parts = []
    for shard in local_shards:
        about = _attributes(shard)["metadata"]
        parts.append((tuple(_attributes(about)["shard_offsets"]), _attributes(shard)["tensor"]))
    return tuple(_attributes(metadata)["size"]), parts


def _attributes(value: Foreign) -> Mapping[str, Any]:
    """Of an object with a `__dict__`, or with slots, whose state is then a pair."""
    state = value.state[1] if isinstance(value.state, tuple) else value.state
    return state if isinstance(state, Mapping) else {}


def _dtensor(value: Foreign, file: Path) -> tuple[tuple[int, ...], list[tuple[tuple[int, ...], Stored]]]:
    state = _attributes(value)
    shape = tuple(value.args[1])
    local, spec = state["_local_tensor"], _attributes(state["_spec"])
    mesh = _attributes(spec["mesh"])
    sizes, coordinates = _mesh_sizes(mesh), mesh.get("_coordinate_on_dim")
    if sizes is None or coordinates is None:
        raise CheckpointError(
            f"{file} holds DTensors of a mesh that this version of torch describes in another way; save with "
            "torch.distributed.checkpoint instead"
        )
    offsets, held = [0] * len(shape), list(shape)
    for placement, size, at in zip(spec["placements"], sizes, coordinates, strict=True):
        kind = placement.path[1].rpartition(".")[2]
        if kind == "Replicate":
            continue
        if kind != "Shard":
            raise CheckpointError(
                f"{file}: tensors placed as {kind} are not read; save full or evenly sharded ones"
            )
        dim = _attributes(placement)["dim"]
        each = -(-held[dim] // size)
        start = min(each * at, held[dim])
        offsets[dim], held[dim] = offsets[dim] + start, min(each, held[dim] - start)
    if prod(held) and tuple(held) != local.shape:
        raise CorruptCheckpointError(f"{file}: a shard has the shape {local.shape} instead of {tuple(held)}")
    return shape, [(tuple(offsets), local)]


def _mesh_sizes(mesh: Mapping[str, Any]) -> Sequence[int] | None:
    if "_layout" in mesh:
        axes = _attributes(mesh["_layout"]).get("axes") or ()
        return [prod(_attributes(axis)["shape"]) for axis in axes] or None
    return mesh["mesh"].shape if isinstance(mesh.get("mesh"), Stored) else None


def _require_sharded(opened: Opened) -> None:
    """Several files of whole tensors are several checkpoints, or one in parts that have to be named."""
    files = _rank_files(opened.folder)
    if not any(len(info.chunks) > 1 for info in opened.catalog.tensors.values()) and len(files) > 1:
        held = {chunk.file for info in opened.catalog.tensors.values() for chunk in info.chunks}
        partial = any(
            sum(c.box.numel for c in info.chunks) != prod(info.shape)
            for info in opened.catalog.tensors.values()
            if info.value is None
        )
        if not partial and len(held) == 1:
            raise CheckpointError(
                f"{opened.folder} holds several files of torch.save with whole tensors "
                f"({', '.join(p.name for p in files[:6])}); name one of them"
            )


def _require_whole(opened: Opened) -> None:
    for key, info in opened.catalog.tensors.items():
        held = prod(info.shape) if info.value is not None else sum(chunk.box.numel for chunk in info.chunks)
        if held != prod(info.shape):
            raise CorruptCheckpointError(
                f"{opened.folder}: the files hold {held} of the {prod(info.shape)} elements of {key}; is the file of a "
                f"rank missing? There are {', '.join(sorted(p.name for p in _rank_files(opened.folder)))}"
            )
