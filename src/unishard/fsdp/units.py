"""From wrapped modules to the core's units: who owns which parameter, materialization, buffers."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from unishard.dist.agree import agree
from unishard.dist.collectives import communicator
from unishard.errors import ShardingError, UnsupportedError
from unishard.fsdp.options import (
    BackwardPrefetch,
    Settings,
    core_precision,
    full_precision_island,
    sharding_of,
)
from unishard.sharding.api import shard_records
from unishard.sharding.dtensor import sharded_parameters
from unishard.sharding.init import fill_module, require_initializable
from unishard.sharding.parameter import ParameterRecord, taken_by
from unishard.sharding.precision import MixedPrecision
from unishard.sharding.unit import ShardUnit, unit_of, units_under
from unishard.sharding.wrap import ChosenUnit, assign_parameters

log = logging.getLogger("unishard")


@dataclass(frozen=True)
class Site:
    """Where a model is sharded, and what of it is left alone."""

    mesh: DeviceMesh
    device: torch.device
    ignored_modules: frozenset[nn.Module]
    ignored_params: frozenset[nn.Parameter]


@dataclass(frozen=True)
class Wrapped:
    """One module to shard as a unit."""

    module: nn.Module
    settings: Settings
    outermost: bool
    island: bool
    """Computes in full precision between others in 16 bits, and casts at both ends."""

    @property
    def precision(self) -> MixedPrecision:
        policy = self.settings.mixed_precision
        if self.island and policy is not None:
            return full_precision_island(policy)
        return core_precision(policy, outermost=self.outermost)

    @property
    def buffer_dtype(self) -> torch.dtype | None:
        policy = self.settings.mixed_precision
        return None if policy is None or self.island else policy.buffer_dtype


def read_ignored(
    module: nn.Module, ignored_modules: Any, ignored_states: Any
) -> tuple[frozenset[nn.Module], frozenset[nn.Parameter]]:
    """All modules and parameters to leave alone. Raises `ShardingError` for anything but modules or parameters."""
    if ignored_modules is not None and ignored_states is not None:
        raise ShardingError(
            "FSDP: ignored_modules= and ignored_states= exclude each other; pass ignored_states="
        )
    items = list(ignored_modules if ignored_modules is not None else ignored_states or ())
    wanted: Any = nn.Module if ignored_modules is not None else (nn.Module, nn.Parameter)
    for item in items:
        if not isinstance(item, wanted):
            what = "a module" if ignored_modules is not None else "a parameter or a module"
            raise ShardingError(f"FSDP: the ignored {item!r} is not {what}")
    tops: list[nn.Module] = [item for item in items if isinstance(item, nn.Module)]
    if module in tops:
        raise ShardingError(
            "FSDP: the wrapped module itself is among the ignored ones; nothing would be sharded"
        )
    modules = {m for top in tops for m in top.modules() if unit_of(m) is None}
    params = {item for item in items if isinstance(item, nn.Parameter)}
    params |= {p for m in modules for p in m._parameters.values() if p is not None}
    return frozenset(modules), frozenset(params)


def runs_forward(module: nn.Module) -> bool:
    """Whether `module` can be called; a plain container is only indexed, and nothing would gather it."""
    return type(module).forward is not nn.Module.forward


def shard_wrapped(root: nn.Module, wrapped: Iterable[Wrapped], site: Site) -> None:
    """Make a unit of every module in `wrapped`, which holds `root` itself. All ranks call together.

    Raises `ShardingError` for modules sharded before, or that cannot be materialized.
    """
    plans = {w.module: w for w in wrapped}
    for module in plans:
        if unit_of(module) is not None:
            raise ShardingError(
                f"FSDP has already been applied to this {type(module).__name__}; a parameter cannot be sharded twice: "
                "wrap inner modules first, or leave the choice to auto_wrap_policy"
            )
    with contextlib.ExitStack() as stack:
        for dim in range(site.mesh.ndim):
            comm = communicator(site.mesh.get_group(dim))
            stack.enter_context(agree(comm, f"FSDP({type(root).__name__})"))
        require_initializable(root, plans[root].settings.param_init_fn)
    names = [(name, module) for name, module in root.named_modules() if module in plans]
    chosen = assign_parameters(root, names, set(site.ignored_params) | _sharded_before(root))
    for choice in sorted(chosen, key=_depth, reverse=True):
        own = _own_modules(choice.module, set(plans), site)
        _shard_one(plans[choice.module], choice, own, site)


def _depth(choice: ChosenUnit) -> int:
    return choice.name.count(".") + 1 if choice.name else 0


def _sharded_before(root: nn.Module) -> set[nn.Parameter]:
    found: set[nn.Parameter] = set()
    for unit in units_under(root):
        for group in unit.groups:
            for registration in group.registrations:
                found |= {registration.visible, registration.whole}
    return found


def _own_modules(top: nn.Module, others: set[nn.Module], site: Site) -> list[nn.Module]:
    """`top` and the modules below it that no other unit and no ignored module contains."""
    own: dict[nn.Module, None] = {}

    def visit(module: nn.Module) -> None:
        taken = module is not top and (module in others or unit_of(module) is not None)
        if taken or module in site.ignored_modules or module in own:
            return
        own[module] = None
        for child in module.children():
            visit(child)

    visit(top)
    return list(own)


def _shard_one(plan: Wrapped, choice: ChosenUnit, own: list[nn.Module], site: Site) -> ShardUnit:
    for module in own:
        tensors = [*module._parameters.values(), *module._buffers.values()]
        if any(t is not None and t.is_meta for t in tensors):
            fill_module(module, site.device, plan.settings.param_init_fn)
    for record in choice.records:
        _refresh(record)
        _check(record)
    on_device = torch.cuda.device(site.device) if site.device.type == "cuda" else contextlib.nullcontext()
    with on_device:
        unit = shard_records(
            [choice.module],
            choice.records,
            mesh=site.mesh,
            sharding=sharding_of(plan.settings.strategy),
            mp_policy=plan.precision,
        )
    if plan.settings.backward_prefetch is not BackwardPrefetch.BACKWARD_PRE:
        unit.backward_prefetch = []
    _keep_gradients_low(plan, unit)
    place_buffers(own, plan.buffer_dtype, site.device)
    return unit


def _refresh(record: ParameterRecord) -> None:
    """`param_init_fn` may have put another parameter in the module."""
    home = record.homes[0]
    current = home.module._parameters[home.name]
    if current is not None:
        record.param = current


def _check(record: ParameterRecord) -> None:
    taken = taken_by(record.param)
    if taken is not None:
        raise ShardingError(
            f"{record.fqn} is tied to {taken}, which another wrapped module has taken already; give the choice of "
            "modules to auto_wrap_policy, which lets the outermost common one have it, or wrap only their common parent"
        )
    if record.param.dim() == 0:
        raise ShardingError(
            f"{record.fqn}: a scalar parameter cannot be sharded; make it 1-D with one element, or pass it in "
            "ignored_states"
        )


def _keep_gradients_low(plan: Wrapped, unit: ShardUnit) -> None:
    policy = plan.settings.mixed_precision
    if policy is None or plan.island or not policy.keep_low_precision_grads:
        return
    for group in unit.groups:
        for registration in sharded_parameters(group):
            if not hasattr(registration.sharded, "grad_dtype"):
                raise UnsupportedError(
                    "FSDP: MixedPrecision(keep_low_precision_grads=True) needs a torch with Tensor.grad_dtype; "
                    "upgrade torch, or leave it False"
                )
            registration.sharded.grad_dtype = group.precision.grad


# What a buffer was before buffer_dtype, by attribute of its module: state dicts show it.
_ORIGINAL_DTYPES = "_fsdp_buffer_dtypes"


@torch.no_grad()
def place_buffers(modules: Iterable[nn.Module], dtype: torch.dtype | None, device: torch.device) -> None:
    """Move buffers to `device` and cast floating ones to `dtype`."""
    for module in modules:
        for name, buffer in module._buffers.items():
            if buffer is None:
                continue
            target = buffer.dtype if dtype is None or not buffer.is_floating_point() else dtype
            if target != buffer.dtype:
                module.__dict__.setdefault(_ORIGINAL_DTYPES, {})[name] = buffer.dtype
            if target != buffer.dtype or buffer.device.type != device.type:
                module._buffers[name] = buffer.to(device, target)


def original_buffer_dtypes(root: nn.Module) -> dict[str, torch.dtype]:
    """By name, the dtype of every buffer that `place_buffers` cast."""
    return {
        f"{prefix}.{name}" if prefix else name: dtype
        for prefix, module in root.named_modules()
        for name, dtype in module.__dict__.get(_ORIGINAL_DTYPES, {}).items()
    }


def become_inner(unit: ShardUnit, settings: Settings) -> None:
    """An outer module was wrapped: inputs arrive cast by it."""
    inner = core_precision(settings.mixed_precision, outermost=False)
    unit.policy = replace(unit.policy, cast_forward_inputs=inner.cast_forward_inputs)


def note_low_precision_masters(model: nn.Module) -> None:
    """The optimizer updates what it finds: 16-bit weights lose small updates."""
    low = next(
        (
            n
            for n, p in model.named_parameters()
            if p.requires_grad and p.dtype in (torch.bfloat16, torch.float16)
        ),
        None,
    )
    if low is not None:
        log.warning(
            "unishard: %s is 16-bit and will be updated in 16 bits, as FSDP does; for fp32 master weights load the "
            "model in float32 and pass MixedPrecision(param_dtype=torch.bfloat16)",
            low,
        )
