"""Checkpoints that DeepSpeed's engine wrote: ZeRO stages 0 to 3, at any number of ranks.

Weights are the fp32 masters; what the optimizer does not own (frozen weights, buffers) is in the model files. DeepSpeed
itself is not needed to read them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from unishard.checkpoint.catalog import Catalog, Known, keys_of
from unishard.checkpoint.convert.deepspeed_stages import (
    Files,
    open_flat_groups,
    open_partitioned,
    open_replicated,
    put_frozen_fragments,
)
from unishard.checkpoint.convert.deepspeed_values import put_values
from unishard.checkpoint.convert.format import (
    Hints,
    Opened,
    Options,
    Progress,
    note_files,
    whole_tensor,
)
from unishard.checkpoint.convert.records import verify_records
from unishard.checkpoint.convert.source import Source
from unishard.checkpoint.convert.torch_read import Archive, Stored
from unishard.checkpoint.keys import MODEL
from unishard.errors import CheckpointError, CorruptCheckpointError, UnsupportedError

_MODEL = re.compile(r"(?:zero_pp_rank_(\d+)_)?mp_rank_(\d+)_model_states\.pt")
_OPTIM = re.compile(r"(?:bf16_|fp16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt")

_SPLIT = re.compile(r"layer_\d+|expp_rank_\d+")


class DeepSpeedFormat:
    """`global_stepN/mp_rank_*_model_states.pt` and `*zero_pp_rank_*_optim_states.pt`."""

    name = "deepspeed"
    title = "DeepSpeed ZeRO"
    honours = frozenset({"overwrite", "ranks", "tag", "torch_optimizer", "zero_stage"})

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
            open_replicated(files, opened, hints)
        elif stage in (1, 2):
            open_flat_groups(files, opened)
        elif stage == 3:
            open_partitioned(files, opened)
        else:
            raise UnsupportedError(f"{path}: ZeRO stage {stage} is not known")
        _add_unoptimized(files, opened, stage)
        opened.catalog.about["frozen"] = _frozen(files, opened)
        put_values(files.model, files.zero[0] if files.optims else {}, opened)
        return note_files(opened)

    def verify(self, opened: Opened, progress: Progress) -> Iterator[str]:
        """Compares each record with the CRC-32 that torch stored with it."""
        return verify_records(opened, progress)

    def write(self, source: Source, target: Path, options: Options) -> tuple[Path, list[str]]:
        """For one number of ranks, and stage 1 or 2, or 3."""
        from unishard.checkpoint.convert.deepspeed_write import write_stage

        return write_stage(source, target, options)


def _read_files(path: Path) -> Files:
    models = _by_rank(path, _MODEL)
    optims = _by_rank(path, _OPTIM)
    files = Files(path, [Archive(p) for p in models])
    if "module" not in files.model:
        raise CorruptCheckpointError(f"{models[0]} has no 'module'")
    split = next((p.name for p in sorted(path.iterdir()) if _SPLIT.match(p.name)), None)
    if split is not None or not isinstance(files.model["module"], Mapping):
        raise UnsupportedError(
            f"{path}: the model is split over pipeline stages or experts ({split or models[0].name}), which is not "
            "read; gather it with DeepSpeed first"
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


def _new_catalog(files: Files) -> Catalog:
    model = files.model
    config = model.get("ds_config")
    about = {
        "writer": "deepspeed",
        "version": model.get("ds_version"),
        "ranks": model.get("dp_world_size"),
        "step": model.get("global_steps"),
        "samples": model.get("global_samples"),
        "config": config if isinstance(config, dict) else None,
    }
    return Catalog(about=about)


def _stage(files: Files) -> int:
    if not files.optims:
        return 0
    stage = files.zero[0].get("zero_stage", 1)
    return int(getattr(stage, "args", (stage,))[0])


# what the optimizer does not own -------------------------------------------------------------------------------


def _add_unoptimized(files: Files, opened: Opened, stage: int) -> None:
    """Frozen weights and buffers; further names of tied weights."""
    catalog, model = opened.catalog, files.model
    by_place: dict[tuple[str, int], str] = {}
    for alias, name in _shared(model.get("shared_params")):
        if f"{MODEL}.{name}" in catalog.tensors:
            catalog.aliases[f"{MODEL}.{alias}"] = f"{MODEL}.{name}"
    if stage == 3:
        put_frozen_fragments(opened, [archive.content for archive in files.models])
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
            known = catalog.find(first)
            if first != key and known is not None and known.shape == stored.shape:
                catalog.aliases[key] = first
            else:
                catalog.tensors[key] = whole_tensor(files.folder, stored)
    if stage >= 2 and model.get("frozen_param_shapes") is None:
        catalog.about["frozen_excluded"] = True
    _require_parameters(files, opened)


def _frozen(files: Files, opened: Opened) -> list[str] | None:
    """Names of weights that the optimizer does not own; `None` where there is no optimizer to tell."""
    lists = [
        v.value for k, v in opened.catalog.blobs.items() if k.endswith(".params") and isinstance(v, Known)
    ]
    if not lists:
        return None
    others = {name for names in lists for name in names} | set(files.model.get("buffer_names") or ())
    return [name for name in keys_of(MODEL, opened.catalog.tensors) if name not in others]


def _require_parameters(files: Files, opened: Opened) -> None:
    lost = [name for name in files.model["module"] if opened.catalog.find(f"{MODEL}.{name}") is None]
    if lost:
        opened.notes.append(
            f"{len(lost)} tensors are not in the files ({', '.join(lost[:5])}): frozen and excluded?"
        )
        opened.catalog.about["frozen_excluded"] = True


def _shared(pairs: Any) -> list[tuple[str, str]]:
    return list(pairs.items()) if isinstance(pairs, Mapping) else [tuple(pair) for pair in pairs or ()]
