"""FSDP1's kinds of state dict and their option objects under their usual names. torch's own are accepted too."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from enum import Enum, auto
from typing import Any

from unishard.errors import StateError, UnsupportedError


class StateDictType(Enum):
    """What a state dict holds: whole plain tensors, DTensors, or the plain tensors that rest on this rank.

    A full one loads at any number of ranks and without FSDP; a sharded one is for `unishard.checkpoint` and
    `torch.distributed.checkpoint`, or for a file a rank at the same number of ranks; a local one for the latter only.
    """

    FULL_STATE_DICT = auto()
    LOCAL_STATE_DICT = auto()
    SHARDED_STATE_DICT = auto()


class OptimStateKeyType(Enum):
    """What the keys of an optimizer's state are: names of parameters, or their positions."""

    PARAM_NAME = auto()
    PARAM_ID = auto()


@dataclass
class StateDictConfig:
    """Options of a model's state dict. `offload_to_cpu`: values in host memory."""

    offload_to_cpu: bool = False


@dataclass
class FullStateDictConfig(StateDictConfig):
    """`rank0_only`: other ranks than the first get `{}`, and need to bring no more than that to load."""

    rank0_only: bool = False


@dataclass
class LocalStateDictConfig(StateDictConfig):
    """Options of a local state dict."""


@dataclass
class ShardedStateDictConfig(StateDictConfig):
    """Options of a sharded state dict. Values are DTensors; the older ShardedTensor is read, and not written."""

    _use_dtensor: bool = True

    def __post_init__(self) -> None:
        _require_dtensor(self)


@dataclass
class OptimStateDictConfig:
    """Options of an optimizer's state dict. `offload_to_cpu`: values in host memory."""

    offload_to_cpu: bool = True


@dataclass
class FullOptimStateDictConfig(OptimStateDictConfig):
    """`rank0_only`: other ranks than the first get `{}`, and need to bring no more than that to load."""

    rank0_only: bool = False


@dataclass
class LocalOptimStateDictConfig(OptimStateDictConfig):
    """Options of a local optimizer state dict."""

    offload_to_cpu: bool = False


@dataclass
class ShardedOptimStateDictConfig(OptimStateDictConfig):
    """Options of a sharded optimizer state dict. Values are DTensors."""

    _use_dtensor: bool = True

    def __post_init__(self) -> None:
        _require_dtensor(self)


def _require_dtensor(config: ShardedStateDictConfig | ShardedOptimStateDictConfig) -> None:
    if not config._use_dtensor:
        raise UnsupportedError(
            f"{type(config).__name__}(_use_dtensor=False) is not available: sharded values are DTensors; leave it out"
        )


@dataclass
class StateDictSettings:
    """What `model.state_dict()` and `FSDP.optim_state_dict()` give.

    >>> StateDictSettings().state_dict_type.name
    'FULL_STATE_DICT'
    """

    state_dict_type: StateDictType = StateDictType.FULL_STATE_DICT
    state_dict_config: StateDictConfig = field(default_factory=FullStateDictConfig)
    optim_state_dict_config: OptimStateDictConfig = field(default_factory=FullOptimStateDictConfig)

    @property
    def rank0_only(self) -> bool:
        """Whether only the first rank has, or brings, a model's full state dict."""
        return isinstance(self.state_dict_config, FullStateDictConfig) and self.state_dict_config.rank0_only

    @property
    def optim_rank0_only(self) -> bool:
        """Whether only the first rank has, or brings, an optimizer's full state dict."""
        config = self.optim_state_dict_config
        return isinstance(config, FullOptimStateDictConfig) and config.rank0_only


_CONFIGS: dict[StateDictType, tuple[type[StateDictConfig], type[OptimStateDictConfig]]] = {
    StateDictType.FULL_STATE_DICT: (FullStateDictConfig, FullOptimStateDictConfig),
    StateDictType.LOCAL_STATE_DICT: (LocalStateDictConfig, LocalOptimStateDictConfig),
    StateDictType.SHARDED_STATE_DICT: (ShardedStateDictConfig, ShardedOptimStateDictConfig),
}


def read_settings(state_dict_type: Any, config: Any, optim_config: Any) -> StateDictSettings:
    """From unishard's or torch's objects, `None` standing for defaults.

    Raises `StateError` for a type that is none, or options of another type.

    >>> read_settings("SHARDED_STATE_DICT", None, None).state_dict_config
    ShardedStateDictConfig(offload_to_cpu=False, _use_dtensor=True)
    """
    name = getattr(state_dict_type, "name", state_dict_type)
    kind = StateDictType.__members__.get(name) if isinstance(name, str) else None
    if kind is None:
        known = ", ".join(f"StateDictType.{each}" for each in StateDictType.__members__)
        raise StateError(f"FSDP: state_dict_type={state_dict_type!r} is not one of {known}")
    wanted, wanted_optim = _CONFIGS[kind]
    return StateDictSettings(
        kind,
        _read(config, wanted, "state_dict_config", kind),
        _read(optim_config, wanted_optim, "optim_state_dict_config", kind),
    )


def _read(value: Any, wanted: Any, argument: str, kind: StateDictType) -> Any:
    if value is None:
        return wanted()
    if type(value).__name__ != wanted.__name__:
        raise StateError(f"FSDP: {argument}={value!r} does not go with {kind}; pass a {wanted.__name__}")
    if isinstance(value, wanted):
        return value
    # torch's, whose default for the private field asks for ShardedTensor.
    public = [each.name for each in fields(wanted) if not each.name.startswith("_")]
    return wanted(**{each: getattr(value, each) for each in public})
