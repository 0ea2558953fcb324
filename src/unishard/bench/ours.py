"""unishard's own rows: every preset through both doors, read off the table of presets."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from unishard.bench.contestant import (
    Contestant,
    EngineTrainer,
    Held,
    Level,
    MicroContext,
    TorchTrainer,
    optimizer_state,
)
from unishard.bench.model import build_model
from unishard.bench.plan import ADAMW, Plan
from unishard.sharding.placement import PRESETS, Placement, Reshard, Sharding

Update = Literal["step", "in-backward", "delayed"]
"""When parameters are updated."""


def config(plan: Plan, preset: str, overlap: bool) -> dict[str, Any]:
    """The configuration of one contestant of the config door."""
    keys: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": plan.shape.micro_batch,
        "gradient_accumulation_steps": plan.accumulation,
        "optimizer": {"type": "AdamW", "params": ADAMW},
        "bf16": {"enabled": plan.dtype == "bf16"},
        "steps_per_print": 1_000_000_000,
        "sharding": preset,
        "overlap_param_gather": overlap,
    }
    if PRESETS[preset].needs_replicas:
        keys["mesh"] = {"dp_replicate": 2}
    return keys


def build_config_door(
    plan: Plan,
    *,
    preset: str,
    overlap: bool = False,
    offload: tuple[str, ...] = (),
    device: str = "nvme",
    update: Update = "step",
) -> EngineTrainer:
    import unishard

    model = build_model(plan)
    tier: dict[str, Any] = {"device": device, "nvme_path": tempfile.gettempdir()}
    zero = {section: dict(tier) for section in offload}
    if update == "delayed":
        zero["offload_optimizer"]["delayed_update"] = True
    keys = {
        **config(plan, preset, overlap),
        "optimizer_in_backward": update == "in-backward",
        "zero_optimization": zero,
    }
    engine, optimizer, _, _ = unishard.initialize(model=model, config=keys)

    def finish_gathers() -> None:
        for group in engine.schedule.groups:
            group.wait()

    return EngineTrainer(engine, optimizer.inner, held_in(model, optimizer.inner), finish_gathers)


def build_code_door(plan: Plan, *, preset: str) -> TorchTrainer:
    import torch.distributed as dist

    import unishard
    from unishard.dist.mesh import build_mesh

    replicas = 2 if PRESETS[preset].needs_replicas else 1
    policy = unishard.MixedPrecisionPolicy(param_dtype=torch.bfloat16 if plan.dtype == "bf16" else None)
    options: dict[str, Any] = {"sharding": preset, "mp_policy": policy}
    if replicas > 1 and dist.is_initialized():
        options["mesh"] = build_mesh("cpu", dp_replicate=replicas)
    model = build_model(plan)
    for block in model.blocks:
        unishard.fully_shard(block, **options)
    unishard.fully_shard(model, **options)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True, **ADAMW)
    return TorchTrainer(model, optimizer, _micro(model, PRESETS[preset]), held_by=held_in(model, optimizer))


def _micro(model: Any, sharding: Sharding) -> MicroContext:
    """What the configuration's engine does by itself: reduce and release as rarely as the preset allows."""

    @contextmanager
    def micro(is_last: bool) -> Iterator[None]:
        model.set_requires_gradient_sync(is_last or sharding.gradient is Placement.SHARD)
        model.set_reshard_after_backward(is_last or sharding.reshard is Reshard.AFTER_FORWARD)
        yield

    return micro


def held_in(model: nn.Module, optimizer: torch.optim.Optimizer) -> Callable[[], Held]:
    """What the groups under `model` keep, and the optimizer's state."""

    def held() -> Held:
        from unishard.sharding.unit import units_under

        groups = [group for unit in units_under(model) for group in unit.groups]
        parameters = [t for g in groups for t in (g.buffer.shard, g.buffer.full)]
        resting = [
            t for g in groups for t in (g.gradients.shard, g.gradients.replica_partial, g.gradients.whole)
        ]
        # Through the code door gradients have moved to the parameters by now.
        shown = [p.grad for p in model.parameters()]
        gradients = [t for t in (*resting, *shown) if isinstance(t, Tensor)]
        return Held(parameters, gradients, optimizer_state(optimizer))

    return held


def _level(sharding: Sharding) -> Level:
    if sharding.reshard is Reshard.AFTER_FORWARD:
        return "zero3"
    if sharding.gradient is Placement.SHARD:
        return "zero2"
    return "zero1" if sharding.optimizer is Placement.SHARD else "replicated"


def _rows(sharding: Sharding) -> Iterator[Contestant]:
    name = "unishard-" + sharding.name.lower().replace("_", "-")
    least = 4 if sharding.needs_replicas else 1
    level = _level(sharding)

    def row(suffix: str, setting: str, build: Any, imports: str) -> Contestant:
        return Contestant(
            name=name + suffix,
            family=name + suffix,
            level=level,
            setting=f"{sharding.name}, {setting}",
            build=build,
            imports=(imports,),
            ours=True,
            min_ranks=least,
        )

    config_door = partial(build_config_door, preset=sharding.name)
    yield row("", "config door, AdamW", config_door, "unishard.engine")
    if level in ("zero1", "zero2") and sharding.reshard is Reshard.NEVER:
        overlapped = partial(build_config_door, preset=sharding.name, overlap=True)
        yield row("-overlap", "config door with overlap_param_gather, AdamW", overlapped, "unishard.engine")
    code_door = partial(build_code_door, preset=sharding.name)
    yield row("-code", "code door: blocks and root, fused AdamW", code_door, "unishard.sharding.api")


def _offloaded(
    suffix: str, what: str, *sections: str, device: str = "nvme", update: Update = "step"
) -> Contestant:
    where = (
        "nvme (the folder for temporary files)" if device == "nvme" else "host memory, which it is in already"
    )
    when = {"step": "", "in-backward": ", optimizer_in_backward", "delayed": ", delayed_update"}[update]
    return Contestant(
        name=f"unishard-zero3-{suffix}",
        family=f"unishard-zero3-{suffix}",
        level="offload",
        setting=f"ZERO3, config door, AdamW{when}, {what} on {where}",
        build=partial(build_config_door, preset="ZERO3", offload=sections, device=device, update=update),
        imports=("unishard.engine",),
        ours=True,
    )


_BOTH = ("offload_optimizer", "offload_param")
CONTESTANTS = (
    *(row for sharding in PRESETS.values() for row in _rows(sharding)),
    _offloaded("cpu", "optimizer state", "offload_optimizer", device="cpu"),
    _offloaded("nvme-optimizer", "optimizer state", "offload_optimizer"),
    _offloaded("nvme", "optimizer state and parameters", *_BOTH),
    _offloaded("nvme-in-backward", "optimizer state and parameters", *_BOTH, update="in-backward"),
    _offloaded("nvme-delayed", "optimizer state and parameters", *_BOTH, update="delayed"),
)
