"""A Lightning Trainer's arguments and a configuration, made one. No library is needed for it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from unishard.config import Config
from unishard.config.batch import ACCUMULATION, MICRO, TRAIN, TriadError, solve
from unishard.config.fields import AUTO
from unishard.config.load import read
from unishard.config.problems import shown
from unishard.config.schema import suggestion
from unishard.config.zero import ZeroOptimization
from unishard.errors import ConfigError

_PRESETS = (
    "NO_SHARD",
    "DDP",
    "ZERO1",
    "ZERO2",
    "SHARD_GRAD_OP",
    "ZERO3",
    "FULL_SHARD",
    "HYBRID_ZERO1",
    "HYBRID_ZERO2",
    "HYBRID_SHARD_GRAD_OP",
    "HYBRID_SHARD",
)
_SECTION_OF = {
    "32-true": None,
    "bf16-mixed": "bf16",
    "bf16-true": "bf16",
    "16-mixed": "fp16",
    "16-true": "fp16",
}
"""Lightning's precisions, and the section of the configuration that computes in them."""


@dataclass(frozen=True)
class TrainerArguments:
    """What the Trainer, the loader and the module say about things that the configuration has keys for."""

    accumulation: int = 1
    """`accumulate_grad_batches`; 1 may be the default."""
    clip: float | None = None
    clip_algorithm: str | None = None
    precision: str = "32-true"
    """"32-true" may be the default."""
    micro_batch: int | None = None
    """Samples of one batch of the training loader, where it says so."""
    optimizer: str | None = None
    """The class that `configure_optimizers` made."""
    scheduler: str | None = None


@dataclass(frozen=True)
class Completed:
    """The configuration that the engine gets, and what the Trainer does with its loop."""

    config: dict[str, Any]
    accumulation: int
    clip: float
    """0 clips nothing."""
    assumed: bool
    """Whether nobody said how many samples a batch has, so that it counts as one."""


def configuration(config: Any = None, options: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The keys that a strategy's arguments mean.

    Args:
        config: a mapping, a path, a `Config`, the name of a preset, or `None`: ZERO3 unless `options` say otherwise.
        options: further keys, of the top level or of `zero_optimization`.

    Raises:
        ConfigError: a key that is unknown, or given twice with different values (all of them at once).

    >>> configuration("zero2", {"gradient_clipping": 1.0})
    {'sharding': 'ZERO2', 'gradient_clipping': 1.0}
    """
    given = {key: value for key, value in (options or {}).items() if value is not None}
    if isinstance(config, str) and config.upper() in _PRESETS:
        tree: dict[str, Any] = {"sharding": config.upper()}
    elif config is not None:
        tree = dict(read(config).tree)
    else:
        tree = {} if {"stage", "sharding", "zero_optimization"} & set(given) else {"sharding": "ZERO3"}
    problems: list[str] = []
    section = tree.get("zero_optimization") or {}
    zero = dict(section) if isinstance(section, Mapping) else {}
    for key, value in given.items():
        if key in Config.model_fields:
            _put(tree, key, value, key, problems)
        elif key in ZeroOptimization.model_fields:
            _put(zero, key, value, f"zero_optimization.{key}", problems)
        else:
            problems.append(f"{key} = {shown(value)}: the option is unknown; {suggestion(key, Config)}")
    if zero:
        tree["zero_optimization"] = zero
    _raise(problems)
    return tree


def _put(section: dict[str, Any], key: str, value: Any, path: str, problems: list[str]) -> None:
    if section.get(key, value) != value:
        problems.append(
            f"{path} is {shown(section[key])} in the configuration and {shown(value)} as an option; keep one"
        )
    section[key] = value


def completed(config: Mapping[str, Any], trainer: TrainerArguments, ranks: int) -> Completed:
    """`config` with what the Trainer knows filled in.

    A value that both give must be the same; of the Trainer's defaults (one batch a step, no clipping, fp32) the
    configuration's value wins.

    Raises:
        ConfigError: every value that both give differently, naming both.

    >>> trainer = TrainerArguments(accumulation=2, clip=0.5, micro_batch=4)
    >>> completed({"train_batch_size": "auto"}, trainer, ranks=2).config["gradient_clipping"]
    0.5
    """
    tree, problems = dict(config), []
    assumed = trainer.micro_batch is None and _number(tree, TRAIN) is None and _number(tree, MICRO) is None
    accumulation = _batch(tree, trainer, ranks, problems)
    clip = _clipping(tree, trainer, problems)
    _precision(tree, trainer.precision, problems)
    for key, made in (("optimizer", trainer.optimizer), ("scheduler", trainer.scheduler)):
        if made is not None and tree.get(key) is not None:
            problems.append(
                f"{key} = {shown(tree[key])} in the configuration, and configure_optimizers() returns {made}; keep one"
            )
    _raise(problems)
    return Completed(tree, accumulation, clip, assumed)


def for_inference(config: Mapping[str, Any]) -> dict[str, Any]:
    """`config` for an engine that only runs forward."""
    left_out = ("optimizer", "scheduler", TRAIN, ACCUMULATION, "gradient_clipping", "optimizer_in_backward")
    return {key: value for key, value in config.items() if key not in left_out} | {MICRO: 1}


def _number(tree: Mapping[str, Any], key: str) -> Any:
    """What the configuration gives, or `None` where it leaves the value to others."""
    value = tree.get(key)
    return None if value == AUTO else value


def _batch(tree: dict[str, Any], trainer: TrainerArguments, ranks: int, problems: list[str]) -> int:
    """Fill the three sizes of the batch; returns the batches of a step."""
    train, micro, steps = (_number(tree, key) for key in (TRAIN, MICRO, ACCUMULATION))
    loaded = trainer.micro_batch
    if micro is not None and loaded is not None and micro != loaded:
        problems.append(
            f"{MICRO} = {shown(micro)} in the configuration, and the training loader has batch_size={loaded}; leave "
            'the key out, or write "auto"'
        )
    micro = loaded if micro is None else micro
    if steps is None and trainer.accumulation != 1:
        steps = trainer.accumulation
    elif steps is not None and trainer.accumulation not in (1, steps):
        problems.append(
            f"{ACCUMULATION} = {shown(steps)} in the configuration, and "
            f"Trainer(accumulate_grad_batches={trainer.accumulation}); keep one"
        )
    if micro is None and train is None:
        micro = 1  # a loader that does not tell; the engine's counters of samples count batches then
    if problems or any(size is not None and type(size) is not int for size in (train, micro, steps)):
        return 1  # a size that is no number is named by the engine's own check
    try:
        triad = solve(train, micro, steps, ranks, "the Trainer's devices and nodes")
    except TriadError as error:
        problems.append(f"{error} (the micro-batch is the training loader's, the steps are the Trainer's)")
    else:
        train, micro, steps = triad.train, triad.micro, triad.accumulation
    for key, value in ((TRAIN, train), (MICRO, micro), (ACCUMULATION, steps)):
        if value is not None:
            tree[key] = value
    return steps or 1


def _clipping(tree: dict[str, Any], trainer: TrainerArguments, problems: list[str]) -> float:
    given, by_value = _number(tree, "gradient_clipping"), trainer.clip_algorithm == "value"
    if given and trainer.clip and (by_value or given != trainer.clip):
        algorithm = ", gradient_clip_algorithm='value'" if by_value else ""
        problems.append(
            f"gradient_clipping = {shown(given)} in the configuration, and "
            f"Trainer(gradient_clip_val={trainer.clip}{algorithm}); keep one"
        )
    clip = given or trainer.clip or 0.0
    tree["gradient_clipping"] = 0.0 if by_value and not given else clip
    return clip


def _precision(tree: dict[str, Any], precision: str, problems: list[str]) -> None:
    if precision not in _SECTION_OF:
        problems.append(
            f"Trainer(precision={precision!r}): use one of {', '.join(_SECTION_OF)}, or the configuration's sections "
            "bf16, fp16 and torch_autocast"
        )
        return
    wanted = _SECTION_OF[precision]
    for name in ("bf16", "fp16"):
        section = tree.get(name)
        if section is not None and not isinstance(section, Mapping):
            continue  # the engine's own check names it
        enabled = (section or {}).get("enabled", AUTO)
        if wanted is not None and enabled != AUTO and enabled is not (name == wanted):
            problems.append(
                f"{name}.enabled = {shown(enabled)} in the configuration, and Trainer(precision={precision!r}); keep "
                "one"
            )
        if name == wanted:
            tree[name] = {**(section or {}), "enabled": True}
        elif section is not None and enabled == AUTO:
            tree[name] = {**section, "enabled": False}


def _raise(problems: list[str]) -> None:
    if len(problems) == 1:
        raise ConfigError(f"UnishardStrategy: {problems[0]}")
    if problems:
        raise ConfigError("UnishardStrategy:\n" + "\n".join(f"  - {problem}" for problem in problems))
