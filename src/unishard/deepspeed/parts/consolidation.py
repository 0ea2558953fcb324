"""`utils.zero_to_fp32`: whole fp32 weights out of a checkpoint, in one process."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import torch
from torch import nn

from unishard.checkpoint.api import inspect, read_tensor
from unishard.checkpoint.catalog import keys_of
from unishard.checkpoint.commit import find

_MODEL = "model"


def get_optim_files(checkpoint_dir: str | Path) -> list[str]:
    """Files of optimizer states in a folder that DeepSpeed wrote, in the order of their ranks."""
    return _rank_files(checkpoint_dir, "*_optim_states.pt")


def get_model_state_files(checkpoint_dir: str | Path) -> list[str]:
    """Files of model states in a folder that DeepSpeed wrote, in the order of their ranks."""
    return _rank_files(checkpoint_dir, "*_model_states.pt")


def _rank_files(folder: str | Path, pattern: str) -> list[str]:
    def rank(path: str) -> list[tuple[int, str]]:
        return [(int(word), "") if word.isdigit() else (-1, word) for word in re.split(r"(\d+)", path)]

    found = sorted((str(path) for path in Path(folder).glob(pattern)), key=rank)
    if not found:
        raise FileNotFoundError(f"no {pattern} in {folder}: not a folder of one of DeepSpeed's checkpoints")
    return found


def get_fp32_state_dict_from_zero_checkpoint(
    checkpoint_dir: str | os.PathLike[str],
    tag: str | None = None,
    exclude_frozen_parameters: bool = False,
    lazy_mode: bool = False,
) -> dict[str, torch.Tensor]:
    """Whole weights (fp32 where they are floating) and buffers of a checkpoint that the engine saved.

    Args:
        checkpoint_dir: what `save_checkpoint` was given. tag: default: what `latest` names.
        exclude_frozen_parameters: leave out what has no optimizer state.
        lazy_mode: accepted; tensors are read one by one in any case.

    Raises:
        CheckpointError: there is no such checkpoint.
    """
    folder = find(Path(checkpoint_dir).absolute(), tag)
    catalog = inspect(folder)
    names = keys_of(_MODEL, catalog.tensors)
    trained = {key.rpartition(".")[0] for key in keys_of("optim.state", catalog.tensors)}
    state: dict[str, torch.Tensor] = {}
    for name in names:
        if exclude_frozen_parameters and trained and name not in trained:
            continue
        value = read_tensor(folder, f"{_MODEL}.{name}", catalog=catalog)
        state[name] = value.float() if value.is_floating_point() else value
    for alias, target in catalog.aliases.items():
        known = target.removeprefix(f"{_MODEL}.")
        if alias.startswith(f"{_MODEL}.") and known in state:
            state[alias.removeprefix(f"{_MODEL}.")] = state[known]
    return state


def convert_zero_checkpoint_to_fp32_state_dict(
    checkpoint_dir: str | os.PathLike[str],
    output_dir: str | os.PathLike[str],
    max_shard_size: str | None = "5GB",
    safe_serialization: bool = False,
    tag: str | None = None,
    exclude_frozen_parameters: bool = False,
) -> None:
    """Write those weights to `output_dir`: `pytorch_model.bin`, or `model.safetensors` with `safe_serialization`.

    A path that ends in .bin or .pt is the file itself. One file is written, whatever `max_shard_size`.
    """
    state = get_fp32_state_dict_from_zero_checkpoint(checkpoint_dir, tag, exclude_frozen_parameters)
    target = Path(output_dir)
    if target.suffix not in (".bin", ".pt", ".pth"):
        target = target / ("model.safetensors" if safe_serialization else "pytorch_model.bin")
    target.parent.mkdir(parents=True, exist_ok=True)
    if safe_serialization:
        from safetensors.torch import save_file

        save_file({name: value.clone() for name, value in state.items()}, target)
    else:
        torch.save(state, target)


def load_state_dict_from_zero_checkpoint(
    model: nn.Module, checkpoint_dir: str | os.PathLike[str], tag: str | None = None
) -> Any:
    """Load those weights into `model`, a plain module in host memory; returns it."""
    model = model.cpu()
    model.load_state_dict(get_fp32_state_dict_from_zero_checkpoint(checkpoint_dir, tag), strict=False)
    return model
