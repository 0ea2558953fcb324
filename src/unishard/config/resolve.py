"""The one place where the batch triad, every `"auto"` and all that is derived is settled, once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from unishard.config.autos import fill_autos
from unishard.config.batch import ACCUMULATION, MICRO, TRAIN, TRIAD, TriadError, implied_world_size, solve
from unishard.config.combinations import COMBINATIONS, STAGE_OF, subgroup_size
from unishard.config.draft import Draft
from unishard.config.fields import Section
from unishard.config.load import Raw, Source, read
from unishard.config.model import Config
from unishard.config.params import resolve_optimizer, resolve_scheduler
from unishard.config.problems import Problem, config_error, parse
from unishard.config.resolved import ResolvedConfig
from unishard.config.translate import treat
from unishard.errors import ConfigError

_HYBRID = {
    "ZERO1": "HYBRID_ZERO1",
    "ZERO2": "HYBRID_ZERO2",
    "SHARD_GRAD_OP": "HYBRID_SHARD_GRAD_OP",
    "ZERO3": "HYBRID_SHARD",
}
_FLAT = {hybrid: flat for flat, hybrid in _HYBRID.items()}
_OF_STAGE = ("NO_SHARD", "ZERO1", "ZERO2", "ZERO3")


@dataclass(frozen=True)
class _Facts:
    """What the launcher, the model and the caller know."""

    world_size: int | None
    world_source: str
    local_world_size: int | None = None
    hidden_size: int | None = None
    overrides: Mapping[str, Any] = field(default_factory=dict)


def resolve(
    config: Source,
    *,
    dp_world_size: int,
    world_size_source: str = "the argument dp_world_size",
    local_world_size: int | None = None,
    hidden_size: int | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> ResolvedConfig:
    """Settle every value of `config` for `dp_world_size` data-parallel ranks.

    `world_size_source` says in errors where that number is from; `local_world_size` (ranks on this node)
    sizes HYBRID_SHARD without a mesh; `hidden_size` fills bucket sizes left to `"auto"`; `overrides` maps
    dotted keys to values and wins over the config. Raises `ConfigError` listing every problem at once.

    >>> resolve({"train_micro_batch_size_per_gpu": 4}, dp_world_size=2).train_batch_size
    8
    """
    raw = read(config)
    draft = _settled(
        raw, _Facts(dp_world_size, world_size_source, local_world_size, hidden_size, overrides or {})
    )
    if draft.problems:
        raise config_error(draft.problems, raw.source)
    resolved = ResolvedConfig(**draft.values, dp_world_size=dp_world_size)
    resolved._origins.update(draft.origins | {"dp_world_size": "launcher"})
    resolved._log_lines = tuple(draft.lines)
    return resolved


def check(
    config: Source,
    *,
    dp_world_size: int | None = None,
    world_size_source: str = "the argument dp_world_size",
    local_world_size: int | None = None,
    hidden_size: int | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> list[Problem]:
    """Every problem of `config` at once; empty when `resolve` would succeed.

    Without `dp_world_size`, what depends on it is checked only as far as the batch sizes imply it.
    Raises `ConfigError` only when the config cannot be read at all.

    >>> [problem.key for problem in check({"train_batch": 8, "fp16": {"enabled": 1}}, dp_world_size=1)]
    ['fp16.enabled', 'train_batch']
    """
    facts = _Facts(dp_world_size, world_size_source, local_world_size, hidden_size, overrides or {})
    return _settled(read(config), facts).problems


def _settled(raw: Raw, facts: _Facts) -> Draft:
    world = facts.world_size
    if world is not None and (isinstance(world, bool) or not isinstance(world, int) or world < 1):
        raise ConfigError(
            f"data-parallel world size {world!r} (from {facts.world_source}) must be an integer of at least 1"
        )
    tree = raw.tree
    for path, value in facts.overrides.items():
        tree = _with(tree, path.split("."), value)
    config, problems = parse(Config, tree)
    if config is None:
        raise config_error(problems, raw.source)
    given = set(_paths(config))
    origins = dict.fromkeys(given, raw.origin) | {
        path: "override" for path in facts.overrides if path in given
    }
    draft = Draft(config, origins, world, facts.world_source)
    draft.problems += [*raw.problems, *problems]
    draft.lines += raw.lines
    for finding in treat(config):
        if isinstance(finding, Problem):
            draft.problems.append(finding)
        else:
            draft.lines.append(finding)
    resolve_optimizer(draft)
    resolve_scheduler(draft)
    fill_autos(draft, Config, "", facts.hidden_size)
    _resolve_batch(draft)
    _resolve_dtypes(draft)
    _resolve_sharding(draft, facts.local_world_size)
    found = (row.problem(draft) for row in COMBINATIONS)
    draft.problems += [problem for problem in found if problem is not None and not draft.bad(problem.key)]
    if draft.get("sharding") == "NO_SHARD":
        draft.values["mesh"] = None
    return draft


def _with(tree: Mapping[str, Any], path: list[str], value: Any) -> dict[str, Any]:
    head, *rest = path
    if not rest:
        return {**tree, head: value}
    inner = tree.get(head)
    return {**tree, head: _with(inner if isinstance(inner, Mapping) else {}, rest, value)}


def _paths(section: Section, prefix: str = "") -> Iterator[str]:
    """Dotted keys of the leaves that were given."""
    for name in section.model_fields_set:
        value = getattr(section, name)
        if isinstance(value, Section):
            yield from _paths(value, f"{prefix}{name}.")
        elif name == "params" and isinstance(value, dict):
            yield from (f"{prefix}params.{key}" for key in value)
        else:
            yield f"{prefix}{name}"


def _resolve_batch(draft: Draft) -> None:
    misspelt = (problem.message for problem in draft.problems if problem.rule == "unknown-key")
    if draft.bad(*TRIAD) or any(f"'{key}'" in message for message in misspelt for key in TRIAD):
        return
    train, micro, accumulation = (draft.get(key) for key in TRIAD)
    world, source = draft.world_size, draft.world_source
    if world is None:
        world, source = implied_world_size(train, micro, accumulation), "the batch sizes themselves"
        draft.world_size, draft.world_source = world, source
    if world is None:
        world, source = 1, "an assumption, as none was given"
    try:
        triad = solve(train, micro, accumulation, world, source)
    except TriadError as error:
        draft.problem(TRAIN, str(error), "batch-triad")
        return
    for key, value in ((TRAIN, triad.train), (MICRO, triad.micro), (ACCUMULATION, triad.accumulation)):
        if draft.get(key) is None:
            draft.set(key, value, "auto" if draft.origins.get(key) == "auto" else "derived")


def _resolve_dtypes(draft: Draft) -> None:
    enabled = [name for name in ("bf16", "fp16") if draft.get(f"{name}.enabled") is True]
    draft.set("compute_dtype", enabled[0] if enabled else "fp32", "derived")
    draft.set("grad_accum_dtype", draft.get("data_types.grad_accum_dtype"), "derived")
    if draft.get("buffer_dtype") is None and (inner := draft.get("data_types.buffer_dtype")) is not None:
        draft.set("buffer_dtype", inner, "derived")
    if draft.get("gradient_clipping") is None:
        draft.set("gradient_clipping", 0.0, draft.origins.get("gradient_clipping", "default"))


def _resolve_sharding(draft: Draft, local_world_size: int | None) -> None:
    """Agree `sharding`, `zero_optimization.stage` and `mesh`; conflicts are left to the table."""
    name = draft.get("sharding")
    if name is None:
        name = _OF_STAGE[draft.get("zero_optimization.stage")]
        draft.set("sharding", name, "derived")
    elif draft.given("zero_optimization.stage") is None:
        draft.set("zero_optimization.stage", STAGE_OF[name], "derived")
    replicate, shard = draft.get("mesh.dp_replicate"), draft.get("mesh.dp_shard")
    if shard is None:
        shard = subgroup_size(draft) or (1 if name == "NO_SHARD" and replicate else None)
    if shard is None and replicate is None and name in _FLAT:
        shard = local_world_size
    if shard is None and replicate is None:
        draft.values["mesh"] = None
        return
    world = draft.world_size
    if world is not None:
        replicate = replicate if replicate is not None else max(world // (shard or 1), 1)
        shard = shard if shard is not None else max(world // replicate, 1)
    for key, value in (("mesh.dp_replicate", replicate), ("mesh.dp_shard", shard)):
        if draft.get(key) != value:
            draft.set(key, value, "derived")
    if replicate is not None and replicate > 1 and name in _HYBRID:
        draft.set("sharding", _HYBRID[name], "derived")
    elif replicate == 1 and name in _FLAT:
        draft.set("sharding", _FLAT[name], "derived")
        draft.lines.append(
            f'sharding = "{name}": with one copy of the states (dp_replicate 1) this is {_FLAT[name]}'
        )
