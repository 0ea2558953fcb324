"""`utils.groups`: process groups by role. Without model parallelism every rank is data-parallel."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist

from unishard.errors import UnsupportedError

mpu: Any = None
mesh_device: Any = None


def initialize(ep_size: int = 1, mpu: Any = None) -> None:
    """Older scripts' announcement of expert parallelism; only `ep_size=1`."""
    if ep_size != 1:
        raise UnsupportedError(
            f"groups.initialize(ep_size={ep_size}): expert parallelism is not available; use ep_size=1, and ZeRO-3"
        )


def _ensure_divisibility(numerator: int, denominator: int) -> None:
    """Raise `AssertionError` unless `denominator` divides `numerator`."""
    if denominator == 0:
        raise AssertionError(f"{numerator} cannot be split by 0: the denominator must be non-zero")
    if numerator % denominator:
        raise AssertionError(f"{numerator} is not divisible by {denominator}")


def _world() -> Any:
    return dist.group.WORLD


def _size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _get_data_parallel_group() -> Any:
    """The ranks that train on different samples: all."""
    return mpu.get_data_parallel_group() if mpu is not None else _world()


def _get_data_parallel_group_ranks() -> list[int]:
    return dist.get_process_group_ranks(_get_data_parallel_group())


def _get_data_parallel_world_size() -> int:
    return mpu.get_data_parallel_world_size() if mpu is not None else _size()


def _get_data_parallel_rank() -> int:
    return mpu.get_data_parallel_rank() if mpu is not None else _rank()


get_data_parallel_group = _get_data_parallel_group
get_data_parallel_rank = _get_data_parallel_rank
get_data_parallel_world_size = _get_data_parallel_world_size
_get_sequence_data_parallel_group = _get_data_parallel_group
_get_sequence_data_parallel_rank = _get_data_parallel_rank
_get_sequence_data_parallel_world_size = _get_data_parallel_world_size


def get_tensor_model_parallel_world_size() -> int:
    """Always 1."""
    return 1


get_model_parallel_world_size = _get_model_parallel_world_size = get_tensor_model_parallel_world_size
_get_sequence_parallel_world_size = get_tensor_model_parallel_world_size


def get_tensor_model_parallel_rank() -> int:
    """Always 0."""
    return 0


get_model_parallel_rank = _get_sequence_parallel_rank = get_tensor_model_parallel_rank


def get_tensor_model_parallel_src_rank() -> int:
    """The first rank of this rank's tensor-parallel group: itself."""
    return _rank()


def get_model_parallel_group() -> Any:
    """No group: nothing is split over ranks but the data and the states."""
    return None


get_tensor_model_parallel_group = _get_sequence_parallel_group = get_model_parallel_group


def _clone_world_group() -> Any:
    return _world()


def _get_broadcast_src_rank() -> int:
    return 0


def _zero_param_parallel_is_initialized() -> bool:
    return False
