"""`deepspeed.initialize` and the command-line arguments that belong to it."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from unishard.config import ResolvedConfig
from unishard.deepspeed.parts.collectives import init_distributed
from unishard.deepspeed.parts.configuration import (
    ConfigView,
    DeepSpeedConfigError,
    raw_config,
    with_defaults,
)
from unishard.deepspeed.parts.data import DeepSpeedDataLoader
from unishard.deepspeed.parts.engine import DeepSpeedEngine
from unishard.deepspeed.parts.logs import set_log_level_from_string
from unishard.deepspeed.parts.optimizers import DeepSpeedCPUAdam
from unishard.deepspeed.parts.parameters import show_zero_attributes
from unishard.deepspeed.parts.partitions import ZeRORuntimeException
from unishard.deepspeed.parts.schedules import SCHEDULES
from unishard.deepspeed.parts.zero_init import restore_init_context, shutdown_init_context, watch_gathered
from unishard.deepspeed.parts.zero_optimizers import optimizer_class, show_as_configured
from unishard.engine.initialize import Makers
from unishard.engine.initialize import initialize as build
from unishard.errors import ConfigError, UnsupportedError
from unishard.sharding.in_place import restore_in_place


def initialize(
    args: Any = None,
    model: nn.Module | None = None,
    optimizer: torch.optim.Optimizer | Callable[[Any], torch.optim.Optimizer] | None = None,
    model_parameters: Any = None,
    training_data: Any = None,
    lr_scheduler: Any = None,
    distributed_port: int = 29500,
    mpu: Any = None,
    dist_init_required: bool | None = None,
    collate_fn: Callable[[Any], Any] | None = None,
    config: Any = None,
    mesh_param: Any = None,
    config_params: Any = None,
) -> tuple[DeepSpeedEngine, Any, Any, Any]:
    """Shard `model` as the configuration says; returns (engine, optimizer, dataloader, lr_scheduler).

    As `unishard.initialize`, with DeepSpeed's arguments and defaults (gradients are clipped to norm 1.0 unless
    `gradient_clipping` says otherwise, no progress is printed unless `steps_per_print` asks for it).

    Args:
        args: may carry `deepspeed_config`. model_parameters: parameters or groups; frozen ones may be left in.
        mpu: anything with `get_data_parallel_group()`; model parallelism through it is not available.
        mesh_param: (data, sequence) sizes; only a sequence size of 1.

    Raises:
        DeepSpeedConfigError: all problems of the configuration at once.

    >>> model = nn.Linear(2, 2)
    >>> config = {"train_batch_size": 1, "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}}}
    >>> engine, _, _, _ = initialize(model=model, model_parameters=model.parameters(), config=config)
    >>> engine.gradient_clipping()
    1.0
    """
    if model is None:
        raise DeepSpeedConfigError("deepspeed.initialize requires a model")
    if getattr(optimizer, "fp32_optimizer_states", True) is False:
        raise DeepSpeedConfigError(
            f"{type(optimizer).__name__}(fp32_optimizer_states=False): under an engine states are fp32, as the masters "
            "are; leave it out"
        )
    raw = _config_of(args, config if config is not None else config_params)
    _refuse_slow_offload(raw, optimizer)
    watch_gathered(raw)
    if dist_init_required is not False:
        init_distributed(distributed_port=distributed_port)
    show_zero_attributes()
    torch_adam = bool(((raw.get("optimizer") or {}).get("params") or {}).get("torch_adam"))
    # What is built from here on is not the user's model, even inside `zero.Init`.
    shutdown_init_context()
    try:
        # As in DeepSpeed, a model may be given again, to another engine; the earlier one is of no use then.
        restore_in_place(model)
        built = build(
            model=model,
            optimizer=optimizer,
            model_parameters=model_parameters,
            training_data=training_data,
            lr_scheduler=lr_scheduler,
            collate_fn=collate_fn,
            config=with_defaults(raw),
            mesh=_mesh(mpu, mesh_param),
            dist_init_required=dist_init_required,
            makers=Makers(
                DeepSpeedEngine,
                partial(optimizer_class, torch_adam=torch_adam),
                SCHEDULES,
                _casts_inputs,
                True,
            ),
        )
    except (ConfigError, UnsupportedError) as error:
        raise DeepSpeedConfigError(str(error)) from error
    finally:
        restore_init_context()
    engine: Any = built.engine
    resolved: ResolvedConfig = engine.config
    if optimizer is None and built.optimizer is not None and not torch_adam:
        show_as_configured(built.optimizer.inner, resolved)
    if resolved.log_level is not None:
        set_log_level_from_string(resolved.log_level)
    engine.complete(ConfigView(raw, resolved), args, collate_fn, client=optimizer)
    if built.dataloader is not None:
        engine.training_dataloader = DeepSpeedDataLoader.around(built.dataloader)
    return engine, built.optimizer, engine.training_dataloader, built.lr_scheduler


def _casts_inputs(rc: ResolvedConfig) -> bool:
    """As in DeepSpeed, inputs reach the model in the dtype they come in, unless `fp16.auto_cast` asks for fp16."""
    return bool(rc.fp16.enabled) and rc.fp16.auto_cast is True


def _refuse_slow_offload(raw: dict[str, Any], optimizer: Any) -> None:
    """What `"zero_force_ds_cpu_optimizer": true` is for. Here others offload well too, so it has to be asked for."""
    section = raw.get("zero_optimization")
    offload = section.get("offload_optimizer") if isinstance(section, dict) else None
    asked = raw.get("zero_force_ds_cpu_optimizer") is True and bool(offload)
    if asked and optimizer is not None and not isinstance(optimizer, DeepSpeedCPUAdam):
        raise ZeRORuntimeException(
            f"zero_force_ds_cpu_optimizer is true, and the optimizer is {type(optimizer).__name__}; pass a "
            "DeepSpeedCPUAdam, or leave the key out: any optimizer's state may be offloaded"
        )


def _config_of(args: Any, config: Any) -> dict[str, Any]:
    named = getattr(args, "deepspeed_config", None) or getattr(args, "deepscale_config", None)
    if config is not None and named is not None:
        raise DeepSpeedConfigError(
            f"the configuration is given twice: as an argument and as args.deepspeed_config={named!r}; keep one"
        )
    if config is None and named is None:
        raise DeepSpeedConfigError("initialize needs config=, or --deepspeed_config in args")
    try:
        return raw_config(config if config is not None else named)
    except ConfigError as error:
        raise DeepSpeedConfigError(str(error)) from error


def _mesh(mpu: Any, mesh_param: Any) -> Any:
    if mesh_param is not None and len(mesh_param) > 1 and mesh_param[1] != 1:
        raise UnsupportedError(
            f"mesh_param={mesh_param!r}: sequence parallelism is not available; use a size of 1, and stage 3"
        )
    if mpu is None:
        return None
    sizes = [
        getattr(mpu, name, None) for name in ("get_model_parallel_world_size", "get_pipe_parallel_world_size")
    ]
    if any(size is not None and size() > 1 for size in sizes):
        raise UnsupportedError(
            "mpu: model parallelism outside the engine is not available; apply torch.distributed.tensor.parallel and "
            "shard with unishard.fully_shard"
        )
    from torch.distributed.device_mesh import DeviceMesh

    return DeviceMesh.from_group(
        mpu.get_data_parallel_group(), "cuda" if torch.cuda.is_available() else "cpu"
    )


def add_config_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add `--deepspeed` and `--deepspeed_config` to `parser`, and return it.

    >>> parser = add_config_arguments(argparse.ArgumentParser())
    >>> parser.parse_args(["--deepspeed", "--deepspeed_config", "ds.json"]).deepspeed_config
    'ds.json'
    """
    group = parser.add_argument_group("DeepSpeed", "DeepSpeed configurations")
    group.add_argument(
        "--deepspeed", default=False, action="store_true", help="use the engine (for user code)"
    )
    group.add_argument("--deepspeed_config", default=None, type=str, help="path of the ds_config JSON file")
    group.add_argument("--deepscale", default=False, action="store_true", help=argparse.SUPPRESS)
    group.add_argument("--deepscale_config", default=None, type=str, help=argparse.SUPPRESS)
    return parser
