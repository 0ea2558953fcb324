"""FSDP1's names for checkpoint formats and communication hooks: not available, each with what to use instead."""

from __future__ import annotations

from typing import Any, NoReturn

from unishard.errors import UnsupportedError

_FULL = "model.state_dict() returns whole tensors on every rank (save them on rank 0), load_state_dict() takes them"
_SHARDED = (
    "call torch.distributed.checkpoint.state_dict.get_state_dict(model, optimizer) and save with "
    "torch.distributed.checkpoint"
)

REFUSED_NAMES = {
    "StateDictType": _FULL,
    "StateDictConfig": _FULL,
    "StateDictSettings": _FULL,
    "FullStateDictConfig": _FULL,
    "LocalStateDictConfig": _FULL,
    "ShardedStateDictConfig": _SHARDED,
    "OptimStateDictConfig": _SHARDED,
    "FullOptimStateDictConfig": _SHARDED,
    "LocalOptimStateDictConfig": _SHARDED,
    "ShardedOptimStateDictConfig": _SHARDED,
    "OptimStateKeyType": _SHARDED,
    "FlatParameter": "parameters keep their own names and shapes here; nothing is flattened in sight of users",
}
"""Public names of `torch.distributed.fsdp` that `unishard.fsdp` knows and does not have."""


def refuse(name: str, instead: str) -> NoReturn:
    """Raise `UnsupportedError`."""
    raise UnsupportedError(f"unishard.fsdp: {name} is not available in this version; {instead}")


class CheckpointNames:
    """The methods of FSDP1's wrapper that later versions will have."""

    @staticmethod
    def set_state_dict_type(*args: Any, **kwargs: Any) -> NoReturn:
        refuse("set_state_dict_type", _FULL)

    @staticmethod
    def get_state_dict_type(*args: Any, **kwargs: Any) -> NoReturn:
        refuse("get_state_dict_type", _FULL)

    @staticmethod
    def state_dict_type(*args: Any, **kwargs: Any) -> NoReturn:
        refuse("state_dict_type", f"{_FULL}; for sharded ones, {_SHARDED}")

    @staticmethod
    def optim_state_dict(*args: Any, **kwargs: Any) -> NoReturn:
        refuse("optim_state_dict", _SHARDED)

    @staticmethod
    def optim_state_dict_to_load(*args: Any, **kwargs: Any) -> NoReturn:
        refuse("optim_state_dict_to_load", _SHARDED)

    @staticmethod
    def full_optim_state_dict(*args: Any, **kwargs: Any) -> NoReturn:
        refuse("full_optim_state_dict", _SHARDED)

    @staticmethod
    def sharded_optim_state_dict(*args: Any, **kwargs: Any) -> NoReturn:
        refuse("sharded_optim_state_dict", _SHARDED)

    @staticmethod
    def shard_full_optim_state_dict(*args: Any, **kwargs: Any) -> NoReturn:
        refuse("shard_full_optim_state_dict", _SHARDED)

    @staticmethod
    def flatten_sharded_optim_state_dict(*args: Any, **kwargs: Any) -> NoReturn:
        refuse("flatten_sharded_optim_state_dict", _SHARDED)

    @staticmethod
    def scatter_full_optim_state_dict(*args: Any, **kwargs: Any) -> NoReturn:
        refuse("scatter_full_optim_state_dict", _SHARDED)

    @staticmethod
    def rekey_optim_state_dict(*args: Any, **kwargs: Any) -> NoReturn:
        refuse("rekey_optim_state_dict", _SHARDED)

    def register_comm_hook(self, *args: Any, **kwargs: Any) -> NoReturn:
        refuse("register_comm_hook", "set MixedPrecision(reduce_dtype=...) to choose what travels")
