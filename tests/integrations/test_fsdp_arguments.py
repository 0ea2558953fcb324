"""Each of Hugging Face's FSDP options is honoured, translated with a line, or refused with a message."""

from __future__ import annotations

from typing import Any

import pytest

from unishard.config import resolve
from unishard.config.load import load_config
from unishard.errors import ConfigError
from unishard.integrations.fsdp_arguments import KEYS, STRATEGIES, translate

HONOURED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "version": ({"version": 1}, {"sharding": "ZERO3"}),
    "reshard_after_forward": ({"reshard_after_forward": False}, {"sharding": "SHARD_GRAD_OP"}),
    "sharding_strategy": ({"sharding_strategy": "NO_SHARD"}, {"sharding": "NO_SHARD"}),
    "cpu_offload": ({"cpu_offload": True}, {"zero_optimization.offload_param": {"device": "cpu"}}),
    "offload_params": (
        {"fsdp_offload_params": "true"},
        {"zero_optimization.offload_param": {"device": "cpu"}},
    ),
    "auto_wrap_policy": ({"auto_wrap_policy": "transformer_based_wrap"}, {"sharding": "ZERO3"}),
    "transformer_layer_cls_to_wrap": (
        {"transformer_layer_cls_to_wrap": ["Block", "Other"]},
        {"zero_optimization.leaf_module": {"classes": ["Block", "Other"]}},
    ),
    "transformer_cls_names_to_wrap": (
        {"fsdp_transformer_cls_names_to_wrap": "Block, Other"},
        {"zero_optimization.leaf_module": {"classes": ["Block", "Other"]}},
    ),
    "cpu_ram_efficient_loading": ({"cpu_ram_efficient_loading": True}, {"zero_optimization.stage": 3}),
    "state_dict_type": ({"state_dict_type": "FULL_STATE_DICT"}, {"sharding": "ZERO3"}),
}
TRANSLATED: dict[str, tuple[dict[str, Any], str]] = {
    "backward_prefetch": ({"backward_prefetch": "BACKWARD_POST"}, "order recorded"),
    "forward_prefetch": ({"forward_prefetch": "false"}, "run ahead in forward"),
    "limit_all_gathers": ({"limit_all_gathers": False}, "three groups"),
    "use_orig_params": ({"use_orig_params": False}, "names and objects"),
    "sync_module_states": ({"sync_module_states": False}, "first rank's weights"),
    "min_num_params": ({"min_num_params": 1000}, "blocks of repeated stacks"),
}
REFUSED: dict[str, dict[str, Any]] = {
    "xla": {"xla": True},
    "xla_fsdp_v2": {"xla_fsdp_v2": True},
    "xla_fsdp_settings": {"xla_fsdp_settings": {"compute_dtype": "bfloat16"}},
    "xla_fsdp_grad_ckpt": {"xla_fsdp_grad_ckpt": True},
    "mixed_precision_policy": {"mixed_precision_policy": "bf16"},
    "mixed_precision": {"mixed_precision": "bf16"},
    "ignored_modules": {"ignored_modules": ["lm_head"]},
    "param_init_fn": {"param_init_fn": "reset"},
}


def found(config: dict[str, Any], path: str) -> Any:
    value: Any = config
    for part in path.split("."):
        value = value[part]
    return value


def test_every_known_key_is_in_one_of_the_tables():
    assert {*HONOURED, *TRANSLATED, *REFUSED, "activation_checkpointing"} == set(KEYS)


@pytest.mark.parametrize("key", HONOURED)
def test_honoured(key):
    given, expected = HONOURED[key]
    made = translate(True, given, 2)
    assert {path: found(made.config, path) for path in expected} == expected
    assert made.lines == ()


@pytest.mark.parametrize("key", TRANSLATED)
def test_translated_with_one_line(key):
    given, text = TRANSLATED[key]
    [line] = translate(True, given, 2).lines
    assert key in line
    assert text in line


@pytest.mark.parametrize("key", REFUSED)
def test_refused_with_what_to_do_instead(key):
    with pytest.raises(ConfigError, match=rf"fsdp_config\['{key}'\]"):
        translate(True, REFUSED[key], 2)


@pytest.mark.parametrize("word", STRATEGIES)
@pytest.mark.parametrize("written", ["word", "list", "key", "number"])
def test_strategies_in_each_of_their_spellings(word, written):
    number = list(STRATEGIES).index(word) + 1
    spelled: dict[str, tuple[Any, dict[str, Any]]] = {
        "word": (f"{word} auto_wrap", {}),
        "list": ([word], {}),
        "key": (True, {"reshard_after_forward": word.upper(), "version": 1}),
        "number": (True, {"fsdp_sharding_strategy": number}),
    }
    made = translate(*spelled[written], ranks_per_node=2)
    assert made.config["sharding"] == STRATEGIES[word]


@pytest.mark.parametrize("word", STRATEGIES)
@pytest.mark.parametrize("more", ["", " offload"])
def test_every_translation_is_a_valid_configuration(word, more):
    config = translate(word + more, None, ranks_per_node=2).config
    filled = {
        **config,
        "train_batch_size": 8,
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 1,
    }
    filled |= {"gradient_clipping": 1.0, "bf16": {"enabled": False}, "fp16": {"enabled": False}}
    resolved = resolve(load_config(filled), dp_world_size=4, world_size_source="the test", local_world_size=2)
    assert resolved.sharding == STRATEGIES[word]


def test_recomputation_is_asked_for():
    assert translate(True, {"activation_checkpointing": "true"}, 1).recompute
    assert not translate(True, {"activation_checkpointing": False}, 1).recompute


@pytest.mark.parametrize(
    ("fsdp", "given", "says"),
    [
        ("full_shard no_shard", {}, "choose one strategy"),
        ("full_shard", {"reshard_after_forward": False}, "contradicts"),
        ("fullshard", {}, "unknown"),
        (True, {"min_num_param": 5}, "did you mean 'min_num_params'"),
        (True, {"auto_wrap_policy": "by_size"}, "TRANSFORMER_BASED_WRAP"),
        (True, {"auto_wrap_policy": "NO_WRAP", "transformer_layer_cls_to_wrap": "Block"}, "not with NO_WRAP"),
        (True, {"state_dict_type": "LOCAL_STATE_DICT"}, "SHARDED_STATE_DICT"),
        (True, {"cpu_offload": "maybe"}, "true or false"),
        (True, {"version": 3}, "use 1 or 2"),
        (True, {"reshard_after_forward": "sometimes"}, "full_shard"),
    ],
)
def test_what_cannot_be_meant_is_refused(fsdp, given, says):
    with pytest.raises(ConfigError, match=says):
        translate(fsdp, given, 2)


def test_all_problems_are_named_at_once():
    with pytest.raises(ConfigError, match=r"(?s)xla.*param_init_fn"):
        translate("full_shard", {"xla": True, "param_init_fn": "f"}, 2)


@pytest.mark.parametrize(
    ("fsdp", "given", "says"),
    [
        (True, {"state_dict_type": "SHARDED_STATE_DICT"}, "written sharded"),
        (True, {"auto_wrap_policy": "NO_WRAP"}, "one by one"),
        ("no_shard offload", {}, "weights stay whole"),
        ("no_shard", {"cpu_ram_efficient_loading": True}, "reads the weights itself"),
    ],
)
def test_values_that_stand_for_something_else_give_a_line(fsdp, given, says):
    [line] = translate(fsdp, given, 2).lines
    assert says in line
