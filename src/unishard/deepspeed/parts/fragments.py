"""`safe_get_*` and `safe_set_*`: masters, gradients and optimizer states of one parameter, whole or this rank's part.

Call after `initialize`. The `full` ones gather: all ranks call together. `None` where there is nothing.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from unishard.optim.flat import Piece
from unishard.optim.sharded import ShardedOptimizer
from unishard.sharding.group import WEIGHTS, ShardGroup
from unishard.sharding.whole_state import ParameterHome, home_of, whole_state, write_state

_optimizers: weakref.WeakKeyDictionary[ShardGroup, weakref.ref[ShardedOptimizer]] = (
    weakref.WeakKeyDictionary()
)

_frozen: weakref.WeakKeyDictionary[ShardGroup, frozenset[int]] = weakref.WeakKeyDictionary()
"""Parameters of each group that were frozen when the optimizer was made."""


def note_optimizer(optimizer: ShardedOptimizer) -> None:
    """Remember which optimizer steps which groups."""
    for piece in optimizer.pieces:
        _optimizers[piece.group] = weakref.ref(optimizer)
        _frozen[piece.group] = frozenset(range(len(piece.group.registrations))) - piece.group.trainable


def _piece(home: ParameterHome) -> tuple[ShardedOptimizer, Piece] | None:
    ref = _optimizers.get(home.group)
    optimizer = None if ref is None else ref()
    for piece in () if optimizer is None else optimizer.pieces:
        if piece.group is home.group and piece.index == home.index:
            return optimizer, piece  # pyright: ignore[reportReturnType]
    return None


def _untrained(param: nn.Parameter, home: ParameterHome) -> bool:
    """Whether the parameter was frozen when its optimizer was made, and still is: DeepSpeed keeps nothing for it."""
    return not param.requires_grad and (_piece(home) is None or home.index in _frozen.get(home.group, ()))


# parts ------------------------------------------------------------------------------------------------------


def safe_get_local_fp32_param(param: nn.Parameter) -> torch.Tensor | None:
    """This rank's part of the fp32 master weight, 1-D: the memory itself, or a copy if it rests on a tier. `None` for
    what was never trained."""
    home = home_of(param)
    if home is None or _untrained(param, home):
        return None
    with home.group.in_memory(WEIGHTS, changed=False):
        return _lasting(home.local(home.group.buffer.shard), home.group.resting is not None)


def safe_get_local_grad(param: nn.Parameter) -> torch.Tensor | None:
    """This rank's part of the reduced gradient, 1-D, without the loss scale; `None` before a backward."""
    home = home_of(param)
    if home is None or home.group.gradients.shard is None:
        return None
    with home.group.gradients.in_memory():
        return _lasting(
            _unscaled(home, home.local(home.group.gradients.shard)), home.group.resting is not None
        )


def safe_get_local_optimizer_state(param: nn.Parameter, optim_state_key: str) -> torch.Tensor | None:
    """This rank's part of an optimizer state such as `exp_avg`; `None` before the first step."""
    home = home_of(param)
    found = None if home is None or _untrained(param, home) else _piece(home)
    if found is None:
        return None
    optimizer, piece = found
    if piece.param.numel():
        with optimizer.shown(piece.group, changed=False):
            value = optimizer.state.get(piece.param, {}).get(optim_state_key)
            return None if value is None else _lasting(value, piece.group.resting is not None)
    # No part of this parameter is here; an empty one, where the optimizer keeps such a value for each element.
    others = (optimizer.state.get(p.param, {}).get(optim_state_key) for p in optimizer.pieces)
    kept = next((value for value in others if isinstance(value, torch.Tensor)), None)
    return None if kept is None or kept.dim() == 0 else kept.new_empty(0)


def safe_set_local_fp32_param(param: nn.Parameter, value: torch.Tensor) -> None:
    """Write this rank's part of the master weight; the compute weight follows. All ranks call together."""
    home = _require(param)
    with torch.no_grad(), _master(home) as local:
        local.copy_(value.reshape(-1))
    _publish(home)


def safe_set_local_grad(param: nn.Parameter, value: torch.Tensor) -> None:
    """Write this rank's part of the reduced gradient."""
    home = _require(param)
    if home.group.gradients.shard is not None:
        with torch.no_grad(), home.group.gradients.in_memory(changed=True):
            home.local(home.group.gradients.shard).copy_(value.reshape(-1) * _scale(home))


def safe_set_local_optimizer_state(param: nn.Parameter, value: torch.Tensor, optim_state_key: str) -> None:
    """Write this rank's part of an optimizer state."""
    with torch.no_grad(), _state(param, optim_state_key) as state:
        if state is not None:
            state.copy_(value.reshape(state.shape))


# wholes -----------------------------------------------------------------------------------------------------


def safe_get_full_fp32_param(param: nn.Parameter) -> torch.Tensor | None:
    """The whole fp32 master weight, a copy."""
    return _gathered(param, safe_get_local_fp32_param(param))


def safe_get_full_grad(param: nn.Parameter) -> torch.Tensor | None:
    """The whole reduced gradient, a copy in fp32, without the loss scale; `None` before a backward.

    While gradients wait to be reduced (inside `no_sync()`, and between the micro-batches of stages 0 and 1) it is this
    rank's own sum.
    """
    home = home_of(param)
    if home is not None and home.group.gradients.shard is None:
        own = home.group.gradients.waiting(home.index)
        if own is not None:
            return _unscaled(home, own.detach().float().clone().view(home.shape))
    grad = _gathered(param, safe_get_local_grad(param))
    return None if grad is None else grad.float()


def safe_get_full_optimizer_state(param: nn.Parameter, optim_state_key: str) -> torch.Tensor | None:
    """The whole of an optimizer state such as `exp_avg`, a copy; `None` before the first step."""
    home = home_of(param)
    if home is None:
        return None
    local = safe_get_local_optimizer_state(param, optim_state_key)
    # A rank without a part of this parameter keeps no state for it, and still takes part.
    scalar = local is not None and local.dim() == 0
    everywhere = home.group.axes.shard.all_gather_object((local is not None, scalar))
    if not any(has for has, _ in everywhere):
        return None
    if any(is_scalar for _, is_scalar in everywhere):
        value = home.group.axes.shard.all_gather_object(None if local is None else float(local))
        return torch.tensor(next(v for v in value if v is not None))
    if local is None:
        local = home.group.buffer.shard[:0]
    return whole_state(home, local)


def safe_set_full_fp32_param(param: nn.Parameter, value: torch.Tensor) -> None:
    """Write the master weight, the same value on every rank; the compute weight follows."""
    home = _require(param)
    with _master(home) as local:
        write_state(home, local, value)
    _publish(home)


def safe_set_full_grad(param: nn.Parameter, value: torch.Tensor) -> None:
    """Write the reduced gradient that the coming step uses, the same value on every rank."""
    home = _require(param)
    if home.group.gradients.shard is not None:
        with home.group.gradients.in_memory(changed=True):
            write_state(home, home.local(home.group.gradients.shard), value * _scale(home))


def safe_set_full_optimizer_state(param: nn.Parameter, value: torch.Tensor, optim_state_key: str) -> None:
    """Write an optimizer state, the same value on every rank."""
    home = _require(param)
    with _state(param, optim_state_key) as local:
        if local is not None:
            write_state(home, local, value)


def safe_update_full_grad_vectorized(
    param_list: Sequence[nn.Parameter], update_func: Callable[[torch.Tensor, nn.Parameter], torch.Tensor]
) -> None:
    """Replace each parameter's whole gradient by `update_func(gradient, parameter)`. All ranks call together."""
    for param in param_list:
        grad = safe_get_full_grad(param)
        if grad is not None:
            safe_set_full_grad(param, update_func(grad, param))


def _require(param: nn.Parameter) -> ParameterHome:
    from unishard.sharding.whole_state import require_home

    return require_home(param)


def _lasting(value: torch.Tensor, away: bool) -> torch.Tensor:
    """What may be kept after the memory of a resting tensor has left."""
    return value.clone() if away else value


@contextmanager
def _master(home: ParameterHome) -> Iterator[torch.Tensor]:
    """This rank's part of the master weight, to be written."""
    with home.group.in_memory(WEIGHTS, changed=True):
        yield home.local(home.group.buffer.shard)
        if home.group.resting is not None:
            home.group.buffer.carry_over()


@contextmanager
def _state(param: nn.Parameter, key: str) -> Iterator[torch.Tensor | None]:
    """This rank's part of an optimizer state, to be written; `None` if there is none."""
    home = home_of(param)
    found = None if home is None else _piece(home)
    if found is None:
        yield None
        return
    with found[0].shown(found[1].group, changed=True):
        yield found[0].state.get(found[1].param, {}).get(key)


def _gathered(param: nn.Parameter, local: torch.Tensor | None) -> torch.Tensor | None:
    home = home_of(param)
    return None if home is None or local is None else whole_state(home, local)


def _scale(home: ParameterHome) -> float:
    found = _optimizers.get(home.group)
    optimizer = None if found is None else found()
    return 1.0 if optimizer is None else optimizer.loss_scale


def _unscaled(home: ParameterHome, grad: torch.Tensor) -> torch.Tensor:
    scale = _scale(home)
    return grad if scale == 1.0 else grad / scale


def _publish(home: ParameterHome) -> None:
    """Bring whole parameters up to date with a shard that was written."""
    group: Any = home.group
    torch.autograd.graph.increment_version([group.buffer.shard])
    group.note_update()
    if group.resident:
        group.unshard()
        group.wait()
        group.axes.shard.drain()
