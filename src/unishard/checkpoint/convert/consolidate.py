"""fp32 weights from a training checkpoint, of ours or of DeepSpeed, under the names that DeepSpeed's users know.

`zero_to_fp32.py` beside a checkpoint calls `main`.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from unishard.checkpoint.catalog import TensorInfo
from unishard.checkpoint.convert.aside import aside
from unishard.checkpoint.convert.format import Opened, Options
from unishard.checkpoint.convert.hugging_face import shard_names, split_shards, write_index
from unishard.checkpoint.convert.operations import Converted, convert
from unishard.checkpoint.convert.registry import open_checkpoint
from unishard.checkpoint.convert.source import Source
from unishard.errors import CheckpointError

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


class LazyTensor:
    """A weight that is read when asked for."""

    def __init__(self, opened: Opened, options: Options, name: str, info: TensorInfo) -> None:
        self._opened, self._options, self._name = opened, options, name
        self.shape, self.dtype = torch.Size(info.shape), info.dtype

    def contiguous(self) -> torch.Tensor:
        """The tensor, in host memory."""
        with Source(self._opened, self._options) as source:
            return _whole(source, self._name, self.shape, self.dtype)


def get_fp32_state_dict_from_zero_checkpoint(
    checkpoint_dir: str | Path,
    tag: str | None = None,
    exclude_frozen_parameters: bool = False,
    lazy_mode: bool = False,
) -> dict[str, Any]:
    """The fp32 weights and buffers of a checkpoint by name, tied ones the same tensor under all their names.

    Args:
        checkpoint_dir: a checkpoint, or the folder of several. tag: default: what the file `latest` names.
        lazy_mode: objects whose `contiguous()` reads the tensor, instead of tensors.

    Raises `CheckpointError` if there is none, `CorruptCheckpointError` if it is damaged.
    """
    options = Options(dtype=torch.float32, weights_only=True, exclude_frozen=exclude_frozen_parameters)
    opened = open_checkpoint(checkpoint_dir, tag=tag)
    found: dict[str, Any] = {}
    with Source(opened, options) as source:
        for name, info in source.weights().items():
            lazy = LazyTensor(opened, options, name, info)
            found[name] = lazy if lazy_mode else _whole(source, name, lazy.shape, lazy.dtype)
        for alias, name in source.ties().items():
            if name in found:
                found[alias] = found[name]
    return found


def _whole(source: Source, name: str, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
    target, position = torch.empty(shape, dtype=dtype), 0
    flat = target.view(-1)
    for _, piece in source.weight_pieces(name):
        flat[position : position + piece.numel()] = piece.reshape(-1)
        position += piece.numel()
    return target


def load_state_dict_from_zero_checkpoint(
    model: nn.Module, checkpoint_dir: str | Path, tag: str | None = None
) -> nn.Module:
    """Copy a checkpoint's weights into `model` where they lie, piece by piece; returns `model`.

    Raises `CheckpointError` for parameters that the checkpoint lacks or has in another shape, before any is changed.
    """
    opened = open_checkpoint(checkpoint_dir, tag=tag)
    with Source(opened, Options(weights_only=True)) as source:
        stored, ties = source.weights(), source.ties()
        state = model.state_dict()
        wrong = []
        for name, value in state.items():
            info = stored.get(ties.get(name, name))
            if info is None and name in dict(model.named_parameters(remove_duplicate=False)):
                wrong.append(f"{name} is missing")
            elif info is not None and info.shape != tuple(value.shape):
                wrong.append(f"{name} has the shape {info.shape} instead of {tuple(value.shape)}")
        if wrong:
            more = f" and {len(wrong) - 10} more" if len(wrong) > 10 else ""
            raise CheckpointError(f"{opened.folder} does not fit the model: {'; '.join(wrong[:10])}{more}")
        with torch.no_grad():
            for name, value in state.items():
                first = ties.get(name, name)
                if first in stored:
                    for box, piece in source.weight_pieces(first):
                        view = value[
                            tuple(slice(o, o + n) for o, n in zip(box.offsets, box.sizes, strict=True))
                        ]
                        view.copy_(piece)
    return model


def convert_zero_checkpoint_to_fp32_state_dict(
    checkpoint_dir: str | Path,
    output_dir: str | Path,
    max_shard_size: str | int | None = "5GB",
    safe_serialization: bool = False,
    tag: str | None = None,
    exclude_frozen_parameters: bool = False,
    *,
    overwrite: bool = False,
) -> Converted:
    """Write the fp32 weights of a checkpoint: one file, or a folder as Hugging Face's `from_pretrained` reads it.

    Args:
        output_dir: a folder for `pytorch_model.bin` (or shards of it), or a file that ends in `.bin`, `.pt`, `.pth` or
            `.safetensors`.
        max_shard_size: of one file in a folder, such as `5GB`; None for one file of any size.
        safe_serialization: `model.safetensors` instead.

    Raises `CheckpointError` for a target that exists, and whatever is wrong with the checkpoint.
    """
    target = Path(output_dir)
    one_file = target.suffix in (".bin", ".pt", ".pth", ".safetensors")
    limit = sys.maxsize if max_shard_size is None else parse_size(max_shard_size)
    if one_file:
        if limit not in (sys.maxsize, Options().max_shard_bytes):
            raise CheckpointError(
                f"{target} is one file of any size; name a folder to have shards of {max_shard_size}"
            )
        if safe_serialization and target.suffix != ".safetensors":
            raise CheckpointError(
                f"{target} is to be safetensors; give it the suffix .safetensors, or name a folder"
            )
        limit = Options().max_shard_bytes
    options = Options(
        dtype=torch.float32,
        max_shard_bytes=limit,
        weights_only=True,
        exclude_frozen=exclude_frozen_parameters,
        overwrite=overwrite,
    )
    if one_file and target.suffix != ".safetensors":
        return convert(checkpoint_dir, target, "torch", options, tag=tag)
    pickled = not safe_serialization and target.suffix != ".safetensors"
    return convert(checkpoint_dir, target, "safetensors", replace(options, pickled=pickled), tag=tag)


def write_weights(
    state: Mapping[str, Any], folder: Path, *, dtype: torch.dtype, limit: int, safetensors: bool
) -> list[Path]:
    """Write tensors, or `LazyTensor`s, by name into a folder as `from_pretrained` reads it, one file after another.

    Other files in the folder stay, those of the same names are replaced. One object under several names is stored once;
    safetensors, which has no place for that, has it under the first.
    """
    first: dict[int, str] = {}
    ties = {name: first.setdefault(id(value), name) for name, value in state.items()}
    infos = {
        name: TensorInfo(tuple(v.shape), dtype if v.dtype.is_floating_point else v.dtype)
        for name, v in state.items()
        if ties[name] == name
    }
    shards, weight_map = split_shards(infos, limit), {}
    names = shard_names(len(shards), pickled=not safetensors)
    folder.mkdir(parents=True, exist_ok=True)
    for file, members in zip(names, shards, strict=True):
        held = {name: state[name].contiguous().to(infos[name].dtype) for name in members}
        if not safetensors:
            held |= {name: held[kept] for name, kept in ties.items() if kept in held}
        with aside(folder / file, folder=False, overwrite=True) as draft:
            if safetensors:
                from safetensors.torch import save_file

                save_file(held, draft, metadata={"format": "pt"})
            else:
                torch.save(held, draft)
        weight_map |= dict.fromkeys(held, file)
    if len(shards) > 1:
        write_index(folder, weight_map, infos, pickled=not safetensors)
    return [folder / file for file in names]


def parse_size(size: str | int) -> int:
    """Bytes, from a number or one with a unit.

    Raises `CheckpointError` for anything else.

    >>> parse_size("5GB"), parse_size("1.5MiB")
    (5000000000, 1572864)
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", str(size))
    if match is None or match[2].upper() not in _UNITS:
        raise CheckpointError(f"{size!r} is no size; write 5GB, 200MB or 1GiB")
    return int(float(match[1]) * _UNITS[match[2].upper()])


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line of `zero_to_fp32.py`."""
    parser = argparse.ArgumentParser(description="Write the fp32 weights of a training checkpoint.")
    parser.add_argument("checkpoint_dir", help="a checkpoint, or the folder with the file 'latest'")
    parser.add_argument("output_dir", help="a folder, or a file ending in .bin, .pt, .pth or .safetensors")
    parser.add_argument("--max_shard_size", default="5GB", help="largest file in the folder (default 5GB)")
    parser.add_argument("--safe_serialization", action="store_true", help="write safetensors")
    parser.add_argument("-t", "--tag", default=None, help="checkpoint to take; default: what 'latest' names")
    parser.add_argument(
        "--exclude_frozen_parameters", action="store_true", help="leave out frozen parameters"
    )
    parser.add_argument("-d", "--debug", action="store_true", help="show where an error comes from")
    given = parser.parse_args(arguments)
    try:
        path, notes = convert_zero_checkpoint_to_fp32_state_dict(
            given.checkpoint_dir,
            given.output_dir,
            max_shard_size=given.max_shard_size,
            safe_serialization=given.safe_serialization,
            tag=given.tag,
            exclude_frozen_parameters=given.exclude_frozen_parameters,
        )
    except CheckpointError as error:
        if given.debug:
            raise
        parser.exit(1, f"{error}\n")
    sys.stdout.write("\n".join([f"wrote {path}", *notes]) + "\n")
