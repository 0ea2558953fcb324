"""File names of DeepSpeed's checkpoints, and a copy of state that is fit to be saved."""

from __future__ import annotations

import os
from typing import Any

import torch


def get_model_ckpt_name_for_rank(base_folder: str, mp_rank_str: str) -> str:
    """Where DeepSpeed keeps the module states of one model-parallel rank."""
    return os.path.join(base_folder, f"mp_rank_{mp_rank_str}_model_states.pt")


def get_zero_ckpt_name_for_rank(base_folder: str, dp_rank: int, mp_rank: int) -> str:
    """Where DeepSpeed keeps the optimizer states of one rank.

    >>> get_zero_ckpt_name_for_rank("ckpt", 1, 0)
    'ckpt/zero_pp_rank_1_mp_rank_00_optim_states.pt'
    """
    return os.path.join(base_folder, f"zero_pp_rank_{dp_rank}_mp_rank_{mp_rank:02d}_optim_states.pt")


def get_layer_ckpt_name_for_rank(base_folder: str, layer_id: str, tp_rank: int) -> str:
    """Where DeepSpeed keeps one pipeline layer's states."""
    return os.path.join(base_folder, f"{layer_id}-model_{tp_rank:02d}_model_states.pt")


def clone_tensors_for_torch_save(item: Any, device: torch.device | str = "cpu") -> Any:
    """`item` with every tensor in it (in lists, tuples and dicts) copied to `device`, without its whole storage.

    Tensors that are one memory (tied weights) stay one.
    """
    return _copied(item, torch.device(device), {})


def _copied(item: Any, device: torch.device, known: dict[tuple[Any, ...], torch.Tensor]) -> Any:
    if isinstance(item, torch.Tensor):
        key = item.data_ptr(), item.dtype, item.shape, item.stride()
        if key not in known or not item.numel():
            known[key] = item.detach().to(device, copy=True)
        return known[key]
    if isinstance(item, dict):
        return type(item)({key: _copied(value, device, known) for key, value in item.items()})
    if isinstance(item, (list, tuple)):
        return type(item)(_copied(value, device, known) for value in item)
    return item
