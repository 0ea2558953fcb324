"""The one table of values that do not go together, each row with what to use instead."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from unishard.config.draft import Draft
from unishard.config.problems import Problem, shown

STAGE_OF = {
    "NO_SHARD": 0,
    "ZERO1": 1,
    "HYBRID_ZERO1": 1,
    "ZERO2": 2,
    "HYBRID_ZERO2": 2,
    "SHARD_GRAD_OP": 2,
    "HYBRID_SHARD_GRAD_OP": 2,
    "ZERO3": 3,
    "HYBRID_SHARD": 3,
}
"""The `zero_optimization.stage` that a sharding stands for in DeepSpeed's terms."""

_RESTS_SHARDED = ("SHARD_GRAD_OP", "HYBRID_SHARD_GRAD_OP")
"""Stage 3 may be written with these too: parameters rest sharded, which is what libraries ask a stage of 3 about."""


@dataclass(frozen=True)
class Combination:
    """One row: `key` is blamed when `when` holds; `{dotted.key}` in the texts is replaced by its value."""

    name: str
    key: str
    when: Callable[[Draft], bool]
    message: str
    instead: str

    def problem(self, draft: Draft) -> Problem | None:
        """The finding, or None when the combination does not occur."""
        if not self.when(draft):
            return None
        text = re.sub(
            r"\{([\w.]+)\}", lambda match: _value(draft, match[1]), f"{self.message}; {self.instead}"
        )
        return Problem(self.key, text, self.name)


def _value(draft: Draft, key: str) -> str:
    if key == "dp_world_size":
        return f"{draft.world_size} (from {draft.world_source})"
    return shown(draft.get(key))


def _on(key: str) -> Callable[[Draft], bool]:
    return lambda draft: draft.get(key) is True


def _not_divisible(draft: Draft, key: str) -> bool:
    size, world = draft.get(key), draft.world_size
    return isinstance(size, int) and size > 0 and world is not None and world % size != 0


def _mesh_misfit(draft: Draft) -> bool:
    replicate, shard, world = draft.get("mesh.dp_replicate"), draft.get("mesh.dp_shard"), draft.world_size
    return None not in (replicate, shard, world) and replicate * shard != world


def _stage_disagrees(draft: Draft) -> bool:
    stage, sharding = draft.given("zero_optimization.stage"), draft.given("sharding")
    if stage is None or sharding is None:
        return False
    return STAGE_OF[sharding] != stage and not (stage == 3 and sharding in _RESTS_SHARDED)


def _buffers_disagree(draft: Draft) -> bool:
    top, inner = draft.given("buffer_dtype"), draft.given("data_types.buffer_dtype")
    return top is not None and inner is not None and top != inner


def _subgroup(draft: Draft) -> bool:
    return (
        draft.number("zero_optimization.mics_shard_size") > 0
        or draft.number("zero_optimization.zero_hpz_partition_size") > 1
    )


def _dynamic_fp16(draft: Draft) -> bool:
    return draft.get("fp16.enabled") is True and draft.number("fp16.loss_scale") == 0


def _schedule(draft: Draft, *types: str) -> bool:
    return draft.get("scheduler.type") in types


def _below(draft: Draft, low: str, high: str) -> bool:
    return draft.number(f"scheduler.params.{high}") < draft.number(f"scheduler.params.{low}")


COMBINATIONS: tuple[Combination, ...] = (
    Combination(
        "fp16-and-bf16",
        "bf16.enabled",
        lambda d: d.get("fp16.enabled") is True and d.get("bf16.enabled") is True,
        "fp16 and bf16 are both enabled, and compute has one dtype",
        "enable bf16 only, or fp16 only where the hardware has no bfloat16",
    ),
    Combination(
        "autocast-and-16-bit",
        "torch_autocast.enabled",
        lambda d: d.get("torch_autocast.enabled") is True and d.get("compute_dtype") != "fp32",
        "torch_autocast casts fp32 weights operation by operation, and {compute_dtype} keeps all of them in 16 bits",
        "enable one of them",
    ),
    Combination(
        "autocast-in-fp16",
        "torch_autocast.dtype",
        lambda d: d.get("torch_autocast.enabled") is True and d.get("torch_autocast.dtype") == "fp16",
        "fp16 under torch_autocast needs a loss scale, which goes with fp16.enabled",
        'set dtype to "bfloat16", or enable fp16 instead',
    ),
    Combination(
        "loss-scale-floor-zero",
        "fp16.min_loss_scale",
        lambda d: _dynamic_fp16(d) and d.number("fp16.min_loss_scale") == 0,
        "a dynamic loss scale that may fall to 0 never recovers",
        "set min_loss_scale to 1",
    ),
    Combination(
        "loss-scale-starts-below-floor",
        "fp16.min_loss_scale",
        lambda d: (
            _dynamic_fp16(d) and 2 ** d.number("fp16.initial_scale_power") < d.number("fp16.min_loss_scale")
        ),
        "the floor {fp16.min_loss_scale} lies above the first loss scale 2**{fp16.initial_scale_power}",
        "lower min_loss_scale, or raise initial_scale_power",
    ),
    Combination(
        "param-dtype-against-compute",
        "data_types.param_dtype",
        lambda d: d.get("data_types.param_dtype") not in (None, d.get("compute_dtype")),
        "param_dtype {data_types.param_dtype} is not the compute dtype {compute_dtype} of fp16 and bf16",
        "leave param_dtype out, and set fp16.enabled or bf16.enabled",
    ),
    Combination(
        "buffer-dtypes-disagree",
        "buffer_dtype",
        _buffers_disagree,
        "buffer_dtype {buffer_dtype} and data_types.buffer_dtype {data_types.buffer_dtype} differ",
        "keep one of them",
    ),
    Combination(
        "sharding-against-stage",
        "sharding",
        _stage_disagrees,
        "sharding {sharding} and zero_optimization.stage {zero_optimization.stage} ask for different things",
        "keep one of them (stages 0, 1, 2, 3 are NO_SHARD, ZERO1, ZERO2, ZERO3)",
    ),
    Combination(
        "param-gather-overlap-without-gather",
        "overlap_param_gather",
        lambda d: d.get("overlap_param_gather") is True and d.get("sharding") not in _GATHERS_AFTER_STEP,
        "with sharding {sharding} no parameters are gathered after the step, so there is nothing to overlap",
        "remove overlap_param_gather, or use sharding ZERO1 or ZERO2",
    ),
    Combination(
        "offload-param-of-replicated-parameters",
        "zero_optimization.offload_param.device",
        lambda d: _offloads(d, "offload_param") and d.get("sharding") in _REPLICATED,
        "with sharding {sharding} every rank computes with parameters that it holds whole between steps",
        "use sharding ZERO3 or SHARD_GRAD_OP, whose shards can rest elsewhere, or offload_optimizer alone",
    ),
    *(
        Combination(
            f"{section.replace('_', '-')}-without-path",
            f"zero_optimization.{section}.nvme_path",
            lambda d, section=section: (
                _offloads(d, section, "nvme") and not d.get(f"zero_optimization.{section}.nvme_path")
            ),
            f"{section}.device is nvme, and no nvme_path says where",
            "set nvme_path to a folder on a local disk",
        )
        for section in ("offload_param", "offload_optimizer", "offload_gradient")
    ),
    Combination(
        "optimizer-in-backward-with-clipping",
        "optimizer_in_backward",
        lambda d: d.get("optimizer_in_backward") is True and d.number("gradient_clipping") > 0,
        "gradient_clipping {gradient_clipping} needs the norm of all gradients before the first update",
        "remove gradient_clipping, or optimizer_in_backward",
    ),
    Combination(
        "optimizer-in-backward-with-fp16",
        "optimizer_in_backward",
        lambda d: d.get("optimizer_in_backward") is True and d.get("fp16.enabled") is True,
        "an overflow under fp16 is known only when all gradients are there",
        "enable bf16 instead, or remove optimizer_in_backward",
    ),
    Combination(
        "optimizer-in-backward-with-delayed-update",
        "optimizer_in_backward",
        lambda d: (
            d.get("optimizer_in_backward") is True
            and d.get("zero_optimization.offload_optimizer.delayed_update") is True
        ),
        "optimizer_in_backward applies a gradient as it arrives, delayed_update one step later",
        "keep one of the two; delayed_update also works with clipping and fp16",
    ),
    Combination(
        "mics-and-hpz",
        "zero_optimization.zero_hpz_partition_size",
        lambda d: (
            d.number("zero_optimization.mics_shard_size") > 0
            and d.number("zero_optimization.zero_hpz_partition_size") > 1
        ),
        "mics_shard_size and zero_hpz_partition_size both choose the ranks that share a copy",
        "keep mics_shard_size",
    ),
    Combination(
        "subgroup-below-stage-3",
        "zero_optimization.stage",
        lambda d: _subgroup(d) and d.get("sharding") not in ("ZERO3", "HYBRID_SHARD"),
        "mics_shard_size and zero_hpz_partition_size go with stage 3, and sharding is {sharding}",
        "set stage to 3, or give mesh.dp_shard, which works with stages 1 and 2 too",
    ),
    Combination(
        "subgroup-against-mesh",
        "mesh.dp_shard",
        lambda d: _subgroup(d) and d.given("mesh.dp_shard") not in (None, subgroup_size(d)),
        "mesh.dp_shard {mesh.dp_shard} differs from mics_shard_size or zero_hpz_partition_size",
        "keep mesh.dp_shard only",
    ),
    Combination(
        "mics-against-world",
        "zero_optimization.mics_shard_size",
        lambda d: _not_divisible(d, "zero_optimization.mics_shard_size"),
        "{zero_optimization.mics_shard_size} ranks a copy do not divide the data-parallel world size "
        "{dp_world_size}",
        "use a divisor of the world size",
    ),
    Combination(
        "hpz-against-world",
        "zero_optimization.zero_hpz_partition_size",
        lambda d: _not_divisible(d, "zero_optimization.zero_hpz_partition_size"),
        "{zero_optimization.zero_hpz_partition_size} ranks a copy do not divide the data-parallel world size "
        "{dp_world_size}",
        "use a divisor of the world size",
    ),
    Combination(
        "mesh-against-world",
        "mesh",
        lambda d: (
            not _subgroup(d)
            and (
                _mesh_misfit(d)
                or _not_divisible(d, "mesh.dp_replicate")
                or _not_divisible(d, "mesh.dp_shard")
            )
        ),
        "dp_replicate {mesh.dp_replicate} x dp_shard {mesh.dp_shard} is not the data-parallel world size "
        "{dp_world_size}",
        "choose sizes whose product is the world size, or leave one out",
    ),
    Combination(
        "no-shard-on-sharding-mesh",
        "mesh.dp_shard",
        lambda d: d.get("sharding") == "NO_SHARD" and (d.given("mesh.dp_shard") or 1) > 1,
        "with sharding NO_SHARD every rank is a replica, so dp_shard {mesh.dp_shard} has nothing to share",
        "remove mesh, or use sharding ZERO1, ZERO2 or ZERO3",
    ),
    Combination(
        "hybrid-without-mesh",
        "mesh",
        lambda d: (
            (d.get("sharding") or "").startswith("HYBRID")
            and d.world_size is not None
            and d.get("mesh") is None
        ),
        "sharding {sharding} shares each copy inside a group of ranks, and the size of that group is unknown",
        'give "mesh": {"dp_shard": N}, usually the number of ranks per node',
    ),
    Combination(
        "data-parallel-size-against-world",
        "data_parallel_size",
        lambda d: (
            None not in (d.get("data_parallel_size"), d.world_size)
            and d.get("data_parallel_size") != d.world_size
        ),
        "{data_parallel_size} is not the data-parallel world size {dp_world_size}",
        "remove the key, or launch that many ranks",
    ),
    Combination(
        "unused-in-backward",
        "zero_optimization.ignore_unused_parameters",
        lambda d: (
            d.get("zero_optimization.ignore_unused_parameters") is False
            and d.get("optimizer_in_backward") is True
        ),
        "optimizer_in_backward updates before it is known which parameters were used",
        "leave out one of the two",
    ),
    Combination(
        "predivide-with-prescale",
        "gradient_predivide_factor",
        lambda d: d.get("prescale_gradients") is True and d.number("gradient_predivide_factor") != 1,
        "prescale_gradients divides by the world size before the reduction, which leaves nothing to "
        "the factor {gradient_predivide_factor}",
        "keep one of the two",
    ),
    Combination(
        "warmup-longer-than-training",
        "scheduler.params.warmup_num_steps",
        lambda d: _below(d, "warmup_num_steps", "total_num_steps"),
        "{scheduler.params.warmup_num_steps} warm-up steps exceed total_num_steps "
        "{scheduler.params.total_num_steps}",
        "lower warmup_num_steps, or raise total_num_steps",
    ),
    Combination(
        "warmup-downwards",
        "scheduler.params.warmup_min_lr",
        lambda d: _below(d, "warmup_min_lr", "warmup_max_lr"),
        "warmup_min_lr {scheduler.params.warmup_min_lr} exceeds warmup_max_lr "
        "{scheduler.params.warmup_max_lr}",
        "exchange the two",
    ),
    Combination(
        "cycle-downwards",
        "scheduler.params.cycle_min_lr",
        lambda d: _below(d, "cycle_min_lr", "cycle_max_lr"),
        "cycle_min_lr {scheduler.params.cycle_min_lr} exceeds cycle_max_lr {scheduler.params.cycle_max_lr}",
        "exchange the two",
    ),
    Combination(
        "cycled-momentum-without-momentum",
        "scheduler.params.cycle_momentum",
        lambda d: (
            _schedule(d, "OneCycle")
            and d.get("scheduler.params.cycle_momentum") is True
            and d.get("optimizer.type") == "Adagrad"
        ),
        "OneCycle cycles momentum, and optimizer {optimizer.type} has none",
        "set cycle_momentum to false, or use AdamW or SGD",
    ),
    Combination(
        "nesterov-without-momentum",
        "optimizer.params.nesterov",
        lambda d: (
            _on("optimizer.params.nesterov")(d)
            and (d.number("optimizer.params.momentum") == 0 or d.number("optimizer.params.dampening") != 0)
        ),
        "nesterov needs momentum above 0 and no dampening, and they are {optimizer.params.momentum} and "
        "{optimizer.params.dampening}",
        "set momentum (0.9, say) and dampening 0, or nesterov to false",
    ),
    Combination(
        "contiguous-checkpoints-without-number",
        "activation_checkpointing.contiguous_memory_optimization",
        lambda d: (
            d.get("activation_checkpointing.contiguous_memory_optimization") is True
            and d.get("activation_checkpointing.number_checkpoints") is None
        ),
        "one buffer for checkpointed inputs has no size without number_checkpoints",
        "set number_checkpoints to the number of checkpointed calls in one forward pass",
    ),
)

_GATHERS_AFTER_STEP = ("ZERO1", "ZERO2", "HYBRID_ZERO1", "HYBRID_ZERO2")


_REPLICATED = ("NO_SHARD", *_GATHERS_AFTER_STEP)


def _offloads(draft: Draft, section: str, *devices: str) -> bool:
    return draft.get(f"zero_optimization.{section}.device") in (devices or ("cpu", "nvme"))


def subgroup_size(draft: Draft) -> int | None:
    """Ranks that share one copy by mics_shard_size or zero_hpz_partition_size; None without either."""
    mics, hpz = (
        draft.get(f"zero_optimization.{key}") for key in ("mics_shard_size", "zero_hpz_partition_size")
    )
    if isinstance(mics, int) and mics > 0:
        return mics
    return hpz if isinstance(hpz, int) and hpz > 1 else None
