"""DeepSpeed's universal checkpoints: a folder for each parameter, loaded at any number of ranks and any ZeRO stage.

DeepSpeed takes them with `"checkpoint": {"load_universal": true}`. It restores the optimizer's parameters and state
from them, the counters and the schedule; frozen weights and buffers it leaves as the model has them.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any

import torch

from unishard.checkpoint.catalog import Catalog, TensorInfo
from unishard.checkpoint.commit import write_durably
from unishard.checkpoint.convert.aside import aside
from unishard.checkpoint.convert.deepspeed_stages import (
    members_of_sub_groups,
    put_frozen_fragments,
    shapes_of,
)
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
from unishard.checkpoint.convert.records import verify_records
from unishard.checkpoint.convert.source import Source
from unishard.checkpoint.convert.torch_file import weights_to_write
from unishard.checkpoint.convert.torch_read import Archive, Stored
from unishard.checkpoint.convert.torch_write import Streamed, write_torch_file
from unishard.checkpoint.keys import MODEL, STATE
from unishard.errors import CheckpointError, CorruptCheckpointError

VERSION = "0.19.8"
"""Of DeepSpeed, whose loader these files were tried with."""


class UniversalFormat:
    """`zero/NAME/fp32.pt`, `exp_avg.pt`, ... and `zero/optimizer_state.pt` beside the model's files."""

    name = "deepspeed-universal"
    title = "DeepSpeed universal"
    honours = frozenset({"exclude_frozen", "overwrite", "tag", "torch_optimizer"})

    def detect(self, path: Path) -> bool:
        return (path / "zero" / "optimizer_state.pt").is_file()

    def open(self, path: Path, hints: Hints) -> Opened:
        models = [Archive(file).content for file in _model_files(path)]
        model = models[0]
        zero = Archive(path / "zero" / "optimizer_state.pt").content
        about = {"writer": "deepspeed", "version": model.get("ds_version"), "step": model.get("global_steps")}
        opened = Opened(path, Catalog(about={**about, "config": model.get("ds_config")}), self.name)
        shapes = {
            n: shape for group in model.get("param_shapes") or [] for n, shape in shapes_of(group).items()
        }
        for folder in sorted(p for p in (path / "zero").iterdir() if p.is_dir()):
            _put_parameter(opened, folder, shapes)
        _put_common_step(opened, zero)
        put_frozen_fragments(opened, models)
        _put_rest(opened, model)
        put_values(model, zero, opened)
        _put_options(opened, model, zero)
        return note_files(opened)

    def verify(self, opened: Opened, progress: Progress) -> Iterator[str]:
        """Compares each record with the CRC-32 that torch stored with it."""
        return verify_records(opened, progress)

    def write(self, source: Source, target: Path, options: Options) -> tuple[Path, list[str]]:
        tag = options.tag or f"global_step{source.step()}"
        states, groups = source.states(), source.groups()
        if not groups:
            raise CheckpointError(
                "the checkpoint has no optimizer state, which DeepSpeed's universal loader needs; write torch or "
                "safetensors, and load that into the model before deepspeed.initialize"
            )
        trained = [name for group in groups for name in group["params"]]
        with aside(target / tag, folder=True, overwrite=options.overwrite) as draft:
            for name in trained:
                _write_parameter(draft / "zero" / name, source, name, states.get(name, {}))
            _write(
                draft / "zero" / "optimizer_state.pt",
                _optimizer_state(groups, counter_of(source, options)),
            )
            _write_model_files(draft, source, set(states) & set(trained))
        for pointer in ("latest", "latest_universal"):
            write_durably(target / pointer, tag.encode())
        return target / tag, _notes(source, set(states) & set(trained))


# reading --------------------------------------------------------------------------------------------------------


def _model_files(path: Path) -> list[Path]:
    """One file; or, of stage 3, one of each rank."""
    if (path / "mp_rank_00_model_states.pt").is_file():
        return [path / "mp_rank_00_model_states.pt"]
    found = path.glob("zero_pp_rank_*_mp_rank_00_model_states.pt")
    files = sorted(found, key=lambda file: int(file.name.split("_")[3]))
    if not files:
        raise CorruptCheckpointError(f"{path}: *mp_rank_00_model_states.pt is missing")
    return files


def _put_parameter(opened: Opened, folder: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
    for file in sorted(folder.glob("*.pt")):
        content = Archive(file).content
        value = content.get("param") if isinstance(content, Mapping) else content
        key = f"{MODEL}.{folder.name}" if file.stem == "fp32" else f"{STATE}.{folder.name}.{file.stem}"
        shape = shapes.get(folder.name, ())
        if isinstance(value, Stored) and len(value.shape) == 1 and value.numel == prod(shape):
            # Stage 3's are flat.
            chunks = chunks_of_run(opened.folder, shape, 0, Run([value]).segments(0, value.numel))
            opened.catalog.tensors[key] = TensorInfo(shape, value.dtype, chunks)
        elif isinstance(value, Stored) and value.shape:
            opened.catalog.tensors[key] = whole_tensor(opened.folder, value)
        elif value is not None:
            opened.catalog.tensors[key] = scalar(value.read() if isinstance(value, Stored) else value)
        else:
            raise CorruptCheckpointError(f"{file} holds no tensor for {key}")


def _put_common_step(opened: Opened, zero: Mapping[str, Any]) -> None:
    """Stage 3 keeps the number of steps once for all."""
    inner = zero.get("optimizer_state_dict") or zero.get("base_optimizer_state") or {}
    step = inner.get("state", {}).get(0, {}).get("step") if isinstance(inner, Mapping) else None
    if step is None:
        return
    value = step.read() if isinstance(step, Stored) else step
    for key in [k for k in opened.catalog.tensors if k.endswith(".exp_avg")]:
        opened.catalog.tensors.setdefault(f"{key.removesuffix('.exp_avg')}.step", scalar(value))


def _put_rest(opened: Opened, model: Mapping[str, Any]) -> None:
    """Buffers and frozen weights, where the model's file has them."""
    catalog = opened.catalog
    for alias, name in (model.get("shared_params") or {}).items():
        if f"{MODEL}.{name}" in catalog.tensors:
            catalog.tensors.pop(f"{MODEL}.{alias}", None)
            catalog.aliases[f"{MODEL}.{alias}"] = f"{MODEL}.{name}"
    for name, stored in (model.get("module") or {}).items():
        if isinstance(stored, Stored) and stored.numel and catalog.find(f"{MODEL}.{name}") is None:
            catalog.tensors[f"{MODEL}.{name}"] = whole_tensor(opened.folder, stored)


def _put_options(opened: Opened, model: Mapping[str, Any], zero: Mapping[str, Any]) -> None:
    inner = zero.get("optimizer_state_dict")
    groups = zero.get("param_groups") or (inner["param_groups"] if inner else [])
    sub_groups = model.get("param_shapes") or []
    # One for each of the optimizer's parameters, which are one a group in stages 1 and 2.
    if sum(len(group["params"]) for group in groups) == len(sub_groups):
        put_groups(opened.catalog, groups, members_of_sub_groups(groups, sub_groups))


# writing --------------------------------------------------------------------------------------------------------


def _write(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_torch_file(path, content)


def _write_parameter(folder: Path, source: Source, name: str, kinds: Mapping[str, TensorInfo]) -> None:
    keys = {"fp32": f"{MODEL}.{name}", **{kind: f"{STATE}.{name}.{kind}" for kind in kinds}}
    for kind, key in keys.items():
        info = source.opened.catalog.tensors[key]
        if info.shape or kind == "fp32":
            # DeepSpeed keeps everything the optimizer works on in fp32.
            streamed = Streamed(
                torch.float32,
                info.shape,
                lambda key=key: (t for _, t in source.pieces(key, torch.float32)),
                key,
            )
            _write(folder / f"{kind}.pt", {"param": streamed})
        else:
            _write(folder / f"{kind}.pt", source.small(key))


def counter_of(source: Source, options: Options) -> Any:
    """The number of steps. Stage 3 gives this one object to all sub groups.

    A tensor, which torch's optimizers want, they then advance together; a number, as DeepSpeed's have it, each alone.
    """
    counted = (name for name, kinds in source.states().items() if "step" in kinds)
    steps = next((int(source.small(f"{STATE}.{name}.step")) for name in counted), 0)
    configured = (((source.about.get("config") or {}).get("optimizer") or {}).get("params") or {}).get(
        "torch_adam"
    )
    return torch.tensor(float(steps)) if options.torch_optimizer or configured else steps


def _optimizer_state(groups: list[dict[str, Any]], step: Any) -> dict[str, Any]:
    """For stages 1 and 2 each group's options. Stage 3 gives all groups those of the first: only what they share."""
    known = [{k: v for k, v in group.items() if k != "params"} for group in groups]
    for position, options in enumerate(known):
        options["params"] = [position]
    common = {k: v for k, v in known[0].items() if k != "params" and all(g.get(k) == v for g in known)}
    state = {0: {"step": step}}
    return {
        "param_groups": known,
        "optimizer_state_dict": {"state": state, "param_groups": [{**common, "params": [0]}]},
        "ds_version": VERSION,
    }


def _write_model_files(draft: Path, source: Source, trained: set[str]) -> None:
    state = weights_to_write(source, [name for name in source.weights() if name not in trained])
    content = {
        **model_content(source, state, ranks=1),
        "universal_checkpoint_info": {"universal_checkpoint_version": 0.4},
    }
    _write(draft / "mp_rank_00_model_states.pt", content)
    # Stage 3 looks for a file of its first rank.
    again = draft / "zero_pp_rank_0_mp_rank_00_model_states.pt"
    try:
        again.hardlink_to(draft / "mp_rank_00_model_states.pt")
    except OSError:  # a file system without links
        shutil.copy2(draft / "mp_rank_00_model_states.pt", again)


def model_content(source: Source, module: Mapping[str, Any], ranks: int) -> dict[str, Any]:
    """What DeepSpeed's model files hold, for tensors in `module`."""
    engine, weights, groups = source.engine(), source.weights(), source.groups()
    return {
        **source.client_state(),
        "module": module,
        "buffer_names": [],
        "optimizer": None,
        "param_shapes": [{n: torch.Size(weights[n].shape) for n in group["params"]} for group in groups],
        "frozen_param_shapes": None,
        "frozen_param_fragments": None,
        "shared_params": source.ties(),
        "lr_scheduler": _schedule(engine.get("lr_scheduler")),
        "data_sampler": None,
        "random_ltd": None,
        "skipped_steps": engine.get("skipped_steps", 0),
        "global_steps": source.step(),
        "global_samples": engine.get("global_samples") or 0,
        "dp_world_size": ranks,
        "mp_world_size": 1,
        "ds_config": source.about.get("config"),
        "ds_version": VERSION,
    }


def _schedule(state: Any) -> Any:
    """DeepSpeed's schedules keep the number of the last update alone."""
    if isinstance(state, Mapping) and "last_epoch" in state and "last_batch_iteration" not in state:
        return {**state, "last_batch_iteration": state["last_epoch"] - 1}
    return state


def _notes(source: Source, trained: set[str]) -> list[str]:
    notes = ['load it with "checkpoint": {"load_universal": true}']
    others = [name for name in source.weights() if name not in trained]
    if others:
        some = ", ".join(others[:4]) + (f" and {len(others) - 4} more" if len(others) > 4 else "")
        notes.append(
            f"DeepSpeed's universal loader does not restore frozen weights and buffers ({some}); they are in 'module' "
            "of mp_rank_00_model_states.pt: load them into the model with load_state_dict(..., strict=False)"
        )
    if (source.engine().get("loss_scale") or {}).get("hysteresis_left") is not None:
        notes.append("the dynamic loss scale starts anew")
    return notes
