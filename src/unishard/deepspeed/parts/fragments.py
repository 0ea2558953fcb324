"""`safe_get_*` and `safe_set_*`: masters, gradients and optimizer states of one parameter, whole or this rank's part.

Call after `initialize`. The `full` ones gather: all ranks call together. `None` where there is nothing.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from unishard.optim.flat import Piece
from unishard.optim.sharded import ShardedOptimizer
from unishard.sharding.group import ShardGroup
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


def _home(piece: Piece) -> ParameterHome:
    return ParameterHome(piece.group, piece.index)


def _opened(home: ParameterHome, *, changed: bool) -> AbstractContextManager[None]:
    """The group's weights and state are in memory inside, wherever they rest."""
    ref = _optimizers.get(home.group)
    optimizer = None if ref is None else ref()
    if home.group.resting is None:
        return nullcontext()
    return (
        home.group.in_memory(changed=changed)
        if optimizer is None
        else optimizer.shown(home.group, changed=changed)
    )


def _kept(home: ParameterHome, tensor: torch.Tensor) -> torch.Tensor:
    """`tensor`, or a copy where its memory goes away."""
    return tensor if home.group.resting is None else tensor.clone()


# parts ------------------------------------------------------------------------------------------------------


def safe_get_local_fp32_param(param: nn.Parameter) -> torch.Tensor | None:
    """This rank's part of the fp32 master weight, 1-D: the memory itself. `None` for what was never trained."""
    home = home_of(param)
    if home is None or _untrained(param, home):
        return None
    with _opened(home, changed=False):
        return _kept(home, home.local(home.group.buffer.shard))


def safe_get_local_grad(param: nn.Parameter) -> torch.Tensor | None:
    """This rank's part of the reduced gradient, 1-D, without the loss scale; `None` before a backward."""
    home = home_of(param)
    if home is None or home.group.gradients.shard is None:
        return None
    return _unscaled(home, home.local(home.group.gradients.shard))


def safe_get_local_optimizer_state(param: nn.Parameter, optim_state_key: str) -> torch.Tensor | None:
    """This rank's part of an optimizer state such as `exp_avg`; `None` before the first step."""
    home = home_of(param)
    found = None if home is None or _untrained(param, home) else _piece(home)
    if found is None:
        return None
    with _opened(_home(found[1]), changed=False):
        return _local_state(*found, optim_state_key)


def _local_state(optimizer: ShardedOptimizer, piece: Piece, optim_state_key: str) -> torch.Tensor | None:
    if piece.param.numel():
        value = optimizer.state.get(piece.param, {}).get(optim_state_key)
        return _kept(_home(piece), value) if isinstance(value, torch.Tensor) else value
    # No part of this parameter is here; an empty one, where the optimizer keeps such a value for each element.
    others = (optimizer.state.get(p.param, {}).get(optim_state_key) for p in optimizer.pieces)
    kept = next((value for value in others if isinstance(value, torch.Tensor)), None)
    return None if kept is None or kept.dim() == 0 else kept.new_empty(0)


def safe_set_local_fp32_param(param: nn.Parameter, value: torch.Tensor) -> None:
    """Write this rank's part of the master weight; the compute weight follows. All ranks call together."""
    home = _require(param)
    with torch.no_grad(), _opened(home, changed=True):
        home.local(home.group.buffer.shard).copy_(value.reshape(-1))
        home.group.buffer.carry_over()
    _publish(home)


def safe_set_local_grad(param: nn.Parameter, value: torch.Tensor) -> None:
    """Write this rank's part of the reduced gradient."""
    home = _require(param)
    if home.group.gradients.shard is not None:
        with torch.no_grad():
            home.local(home.group.gradients.shard).copy_(value.reshape(-1) * _scale(home))


def safe_set_local_optimizer_state(param: nn.Parameter, value: torch.Tensor, optim_state_key: str) -> None:
    """Write this rank's part of an optimizer state."""
    found = _piece(_require(param))
    if found is None:
        return
    with torch.no_grad(), _opened(_home(found[1]), changed=True):
        state = found[0].state.get(found[1].param, {}).get(optim_state_key)
        if isinstance(state, torch.Tensor):
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
    with _opened(home, changed=True):
        write_state(home, home.local(home.group.buffer.shard), value)
        home.group.buffer.carry_over()
    _publish(home)


def safe_set_full_grad(param: nn.Parameter, value: torch.Tensor) -> None:
    """Write the reduced gradient that the coming step uses, the same value on every rank."""
    home = _require(param)
    if home.group.gradients.shard is not None:
        write_state(home, home.local(home.group.gradients.shard), value * _scale(home))


def safe_set_full_optimizer_state(param: nn.Parameter, value: torch.Tensor, optim_state_key: str) -> None:
    """Write an optimizer state, the same value on every rank."""
    home = _require(param)
    found = _piece(home)
    if found is None:
        return
    with _opened(home, changed=True):
        local = found[0].state.get(found[1].param, {}).get(optim_state_key)
        if isinstance(local, torch.Tensor):
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
