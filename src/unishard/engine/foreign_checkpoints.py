"""What the engine does otherwise with a checkpoint that another program wrote."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unishard.checkpoint import commit
from unishard.checkpoint.keys import ENGINE
from unishard.checkpoint.training import Names
from unishard.errors import CheckpointError

if TYPE_CHECKING:
    from unishard.checkpoint.convert.format import Hints
    from unishard.engine.engine import Engine

_IMPLEMENTATION = {"foreach", "fused", "capturable", "differentiable"}


def find_checkpoint(folder: Path, tag: str | None) -> Path:
    """The checkpoint that `folder` means: one of several in it, or itself, of any format.

    Raises `CheckpointError` with what is there instead.
    """
    try:
        return commit.find(folder, tag)
    except CheckpointError:
        from unishard.checkpoint.convert.registry import detect, locate

        if tag is not None or not folder.exists():
            raise
        found = locate(folder)
        if detect(found) is None:
            raise
        return found


def foreign_tags(folder: Path) -> list[str]:
    """What a pointer that another program wrote names, so that its run is not started anew unnoticed."""
    from unishard.checkpoint.convert.registry import detect, locate

    if not (folder / commit.LATEST).is_file():
        return []
    found = locate(folder)
    return [found.name] if found.parent == folder and detect(found) is not None else []


def hints_of(engine: Engine) -> Hints:
    """The parameter names of each of the optimizer's groups, for formats that keep its state by position."""
    from unishard.checkpoint.convert.format import Hints

    if engine.optimizer is None:
        return Hints()
    names = Names(engine.module)
    members = [[names.of(p.group, p.index) for p in pieces] for pieces in engine.optimizer.members]
    return Hints(members, frozenset(n for n, p in engine.module.named_parameters() if not p.requires_grad))


def own_options(engine: Engine, options: Mapping[int, Mapping[str, Any]]) -> dict[int, dict[str, Any]]:
    """Of another program's options those that this optimizer has and that do not say how it is carried out."""
    if engine.optimizer is None:
        return {}
    kept = {}
    for position, stored in options.items():
        known = set(engine.optimizer.inner.param_groups[position]) - _IMPLEMENTATION
        kept[position] = {name: value for name, value in stored.items() if name in known}
    return kept


def complete_counters(engine: Engine, state: Mapping[str, Any]) -> None:
    """Counters that another program did not keep, from those that it did; a loss scale of another kind is dropped."""
    saved = state.get(ENGINE)
    if saved is None:
        return
    if saved["micro_steps"] is None:
        saved["micro_steps"] = saved["global_steps"] * engine.gradient_accumulation_steps()
    if saved["global_samples"] is None:
        saved["global_samples"] = saved["global_steps"] * engine.train_batch_size()
    scale, optimizer = saved["loss_scale"], engine.optimizer
    if scale is not None and (optimizer is None or optimizer.scaler.state_dict().keys() != scale.keys()):
        saved["loss_scale"] = None
