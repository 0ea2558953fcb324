"""`utils.zero_to_fp32` and `utils.zero_to_torch`: whole weights out of a checkpoint, in one process."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from unishard.checkpoint.convert import consolidate

OUTPUT_DTYPE_NAMES = {
    "float32": torch.float32,
    "fp32": torch.float32,
    "float16": torch.float16,
    "fp16": torch.float16,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
}

SCRIPT = '''#!/usr/bin/env python
"""Write weights from a checkpoint here in a dtype: zero_to_torch.py FOLDER OUTPUT --dtype bf16 [--tag TAG]"""

from unishard.deepspeed.parts.consolidation import main

if __name__ == "__main__":
    main()
'''
"""`zero_to_torch.py`, which stands beside checkpoints."""


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
) -> dict[str, Any]:
    """Whole weights (fp32 where they are floating) and buffers of a checkpoint, of this engine's or DeepSpeed's.

    Args:
        checkpoint_dir: what `save_checkpoint` was given. tag: default: what `latest` names.
        exclude_frozen_parameters: leave out what is not trained.
        lazy_mode: objects whose `contiguous()` reads the tensor, instead of tensors.

    Raises:
        CheckpointError: there is no such checkpoint.
    """
    return consolidate.get_fp32_state_dict_from_zero_checkpoint(
        Path(checkpoint_dir).absolute(), tag, exclude_frozen_parameters, lazy_mode
    )


def to_torch_tensor(
    state_dict: Mapping[str, Any], return_empty_tensor: bool = False, dtype: str | torch.dtype | None = None
) -> dict[str, torch.Tensor]:
    """The tensors that a lazy state dict stands for; one object under several names stays one.

    Args:
        return_empty_tensor: without values. dtype: of floating ones; default: their own.
    """
    wanted, made = None if dtype is None else _dtype(dtype), {}
    for value in state_dict.values():
        if id(value) not in made:
            kind = wanted if wanted is not None and value.dtype.is_floating_point else value.dtype
            made[id(value)] = (
                torch.empty(value.shape, dtype=kind) if return_empty_tensor else value.contiguous().to(kind)
            )
    return {name: made[id(value)] for name, value in state_dict.items()}


def convert_zero_checkpoint_to_state_dict(
    checkpoint_dir: str | os.PathLike[str],
    output_dir: str | os.PathLike[str],
    dtype: str | torch.dtype = torch.float32,
    max_shard_size: str | int | None = "5GB",
    safe_serialization: bool = False,
    tag: str | None = None,
    exclude_frozen_parameters: bool = False,
) -> None:
    """Write whole weights to the folder `output_dir`: `pytorch_model.bin`, or `model.safetensors`, or shards of it.

    Args:
        dtype: of floating weights. max_shard_size: of one file; `None`: one file of any size.
        output_dir: a path that ends in .bin, .pt or .pth is the one file itself.
    """
    # By its public name, which scripts replace.
    from unishard.deepspeed.utils import zero_to_fp32  # pyright: ignore[reportMissingImports]

    kind, target = _dtype(dtype), Path(output_dir)
    state = zero_to_fp32.get_fp32_state_dict_from_zero_checkpoint(
        checkpoint_dir, tag, exclude_frozen_parameters, lazy_mode=True
    )
    if target.suffix in (".bin", ".pt", ".pth"):
        target.parent.mkdir(parents=True, exist_ok=True)
        torch.save(to_torch_tensor(state, dtype=kind), target)
        return
    limit = sys.maxsize if max_shard_size is None else consolidate.parse_size(max_shard_size)
    consolidate.write_weights(state, target, dtype=kind, limit=limit, safetensors=safe_serialization)


def convert_zero_checkpoint_to_fp32_state_dict(
    checkpoint_dir: str | os.PathLike[str],
    output_dir: str | os.PathLike[str],
    max_shard_size: str | int | None = "5GB",
    safe_serialization: bool = False,
    tag: str | None = None,
    exclude_frozen_parameters: bool = False,
) -> None:
    """As `convert_zero_checkpoint_to_state_dict`, in fp32."""
    convert_zero_checkpoint_to_state_dict(
        checkpoint_dir,
        output_dir,
        torch.float32,
        max_shard_size,
        safe_serialization,
        tag,
        exclude_frozen_parameters,
    )


def load_state_dict_from_zero_checkpoint(
    model: nn.Module, checkpoint_dir: str | os.PathLike[str], tag: str | None = None
) -> Any:
    """Load those weights into `model`, a plain module in host memory; returns it."""
    model = model.cpu()
    model.load_state_dict(get_fp32_state_dict_from_zero_checkpoint(checkpoint_dir, tag), strict=False)
    return model


def main(args: Sequence[str] | None = None) -> None:
    """The command line of `zero_to_torch.py`."""
    from unishard.deepspeed.utils import zero_to_fp32  # pyright: ignore[reportMissingImports]

    parser = argparse.ArgumentParser(description="Write the weights of a training checkpoint in a dtype.")
    parser.add_argument("checkpoint_dir", help="the folder with the file 'latest'")
    parser.add_argument("output_dir", help="a folder, or a file ending in .bin, .pt or .pth")
    parser.add_argument("--dtype", required=True, choices=sorted(OUTPUT_DTYPE_NAMES), help="of the weights")
    parser.add_argument("--max_shard_size", default="5GB", help="largest file in the folder (default 5GB)")
    parser.add_argument("--safe_serialization", action="store_true", help="write safetensors")
    parser.add_argument("-t", "--tag", default=None, help="checkpoint to take; default: what 'latest' names")
    parser.add_argument(
        "--exclude_frozen_parameters", action="store_true", help="leave out frozen parameters"
    )
    parser.add_argument(
        "-d", "--debug", action="store_true", help="accepted; errors show where they come from"
    )
    given = vars(parser.parse_args(args))
    given.pop("debug")
    zero_to_fp32.convert_zero_checkpoint_to_state_dict(**given)


def _dtype(dtype: str | torch.dtype) -> torch.dtype:
    found = OUTPUT_DTYPE_NAMES.get(str(dtype).removeprefix("torch."))
    if found is None:
        raise ValueError(f"Unsupported output dtype {dtype!r}; take one of {', '.join(OUTPUT_DTYPE_NAMES)}")
    return found
