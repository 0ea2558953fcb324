"""The class that a sharded module turns into: FSDP2's methods, on unishard's units."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule as TorchFSDPModule
from torch.distributed.fsdp import UnshardHandle as TorchUnshardHandle

from unishard.dist.streams import on_stream
from unishard.errors import ArgumentTypeError, ShardingError, UnsupportedError
from unishard.sharding.composable import forget_sharded, note_sharded
from unishard.sharding.dtensor import (
    copy_group,
    copy_parameter,
    require_same_kind,
    resync,
    sharded_parameters,
)
from unishard.sharding.hooks import StateDictHooks, UnitHooks, is_inert
from unishard.sharding.parameter import Home
from unishard.sharding.placement import Placement
from unishard.sharding.unit import ShardUnit, unit_of, units_under

_classes: dict[type, type] = {}


def as_fsdp_class(cls: type[nn.Module]) -> type:
    """The class `FSDP<Name>` of a module class, made once."""
    if cls not in _classes:
        _classes[cls] = type(f"FSDP{cls.__name__}", (FSDPModule, cls), {"__module__": cls.__module__})
    return _classes[cls]


class UnshardHandle(TorchUnshardHandle):
    """An `unshard(async_op=True)` under way; `wait()` shows the whole parameters in the module."""

    def __init__(self, unit: ShardUnit) -> None:
        self._unit: ShardUnit | None = unit

    def wait(self) -> None:
        unit, self._unit = self._unit, None
        if unit is not None:
            unit.wait()


class FSDPModule(TorchFSDPModule):
    """What `fully_shard` makes of a module. Methods are FSDP2's; `recurse` covers sharded modules below."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        # Containers build new ones of their own class when sliced; those are plain.
        original = _original_class(cls)
        made: Any = original.__new__(original)  # pyright: ignore[reportCallIssue]
        made.__init__(*args, **kwargs)
        return made

    @property
    def _unit(self) -> ShardUnit:
        return _require_unit(self)

    def unshard(self, async_op: bool = False) -> UnshardHandle | None:
        """Gather this module's own parameters. With `async_op`, return a handle to wait on."""
        unit = self._unit
        unit.unshard()
        handle = UnshardHandle(unit)
        if async_op:
            return handle
        handle.wait()
        return None

    def reshard(self) -> None:
        """Release this module's own whole parameters."""
        self._unit.reshard()

    def set_requires_gradient_sync(self, requires_gradient_sync: bool, *, recurse: bool = True) -> None:
        """Whether backward reduces gradients; if not, each rank keeps its own sums for a later backward."""
        for unit in self._select(recurse):
            unit.reduce_gradients = requires_gradient_sync
            unit.reduce_across_replicas = requires_gradient_sync

    def set_requires_all_reduce(self, requires_all_reduce: bool, *, recurse: bool = True) -> None:
        """Whether backward also reduces across replicas; if not, sums stay within the dp_shard axis."""
        for unit in self._select(recurse):
            unit.reduce_across_replicas = requires_all_reduce

    def set_reshard_after_forward(self, reshard_after_forward: bool, recurse: bool = True) -> None:
        """Whether to release parameters after forward."""
        if not isinstance(reshard_after_forward, bool):
            raise ShardingError(
                f"set_reshard_after_forward expects a bool, got {reshard_after_forward!r}; pass an int to fully_shard"
            )
        for unit in self._select(recurse):
            if unit.sharding.parameter is Placement.SHARD:
                unit.reshard_after_forward = reshard_after_forward
                unit.keep_if_root = False
                unit.keep_within = None
            elif reshard_after_forward:
                raise ShardingError(
                    f"{unit.name}: {unit.sharding} keeps parameters whole; use sharding=ZERO3"
                )

    def set_reshard_after_backward(self, reshard_after_backward: bool, *, recurse: bool = True) -> None:
        """Whether to release parameters after backward."""
        for unit in self._select(recurse):
            unit.reshard_after_backward = reshard_after_backward

    def set_modules_to_forward_prefetch(self, modules: list[Any]) -> None:
        """Gather `modules` ahead whenever this module runs forward, instead of following the recorded order."""
        self._unit.forward_prefetch = [_require_unit(m) for m in modules]

    def set_modules_to_backward_prefetch(self, modules: list[Any]) -> None:
        """Gather `modules` ahead whenever this module's backward begins."""
        self._unit.backward_prefetch = [_require_unit(m) for m in modules]

    def set_is_last_backward(self, is_last_backward: bool) -> None:
        """Accepted for FSDP2's scripts: gradients here are complete after each backward, which both values allow."""

    def set_unshard_in_backward(self, unshard_in_backward: bool) -> None:
        """Whether this module's backward needs its parameters gathered (an embedding's does not)."""
        self._unit.unshard_in_backward = unshard_in_backward

    def set_gradient_divide_factor(self, factor: float) -> None:
        """Divide summed gradients by `factor` instead of by the number of data-parallel ranks."""
        for group in self._unit.groups:
            group.gradients.divisor = factor

    def set_reduce_scatter_divide_factor(self, factor: float) -> None:
        """Former name of `set_gradient_divide_factor`."""
        self.set_gradient_divide_factor(factor)

    def set_force_sum_reduction_for_comms(self, enable: bool) -> None:
        """Accepted: reductions here always sum, and divide locally."""

    def set_reduce_scatter_unused_params(
        self, reduce_scatter_unused_params: bool, *, recurse: bool = True
    ) -> None:
        """Whether a parameter that no rank used gets a gradient of zeros instead of none.

        What one rank did not use and another did is reduced in either case, with zeros from the first.
        """
        for unit in self._select(recurse):
            for group in unit.groups:
                for registration in sharded_parameters(group):
                    registration.zero_if_unused = reduce_scatter_unused_params

    def set_all_reduce_hook(self, hook: Callable[[torch.Tensor], None], *, stream: Any = None) -> None:
        """Run `hook` on each reduced flat gradient, in place, before it is added to the parameters' gradients.

        `stream` is where it runs; only without replicas, whose sums arrive where they are needed.
        """
        if stream is not None and any(g.axes.replicate.size > 1 for g in self._unit.groups):
            raise ShardingError(
                "set_all_reduce_hook: with replicas the hook runs where their sum arrives; leave stream=None"
            )
        for group in self._unit.groups:
            device = group.buffer.device
            group.gradients.all_reduce_hook = hook if stream is None else on_stream(hook, stream, device)

    def reset_iter_state(self) -> None:
        """Forget a forward or backward that an exception cut short."""
        schedule = self._unit.schedule
        if schedule is not None:
            schedule.recover()
            for unit in schedule.units:
                unit.reshard()

    def set_post_optim_event(self, event: Any) -> None:
        """Accepted: gathers here wait for everything issued before them."""

    def _set_unshard_async_op(self, async_op: bool) -> None:
        """Accepted: gathers are always asynchronous."""

    def _refuse(self, name: str) -> None:
        raise UnsupportedError(f"{name} is not available in this version; collectives are chosen by backend")

    def set_custom_all_gather(self, comm: Any) -> None:
        self._refuse("set_custom_all_gather")

    def set_custom_reduce_scatter(self, comm: Any) -> None:
        self._refuse("set_custom_reduce_scatter")

    def set_reduce_scatter_max_input_buffers(self, max_input_buffers: int, *, recurse: bool = True) -> None:
        """How many groups' gradients may be on their way at once; of several modules' wishes the largest counts."""
        if isinstance(max_input_buffers, bool) or not isinstance(max_input_buffers, int):
            raise ArgumentTypeError(
                f"set_reduce_scatter_max_input_buffers takes a count of at least 1, not {max_input_buffers!r}"
            )
        if max_input_buffers < 1:
            raise ShardingError(
                f"set_reduce_scatter_max_input_buffers({max_input_buffers}): reductions need at least 1 buffer"
            )
        for unit in self._select(recurse):
            unit.max_reductions = max_input_buffers

    def set_separate_reduce_scatter_group(self, enable: bool = True, *, recurse: bool = True) -> None:
        """Accepted except on NCCL: elsewhere gathers and reductions do not queue behind each other in one group."""
        if enable and _on_nccl(self._select(recurse)):
            self._refuse("set_separate_reduce_scatter_group")

    def set_allocate_memory_from_process_group_for_comm(self, enable: bool) -> None:
        """Accepted except on NCCL: other backends have no memory of their own to give."""
        if enable and _on_nccl([self._unit]):
            self._refuse("set_allocate_memory_from_process_group_for_comm")

    def set_symm_mem_for_comm(self, backend: Any = "NCCL") -> None:
        self._refuse("set_symm_mem_for_comm")

    def _select(self, recurse: bool) -> Iterator[ShardUnit]:
        return units_under(_as_module(self)) if recurse else iter([self._unit])

    def _get_fsdp_state(self) -> Any:
        raise UnsupportedError("_get_fsdp_state is private to torch; use the public methods of FSDPModule")

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        unit = self._unit
        unit.reshard()
        for group in unit.groups:
            require_same_kind(group, args[0] if args else kwargs["fn"])
        # Past torch's override, which expects torch's own state.
        result = super(TorchFSDPModule, self)._apply(*args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]
        for group in unit.groups:
            resync(group)
        return result

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return _deepcopy(self, memo)


def _original_class(cls: type) -> type:
    """The class that `as_fsdp_class` was given: it follows ours and torch's in the method resolution order."""
    return cls.__mro__[cls.__mro__.index(TorchFSDPModule) + 1]


def _on_nccl(units: Iterable[ShardUnit]) -> bool:
    return any(group.axes.shard.native_device for unit in units for group in unit.groups)


def share_comm_ctx(modules: Sequence[Any]) -> None:
    """Let separately rooted modules (pipeline stages) share what they communicate with, as they always do here.

    All collectives of a process group are queued in the order of their calls, whichever module they are for. Raises
    `ShardingError` for a module that is not sharded.
    """
    for module in modules:
        _require_unit(module)


def _as_module(module: Any) -> nn.Module:
    return module


def _require_unit(module: Any) -> ShardUnit:
    unit = unit_of(module) if isinstance(module, nn.Module) else None
    if unit is None:
        raise ShardingError(f"expected a module that fully_shard was applied to, got {type(module).__name__}")
    return unit


def _deepcopy(module: Any, memo: dict[int, Any]) -> Any:
    """An independent sharded copy on the same mesh: same groups, its own shards and hooks."""
    unit = _require_unit(module)
    for below in units_under(module):
        below.reshard()
        for group in below.groups:
            if group.resting is not None:
                raise UnsupportedError(
                    f"deepcopy of {below.name}: its parameters rest on a tier, and a copy would need as much again; "
                    "copy the model before fully_shard, or save and load its state"
                )
            # DTensors have no deepcopy of their own.
            memo.update(
                {
                    id(r.sharded): copy_parameter(r)
                    for r in sharded_parameters(group)
                    if id(r.sharded) not in memo
                }
            )
    original = _original_class(type(module))
    made: Any = original.__new__(original)  # pyright: ignore[reportCallIssue]
    memo[id(module)] = made
    made.__dict__.update({key: copy.deepcopy(value, memo) for key, value in module.__dict__.items()})
    forget_sharded(made)
    if all(id(m) in memo for m in unit.modules):
        _copy_unit(unit, memo)
    return made


def _copy_unit(unit: ShardUnit, memo: dict[int, Any]) -> None:
    def home_of(home: Home) -> Home:
        return Home(memo[id(home.module)], home.name)

    modules = [memo[id(m)] for m in unit.modules]
    for module in modules:
        _drop_inert_hooks(module)
    made = ShardUnit(unit.name, modules, unit.sharding, unit.policy)
    made.copy_settings(unit)
    made.groups = [copy_group(group, home_of, memo) for group in unit.groups]
    UnitHooks(made, unit.hooks.start)
    for module in modules:
        StateDictHooks(made, module)
        note_sharded(module)
        module.__class__ = as_fsdp_class(type(module))


def _drop_inert_hooks(module: nn.Module) -> None:
    for hooks in (
        module._forward_pre_hooks,
        module._forward_hooks,
        module._state_dict_pre_hooks,
        module._load_state_dict_pre_hooks,
        module._load_state_dict_post_hooks,
    ):
        for key in [key for key, hook in hooks.items() if is_inert(hook)]:
            del hooks[key]
