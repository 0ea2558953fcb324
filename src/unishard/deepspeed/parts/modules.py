"""Helpers about modules, and names of `utils` that are a few lines each."""

from __future__ import annotations

from enum import IntEnum
from functools import reduce
from typing import Any

import torch.distributed as dist
from torch import nn


class DeprecatedException(Exception):
    """Something that DeepSpeed took away."""


class ActivationFuncType(IntEnum):
    """Activation functions by number."""

    UNKNOWN = 0
    GELU = 1
    ReLU = 2
    GATED_GELU = 3
    GATED_SILU = 4


class NormType(IntEnum):
    """Normalizations by number."""

    UNKNOWN = 0
    LayerNorm = 1
    GroupNorm = 2
    RMSNorm = 3


def recursive_getattr(model: Any, module_name: str) -> Any:
    """The attribute at a dotted path.

    >>> recursive_getattr(nn.Sequential(nn.Linear(2, 3)), "0.out_features")
    3
    """
    return reduce(getattr, module_name.split("."), model)


def recursive_setattr(model: Any, module_name: str, module: Any) -> None:
    """Set the attribute at a dotted path."""
    holder, _, name = module_name.rpartition(".")
    setattr(recursive_getattr(model, holder) if holder else model, name, module)


_names: dict[int, str] = {}


def debug_extract_module_and_param_names(model: nn.Module) -> None:
    """Remember the names of a model's modules and parameters."""
    _names.update({id(module): name for name, module in model.named_modules()})
    _names.update({id(param): name for name, param in model.named_parameters()})


def debug_clear_module_and_param_names() -> None:
    """Forget them."""
    _names.clear()


def debug_module2name(module: nn.Module) -> str:
    return _names.get(id(module), "unknown")


def debug_param2name(param: nn.Parameter) -> str:
    return _names.get(id(param), "unknown")


def debug_param2name_id_shape(param: Any) -> str:
    return f"name={debug_param2name(param)} id={getattr(param, 'ds_id', None)} shape={tuple(param.shape)}"


def debug_param2name_id_shape_status(param: Any) -> str:
    return f"{debug_param2name_id_shape(param)} status={getattr(param, 'ds_status', None)}"


def printflock(*msgs: Any) -> None:
    """Print while no other process of this machine does so, where files can be locked."""
    try:
        import fcntl
    except ImportError:
        print(*msgs)
        return
    with open(__file__) as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        print(*msgs, flush=True)


def print_rank0(msg: Any, force: bool = False) -> None:
    """Print on rank 0."""
    if force or not dist.is_initialized() or dist.get_rank() == 0:
        print(msg)


def _asked(mpu: Any, default: Any, *names: str) -> Any:
    """What the first of `names` that `mpu` has returns."""
    for name in names if mpu is not None else ():
        if hasattr(mpu, name):
            return getattr(mpu, name)()
    return default


def bwc_tensor_model_parallel_rank(mpu: Any = None) -> int:
    """The tensor-parallel rank by whichever name `mpu` has for it; 0 without one."""
    return _asked(
        mpu, 0, "get_tensor_model_parallel_rank", "get_slice_parallel_rank", "get_model_parallel_rank"
    )


def bwc_tensor_model_parallel_world_size(mpu: Any = None) -> int:
    """The tensor-parallel size by whichever name `mpu` has for it; 1 without one."""
    return _asked(
        mpu,
        1,
        "get_tensor_model_parallel_world_size",
        "get_slice_parallel_world_size",
        "get_model_parallel_world_size",
    )


def bwc_tensor_model_parallel_group(mpu: Any = None) -> Any:
    """The tensor-parallel group by whichever name `mpu` has for it; `None` without one."""
    return _asked(
        mpu, None, "get_tensor_model_parallel_group", "get_slice_parallel_group", "get_model_parallel_group"
    )


def bwc_pipeline_parallel_world_size(mpu: Any = None) -> int:
    """The pipeline size by whichever name `mpu` has for it; 1 without one."""
    return _asked(mpu, 1, "get_pipeline_model_parallel_world_size", "get_pipe_parallel_world_size")


def bwc_pipeline_parallel_group(mpu: Any = None) -> Any:
    """The pipeline group by whichever name `mpu` has for it; `None` without one."""
    return _asked(mpu, None, "get_pipeline_model_parallel_group", "get_pipe_parallel_group")
