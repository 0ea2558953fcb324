"""The table of combinations: each row fires, and every pair of features is accepted or refused by a row."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import pytest

from unishard.config import check, resolve
from unishard.config.combinations import COMBINATIONS
from unishard.errors import ConfigError

BASE: dict[str, Any] = {"train_micro_batch_size_per_gpu": 1}


def adamw(**params: Any) -> dict[str, Any]:
    return {"optimizer": {"type": "AdamW", "params": params}}


def schedule(kind: str, **params: Any) -> dict[str, Any]:
    return {"scheduler": {"type": kind, "params": params}}


def zero(**values: Any) -> dict[str, Any]:
    return {"zero_optimization": values}


EXAMPLES: dict[str, dict[str, Any]] = {
    "fp16-and-bf16": {"fp16": {"enabled": True}, "bf16": {"enabled": True}},
    "autocast-and-16-bit": {"torch_autocast": {"enabled": True}, "bf16": {"enabled": True}},
    "autocast-in-fp16": {"torch_autocast": {"enabled": True, "dtype": "float16"}},
    "loss-scale-floor-zero": {"fp16": {"enabled": True, "min_loss_scale": 0}},
    "loss-scale-starts-below-floor": {
        "fp16": {"enabled": True, "initial_scale_power": 2, "min_loss_scale": 8}
    },
    "param-dtype-against-compute": {"bf16": {"enabled": True}, "data_types": {"param_dtype": "fp16"}},
    "buffer-dtypes-disagree": {"buffer_dtype": "fp32", "data_types": {"buffer_dtype": "bf16"}},
    "sharding-against-stage": {"sharding": "ZERO1"} | zero(stage=2),
    "param-gather-overlap-without-gather": {"overlap_param_gather": True} | zero(stage=3),
    "offload-param-of-replicated-parameters": zero(
        stage=2, offload_param={"device": "nvme", "nvme_path": "/nvme"}
    ),
    "offload-param-without-path": zero(stage=3, offload_param={"device": "nvme"}),
    "offload-optimizer-without-path": zero(stage=3, offload_optimizer={"device": "nvme"}),
    "offload-gradient-without-path": zero(stage=3, offload_gradient={"device": "nvme"}),
    "optimizer-in-backward-with-clipping": {"optimizer_in_backward": True, "gradient_clipping": 1.0},
    "optimizer-in-backward-with-fp16": {"optimizer_in_backward": True, "fp16": {"enabled": True}},
    "optimizer-in-backward-with-delayed-update": zero(offload_optimizer={"delayed_update": True})
    | {"optimizer_in_backward": True, "gradient_clipping": 0.0},
    "mics-and-hpz": zero(stage=3, mics_shard_size=2, zero_hpz_partition_size=2),
    "subgroup-below-stage-3": zero(stage=2, mics_shard_size=2),
    "subgroup-against-mesh": zero(stage=3, mics_shard_size=2) | {"mesh": {"dp_shard": 4}},
    "mics-against-world": zero(stage=3, mics_shard_size=3),
    "hpz-against-world": zero(stage=3, zero_hpz_partition_size=3),
    "mesh-against-world": {"sharding": "ZERO3", "mesh": {"dp_replicate": 2, "dp_shard": 4}},
    "no-shard-on-sharding-mesh": {"mesh": {"dp_shard": 2}},
    "hybrid-without-mesh": {"sharding": "HYBRID_SHARD"},
    "data-parallel-size-against-world": {"data_parallel_size": 8},
    "unused-in-backward": {
        "optimizer_in_backward": True,
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": 3, "ignore_unused_parameters": False},
    },
    "predivide-with-prescale": {"prescale_gradients": True, "gradient_predivide_factor": 2.0},
    "warmup-longer-than-training": schedule("WarmupCosineLR", warmup_num_steps=20, total_num_steps=10),
    "warmup-downwards": schedule("WarmupLR", warmup_min_lr=0.1, warmup_max_lr=0.01),
    "cycle-downwards": schedule("OneCycle", cycle_min_lr=0.1, cycle_max_lr=0.01),
    "cycled-momentum-without-momentum": schedule("OneCycle", cycle_min_lr=0.1, cycle_max_lr=0.2)
    | {"optimizer": {"type": "Adagrad"}},
    "nesterov-without-momentum": {"optimizer": {"type": "SGD", "params": {"nesterov": True}}},
    "contiguous-checkpoints-without-number": {
        "activation_checkpointing": {"contiguous_memory_optimization": True}
    },
}
WORLD = 4


def merged(*configs: dict[str, Any]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for config in configs:
        for key, value in config.items():
            both = isinstance(value, dict) and isinstance(result.get(key), dict)
            result[key] = merged(result[key], value) if both else value
    return result


def test_every_row_has_an_example() -> None:
    assert [row.name for row in COMBINATIONS] == list(EXAMPLES)


@pytest.mark.parametrize("row", COMBINATIONS, ids=lambda row: row.name)
def test_row_refuses_its_combination_with_a_remedy(row: Any) -> None:
    problems = [p for p in check(BASE | EXAMPLES[row.name], dp_world_size=WORLD) if p.rule == row.name]
    assert [problem.key for problem in problems] == [row.key]
    assert problems[0].message.endswith(row.instead)
    assert "{" not in problems[0].message.replace(row.instead, "")
    with pytest.raises(ConfigError, match=r"."):
        resolve(BASE | EXAMPLES[row.name], dp_world_size=WORLD)


def test_messages_hold_the_values() -> None:
    (problem,) = check(
        BASE | EXAMPLES["mesh-against-world"], dp_world_size=WORLD, world_size_source="torchrun"
    )
    assert (
        "dp_replicate 2 x dp_shard 4 is not the data-parallel world size 4 (from torchrun)" in problem.message
    )


FEATURES: dict[str, dict[str, Any]] = {
    "stage0": zero(stage=0),
    "stage1": zero(stage=1),
    "stage2": zero(stage=2),
    "stage3": zero(stage=3),
    "mics": zero(mics_shard_size=2),
    "hpz": zero(zero_hpz_partition_size=2),
    "SHARD_GRAD_OP": {"sharding": "SHARD_GRAD_OP"},
    "ZERO2": {"sharding": "ZERO2"},
    "HYBRID_SHARD": {"sharding": "HYBRID_SHARD"},
    "mesh2x2": {"mesh": {"dp_replicate": 2, "dp_shard": 2}},
    "mesh4": {"mesh": {"dp_shard": 4}},
    "mesh-of-3": {"mesh": {"dp_shard": 3}},
    "overlap_param_gather": {"overlap_param_gather": True},
    "optimizer_in_backward": {"optimizer_in_backward": True},
    "fp16": {"fp16": {"enabled": True}},
    "fp16-static": {"fp16": {"enabled": True, "loss_scale": 128.0}},
    "fp16-no-floor": {"fp16": {"min_loss_scale": 0}},
    "bf16": {"bf16": {"enabled": True}},
    "param_dtype": {"data_types": {"param_dtype": "bf16"}},
    "grad_accum_dtype": {"data_types": {"grad_accum_dtype": "bf16"}},
    "buffer_dtype": {"buffer_dtype": "fp32"},
    "data_types.buffer_dtype": {"data_types": {"buffer_dtype": "bf16"}},
    "communication_data_type": {"communication_data_type": "bf16"},
    "prescale": {"prescale_gradients": True},
    "predivide": {"gradient_predivide_factor": 2.0},
    "clipping": {"gradient_clipping": 1.0},
    "accumulation": {"gradient_accumulation_steps": 3},
    "AdamW": adamw(lr=1e-3),
    "Adagrad": {"optimizer": {"type": "Adagrad"}},
    "nesterov": {"optimizer": {"type": "SGD", "params": {"nesterov": True, "momentum": 0.9}}},
    "WarmupLR": schedule("WarmupLR", warmup_max_lr=0.1),
    "OneCycle": schedule("OneCycle", cycle_min_lr=0.1, cycle_max_lr=0.2),
    "data_parallel_size": {"data_parallel_size": 4},
    "monitors": {"tensorboard": {"enabled": True}, "csv_monitor": {"enabled": True}},
}
FRAGMENTS_ALONE_REFUSED = {"mics", "hpz", "HYBRID_SHARD", "mesh2x2", "mesh4", "mesh-of-3"} | {
    "overlap_param_gather",
    "param_dtype",
}


def overlapping(left: dict[str, Any], right: dict[str, Any]) -> bool:
    """Whether the two name different types of one section, so that a merge means neither."""
    return any(left.get(name) and right.get(name) for name in ("optimizer", "scheduler"))


def test_every_pair_is_accepted_or_refused_by_a_row() -> None:
    rows = {row.name for row in COMBINATIONS}
    for (left, first), (right, second) in combinations(FEATURES.items(), 2):
        if overlapping(first, second):
            continue
        config = merged(BASE, first, second)
        problems = check(config, dp_world_size=WORLD)
        assert {problem.rule for problem in problems} <= rows, (left, right, problems)
        if not problems:
            found = resolve(config, dp_world_size=WORLD)
            assert found.train_batch_size == WORLD * found.gradient_accumulation_steps, (left, right)


@pytest.mark.parametrize("name", FEATURES)
def test_one_feature_alone_is_accepted(name: str) -> None:
    problems = check(merged(BASE, FEATURES[name]), dp_world_size=WORLD)
    assert bool(problems) == (name in FRAGMENTS_ALONE_REFUSED)
