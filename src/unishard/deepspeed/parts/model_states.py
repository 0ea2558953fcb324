"""`mp_rank_00_model_states.pt` in a checkpoint: what scripts load out of DeepSpeed's, read from the shards when loaded.

The file holds names and no tensors, so that weights are not on the disk twice.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from unishard.engine.engine import Engine

NAME = "mp_rank_00_model_states.pt"


class ModelStates:
    """Becomes the dictionary that `read_model_states` gives when it is unpickled."""

    def __init__(self, folder: Path, module: Mapping[str, tuple[int, ...]], dtype: torch.dtype) -> None:
        self._arguments = str(folder), dict(module), dtype

    def __reduce__(self) -> Any:
        return read_model_states, self._arguments


def read_model_states(
    folder: str, module: Mapping[str, tuple[int, ...]], dtype: torch.dtype
) -> dict[str, Any]:
    """Weights and buffers under `module`, floating ones in `dtype`, with counters and the client state.

    Args:
        folder: the checkpoint, as it was saved. module: names and shapes.

    Raises:
        CheckpointError: the checkpoint is not there any more.
    """
    from unishard.checkpoint.api import inspect, read_tensor
    from unishard.checkpoint.keys import CLIENT, ENGINE, MODEL
    from unishard.checkpoint.storage import Reader
    from unishard.errors import CheckpointError

    if not Path(folder).is_dir():
        raise CheckpointError(
            f"{NAME} was saved in {folder}, which is not there; move the checkpoint back, or read its weights where it "
            "is with deepspeed.utils.zero_to_fp32.get_fp32_state_dict_from_zero_checkpoint"
        )
    catalog = inspect(folder)
    with Reader(Path(folder), catalog) as reader:
        engine, client = (reader.blob(key) for key in (ENGINE, CLIENT))
    weights: dict[str, torch.Tensor] = {}
    for name in module:
        key = catalog.aliases.get(f"{MODEL}.{name}", f"{MODEL}.{name}")
        if key not in weights:
            value = read_tensor(folder, key, catalog=catalog)
            weights[key] = value.to(dtype) if value.is_floating_point() else value
    named = {name: weights[catalog.aliases.get(f"{MODEL}.{name}", f"{MODEL}.{name}")] for name in module}
    return {**client, **engine, "module": named, "ds_config": catalog.about.get("config")}


def model_states_file(engine: Engine, folder: Path, *, exclude_frozen: bool) -> bytes:
    """The content of the file, for a checkpoint that is going to be at `folder`."""
    from unishard.checkpoint.training import persistent_buffers
    from unishard.sharding.precision import as_dtype

    shapes = {
        name: tuple(getattr(param, "ds_shape", param.shape))
        for name, param in engine.module.named_parameters(remove_duplicate=False)
        if param.requires_grad or not exclude_frozen
    }
    shapes |= {name: tuple(buffer.shape) for name, buffer in persistent_buffers(engine.module)}
    content = io.BytesIO()
    torch.save(ModelStates(folder, shapes, as_dtype(engine.config.compute_dtype)), content)
    return content.getvalue()
