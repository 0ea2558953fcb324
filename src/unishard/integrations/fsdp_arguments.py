"""Hugging Face's `fsdp` and `fsdp_config` in the words of unishard's configuration. No library is needed for it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from unishard.errors import ConfigError

STRATEGIES = {
    "full_shard": "ZERO3",
    "shard_grad_op": "SHARD_GRAD_OP",
    "no_shard": "NO_SHARD",
    "hybrid_shard": "HYBRID_SHARD",
    "hybrid_shard_zero2": "HYBRID_SHARD_GRAD_OP",
}
"""FSDP's strategies, by the names Hugging Face gives them, as presets."""

_NUMBERED = dict(enumerate(STRATEGIES.values(), start=1))  # accelerate writes strategies as 1 to 5, too
_POLICIES = ("TRANSFORMER_BASED_WRAP", "SIZE_BASED_WRAP", "NO_WRAP")
_XLA = "PyTorch/XLA is not supported; remove the key, and train on GPUs or CPUs"
_BLOCKS = "the blocks of repeated stacks are gathered one by one, and other modules above 100 M elements"


@dataclass(frozen=True)
class Translation:
    """What the arguments become: a configuration, whether activations are recomputed, and a line for each key that
    stands for something else here."""

    config: dict[str, Any]
    recompute: bool
    lines: tuple[str, ...]


@dataclass(frozen=True)
class Meaning:
    """A key whose value changes nothing here, except that one line says what happens instead.

    `neutral` are the values that describe what happens anyway.
    """

    text: str
    neutral: tuple[Any, ...]


_TRANSLATED = {
    "backward_prefetch": Meaning(
        "gathers run ahead in the order recorded in the step before", ("BACKWARD_PRE",)
    ),
    "forward_prefetch": Meaning("gathers run ahead in forward too, always", (True,)),
    "limit_all_gathers": Meaning("at most three groups are gathered at a time, always", (True,)),
    "use_orig_params": Meaning("parameters keep their names and objects, always", (True,)),
    "sync_module_states": Meaning("every rank starts from the first rank's weights, always", (True,)),
}
_REFUSED = {
    "xla": _XLA,
    "xla_fsdp_v2": _XLA,
    "xla_fsdp_settings": _XLA,
    "xla_fsdp_grad_ckpt": _XLA,
    "mixed_precision_policy": "pass bf16=True or fp16=True to TrainingArguments",
    "mixed_precision": "pass bf16=True or fp16=True to TrainingArguments",
    "ignored_modules": "freeze them (requires_grad_(False)), or use unishard.fully_shard(ignored_params=)",
    "param_init_fn": "build the model inside unishard.init_sharded(), which needs none",
}
_HONOURED = (
    "version",
    "reshard_after_forward",
    "sharding_strategy",
    "cpu_offload",
    "offload_params",
    "activation_checkpointing",
    "auto_wrap_policy",
    "transformer_layer_cls_to_wrap",
    "transformer_cls_names_to_wrap",
    "min_num_params",
    "cpu_ram_efficient_loading",
    "state_dict_type",
)
KEYS = (*_HONOURED, *_TRANSLATED, *_REFUSED)
"""Every key of `fsdp_config` that is known, without its optional prefix `fsdp_`."""


def translate(fsdp: Any, fsdp_config: Mapping[str, Any] | None, ranks_per_node: int) -> Translation:
    """The configuration that trains as `fsdp` and `fsdp_config` of `TrainingArguments` ask.

    Args:
        fsdp: True, or words such as "full_shard auto_wrap offload", as a string or a list.
        ranks_per_node: the ranks that share one copy under hybrid sharding.

    Raises:
        ConfigError: every key that is unknown or cannot be honoured, at once.

    >>> translate("shard_grad_op auto_wrap", {"transformer_layer_cls_to_wrap": "Block"}, 1).config["sharding"]
    'SHARD_GRAD_OP'
    """
    reading = _Reading(fsdp, fsdp_config or {})
    sharding, recompute = reading.sharding(), reading.flag("activation_checkpointing", False)
    zero: dict[str, Any] = {"stage": 0 if sharding == "NO_SHARD" else 3}
    if zero["stage"] == 3:
        zero["stage3_gather_16bit_weights_on_model_save"] = True
    if classes := reading.wrapped_classes():
        zero["leaf_module"] = {"classes": classes}
    if reading.offloads():
        zero |= {"offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}
    if zero["stage"] == 0 and zero.pop("offload_param", None):
        reading.line(
            "cpu_offload", True, "optimizer state rests in host memory; under no_shard weights stay whole"
        )
    reading.loading(zero["stage"] == 3)
    reading.saving()
    reading.translated_and_refused()
    config: dict[str, Any] = {
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "bf16": {"enabled": "auto"},
        "fp16": {"enabled": "auto"},
        "sharding": sharding,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
    }
    if sharding.startswith("HYBRID"):
        config["mesh"] = {"dp_shard": ranks_per_node}
    if reading.problems:
        raise ConfigError("fsdp arguments that cannot be honoured:\n" + "\n".join(reading.problems))
    return Translation(config, recompute, tuple(reading.lines))


class _Reading:
    """One pass over the arguments, with the problems and log lines it meets."""

    def __init__(self, fsdp: Any, given: Mapping[str, Any]) -> None:
        self.keys = {
            key.removeprefix("fsdp_") if key != "fsdp_version" else "version": v for key, v in given.items()
        }
        self.words = _words(fsdp)
        self.problems: list[str] = []
        self.lines: list[str] = []
        for key in self.keys:
            if key not in KEYS:
                near = get_close_matches(key, KEYS, n=1)
                hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(KEYS)}"
                self.problem(key, self.keys[key], f"the key is unknown; {hint}")
        if self.keys.get("version", 2) not in (1, 2, "1", "2"):
            self.problem("version", self.keys["version"], "use 1 or 2; both run on the same engine")

    def problem(self, key: str, value: Any, text: str) -> None:
        self.problems.append(f"  - fsdp_config[{key!r}] = {value!r}: {text}")

    def line(self, key: str, value: Any, text: str) -> None:
        self.lines.append(f"fsdp_config[{key!r}] = {value!r}: {text}")

    def flag(self, key: str, default: bool) -> bool:
        value = self.keys.get(key, default)
        if str(value).lower() in ("true", "1"):
            return True
        if str(value).lower() not in ("false", "0", "none"):
            self.problem(key, value, "use true or false")
        return False

    def sharding(self) -> str:
        """The preset, from a word of `fsdp` or from the key that newer releases of transformers write it to."""
        strategies = [word for word in self.words if word in STRATEGIES]
        for word in self.words:
            if word not in (*STRATEGIES, "offload", "auto_wrap"):
                known = ", ".join((*STRATEGIES, "offload", "auto_wrap"))
                self.problems.append(f"  - fsdp = {word!r}: unknown; known are {known}")
        if len(strategies) > 1:
            self.problems.append(f"  - fsdp = {' '.join(strategies)!r}: choose one strategy")
        found = {STRATEGIES[word] for word in strategies}
        for key in ("reshard_after_forward", "sharding_strategy"):
            value = self.keys.get(key)
            if value is None:
                continue
            preset = _preset_of(value)
            if preset is None:
                self.problem(key, value, f"use true, false, or one of {', '.join(STRATEGIES)}")
            elif found and preset not in found:
                self.problem(
                    key, value, f"it contradicts {' and '.join(found)}, which is asked for as well; keep one"
                )
            else:
                found.add(preset)
        return next(iter(found), "ZERO3")

    def wrapped_classes(self) -> list[str]:
        """The classes whose modules are gathered one by one, if the arguments name any."""
        policy = str(self.keys.get("auto_wrap_policy", _POLICIES[0])).upper()
        if policy not in _POLICIES:
            self.problem(
                "auto_wrap_policy", self.keys["auto_wrap_policy"], f"use one of {', '.join(_POLICIES)}"
            )
        named = (
            self.keys.get("transformer_layer_cls_to_wrap")
            or self.keys.get("transformer_cls_names_to_wrap")
            or []
        )
        classes = [name.strip() for name in named.split(",")] if isinstance(named, str) else list(named)
        if policy == _POLICIES[0]:
            if self.keys.get("min_num_params"):
                self.line("min_num_params", self.keys["min_num_params"], _BLOCKS)
            return classes
        if classes:
            self.problem(
                "transformer_layer_cls_to_wrap", named, f"it goes with {_POLICIES[0]}, not with {policy}"
            )
        self.line("auto_wrap_policy", policy, _BLOCKS)
        return []

    def offloads(self) -> bool:
        return (
            "offload" in self.words or self.flag("cpu_offload", False) or self.flag("offload_params", False)
        )

    def loading(self, sharded: bool) -> None:
        if self.flag("cpu_ram_efficient_loading", False) and not sharded:
            self.line("cpu_ram_efficient_loading", True, "under no_shard every rank reads the weights itself")

    def saving(self) -> None:
        kind = str(self.keys.get("state_dict_type", "FULL_STATE_DICT")).upper()
        if kind == "SHARDED_STATE_DICT":
            text = "checkpoints are always written sharded; save_model writes whole safetensors all the same"
            self.line("state_dict_type", kind, text)
        elif kind != "FULL_STATE_DICT":
            self.problem("state_dict_type", kind, "use FULL_STATE_DICT or SHARDED_STATE_DICT")

    def translated_and_refused(self) -> None:
        for key, meaning in _TRANSLATED.items():
            value = self.keys.get(key)
            if value is not None and _plain(value) not in meaning.neutral:
                self.line(key, value, meaning.text)
        for key, instead in _REFUSED.items():
            if self.keys.get(key) not in (None, False, "false", {}, []):
                self.problem(key, self.keys[key], instead)


def _words(fsdp: Any) -> list[str]:
    if isinstance(fsdp, bool) or fsdp is None:
        return []
    items: Iterable[Any] = fsdp.split() if isinstance(fsdp, str) else fsdp
    return [str(getattr(item, "value", item)).lower() for item in items]


def _preset_of(value: Any) -> str | None:
    """`reshard_after_forward` is a bool in FSDP2, and a strategy in FSDP1."""
    simple = _plain(value)
    if isinstance(simple, bool):
        return "ZERO3" if simple else "SHARD_GRAD_OP"
    return _NUMBERED.get(simple) or STRATEGIES.get(str(simple).lower().rpartition(".")[2])


def _plain(value: Any) -> Any:
    """Command lines and accelerate's files write booleans and numbers as words."""
    if isinstance(value, str):
        if value.isdigit():
            return int(value)
        return {"true": True, "false": False}.get(value.lower(), value.upper())
    return value
