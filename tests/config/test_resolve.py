"""Resolving: `"auto"`, origins, sharding, mesh and dtypes."""

from __future__ import annotations

import copy
import json
import math
from typing import Any

import pytest
from pydantic import ValidationError

from unishard.config import Config, ResolvedConfig, check, resolve
from unishard.errors import ConfigError

BASE: dict[str, Any] = {"train_micro_batch_size_per_gpu": 1}


def resolved(config: dict[str, Any], world: int = 4, **facts: Any) -> ResolvedConfig:
    return resolve(BASE | config, dp_world_size=world, **facts)


def test_hidden_size_fills_buckets_as_transformers_does() -> None:
    sizes = ("reduce_bucket_size", "stage3_prefetch_bucket_size", "stage3_param_persistence_threshold")
    zero = {"stage": 3} | dict.fromkeys(sizes, "auto")
    filled = resolved({"zero_optimization": zero}, hidden_size=768)
    assert [getattr(filled.zero_optimization, key) for key in sizes] == [589_824, 530_841, 7_680]
    assert {filled.origin(f"zero_optimization.{key}") for key in sizes} == {"auto"}
    problems = check(BASE | {"zero_optimization": zero}, dp_world_size=4)
    assert {problem.key for problem in problems} == {f"zero_optimization.{key}" for key in sizes}
    assert all(
        "hidden size, which is unknown; give a number, or pass hidden_size" in p.message for p in problems
    )


HF = {
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "fp16": {"enabled": "auto", "loss_scale": 0, "initial_scale_power": 16},
    "bf16": {"enabled": "auto"},
    "optimizer": {
        "type": "AdamW",
        "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"},
    },
    "scheduler": {
        "type": "WarmupDecayLR",
        "params": {
            "warmup_min_lr": "auto",
            "warmup_max_lr": "auto",
            "warmup_num_steps": "auto",
            "total_num_steps": "auto",
        },
    },
    "zero_optimization": {"stage": 3, "stage3_gather_16bit_weights_on_model_save": "auto"},
}


def test_auto_without_overrides_says_which_values_are_missing() -> None:
    missing = {problem.key for problem in check(HF, dp_world_size=2)}
    assert missing == {
        "optimizer.params.lr",
        "scheduler.params.warmup_max_lr",
        "scheduler.params.warmup_num_steps",
        "scheduler.params.total_num_steps",
        "train_batch_size",
    }


def test_overrides_fill_auto_and_the_rest_follows() -> None:
    overrides = {
        "train_micro_batch_size_per_gpu": 4,
        "bf16.enabled": True,
        "gradient_clipping": 1.0,
        "optimizer.params.lr": 3e-4,
        "scheduler.params.warmup_num_steps": 10,
        "scheduler.params.total_num_steps": 100,
    }
    filled = resolve(HF, dp_world_size=2, overrides=overrides)
    assert filled.optimizer is not None
    assert filled.scheduler is not None
    assert filled.optimizer.params == {
        "lr": 3e-4, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0, "bias_correction": True, "amsgrad": False
    }  # fmt: skip
    assert filled.scheduler.params == {
        "warmup_min_lr": 0.0, "warmup_max_lr": 3e-4, "warmup_num_steps": 10, "total_num_steps": 100,
        "warmup_type": "log",
    }  # fmt: skip
    assert (filled.compute_dtype, filled.fp16.enabled, filled.gradient_clipping) == ("bf16", False, 1.0)
    assert (filled.train_batch_size, filled.gradient_accumulation_steps) == (8, 1)
    assert "auto" not in json.dumps([row.value for row in filled.as_table()])
    origins = {row.key: row.origin for row in filled.as_table()}
    assert origins["optimizer.params.lr"] == "override"
    assert origins["optimizer.params.betas"] == "auto"
    assert origins["scheduler.params.warmup_max_lr"] == "auto"
    assert origins["fp16.enabled"] == "auto"
    assert origins["fp16.hysteresis"] == "default"
    assert origins["train_batch_size"] == "auto"
    assert origins["zero_optimization.stage"] == "dict"


def test_an_override_of_an_unknown_key_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"optimiser: unknown key; did you mean 'optimizer'"):
        resolved({}, overrides={"optimiser.params.lr": 1e-3})


@pytest.mark.parametrize(
    ("config", "world", "sharding", "stage", "mesh"),
    [
        ({}, 4, "NO_SHARD", 0, None),
        ({"zero_optimization": {"stage": 1}}, 4, "ZERO1", 1, None),
        ({"zero_optimization": {"stage": 2}}, 4, "ZERO2", 2, None),
        ({"zero_optimization": {"stage": 3}}, 4, "ZERO3", 3, None),
        ({"sharding": "FULL_SHARD"}, 4, "ZERO3", 3, None),
        ({"sharding": "ddp"}, 4, "NO_SHARD", 0, None),
        ({"sharding": "SHARD_GRAD_OP"}, 4, "SHARD_GRAD_OP", 2, None),
        ({"sharding": "ZERO3", "mesh": {"dp_shard": 2}}, 4, "HYBRID_SHARD", 3, (2, 2)),
        ({"sharding": "ZERO3", "mesh": {"dp_shard": 4}}, 4, "ZERO3", 3, (1, 4)),
        ({"sharding": "HYBRID_SHARD", "mesh": {"dp_replicate": 2}}, 8, "HYBRID_SHARD", 3, (2, 4)),
        ({"zero_optimization": {"stage": 2}, "mesh": {"dp_shard": 2}}, 4, "HYBRID_ZERO2", 2, (2, 2)),
        ({"zero_optimization": {"stage": 1}, "mesh": {"dp_shard": 2}}, 4, "HYBRID_ZERO1", 1, (2, 2)),
        ({"sharding": "SHARD_GRAD_OP", "mesh": {"dp_shard": 2}}, 4, "HYBRID_SHARD_GRAD_OP", 2, (2, 2)),
        ({"zero_optimization": {"stage": 3, "mics_shard_size": 2}}, 4, "HYBRID_SHARD", 3, (2, 2)),
        ({"zero_optimization": {"stage": 3, "mics_shard_size": 4}}, 4, "ZERO3", 3, (1, 4)),
        ({"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 2}}, 4, "HYBRID_SHARD", 3, (2, 2)),
        ({"sharding": "NO_SHARD", "mesh": {"dp_replicate": 4}}, 4, "NO_SHARD", 0, None),
        ({"mesh": {}}, 4, "NO_SHARD", 0, None),
    ],
)
def test_sharding_stage_and_mesh_agree(
    config: dict[str, Any], world: int, sharding: str, stage: int, mesh: tuple[int, int] | None
) -> None:
    found = resolved(config, world)
    assert (found.sharding, found.zero_optimization.stage) == (sharding, stage)
    assert (found.mesh and (found.mesh.dp_replicate, found.mesh.dp_shard)) == mesh


def test_hybrid_without_mesh_takes_the_node() -> None:
    found = resolved({"sharding": "HYBRID_SHARD"}, world=8, local_world_size=4)
    assert found.mesh is not None
    assert (found.mesh.dp_replicate, found.mesh.dp_shard) == (2, 4)
    one_node = resolved({"sharding": "HYBRID_SHARD"}, world=4, local_world_size=4)
    assert one_node.sharding == "ZERO3"
    assert "with one copy of the states (dp_replicate 1) this is ZERO3" in one_node.log_lines[0]


@pytest.mark.parametrize(
    ("config", "compute", "accumulate", "buffers"),
    [
        ({}, "fp32", None, None),
        ({"fp16": {"enabled": True}}, "fp16", None, None),
        ({"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "float32"}}, "bf16", "fp32", None),
        ({"data_types": {"buffer_dtype": "torch.half"}}, "fp32", None, "fp16"),
        ({"buffer_dtype": "bfloat16"}, "fp32", None, "bf16"),
    ],
)
def test_dtypes(config: dict[str, Any], compute: str, accumulate: str | None, buffers: str | None) -> None:
    found = resolved(config)
    assert (found.compute_dtype, found.grad_accum_dtype, found.buffer_dtype) == (compute, accumulate, buffers)


@pytest.mark.parametrize("never", [None, "inf", math.inf])
def test_steps_per_print_takes_infinity(never: Any) -> None:
    found = resolved({"steps_per_print": never})
    assert found.steps_per_print == math.inf
    assert found.as_dict()["steps_per_print"] == "inf"
    assert resolved({}).steps_per_print == 10
    assert resolved({"steps_per_print": 5}).steps_per_print == 5


@pytest.mark.parametrize("config", [{}, {"gradient_clipping": 0.0}, {"gradient_clipping": None}])
def test_absent_clipping_means_none(config: dict[str, Any]) -> None:
    assert resolved(config).gradient_clipping == 0.0


def test_resolved_is_frozen_and_portable() -> None:
    found = resolved({"zero_optimization": {"stage": 3}})
    with pytest.raises(ValidationError, match="frozen"):
        found.train_batch_size = 3  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(ValidationError, match="frozen"):
        found.zero_optimization.stage = 1  # pyright: ignore[reportAttributeAccessIssue]
    copied = copy.deepcopy(found)
    assert copied == found
    assert copied.origin("sharding") == "derived"
    assert json.loads(json.dumps(found.as_dict()))["sharding"] == "ZERO3"


def test_origin_of_an_unknown_key_raises() -> None:
    with pytest.raises(KeyError, match="no such key in the resolved config"):
        resolved({}).origin("zero_optimization.stge")


def test_resolving_again_changes_nothing_but_the_world() -> None:
    first = resolved(
        {"optimizer": {"type": "Adam", "params": {"lr": 0.1}}, "zero_optimization": {"stage": 2}}
    )
    again = resolve(first, dp_world_size=4)
    assert again.as_dict() == first.as_dict()


def test_table_has_every_honoured_key_and_hides_what_is_off() -> None:
    rows = {row.key: row for row in resolved({"wall_clock_breakdown": True}).as_table()}
    assert rows["wall_clock_breakdown"] == ("wall_clock_breakdown", True, "dict")
    assert rows["dp_world_size"].origin == "launcher"
    assert not any(key.startswith(("autotuning", "timers")) for key in rows)
    full = {row.key for row in resolved({}).as_table(full=True)}
    assert "autotuning.enabled" in full
    assert set(Config.model_fields) <= {key.partition(".")[0] for key in full}
