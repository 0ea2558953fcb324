"""Which files of a DeepSpeed checkpoint belong together, read off their names and headers, also for fewer ranks."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from unishard.deepspeed.parts.modules import (
    bwc_pipeline_parallel_world_size,
    bwc_tensor_model_parallel_world_size,
)

_DIMENSIONS = "checkpoint_parallel_dimensions"
_DEGREES = ("pp_degree", "tp_degree")
_OPTIMIZER = re.compile(r"(?:bf16_|fp16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt")


class model_2d_map:
    """What belongs to each cell of a grid of pipeline stages and tensor-parallel ranks."""

    def __init__(self, cells: Sequence[Sequence[list[int]]]) -> None:
        self._cells = [list(row) for row in cells]

    @property
    def pp_degree(self) -> int:
        return len(self._cells)

    @property
    def tp_degree(self) -> int:
        return len(self._cells[0])

    def get_data(self, pp_index: int | None = None, tp_index: int | None = None) -> list[int]:
        """What belongs to a cell; to a whole row or column where an index is left out."""
        rows = self._cells if pp_index is None else [self._cells[pp_index]]
        found = []
        for row in rows:
            for cell in row if tp_index is None else [row[tp_index]]:
                found += cell
        return found


class model_3d_desc:
    """Degrees of pipeline, tensor and data parallelism of a checkpoint.

    >>> model_3d_desc(1, 2, 2).reshape(model_3d_desc(1, 1, 2))[1].get_data()
    [1, 3]
    """

    def __init__(self, pp_degree: int = 1, tp_degree: int = 1, dp_degree: int = 1) -> None:
        self.pp_degree, self.tp_degree, self.dp_degree = pp_degree, tp_degree, dp_degree

    def get_desc(self) -> str:
        return f"PP,TP,DP = ({self.pp_degree}, {self.tp_degree}, {self.dp_degree})"

    def world_size(self) -> int:
        """Ranks that wrote it."""
        return self.pp_degree * self.tp_degree * self.dp_degree

    def is_valid(self, pp_index: int, tp_index: int, dp_index: int) -> tuple[bool, list[str]]:
        """Whether a rank's coordinates exist, and what is wrong with them."""
        given = zip(["pp", "tp", "dp"], (pp_index, tp_index, dp_index), self._degrees(), strict=True)
        errors = [
            f"{name} index {index} is not below {degree}" for name, index, degree in given if index >= degree
        ]
        return not errors, errors

    def can_reshape(self, target_3d_desc: model_3d_desc) -> tuple[bool, list[str]]:
        """Whether each degree of the target is at most this one's, and which are not."""
        pairs = zip(["pp", "tp", "dp"], self._degrees(), target_3d_desc._degrees(), strict=True)
        errors = [f"{name} cannot grow from {here} to {there}" for name, here, there in pairs if there > here]
        return not errors, errors

    def reshape(self, target_3d_desc: model_3d_desc, verbose: bool = False) -> list[model_2d_map]:
        """For each data-parallel rank of the target, the numbers of the files that its cells are made of.

        File n of a checkpoint is that of data-parallel rank n // (pp * tp), stage by stage.
        """
        possible, errors = self.can_reshape(target_3d_desc)
        if not possible:
            raise AssertionError("; ".join(errors))
        pp, tp, dp = target_3d_desc._degrees()
        columns = [
            _parts([[stage * self.tp_degree + rank] for rank in range(self.tp_degree)], tp)
            for stage in range(self.pp_degree)
        ]
        # Of each new tensor-parallel rank, what all stages have, dealt out to the new stages.
        stages = [_parts([[n] for column in columns for n in column[rank]], pp) for rank in range(tp)]
        size = self.pp_degree * self.tp_degree
        cells = [
            [
                _parts([[n + size * d for d in range(self.dp_degree)] for n in stages[rank][stage]], dp)
                for rank in range(tp)
            ]
            for stage in range(pp)
        ]
        return [model_2d_map([[cell[d] for cell in row] for row in cells]) for d in range(dp)]

    def _degrees(self) -> tuple[int, int, int]:
        return self.pp_degree, self.tp_degree, self.dp_degree


def _parts(lists: Sequence[list[int]], count: int) -> list[list[int]]:
    """The lists end to end, in `count` equal parts."""
    flat = [number for part in lists for number in part]
    if len(flat) % count:
        raise AssertionError(f"{len(flat)} files cannot be dealt out to {count} ranks evenly")
    each = len(flat) // count
    return [flat[n * each : (n + 1) * each] for n in range(count)]


def get_model_3d_descriptor(dir: str) -> model_3d_desc:
    """The degrees of the DeepSpeed checkpoint in a folder, as its model files say, or by the numbers of its files.

    Raises `RuntimeError` for model files that say different things.
    """
    names = sorted(os.listdir(dir))
    models = [name for name in names if name.startswith("mp_rank_")]
    zero = len(_optimizer_files(dir))
    told = {}
    for name in models:
        state = torch.load(os.path.join(dir, name), map_location="cpu", weights_only=False)
        told[name] = state.get(_DIMENSIONS) if isinstance(state, Mapping) else None
    silent = [name for name, value in told.items() if value is None]
    if len(silent) < len(told):
        if silent:
            raise RuntimeError(f"{dir}: {_DIMENSIONS} is missing from model-state files: {silent}")
        degrees = {tuple(value[key] for key in _DEGREES) for value in told.values()}
        if len(degrees) != 1:
            raise RuntimeError(f"{dir}: {_DIMENSIONS} disagrees across model-state files: {sorted(degrees)}")
        pipeline, tensor = degrees.pop()
    else:
        layers = {name.split("-")[0] for name in names if name.startswith("layer_")}
        first = min(layers) if layers else ""
        tensor = sum(name.startswith(f"{first}-") for name in names) if layers else max(len(models), 1)
        pipeline = max(len(models) // tensor, 1) if layers else 1
    return model_3d_desc(pipeline, tensor, max(zero // (pipeline * tensor), 1))


def _optimizer_files(folder: str) -> list[str]:
    found = [(m, name) for name in os.listdir(folder) if (m := _OPTIMIZER.fullmatch(name))]
    found.sort(key=lambda pair: (int(pair[0][1]), int(pair[0][2])))
    return [os.path.join(folder, name) for _, name in found]


def checkpoint_parallel_metadata(mpu: Any) -> dict[str, dict[str, int]]:
    """What DeepSpeed's model files say of their degrees."""
    sizes = (bwc_pipeline_parallel_world_size(mpu), bwc_tensor_model_parallel_world_size(mpu))
    return {_DIMENSIONS: dict(zip(_DEGREES, sizes, strict=True))}


def merge_state(state_a: Any, state_b: Any, key_list: Sequence[str] = ()) -> Any:
    """Two ranks' states as one: tensors end to end, what only one has as it is, other values from the first.

    >>> merge_state({"step": 3, "exp_avg": torch.zeros(2)}, {"step": 3, "exp_avg": torch.zeros(1)})
    {'step': 3, 'exp_avg': tensor([0., 0., 0.])}
    """
    path = ".".join(key_list)
    if type(state_a) is not type(state_b):
        print(f"merge_state: {path}")
        raise ValueError(f"{path}: cannot merge a {type(state_a).__name__} with a {type(state_b).__name__}")
    if isinstance(state_a, dict):
        merged = {
            key: merge_state(value, state_b[key], [*key_list, str(key)]) if key in state_b else value
            for key, value in state_a.items()
        }
        return type(state_a)(
            {**merged, **{key: value for key, value in state_b.items() if key not in state_a}}
        )
    if isinstance(state_a, (list, tuple)):
        if len(state_a) != len(state_b):
            print(f"merge_state: {path}")
            raise ValueError(
                f"{path}: Cannot merge lists of different lengths, {len(state_a)} and {len(state_b)}"
            )
        return type(state_a)(merge_state(a, b, key_list) for a, b in zip(state_a, state_b, strict=True))
    if isinstance(state_a, torch.Tensor) and state_a.dim():
        return torch.cat([state_a, state_b])
    return state_a


class ZeROCheckpoint:
    """The optimizer's files of a DeepSpeed checkpoint, also for fewer ranks than wrote them."""

    def __init__(self, dir: str, source_3d: model_3d_desc | None = None) -> None:
        self.dir, self.file_list = dir, _optimizer_files(dir)
        self.num_files = len(self.file_list)
        if not self.num_files:
            raise AssertionError(f"{dir} has no files of a ZeRO optimizer")
        self.src_3d = source_3d or get_model_3d_descriptor(dir)
        self.reshape(model_3d_desc(*self.src_3d._degrees()))

    def reshape(self, target_3d_desc: model_3d_desc) -> None:
        """Deal the files out to the ranks of a target."""
        self.target_3d, self._maps = target_3d_desc, self.src_3d.reshape(target_3d_desc)

    def get_src_world_size(self) -> int:
        return self.src_3d.world_size()

    def get_src_tp_degree(self) -> int:
        return self.src_3d.tp_degree

    def get_src_pp_degree(self) -> int:
        return self.src_3d.pp_degree

    def get_src_dp_degree(self) -> int:
        return self.src_3d.dp_degree

    def get_file_indices_for_rank(self, pp_index: int, tp_index: int, dp_index: int) -> list[int]:
        """Numbers in `file_list` of the files that a rank of the target is made of."""
        return self._maps[dp_index].get_data(pp_index, tp_index)

    def get_files_for_rank(self, pp_index: int, tp_index: int, dp_index: int) -> list[str]:
        """Those files."""
        return [self.file_list[n] for n in self.get_file_indices_for_rank(pp_index, tp_index, dp_index)]

    def get_state_for_rank(
        self,
        pp_index: int,
        tp_index: int,
        dp_index: int,
        keys_to_ignore: Sequence[str] = (),
        strip_tensor_paddings: bool = True,
    ) -> Any:
        """The content of those files as one, without what fills each rank's part up."""
        merged: Any = None
        for file in self.get_files_for_rank(pp_index, tp_index, dp_index):
            state = torch.load(file, map_location="cpu", weights_only=False)
            for key in keys_to_ignore:
                state.pop(key, None)
            optimizer = state.get("optimizer_state_dict") or {}
            if strip_tensor_paddings:
                _strip(optimizer)
            if optimizer.get("partition_count"):
                optimizer["partition_count"] = [self.target_3d.dp_degree] * len(optimizer["partition_count"])
            merged = state if merged is None else merge_state(merged, state)
        return merged


def _strip(optimizer: dict[str, Any]) -> None:
    paddings = optimizer.get("group_paddings")
    inner = optimizer.get("base_optimizer_state")
    if not paddings or not isinstance(inner, Mapping):
        return
    for group, kinds in inner.get("state", {}).items():
        for kind, value in kinds.items():
            if paddings[group] and isinstance(value, torch.Tensor) and value.dim():
                kinds[kind] = value[: value.numel() - paddings[group]].clone()
    optimizer["group_paddings"] = [0] * len(paddings)
