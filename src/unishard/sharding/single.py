"""Parameters that are sharded one by one, before their model is: what `init_sharded` leaves behind."""

from __future__ import annotations

import weakref
from math import prod

import torch
from torch import nn

from unishard.dist.mesh import Axes
from unishard.sharding.layout import FlatLayout, plan_layout


class SingleShard:
    """One released parameter: this rank's flat slice of it, and the way back to the whole."""

    def __init__(self, param: nn.Parameter, axes: Axes, dtype: torch.dtype | None) -> None:
        self.shape = param.shape
        self.axes = axes
        self.dtype = dtype if dtype is not None and param.dtype.is_floating_point else param.dtype
        self.device = param.device
        self.layout: FlatLayout = plan_layout([tuple(param.shape)], axes.shard.size)
        self.open = True
        self.opening = False
        """Whether `reopen` is under way: functions that touch the parameter meanwhile belong to it."""
        self._shard = torch.empty(0)
        self.close(param)

    @torch.no_grad()
    def whole(self) -> torch.Tensor:
        """The whole parameter, fresh memory. All ranks call together."""
        full = torch.empty(self.layout.numel, dtype=self.dtype, device=self.device)
        length = self.layout.shard_numel
        full[self.axes.shard.rank * length : (self.axes.shard.rank + 1) * length].copy_(self._shard)
        self.axes.shard.all_gather(full, "init", source=self._shard).wait()
        start = self.layout.offsets[0] if self.layout.numel else 0
        return full[start : start + prod(self.shape)].view(self.shape)

    @torch.no_grad()
    def close(self, param: nn.Parameter) -> None:
        """Keep this rank's slice of rank 0's values and empty the parameter."""
        full = torch.zeros(self.layout.numel, dtype=self.dtype, device=self.device)
        start = self.layout.offsets[0] if self.layout.numel else 0
        full[start : start + prod(self.shape)].view(self.shape).copy_(param.data)
        self.axes.broadcast(full)
        length = self.layout.shard_numel
        self._shard = full[self.axes.shard.rank * length : (self.axes.shard.rank + 1) * length].clone()
        param.data = torch.empty(0, dtype=self.dtype, device=self.device)
        self.open = False

    @property
    def held(self) -> torch.Tensor:
        """This rank's slice, 1-D."""
        return self._shard

    @property
    def held_bytes(self) -> int:
        """Bytes of this rank's slice."""
        return self._shard.numel() * self._shard.element_size()

    def drop(self, param: nn.Parameter) -> None:
        """Empty the parameter again without looking at what was written to it."""
        param.data = torch.empty(0, dtype=self.dtype, device=self.device)
        self.open = False

    @torch.no_grad()
    def reopen(self, param: nn.Parameter) -> None:
        """Give the parameter its whole data back, until `close`."""
        self.opening = True
        try:
            param.data = self.whole()
        finally:
            self.opening = False
        self.open = True


_singles: dict[int, tuple[weakref.ref[nn.Parameter], SingleShard]] = {}


def shard_single(param: nn.Parameter, axes: Axes, dtype: torch.dtype | None = None) -> None:
    """Shard `param` on its own: it becomes empty, and `single_of(param)` remembers the rest."""
    key = id(param)
    _singles[key] = (weakref.ref(param, lambda _: _singles.pop(key, None)), SingleShard(param, axes, dtype))


def single_of(param: torch.Tensor) -> SingleShard | None:
    """The shard of a parameter that `init_sharded` released, if it is one."""
    found = _singles.get(id(param))
    return found[1] if found is not None and found[0]() is param else None


def adopted(param: nn.Parameter) -> None:
    """A group has taken the parameter over."""
    _singles.pop(id(param), None)


def full_shape(param: torch.Tensor) -> torch.Size:
    """The shape of a parameter, released or not."""
    single = single_of(param)
    return param.shape if single is None else single.shape
