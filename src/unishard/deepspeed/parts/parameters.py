"""The `ds_*` attributes that libraries read on parameters, over the groups that hold them."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Iterable
from enum import Enum
from math import prod
from typing import Any

import torch
from torch import nn

from unishard.sharding.group import ShardGroup
from unishard.sharding.single import SingleShard, single_of
from unishard.sharding.whole_state import home_of


class ZeroParamType(Enum):
    """What ZeRO-3 does with a parameter."""

    NORMAL = 1
    PARTITIONED = 2
    REMOTE = 3


class ZeroParamStatus(Enum):
    """Whether a sharded parameter is whole at the moment."""

    AVAILABLE = 1
    NOT_AVAILABLE = 2
    INFLIGHT = 3


_ids: dict[int, tuple[weakref.ref[Any], int]] = {}
_next_id = itertools.count()


class LocalPart(torch.Tensor):
    """This rank's part of a parameter, as `ds_tensor` shows it: the memory itself. To assign `data` writes it."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # pyright: ignore[reportAssignmentType]
    ds_numel: int
    _group: ShardGroup | None

    @classmethod
    def of(cls, part: torch.Tensor, group: ShardGroup | None) -> LocalPart:
        shown = torch.Tensor._make_subclass(cls, part)
        # As libraries read it: elements of a part.
        shown.ds_numel, shown._group = part.numel(), group
        return shown

    @property
    def data(self) -> torch.Tensor:
        plain: Any = torch.Tensor.data
        return plain.__get__(self)

    @data.setter
    def data(self, value: torch.Tensor) -> None:
        with torch.no_grad():
            self.copy_(value.reshape(-1))
        if self._group is not None:
            self._group.buffer.carry_over()
            torch.autograd.graph.increment_version([self._group.buffer.shard])
            self._group.forget_gathered()


class _Sharded:
    """A parameter that rests as shards: by itself after `zero.Init`, or in a group after `initialize`."""

    def __init__(
        self, param: torch.Tensor, single: SingleShard | None, group: ShardGroup | None, index: int
    ) -> None:
        self.param = param
        self.single, self.group, self.index = single, group, index

    @property
    def shape(self) -> torch.Size:
        if self.group is not None:
            return torch.Size(self.group.buffer.layout.shapes[self.index])
        return self.single.shape if self.single is not None else self.param.shape

    @property
    def status(self) -> ZeroParamStatus:
        if self.group is None:
            whole = self.single is not None and self.single.open
        else:
            whole = self.group.shown_whole
            if not whole and self.group.is_whole:
                return ZeroParamStatus.INFLIGHT
        return ZeroParamStatus.AVAILABLE if whole else ZeroParamStatus.NOT_AVAILABLE

    @property
    def process_group(self) -> Any:
        axes = self.group.axes if self.group is not None else self.single.axes if self.single else None
        return None if axes is None else axes.shard.group

    @property
    def local(self) -> LocalPart:
        """This rank's part, 1-D."""
        if self.group is not None:
            local = self.group.buffer.local(self.index, self.group.buffer.shard)
        else:
            local = self.single.held if self.single is not None else self.param.detach().view(-1)
        return LocalPart.of(local, self.group)


def sharded(param: torch.Tensor) -> _Sharded | None:
    """What is known of a parameter that rests as shards; `None` for others, those of ZeRO-1 and 2 included, and for
    those without elements, of which there is nothing to shard."""
    single = single_of(param)
    if single is not None:
        return _Sharded(param, single, None, 0)
    home = home_of(param)
    if home is None or home.group.resident or not prod(home.shape):
        return None
    return _Sharded(param, None, home.group, home.index)


def _serial(param: torch.Tensor) -> int:
    key = id(param)
    known = _ids.get(key)
    if known is None or known[0]() is not param:
        known = _ids[key] = weakref.ref(param, lambda _: _ids.pop(key, None)), next(_next_id)
    return known[1]


def _gathering(sharding: _Sharded) -> Callable[..., None]:
    def all_gather(param_list: Any = None, async_op: bool = False, hierarchy: int = 0) -> None:
        from unishard.deepspeed.parts.zero_init import open_parameters

        open_parameters([sharding.param] if param_list is None else param_list)

    return all_gather


def _releasing(sharding: _Sharded) -> Callable[..., None]:
    def partition(
        param_list: Any = None, hierarchy: int = 0, has_been_updated: bool = False, free_data: bool = True
    ) -> None:
        from unishard.deepspeed.parts.zero_init import close_parameters

        params = [sharding.param] if param_list is None else param_list
        close_parameters(params, updated=has_been_updated, free=free_data)

    return partition


class GatherHandle:
    """A gather that is over when it returns: `wait()` has nothing to do, however often it is called."""

    def wait(self, **options: Any) -> None:
        return None


def _gathering_together(sharding: _Sharded) -> Callable[..., GatherHandle]:
    def all_gather_coalesced(params: Iterable[nn.Parameter], **options: Any) -> GatherHandle:
        from unishard.deepspeed.parts.zero_init import open_parameters

        open_parameters(list(params))
        return GatherHandle()

    return all_gather_coalesced


_ATTRIBUTES: dict[str, Callable[[_Sharded], Any]] = {
    "ds_id": lambda s: _serial(s.param),
    "ds_shape": lambda s: s.shape,
    "ds_numel": lambda s: prod(s.shape),
    "ds_status": lambda s: s.status,
    "ds_tensor": lambda s: s.local,
    "ds_param_type": lambda s: ZeroParamType.PARTITIONED,
    "ds_persist": lambda s: False,
    "ds_process_group": lambda s: s.process_group,
    "ds_zero_param_process_group": lambda s: s.process_group,
    "ds_active_sub_modules": lambda s: set(),
    "ds_summary": lambda s: (
        lambda **_: {
            "id": _serial(s.param),
            "status": s.status.name,
            "numel": prod(s.shape),
            "ds_shape": tuple(s.shape),
        }
    ),
    "all_gather": _gathering,
    "all_gather_coalesced": _gathering_together,
    "partition": _releasing,
    "partition_numel": lambda s: lambda: -(-prod(s.shape) // _ranks(s)),
}


def _ranks(sharding: _Sharded) -> int:
    axes = (
        sharding.group.axes
        if sharding.group is not None
        else sharding.single.axes
        if sharding.single
        else None
    )
    return 1 if axes is None else axes.shard.size


class _ZeroAttribute:
    """Read on a parameter that rests as shards, gives its value; on others there is no such attribute.

    Not a data descriptor: what users set on a parameter themselves wins.
    """

    def __init__(self, name: str, read: Callable[[_Sharded], Any]) -> None:
        self._name, self._read = name, read

    def __get__(self, param: Any, owner: Any = None) -> Any:
        found = None if param is None else sharded(param)
        if found is None:
            raise AttributeError(
                f"{getattr(owner, '__name__', owner)!r} object has no attribute {self._name!r}"
            )
        return self._read(found)


def show_zero_attributes() -> None:
    """Let parameters answer `ds_id`, `ds_status` and the like, as DeepSpeed's do under ZeRO-3.

    Values change with every gather, so they are read off the groups rather than kept on the parameters.
    """
    for name, read in _ATTRIBUTES.items():
        if name not in nn.Parameter.__dict__:
            setattr(nn.Parameter, name, _ZeroAttribute(name, read))


def is_zero_param(parameter: Any) -> bool:
    """Whether `parameter` rests as shards (ZeRO-3)."""
    return isinstance(parameter, torch.Tensor) and sharded(parameter) is not None
