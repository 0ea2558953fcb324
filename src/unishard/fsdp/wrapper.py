"""`FullyShardedDataParallel`: FSDP1's wrapper around a module that unishard shards."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from unishard.errors import ShardingError, StateError
from unishard.fsdp.mesh import build_fsdp_mesh, compute_device
from unishard.fsdp.options import (
    BackwardPrefetch,
    MixedPrecision,
    Settings,
    ShardingStrategy,
    as_backward_prefetch,
    as_mixed_precision,
    as_strategy,
    check_offload,
    sharding_of,
)
from unishard.fsdp.refused import refuse
from unishard.fsdp.state_dict import INNER, MARK, finish_state_dict, prepare_to_load, tidy_load_report
from unishard.fsdp.state_dict_methods import StateDictMethods
from unishard.fsdp.state_dict_type import StateDictSettings
from unishard.fsdp.summon import summoned
from unishard.fsdp.units import (
    Site,
    Wrapped,
    become_inner,
    note_low_precision_masters,
    read_ignored,
    runs_forward,
    shard_wrapped,
)
from unishard.fsdp.wrap import Choice, choose_by_policy
from unishard.optim.clip import clip_grad_norm_
from unishard.sharding.unit import ShardUnit, unit_of, units_under

log = logging.getLogger("unishard")


class FullyShardedDataParallel(StateDictMethods):
    """Shard `module`, and with `auto_wrap_policy` modules inside it one by one. All ranks construct together.

    Parameters keep their names and are DTensors between uses, whatever `use_orig_params` says; weights start as rank
    0's. Attributes, methods and indexing reach the wrapped module, whose own forward gathers and releases: calling
    `model.module` or a method that ends in forward (`generate`) is as good as calling `model`.

    Args:
        module: what to wrap. Its wrapped children are replaced in place.
        process_group: the ranks to shard over; for hybrid strategies (shard group, replicate group). Default: all
            ranks, hybrid ones sharding within LOCAL_WORLD_SIZE.
        sharding_strategy: default FULL_SHARD.
        cpu_offload: `CPUOffload`; refused on accelerators in this version.
        auto_wrap_policy: see `unishard.fsdp.wrap`. Without one, everything is gathered at once.
        backward_prefetch: BACKWARD_PRE gathers the next unit early; BACKWARD_POST and None do not prefetch.
        mixed_precision: `MixedPrecision`.
        ignored_modules, ignored_states: modules, or parameters, to leave as they are; give one of the two.
        param_init_fn: initialises a module made on the meta device; default: the modules' `reset_parameters`.
        device_id: where to compute; leave it out on a CPU.
        sync_module_states: both values accepted; rank 0's weights and buffers always count.
        forward_prefetch: both values accepted; the order of the last step is always prefetched by one unit.
        limit_all_gathers: both values accepted; at most one unit is gathered ahead.
        use_orig_params: both values accepted; parameters always keep their names, shapes and `requires_grad`.
        device_mesh: (dp_shard,) or, for hybrid strategies, (dp_replicate, dp_shard); excludes `process_group`.

    Raises:
        ShardingError: arguments that do not fit each other or the model. UnsupportedError: what is not available.

    Source: PyTorch FSDP (Zhao et al. 2023, sections 3 and 4).

    >>> model = FullyShardedDataParallel(nn.Linear(3, 2))
    >>> [name for name, _ in model.named_parameters()]
    ['weight', 'bias']
    """

    def __init__(
        self,
        module: nn.Module,
        process_group: Any = None,
        sharding_strategy: Any = None,
        cpu_offload: Any = None,
        auto_wrap_policy: Any = None,
        backward_prefetch: Any = BackwardPrefetch.BACKWARD_PRE,
        mixed_precision: Any = None,
        ignored_modules: Iterable[nn.Module] | None = None,
        param_init_fn: Callable[[nn.Module], Any] | None = None,
        device_id: int | torch.device | None = None,
        sync_module_states: bool = False,
        forward_prefetch: bool = False,
        limit_all_gathers: bool = True,
        use_orig_params: bool = False,
        ignored_states: Iterable[Any] | None = None,
        device_mesh: Any = None,
    ) -> None:
        super().__init__()
        _check_module(module)
        settings = Settings(
            strategy=as_strategy(sharding_strategy),
            mixed_precision=as_mixed_precision(mixed_precision),
            cpu_offload=cpu_offload,
            backward_prefetch=as_backward_prefetch(backward_prefetch),
            param_init_fn=param_init_fn,
        )
        modules, params = read_ignored(module, ignored_modules, ignored_states)
        device = compute_device(device_id, device_mesh, process_group)
        check_offload(cpu_offload, device)
        if settings.backward_prefetch is BackwardPrefetch.BACKWARD_POST:
            log.info(
                "unishard: BACKWARD_POST does not prefetch here: it needs as little memory, and overlaps less"
            )
        mesh = build_fsdp_mesh(sharding_of(settings.strategy), process_group, device_mesh, device)
        site = Site(mesh, device, modules, params)
        note_low_precision_masters(module)
        inner = {} if auto_wrap_policy is None else _choose(module, auto_wrap_policy, settings, site)
        wrapped = [_plan(module, m, settings, inner) for m in (module, *inner)]
        shard_wrapped(module, wrapped, site)
        _replace_children(module, {w.module: _around(type(self), w, site) for w in wrapped[1:]})
        for below in FullyShardedDataParallel.fsdp_modules(module):
            below._become_inner()
        self._hold(wrapped[0], site)

    def _hold(self, wrapped: Wrapped, site: Site) -> None:
        self._settings = wrapped.settings
        self._mesh = site.mesh
        self._device = site.device
        self._state_dict_settings = StateDictSettings()
        self._is_inner = not wrapped.outermost
        self._modules[INNER] = wrapped.module
        self.training = wrapped.module.training
        self.register_load_state_dict_pre_hook(prepare_to_load)
        self.register_load_state_dict_post_hook(tidy_load_report)

    def _become_inner(self) -> None:
        """Another module was wrapped around this one."""
        if not self._is_inner:
            self._is_inner = True
            become_inner(self._unit, self._settings)

    # the wrapped module --------------------------------------------------------------------------------------

    @property
    def module(self) -> nn.Module:
        """The wrapped module, also below a later activation-checkpointing wrapper."""
        inner: Any = self._modules[INNER]
        return getattr(inner, "_checkpoint_wrapped_module", inner)

    @property
    def _unit(self) -> ShardUnit:
        unit = unit_of(self.module)
        if unit is None:
            raise StateError(
                f"the {type(self.module).__name__} inside FSDP is not sharded; wrap a fresh module with FSDP(...)"
            )
        return unit

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            inner = self.__dict__.get("_modules", {}).get(INNER)
            # Protocols (copying, pickling) ask every object for dunder names; the wrapped module's are not ours.
            if inner is None or (name.startswith("__") and name.endswith("__")):
                raise
            return getattr(inner, name)

    def __getitem__(self, key: Any) -> Any:
        inner: Any = self._modules[INNER]
        return inner[key]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the wrapped module."""
        inner: Any = self._modules[INNER]
        return inner(*args, **kwargs)

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """The parameters under the names they had before wrapping."""
        for name, param in super().named_parameters(prefix, recurse, remove_duplicate):
            yield name.replace(MARK, ""), param

    def named_buffers(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """The buffers under the names they had before wrapping."""
        for name, buffer in super().named_buffers(prefix, recurse, remove_duplicate):
            yield name.replace(MARK, ""), buffer

    def _fqn_modifiers(self) -> dict[str, str]:
        """What torch.distributed.checkpoint leaves out of names."""
        return {"": INNER}

    # what a script asks about --------------------------------------------------------------------------------

    @property
    def sharding_strategy(self) -> ShardingStrategy:
        """The strategy of this module."""
        return self._settings.strategy

    @property
    def mixed_precision(self) -> MixedPrecision | None:
        """The dtypes of this module."""
        return self._settings.mixed_precision

    @property
    def process_group(self) -> dist.ProcessGroup:
        """The group that parameters are sharded over."""
        return self._mesh.get_group(self._mesh.ndim - 1)

    @property
    def rank(self) -> int:
        """This rank within `process_group`."""
        return self._mesh.get_local_rank(self._mesh.ndim - 1)

    @property
    def world_size(self) -> int:
        """The size of `process_group`."""
        return self._mesh.size(self._mesh.ndim - 1)

    def check_is_root(self) -> bool:
        """Whether no other FSDP module is wrapped around this one."""
        return not self._is_inner

    @staticmethod
    def fsdp_modules(module: nn.Module, root_only: bool = False) -> list[FullyShardedDataParallel]:
        """The FSDP modules in `module`, itself included, outermost first."""
        found = [m for m in module.modules() if isinstance(m, FullyShardedDataParallel)]
        return [m for m in found if not (root_only and m._is_inner)]

    # training ------------------------------------------------------------------------------------------------

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Let backward keep gradients on this rank, whole, until a backward outside reduces the sums.

        Raises `StateError` for a module inside another FSDP module.
        """
        self._require_outermost("no_sync()")
        before = [(unit, unit.reduce_gradients, unit.reduce_across_replicas) for unit in units_under(self)]
        for unit, _, _ in before:
            unit.reduce_gradients = unit.reduce_across_replicas = False
        try:
            yield
        finally:
            for unit, reduce, across in before:
                unit.reduce_gradients, unit.reduce_across_replicas = reduce, across

    def clip_grad_norm_(self, max_norm: float, norm_type: float = 2.0) -> torch.Tensor:
        """Scale gradients so that their global norm is at most `max_norm`; return the norm before, a plain scalar.

        Every element counts once under every strategy. All ranks call together. Raises `StateError` for a module
        inside another FSDP module.
        """
        self._require_outermost("clip_grad_norm_()")
        return clip_grad_norm_(self.parameters(), max_norm, norm_type)

    def _require_outermost(self, call: str) -> None:
        if self._is_inner:
            raise StateError(
                f"FSDP: {call} of a {type(self.module).__name__} inside another FSDP module; call it on the outermost"
            )

    @staticmethod
    @contextmanager
    def summon_full_params(
        module: nn.Module,
        recurse: bool = True,
        writeback: bool = True,
        rank0_only: bool = False,
        offload_to_cpu: bool = False,
        with_grads: bool = False,
    ) -> Iterator[None]:
        """Show whole plain parameters, in the dtype they rest in, inside the block. All ranks enter together.

        With `writeback` each rank keeps its own part of what it wrote, and replicas follow the first one. A forward in
        the block computes with the values from before it.

        Args:
            recurse: also the FSDP modules inside `module`.
            rank0_only: the other ranks see what rests; needs `writeback=False`.
            offload_to_cpu: hold the whole parameters in host memory.
            with_grads: show whole gradients too, and write them back.

        Raises:
            UnsupportedError: `writeback` with `rank0_only`. StateError: during forward or backward, or nested.
        """
        units = units_under(module) if recurse else iter(_units_of(module))
        with summoned(list(units), writeback, rank0_only, offload_to_cpu, with_grads):
            yield

    def apply(self, fn: Callable[[nn.Module], None]) -> Any:
        """Apply `fn` to every submodule, each wrapped one's parameters whole meanwhile; what `fn` writes is kept."""
        with FullyShardedDataParallel.summon_full_params(self, recurse=False):
            return super().apply(fn)

    # state dicts ---------------------------------------------------------------------------------------------

    def state_dict(
        self, *args: Any, destination: Any = None, prefix: str = "", keep_vars: bool = False
    ) -> Any:
        """Values under the names before wrapping: whole plain tensors on every rank, or what `state_dict_type` says.

        All ranks call together.
        """
        result = super().state_dict(*args, destination=destination, prefix=prefix, keep_vars=keep_vars)
        if not self._is_inner or (destination is None and not args):
            settings = FullyShardedDataParallel.get_state_dict_type(self)
            finish_state_dict(self, result, args[1] if len(args) > 1 else prefix, settings)
        return result

    def register_comm_hook(self, *args: Any, **kwargs: Any) -> None:
        """Not available; raises `UnsupportedError`."""
        refuse("register_comm_hook", "set MixedPrecision(reduce_dtype=...) to choose what travels")


def _check_module(module: Any) -> None:
    if not isinstance(module, nn.Module):
        raise ShardingError(f"FSDP wraps an nn.Module, not {type(module).__name__}")
    if isinstance(module, FullyShardedDataParallel):
        raise ShardingError(
            f"FSDP(FSDP({type(module.module).__name__})): a parameter cannot be sharded twice; wrap each module once"
        )
    if not runs_forward(module):
        raise ShardingError(
            f"FSDP cannot wrap a {type(module).__name__}, which has no forward and would never be gathered; wrap the "
            "modules inside it, or the module that holds it"
        )


def _units_of(module: nn.Module) -> list[ShardUnit]:
    inner = module.module if isinstance(module, FullyShardedDataParallel) else module
    unit = unit_of(inner)
    return [] if unit is None else [unit]


def _choose(module: nn.Module, policy: Any, settings: Settings, site: Site) -> Choice:
    for name, child in module.named_modules():
        if isinstance(child, FullyShardedDataParallel):
            raise ShardingError(
                f"FSDP: auto_wrap_policy on a model whose {name!r} is wrapped already; wrap by hand or by policy"
            )
    islands = settings.mixed_precision._module_classes_to_ignore if settings.mixed_precision else ()
    chosen = choose_by_policy(module, policy, set(site.ignored_modules), set(site.ignored_params), islands)
    containers = sum(not runs_forward(m) for m in chosen)
    if containers:
        log.info(
            "unishard: the policy chose %d containers without forward; they stay as they are", containers
        )
    if not chosen:
        log.warning(
            "unishard: auto_wrap_policy matched no module of %s; all of it will be gathered at once",
            type(module).__name__,
        )
    return {m: overrides for m, overrides in chosen.items() if runs_forward(m)}


def _plan(root: nn.Module, module: nn.Module, settings: Settings, inner: Choice) -> Wrapped:
    policy = settings.mixed_precision
    ignored = tuple(policy._module_classes_to_ignore) if policy is not None else ()
    island = module is not root and isinstance(module, ignored)
    return Wrapped(module, settings.override(inner.get(module, {})), module is root, island)


def _around(cls: type[FullyShardedDataParallel], wrapped: Wrapped, site: Site) -> FullyShardedDataParallel:
    """A wrapper around a module that is sharded already."""
    made = cls.__new__(cls)
    nn.Module.__init__(made)
    made._hold(wrapped, site)
    return made


def _replace_children(root: nn.Module, wrappers: dict[nn.Module, FullyShardedDataParallel]) -> None:
    for parent in list(root.modules()):
        for name, child in list(parent._modules.items()):
            if child in wrappers:
                parent._modules[name] = wrappers[child]
