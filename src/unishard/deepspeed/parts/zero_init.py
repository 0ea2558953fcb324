"""`zero.Init` and `zero.GatheredParameters` over `unishard.init_sharded` and `unishard.gather`."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from unishard.deepspeed.parts.collectives import init_distributed
from unishard.deepspeed.parts.configuration import raw_config
from unishard.deepspeed.parts.parameters import is_zero_param, show_zero_attributes
from unishard.dist.mesh import axes_of, build_mesh
from unishard.errors import ShardingError, UnsupportedError
from unishard.sharding.gather import gather
from unishard.sharding.init import init_sharded
from unishard.sharding.single import shard_single, single_of
from unishard.sharding.whole_state import home_of

_active: list[Init] = []
_paused: list[Init] = []


class Init(AbstractContextManager["Init"]):
    """Modules built inside are sharded as soon as each one's `__init__` is over; with `module`, an existing one is.

    Args:
        module: shard this module's parameters now.
        data_parallel_group: the ranks that share the parameters; default: all.
        config_dict_or_path, config: a ds_config; its fp16 or bf16 section chooses the dtype when `dtype` is absent.
        dtype: of floating parameters. enabled: False makes this do nothing.
        remote_device: where parameters rest; only the device itself here, offload follows from the configuration.
        mem_efficient_linear, pin_memory, tensor_overrides: accepted; there is nothing to choose here.
    """

    def __init__(
        self,
        module: nn.Module | None = None,
        data_parallel_group: Any = None,
        mem_efficient_linear: bool = True,
        remote_device: str | None = None,
        pin_memory: bool = False,
        config_dict_or_path: Any = None,
        config: Any = None,
        enabled: bool = True,
        dtype: torch.dtype | None = None,
        mpu: Any = None,
        zero_param_parallel_group: Any = None,
        zero_quantized_weights: bool = False,
        zero_quantized_nontrainable_weights: bool = False,
        sequence_data_parallel_group: Any = None,
        param_swapper: Any = None,
        tensor_overrides: Any = None,
    ) -> None:
        if remote_device in ("cpu", "nvme"):
            raise UnsupportedError(
                f"zero.Init(remote_device={remote_device!r}): parameters are created on the device and offloaded by "
                "initialize(); leave remote_device out, and set zero_optimization.offload_param in the configuration"
            )
        if zero_quantized_weights or zero_quantized_nontrainable_weights:
            raise UnsupportedError("zero.Init: quantized weights are not available; leave the argument out")
        if mpu is not None and data_parallel_group is None:
            data_parallel_group = mpu.get_data_parallel_group()
        self.enabled = enabled
        if not enabled:
            return
        if not dist.is_initialized():
            init_distributed()
        problem = _contradicting_single_rank_pg_error(
            dist.get_world_size(), data_parallel_group or sequence_data_parallel_group
        )
        if problem is not None:
            raise ShardingError(problem)
        show_zero_attributes()
        self._config = raw_config(config if config is not None else config_dict_or_path)
        watch_gathered(self._config)
        self.dtype = dtype if dtype is not None else _dtype_of(self._config)
        self._mesh = _mesh_of(data_parallel_group or sequence_data_parallel_group)
        self._context: AbstractContextManager[None] | None = None
        if module is not None:
            self._shard(module)

    def _shard(self, module: nn.Module) -> None:
        axes = axes_of(self._mesh if self._mesh is not None else build_mesh("cpu"))
        for param in module.parameters():
            if param.numel() and single_of(param) is None and home_of(param) is None and not param.is_meta:
                shard_single(param, axes, self.dtype if param.is_floating_point() else None)

    def __enter__(self) -> Init:
        if self.enabled and self not in _active:
            _active.append(self)
            if len(_active) == 1:
                self._begin()
        return self

    def _begin(self) -> None:
        self._context = init_sharded(mesh=self._mesh, dtype=self.dtype)
        self._context.__enter__()

    def _end(self, *failure: Any) -> None:
        context, self._context = self._context, None
        if context is not None:
            context.__exit__(*(failure or (None, None, None)))

    def __exit__(self, *failure: Any) -> None:
        if not self.enabled or self not in _active:
            return
        _active.remove(self)
        self._end(*failure)


def _contradicting_single_rank_pg_error(
    dp_world_size: int, explicit_process_group: Any, env: Mapping[str, str | None] | None = None
) -> str | None:
    """What is wrong when there is a process group of one rank under a launcher that started more: each would hold
    the whole model. A group that was given is meant."""
    launched = str((os.environ if env is None else env).get("WORLD_SIZE"))
    meant = dp_world_size != 1 or explicit_process_group is not None
    if meant or not launched.isdigit() or int(launched) <= 1:
        return None
    return (
        f"zero.Init: the launcher says WORLD_SIZE={launched}, and the process group has one rank; call "
        "deepspeed.init_distributed() before anything makes a process group of its own, or pass "
        "data_parallel_group= if one rank is meant"
    )


def shutdown_init_context() -> None:
    """Leave the running `zero.Init`, so that modules built from now on are ordinary."""
    if _active:
        # Of nested ones the outermost holds the context.
        _paused.append(_active[0])
        _active[0]._end()


def restore_init_context() -> None:
    """Take up the `zero.Init` that `shutdown_init_context` left."""
    if _paused:
        _paused.pop()._begin()


def _dtype_of(config: dict[str, Any]) -> torch.dtype | None:
    for section, dtype in (("bf16", torch.bfloat16), ("bfloat16", torch.bfloat16), ("fp16", torch.float16)):
        if config.get(section, {}).get("enabled") is True:
            return dtype
    return None


_watching = False
"""Whether parameters are compared with what they were, when a `GatheredParameters` that drops changes ends."""


def watch_gathered(config: dict[str, Any]) -> None:
    """Take `zero_optimization.enable_sanity_checks` of a configuration over, for good."""
    global _watching
    section = config.get("zero_optimization")
    _watching = _watching or (isinstance(section, dict) and section.get("enable_sanity_checks") is True)


def _mesh_of(group: Any) -> Any:
    if group is None:
        return None
    from torch.distributed.device_mesh import DeviceMesh

    return DeviceMesh.from_group(group, "cuda" if torch.cuda.is_available() else "cpu")


class ModifiedError(ShardingError, RuntimeError):
    """Gathered parameters were written where nobody takes the changes over."""


class GatheredParameters(AbstractContextManager[None]):
    """Parameters are whole inside. With `modifier_rank`, everybody takes over what that rank wrote.

    Args:
        params: a parameter, an iterable of parameters, or a module; those that are not sharded are left alone.
        modifier_rank: a data-parallel rank; with `None`, changes are dropped, or with
            `zero_optimization.enable_sanity_checks` an error on all ranks.
        fwd_module: accepted; a group remembers by itself what holds it. enabled: False makes this do nothing.
    """

    def __init__(
        self, params: Any, modifier_rank: int | None = None, fwd_module: Any = None, enabled: bool = True
    ) -> None:
        self._params = [] if not enabled else [p for p in _as_list(params) if is_zero_param(p)]
        self._modifier_rank = modifier_rank
        self._stack = ExitStack()
        self._versions: list[int] = []

    def __enter__(self) -> None:
        if self._params:
            self._stack.enter_context(gather(self._params, modifier_rank=self._modifier_rank))
            if _watching and self._modifier_rank is None:
                self._versions = [param._version for param in self._params]

    def __exit__(self, *failure: Any) -> None:
        pairs = zip(self._params, self._versions, strict=False)
        written = [param for param, version in pairs if param._version != version]
        self._stack.__exit__(*failure)
        if self._versions and failure[0] is None:
            self._refuse(written)

    def _refuse(self, written: list[nn.Parameter]) -> None:
        """Raise on every rank if any rank wrote."""
        single, home = single_of(self._params[0]), home_of(self._params[0])
        axes = single.axes if single is not None else home.group.axes if home is not None else None
        shapes = [tuple(param.ds_shape) for param in written]  # pyright: ignore[reportAttributeAccessIssue]
        everywhere = [shapes] if axes is None else axes.shard.all_gather_object(shapes)
        rank = next((rank for rank, found in enumerate(everywhere) if found), None)
        if rank is not None:
            raise ModifiedError(
                f"rank {rank} wrote to gathered parameters of shapes {everywhere[rank]} in place (in-place "
                "modification), and GatheredParameters(modifier_rank=None) drops what is written; name the rank whose "
                "changes count"
            )


def _as_list(params: Any) -> list[Any]:
    if isinstance(params, nn.Module):
        return list(params.parameters())
    return [params] if isinstance(params, torch.Tensor) else list(params)


def open_parameters(params: Iterable[Any]) -> None:
    """Make whole, until `close_parameters`: what `param.all_gather()` does."""
    for param in params:
        single, home = single_of(param), home_of(param)
        if single is not None and not single.open:
            single.reopen(param)
        elif home is not None and not home.group.shown_whole:
            home.group.unshard()
            home.group.wait()
            home.group.held = True


def close_parameters(params: Iterable[Any], *, updated: bool = False, free: bool = True) -> None:
    """Release again, keeping what was written if `updated`: what `param.partition()` does.

    Without `free` a parameter of `zero.Init` counts as released and its memory stays until the next release.
    """
    for param in params:
        single, home = single_of(param), home_of(param)
        if single is not None and single.open:
            if not free:
                whole = param.data
            if updated:
                single.close(param)
            else:
                single.drop(param)
            if not free:
                param.data = whole  # pyright: ignore[reportPossiblyUnboundVariable]
        elif home is not None and home.group.held:
            home.group.held = False
            if updated:
                home.group.buffer.absorb()
            home.group.reshard()


def register_external_parameter(module: nn.Module, parameter: nn.Parameter) -> None:
    """Say that `module`'s forward uses `parameter`, which belongs to another module. Call it before `initialize`.

    The parameter is then gathered with the innermost module that contains both.
    """
    from unishard.sharding.wrap import note_external

    if not isinstance(parameter, nn.Parameter):
        raise ShardingError(f"register_external_parameter needs a parameter, not {type(parameter).__name__}")
    note_external(module, parameter)


def unregister_external_parameter(module: nn.Module, parameter: nn.Parameter) -> None:
    """Undo `register_external_parameter`."""
    from unishard.sharding.wrap import forget_external

    forget_external(module, parameter)
