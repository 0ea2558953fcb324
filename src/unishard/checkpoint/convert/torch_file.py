"""One file of `torch.save`: a plain state dict, or a dict that holds one beside an optimizer's.

Full state dicts of FSDP1 are such files, as are most people's own checkpoints.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from unishard.checkpoint.catalog import Catalog, Known
from unishard.checkpoint.convert.aside import aside
from unishard.checkpoint.convert.deepspeed_values import materialized
from unishard.checkpoint.convert.format import (
    Hints,
    Opened,
    Options,
    Progress,
    note_files,
    put_counters,
    put_groups,
    scalar,
    whole_tensor,
)
from unishard.checkpoint.convert.matching import members_of
from unishard.checkpoint.convert.records import verify_records
from unishard.checkpoint.convert.source import Source
from unishard.checkpoint.convert.torch_read import Archive, Foreign, Stored
from unishard.checkpoint.convert.torch_write import Streamed, write_torch_file
from unishard.checkpoint.keys import MODEL, STATE
from unishard.errors import CheckpointError

_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt", ".tar")
_MODEL_NAMES = ("model", "state_dict", "model_state_dict", "module", "net", "weights")
_SEVERAL = "optimizer_states"
_OPTIMIZER_NAMES = (
    "optimizer",
    "optim",
    "optimizer_state_dict",
    "optim_state_dict",
    "optimizer_state",
    _SEVERAL,
)
_STEP_NAMES = ("global_step", "global_steps", "step", "iteration", "iter_num")


class TorchFormat:
    """`checkpoint.pt`."""

    name = "torch"
    title = "torch.save"
    honours = frozenset({"dtype", "weights_only", "exclude_frozen", "overwrite"})

    def detect(self, path: Path) -> bool:
        if not path.is_file() or path.suffix not in _SUFFIXES:
            return False
        with open(path, "rb") as file:
            return file.read(4) == b"PK\x03\x04" or path.suffix in (".pt", ".pth", ".ckpt")

    def open(self, path: Path, hints: Hints) -> Opened:
        return open_content(path.parent, path.name, Archive(path).content, hints, self.name)

    def verify(self, opened: Opened, progress: Progress) -> Iterator[str]:
        """Compares each record with the CRC-32 that torch stored with it."""
        return verify_records(opened, progress)

    def write(self, source: Source, target: Path, options: Options) -> tuple[Path, list[str]]:
        state = weights_to_write(source, list(source.weights()))
        content: Any = state
        groups = source.groups()
        if groups:
            optimizer = {"state": _state_by_position(source, groups), "param_groups": _by_position(groups)}
            content = {"model": state, "optimizer": optimizer, "step": source.step(), **_others(source)}
        with aside(target, folder=False, overwrite=options.overwrite) as draft:
            write_torch_file(draft, content)
        left_out = source.engine() and not options.weights_only
        return target, ["loss scale and schedule were left out"] if left_out else []


def open_content(folder: Path, file: str, content: Any, hints: Hints, kind: str) -> Opened:
    """Describe the content of one file.

    Raises `CheckpointError` if it holds no state dict.
    """
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{folder / file} holds a {type(content).__name__}, not a state dict")
    opened = Opened(folder, Catalog(about={"writer": "torch.save"}), kind)
    state, optimizer, rest = split(content, str(folder / file))
    parameters = put_weights(opened, state)
    if optimizer is not None:
        put_optimizer(opened, optimizer, parameters, f"{folder / file}", hints)
    client: dict[str, Any] = {}
    for name, value in rest.items():
        if isinstance(value, Foreign) or _heavy(value):
            opened.notes.append(f"{name} was left out")
        else:
            client[str(name)] = materialized(value)
    step = next((rest[name] for name in _STEP_NAMES if isinstance(rest.get(name), int)), None)
    if step is not None:
        opened.catalog.about["step"] = step
    put_counters(opened.catalog, client, global_steps=step or 0)
    return note_files(opened)


def split(
    content: Mapping[str, Any], where: str
) -> tuple[Mapping[str, Any], Mapping[str, Any] | None, dict[str, Any]]:
    """(state dict of the model, of the optimizer, the rest) of what a file holds."""
    if content and all(isinstance(v, Stored) for v in content.values()):
        return content, None, {}
    named = [n for n in _MODEL_NAMES if _is_state_dict(content.get(n))]
    if not named:
        tensors = {k: v for k, v in content.items() if isinstance(v, Stored | Foreign)}
        if tensors and not any(isinstance(v, Mapping) for v in content.values()):
            return tensors, None, {k: v for k, v in content.items() if k not in tensors}
        raise CheckpointError(
            f"{where} holds {', '.join(map(str, list(content)[:8]))}; the model's state dict is looked for there and "
            f"under {', '.join(_MODEL_NAMES)}"
        )
    several = content.get(_SEVERAL)
    if isinstance(several, list) and len(several) == 1:
        # Lightning's checkpoints list their optimizers.
        content = {**content, _SEVERAL: several[0]}
    found = [n for n in _OPTIMIZER_NAMES if is_optimizer(content.get(n))]
    rest = {k: v for k, v in content.items() if k != named[0] and k not in found[:1]}
    return content[named[0]], content[found[0]] if found else None, rest


def _is_state_dict(value: Any) -> bool:
    return isinstance(value, Mapping) and any(isinstance(v, Stored | Foreign) for v in value.values())


def is_optimizer(value: Any) -> bool:
    """Whether this is an optimizer's state dict."""
    return isinstance(value, Mapping) and "state" in value and "param_groups" in value


def _heavy(value: Any) -> bool:
    if isinstance(value, Stored):
        return value.numel > 1 << 20
    if isinstance(value, Mapping):
        return any(_heavy(v) or isinstance(v, Foreign) for v in value.values())
    if isinstance(value, list | tuple):
        return any(_heavy(v) or isinstance(v, Foreign) for v in value)
    return False


def put_weights(opened: Opened, state: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Enter a state dict; returns the shapes of what may be parameters, tied ones once."""
    seen: dict[tuple[Any, ...], str] = {}
    parameters: dict[str, tuple[int, ...]] = {}
    for full, value in state.items():
        name = _unwrapped(full, state)
        key = f"{MODEL}.{name}"
        if not isinstance(value, Stored):
            opened.notes.append(f"{name} is no tensor and was left out")
            continue
        place = (value.record, value.data, value.shape, value.strides)
        first = seen.setdefault(place, key) if value.numel else key
        if first != key:
            opened.catalog.aliases[key] = first
            continue
        opened.catalog.tensors[key] = whole_tensor(opened.folder, value)
        if value.dtype.is_floating_point:
            parameters[name] = value.shape
    return parameters


def _unwrapped(name: str, state: Mapping[str, Any]) -> str:
    """Without what DDP and `torch.compile` put before names."""
    if all(str(other).startswith("module.") for other in state):
        name = name.removeprefix("module.")
    return name.replace("_orig_mod.", "")


def put_optimizer(
    opened: Opened,
    optimizer: Mapping[str, Any],
    parameters: Mapping[str, tuple[int, ...]],
    where: str,
    hints: Hints,
) -> None:
    """Enter an optimizer's state dict, keyed by position or by name."""
    state, groups = optimizer["state"], optimizer["param_groups"]
    shapes = {
        key: v.shape
        for key, kinds in state.items()
        for v in kinds.values()
        if isinstance(v, Stored) and v.shape
    }
    members = members_of(groups, shapes, parameters, where, hints.members, hints.frozen)
    positions = [position for group in groups for position in group["params"]]
    for position, name in zip(positions, [n for group in members for n in group], strict=True):
        for kind, value in state.get(position, {}).items():
            put_state(opened, f"{STATE}.{name}.{kind}", value)
    put_groups(opened.catalog, groups, members)


def put_state(opened: Opened, key: str, value: Any) -> None:
    """Enter one piece of an optimizer's state."""
    if isinstance(value, Stored):
        shaped = bool(value.shape)
        opened.catalog.tensors[key] = whole_tensor(opened.folder, value) if shaped else scalar(value.read())
    elif isinstance(value, int | float) and not isinstance(value, bool):
        opened.catalog.tensors[key] = scalar(value)
    elif value is not None:
        opened.catalog.blobs[key] = Known(value)


def weights_to_write(source: Source, names: list[str]) -> dict[str, Streamed]:
    """Placeholders for weights, tied ones under all their names."""
    weights, found = source.weights(), {}
    for name in names:
        info = weights[name]
        found[name] = Streamed(
            info.dtype, info.shape, lambda name=name: (t for _, t in source.weight_pieces(name)), name
        )
    for alias, name in source.ties().items():
        if name in found:
            found[alias] = found[name]
    return found


def _state_by_position(source: Source, groups: list[dict[str, Any]]) -> dict[int, dict[str, Any]]:
    states, values, found = source.states(), source.state_values(), {}
    for position, name in enumerate(n for group in groups for n in group["params"]):
        kinds: dict[str, Any] = dict(values.get(name, {}))
        for kind, info in states.get(name, {}).items():
            key = f"{STATE}.{name}.{kind}"
            streamed = Streamed(
                info.dtype, info.shape, lambda key=key: (t for _, t in source.pieces(key)), key
            )
            kinds[kind] = streamed if info.shape else source.small(key)
        if kinds:
            found[position] = kinds
    return found


def _by_position(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    found, position = [], 0
    for group in groups:
        names = list(group["params"])
        positions = list(range(position, position + len(names)))
        found.append({**group, "params": positions, "param_names": names})
        position += len(names)
    return found


def _others(source: Source) -> dict[str, Any]:
    return {k: v for k, v in source.client_state().items() if k not in ("model", "optimizer", "step")}
