"""From a model and a configuration to an engine: every choice is made and checked before the model is touched."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader, Dataset

from unishard.config import ResolvedConfig, load_config, resolve
from unishard.dist.agree import agree, require_same
from unishard.dist.collectives import communicator
from unishard.dist.mesh import Axes, axes_of, build_mesh, ensure_process_group
from unishard.engine.engine import Engine
from unishard.errors import ConfigError, ShardingError
from unishard.optim.base import build_optimizer
from unishard.optim.elementwise import check_client_optimizer
from unishard.optim.loss_scale import DynamicLossScale, LossScale, NoLossScale, StaticLossScale
from unishard.optim.pieces import Pieces, user_groups
from unishard.optim.schedules import build_schedule
from unishard.optim.sharded import ShardedOptimizer, UpdateRules
from unishard.sharding.build import ShardPlan
from unishard.sharding.host_memory import prepare_heap
from unishard.sharding.in_place import ShardedModel, shard_in_place
from unishard.sharding.placement import Placement, preset
from unishard.sharding.ports import ON_DEVICE, Tiers
from unishard.sharding.precision import MixedPrecision, as_dtype
from unishard.sharding.wrap import choose_holders

log = logging.getLogger("unishard")


class Makers(NamedTuple):
    """The classes of what `initialize` builds: a door may give its users subclasses with more names."""

    engine: type[Engine] = Engine
    optimizer: Callable[[ResolvedConfig], type[ShardedOptimizer]] = lambda rc: ShardedOptimizer
    schedules: Mapping[str, Callable[..., Any]] = {}
    """By type, in place of the engine's own."""
    casts_inputs: Callable[[ResolvedConfig], bool] = lambda rc: not _refuses_casts(rc)
    """Whether floating inputs of the model are cast to a 16-bit compute dtype."""
    keeps_buffers: bool = False
    """Whether floating buffers keep their dtype unless `buffer_dtype` says otherwise."""


class Initialized(NamedTuple):
    """What `initialize` returns, in DeepSpeed's order."""

    engine: Engine
    optimizer: Any
    dataloader: DataLoader[Any] | None
    lr_scheduler: Any


def initialize(
    args: Any = None,
    model: nn.Module | None = None,
    optimizer: torch.optim.Optimizer | Callable[[Any], torch.optim.Optimizer] | None = None,
    model_parameters: Any = None,
    training_data: Dataset[Any] | None = None,
    lr_scheduler: Any = None,
    distributed_port: int | None = None,
    mpu: Any = None,
    dist_init_required: bool | None = None,
    collate_fn: Callable[[Any], Any] | None = None,
    config: Any = None,
    mesh: Any = None,
    mesh_param: Any = None,
    config_params: Any = None,
    device: torch.device | None = None,
    makers: Makers = Makers(),  # noqa: B008 - immutable
) -> Initialized:
    """Shard `model` as `config` says and return (engine, optimizer, dataloader, lr_scheduler).

    The process group is created when there is none. All ranks call together.

    Args:
        args: anything with `deepspeed_config`, read when `config` is absent.
        model: the model; every rank continues with the first rank's weights.
        optimizer: built by the caller on the model's parameters (its groups are kept), or a function that builds one.
        model_parameters: parameters, groups or (name, parameter) pairs for the configured optimizer.
        training_data: a dataset, for a loader of micro-batches split over data-parallel ranks.
        lr_scheduler: a scheduler, or a function from optimizer to scheduler.
        config: a path, a dict, or a `Config`. mesh: a 1-D or (dp_replicate, dp_shard) `DeviceMesh`.
        device: where to compute; default: this local rank's GPU if there is any, else the CPU.
        makers: the classes of engine and optimizer, for doors.

    Raises:
        ConfigError: all problems of the configuration at once. ShardingError: a model or mesh that cannot be sharded.

    >>> model = nn.Linear(2, 2)
    >>> config = {"train_micro_batch_size_per_gpu": 1, "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}}}
    >>> engine, optimizer, _, _ = initialize(model=model, config=config)
    >>> engine.train_batch_size()
    1
    """
    if model is None or not isinstance(model, nn.Module):
        raise ConfigError(f"initialize needs model=, an nn.Module; got {type(model).__name__}")
    if mpu is not None or mesh_param is not None:
        raise ConfigError("mpu= and mesh_param= are not available; pass a DeviceMesh as mesh=")
    if dist_init_required is False and not dist.is_initialized():
        raise ConfigError(
            "dist_init_required=False, but there is no process group; create one, or leave it out"
        )
    device = _device() if device is None else device
    if distributed_port is not None:
        os.environ.setdefault("MASTER_PORT", str(distributed_port))
    ensure_process_group(device)
    rc, axes = _resolve(args, config if config is not None else config_params, model, mesh, device)
    if rc.log_level is not None:
        log.setLevel(rc.log_level)
    _log_once(rc)
    _configure_checkpointing(rc)
    if rc.seed is not None:
        torch.manual_seed(rc.seed)
    client = _client_optimizer(optimizer, model_parameters, model, rc)
    leaves = rc.zero_optimization.leaf_module
    if leaves is not None:
        from unishard.sharding.leaves import mark_leaves

        if not mark_leaves(model, leaves.classes, leaves.names, leaves.name_suffixes):
            log.warning("unishard: no module of %s fits leaf_module (%s)", type(model).__name__, leaves)
    tiers = _tiers(rc, device)
    if tiers is not ON_DEVICE:
        prepare_heap(sum(p.numel() for p in model.parameters()) // axes.world_size)
    plan = ShardPlan(preset(rc.sharding), axes, _precision(rc, makers), device, tiers=tiers)
    sharded = _shard(model, plan, rc)
    _cast_buffers(model, rc, makers)
    wrapped = _optimizer(client, model_parameters, model, sharded, rc, makers)
    scheduler = _scheduler(lr_scheduler, wrapped, rc, makers)
    loader = None
    if training_data is not None:
        from unishard.engine.data import build_dataloader

        loader = build_dataloader(training_data, collate_fn, rc, axes)
    engine = makers.engine(sharded, rc, axes, device, wrapped, scheduler, loader)
    return Initialized(engine, wrapped, loader, scheduler)


def _tiers(rc: ResolvedConfig, device: torch.device) -> Tiers:
    if not rc.zero_optimization.offloads:
        return ON_DEVICE
    from unishard.engine.tiers import build_tiers

    return build_tiers(rc, device)


def _shard(model: nn.Module, plan: ShardPlan, rc: ResolvedConfig) -> ShardedModel:
    zero = rc.zero_optimization
    alone = plan.sharding.parameter is Placement.SHARD and zero.stage3_max_reuse_distance == 0
    sharded = shard_in_place(model, plan, choose_holders(model) if alone else None)
    sharded.schedule.root.keep_if_root = not alone
    sharded.schedule.prefetch = zero.stage3_prefetch_bucket_size > 0
    return sharded


def _device() -> torch.device:
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def _resolve(
    args: Any, config: Any, model: nn.Module, mesh: Any, device: torch.device
) -> tuple[ResolvedConfig, Axes]:
    """Read and resolve the configuration on every rank, and check that all ranks mean the same run."""
    world = communicator(dist.group.WORLD)
    with agree(world, "read the configuration"):
        if config is None:
            config = getattr(args, "deepspeed_config", None)
        if config is None:
            raise ConfigError("initialize needs config= (a path, dict or Config), or args.deepspeed_config")
        source = load_config(config)
        replicate_only = source.sharding in ("NO_SHARD", "DDP")
        rc = resolve(
            source,
            dp_world_size=mesh.size() if mesh is not None else world.size,
            world_size_source="the mesh" if mesh is not None else "the process group",
            local_world_size=int(os.environ.get("LOCAL_WORLD_SIZE", world.size)),
            hidden_size=_hidden_size(model),
        )
    require_same(world, "the configuration", repr(rc.as_dict()), "pass the same configuration on every rank")
    sharding = preset(rc.sharding)
    replicate_only = not sharding.sharded_anywhere
    if mesh is None:
        replicas = 1 if rc.mesh is None else rc.mesh.dp_replicate or 1
        mesh = build_mesh(device.type, dp_replicate=replicas)
    elif sharding.needs_replicas and mesh.ndim != 2:
        raise ShardingError(
            f"{sharding} needs a 2-D mesh (dp_replicate, dp_shard), not one of {mesh.ndim} dimensions"
        )
    return rc, axes_of(mesh, replicate_only=replicate_only)


def _hidden_size(model: nn.Module) -> int | None:
    described = getattr(model, "config", None)
    for name in ("hidden_size", "n_embd", "d_model"):
        value = getattr(described, name, None)
        if isinstance(value, int):
            return value
    return None


def _log_once(rc: ResolvedConfig) -> None:
    if dist.get_rank() == 0:
        for line in rc.log_lines:
            log.info("unishard: %s", line)
        if rc.dump_state:
            for row in rc.as_table():
                log.info("unishard: %s = %s (%s)", row.key, row.value, row.origin)


def _configure_checkpointing(rc: ResolvedConfig) -> None:
    """What the configuration says about recomputation, over what `unishard.checkpointing.configure` was told before."""
    section = rc.activation_checkpointing
    given = {
        key: getattr(section, key)
        for key in type(section).model_fields
        if rc.origin(f"activation_checkpointing.{key}") != "default"
    }
    if given:
        from unishard.checkpointing.settings import configure_keys

        configure_keys(given)


def _precision(rc: ResolvedConfig, makers: Makers) -> MixedPrecision:
    compute = as_dtype(rc.compute_dtype)
    return MixedPrecision(
        param_dtype=compute,
        master_dtype=torch.float32,
        grad_dtype=as_dtype(rc.grad_accum_dtype) if rc.grad_accum_dtype else torch.float32,
        reduce_dtype=as_dtype(rc.communication_data_type) if rc.communication_data_type else compute,
        output_dtype=as_dtype(rc.output_dtype) if rc.output_dtype else None,
        cast_forward_inputs=compute is not torch.float32 and makers.casts_inputs(rc),
    )


def _refuses_casts(rc: ResolvedConfig) -> bool:
    """Inputs are cast to the compute dtype unless the configuration itself says `"auto_cast": false`."""
    return bool(rc.fp16.enabled) and not rc.fp16.auto_cast and rc.origin("fp16.auto_cast") != "default"


def _cast_buffers(model: nn.Module, rc: ResolvedConfig, makers: Makers) -> None:
    """Floating buffers follow `buffer_dtype`, or the compute dtype, so that what they are added to stays in it."""
    asked = rc.buffer_dtype or (None if makers.keeps_buffers else rc.compute_dtype)
    dtype = torch.float32 if asked is None else as_dtype(asked)
    if dtype is torch.float32 and rc.buffer_dtype is None:
        return
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.is_floating_point() and buffer.dtype.itemsize > 1:
                module._buffers[name] = buffer.to(dtype)


def _client_optimizer(
    optimizer: Any, model_parameters: Any, model: nn.Module, rc: ResolvedConfig
) -> torch.optim.Optimizer | None:
    """The caller's optimizer, checked before anything is sharded."""
    if optimizer is None:
        return None
    if callable(optimizer) and not isinstance(optimizer, torch.optim.Optimizer):
        optimizer = optimizer(user_groups(model_parameters, model))
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise ConfigError(
            f"optimizer must be a torch.optim.Optimizer or a function of parameters, not {optimizer!r}"
        )
    if not rc.zero_allow_untested_optimizer:
        check_client_optimizer(optimizer)
    if optimizer.state and not _as_built(optimizer):
        raise ConfigError(
            f"{type(optimizer).__name__} has stepped already: its state belongs to whole parameters; build it fresh "
            "and pass it to initialize before the first step"
        )
    return optimizer


def _as_built(optimizer: torch.optim.Optimizer) -> bool:
    """Whether all state is what the constructor makes: torch's Adagrad begins with sums."""
    return type(optimizer) is torch.optim.Adagrad and all(
        float(state["step"]) == 0 for state in optimizer.state.values()
    )


def _build_again(optimizer: torch.optim.Optimizer) -> None:
    """State as the constructor makes it, for the pieces that the groups hold now."""
    optimizer.state.clear()
    for group in optimizer.param_groups if type(optimizer) is torch.optim.Adagrad else ():
        for piece in group["params"]:
            total = torch.full_like(piece, group["initial_accumulator_value"])
            optimizer.state[piece] = {"step": torch.zeros(()), "sum": total}


def _optimizer(
    client: torch.optim.Optimizer | None,
    model_parameters: Any,
    model: nn.Module,
    sharded: ShardedModel,
    rc: ResolvedConfig,
    makers: Makers,
) -> ShardedOptimizer | None:
    pieces = Pieces(sharded.groups)
    if client is not None:
        for group in client.param_groups:
            group["params"] = pieces.of(group["params"])
        _build_again(client)
        inner = client
    elif rc.optimizer is not None:
        groups = [{**g, "params": pieces.of(g["params"])} for g in user_groups(model_parameters, model)]
        inner = build_optimizer(rc.optimizer.type, groups, rc.optimizer.params)
    else:
        return None
    _set_divisors(sharded, rc)
    offload = rc.zero_optimization.offload_optimizer
    wrapped = makers.optimizer(rc)(
        inner,
        sharded.schedule,
        pieces,
        _loss_scale(rc),
        UpdateRules(
            max_norm=rc.gradient_clipping,
            defer_gather=rc.overlap_param_gather,
            delayed=bool(offload is not None and offload.delayed_update),
        ),
    )
    wrapped.skips_overflow = bool(rc.fp16.enabled or (rc.bf16.enabled and rc.bf16.check_grad_overflow))
    return wrapped


def _set_divisors(sharded: ShardedModel, rc: ResolvedConfig) -> None:
    """`prescale_gradients` divides before the wire, otherwise after; the result is the same either way."""
    for group in sharded.groups:
        if rc.gradient_allreduce_op == "sum":
            group.gradients.divisor = 1.0
        if rc.prescale_gradients:
            factor = rc.gradient_predivide_factor
            group.gradients.predivide = float(factor) if factor != 1.0 else float(group.axes.world_size)


def _loss_scale(rc: ResolvedConfig) -> LossScale:
    fp16 = rc.fp16
    if not fp16.enabled:
        return NoLossScale()
    limit = fp16.max_consecutive_overflows
    if fp16.loss_scale:
        return StaticLossScale(float(fp16.loss_scale), max_consecutive_overflows=limit)
    return DynamicLossScale(
        initial=2.0**fp16.initial_scale_power,
        window=fp16.loss_scale_window,
        hysteresis=fp16.hysteresis,
        consecutive_hysteresis=fp16.consecutive_hysteresis,
        min_scale=fp16.min_loss_scale,
        max_consecutive_overflows=limit,
    )


def _scheduler(client: Any, optimizer: ShardedOptimizer | None, rc: ResolvedConfig, makers: Makers) -> Any:
    if client is None and rc.scheduler is None:
        return None
    if optimizer is None:
        raise ConfigError("a scheduler needs an optimizer; add an optimizer section, or pass optimizer=")
    if rc.scheduler is not None and client is None:
        own = makers.schedules.get(rc.scheduler.type)
        if own is not None:
            return own(optimizer, **rc.scheduler.params)
        return build_schedule(rc.scheduler.type, optimizer, rc.scheduler.params)
    if hasattr(client, "step"):
        return client
    if callable(client):
        return client(optimizer)
    raise ConfigError(f"lr_scheduler must have step() or be a function of the optimizer, not {client!r}")
