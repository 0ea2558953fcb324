"""All formats, in the order in which they are looked for."""

from __future__ import annotations

import importlib
from pathlib import Path

from unishard.checkpoint.commit import LATEST, committed
from unishard.checkpoint.convert.format import Format, Hints, Opened
from unishard.errors import CheckpointError

_HOMES = {
    "unishard": "ours:UnishardFormat",
    "deepspeed-universal": "universal:UniversalFormat",
    "deepspeed": "deepspeed:DeepSpeedFormat",
    "dcp": "dcp:DcpFormat",
    "safetensors": "hugging_face:HuggingFaceFormat",
    "fsdp": "fsdp:FsdpFormat",
    "torch": "torch_file:TorchFormat",
}
"""To add a format: a file here with a class that has what `format.Format` lists, and a row."""


def names() -> list[str]:
    return list(_HOMES)


def get(name: str) -> Format:
    """A format by its name.

    Raises `CheckpointError` with the names there are.

    >>> get("safetensors").title
    'Hugging Face safetensors'
    """
    if name not in _HOMES:
        raise CheckpointError(f"format {name!r} is not known; there are {', '.join(_HOMES)}")
    module, _, kind = _HOMES[name].partition(":")
    return getattr(importlib.import_module(f"unishard.checkpoint.convert.{module}"), kind)()


def detect(path: Path) -> Format | None:
    """The format of a file or folder, or `None`."""
    return next((found for name in _HOMES if (found := get(name)).detect(path)), None)


def _is_training_checkpoint(path: Path) -> bool:
    # Files of weights often lie beside the folders of a run's checkpoints, which are what is meant then.
    found = detect(path)
    return found is not None and found.name not in ("safetensors", "fsdp", "torch")


def locate(path: Path, tag: str | None = None) -> Path:
    """The checkpoint that `path` means: itself, its `tag`, what `latest` names there, or the newest.

    Raises `CheckpointError` with what is there instead.
    """
    if not path.exists():
        raise CheckpointError(f"{path} does not exist; check the path")
    if tag is not None:
        if not (path / tag).is_dir():
            there = sorted(p.name for p in path.iterdir() if p.is_dir()) if path.is_dir() else []
            raise CheckpointError(
                f"{path} holds no {tag!r}" + (f"; there are {', '.join(there)}" if there else "")
            )
        return path / tag
    if path.is_file() or _is_training_checkpoint(path):
        return path
    for pointer in (LATEST, "latest_universal"):
        if (path / pointer).is_file():
            named = path / (path / pointer).read_text(encoding="utf-8").strip()
            if named.is_dir():
                return named
            raise CheckpointError(f"{path / pointer} names {named.name!r}, which is not there")
    whole = committed(path)
    return path / whole[-1][1] if whole else path


def open_checkpoint(
    path: str | Path, *, tag: str | None = None, format: str | None = None, hints: Hints | None = None
) -> Opened:
    """Describe a checkpoint of any format, without reading its tensors. One process suffices.

    Args:
        path: a checkpoint, or the folder of several: then `tag`, or what `latest` names there.
        format: its name, where the files do not tell.

    Raises:
        CheckpointError: nothing that is known, with what is there.
        CorruptCheckpointError: files that are missing, truncated or of another checkpoint.
    """
    found = locate(Path(path), tag)
    kind = get(format) if format is not None else detect(found)
    if kind is None:
        there = sorted(p.name for p in found.iterdir())[:8] if found.is_dir() else []
        raise CheckpointError(
            f"{found} is no checkpoint of a known format ({', '.join(_HOMES)})"
            + (f"; it holds {', '.join(there)}" if there else "")
        )
    return kind.open(found, hints or Hints())
