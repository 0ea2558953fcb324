"""What DeepSpeed's checkpoints say besides tensors: counters, loss scale, schedule, the user's own values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from unishard.checkpoint.convert.format import Opened, put_counters
from unishard.checkpoint.convert.torch_read import Foreign, Stored

_OWN = {
    "module",
    "buffer_names",
    "optimizer",
    "param_shapes",
    "frozen_param_shapes",
    "shared_params",
    "frozen_param_fragments",
    "lr_scheduler",
    "data_sampler",
    "random_ltd",
    "skipped_steps",
    "global_steps",
    "global_samples",
    "dp_world_size",
    "mp_world_size",
    "checkpoint_parallel_dimensions",
    "ds_config",
    "ds_version",
    "universal_checkpoint_info",
}


def put_values(model: Mapping[str, Any], zero: Mapping[str, Any], opened: Opened) -> None:
    """Enter the counters and the client state of `model`, and the loss scale that `zero` or `model` hold."""
    client: dict[str, Any] = {}
    for name, value in model.items():
        if name not in _OWN:
            if _holds(value, Foreign):
                opened.notes.append(f"client state {name!r} holds objects of other classes and was left out")
            else:
                client[name] = materialized(value)
    for left_out in ("data_sampler", "random_ltd"):
        if model.get(left_out) is not None:
            opened.notes.append(f"{left_out}: its state has no counterpart and was left out")
    put_counters(
        opened.catalog,
        client,
        global_steps=model.get("global_steps", 0),
        global_samples=model.get("global_samples"),
        skipped_steps=model.get("skipped_steps", 0),
        loss_scale=_loss_scale(zero, model.get("optimizer") or {}),
        lr_scheduler=materialized(model.get("lr_scheduler")),
    )


def _holds(value: Any, kind: type) -> bool:
    if isinstance(value, Mapping):
        return any(_holds(v, kind) for v in value.values())
    if isinstance(value, list | tuple | set):
        return any(_holds(v, kind) for v in value)
    return isinstance(value, kind)


def materialized(value: Any) -> Any:
    """`value` with tensors read: for what is small."""
    if isinstance(value, Stored):
        return value.read()
    if isinstance(value, Mapping):
        return {key: materialized(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(materialized(v) for v in value)
    return value


def _loss_scale(zero: Mapping[str, Any], optimizer: Mapping[str, Any]) -> dict[str, float] | None:
    """As our dynamic loss scale keeps it; nothing for a fixed one, whose value comes from the configuration."""
    scaler = zero.get("loss_scaler")
    if isinstance(scaler, Foreign) and scaler.get("dynamic"):
        iteration, last = int(scaler.get("cur_iter", 0)), int(scaler.get("last_overflow_iter", -1))
        scale, left = scaler.get("cur_scale"), scaler.get("cur_hysteresis", 1)
    elif optimizer.get("dynamic_loss_scale"):
        iteration, last = int(optimizer["cur_iter"]), int(optimizer.get("last_overflow_iter", -1))
        scale, left = optimizer["cur_scale"], 1
    else:
        return None
    scale = float(scale.read() if isinstance(scale, Stored) else scale)  # pyright: ignore[reportArgumentType]
    return {
        "scale": scale,
        "hysteresis_left": int(left),
        "clean": max(0, iteration - last - 1),
        "overflows_at_floor": 0,
    }
