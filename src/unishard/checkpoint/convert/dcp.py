"""torch.distributed.checkpoint's folders, which FSDP2's users write: any nesting of model and optimizer.

Keys are brought to ours: the optimizer's are found by `.state.` and `.param_groups.`, the model's by sharing names with
them. Metadata is a pickle that only torch's own reader understands, so it is trusted as torch trusts it.
"""

from __future__ import annotations

import io
import zipfile
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from unishard.checkpoint.catalog import METADATA, Catalog, Chunk, Known
from unishard.checkpoint.commit import write_durably
from unishard.checkpoint.convert.aside import aside
from unishard.checkpoint.convert.format import (
    Hints,
    Opened,
    Options,
    Progress,
    note_files,
    put_counters,
    put_groups,
)
from unishard.checkpoint.convert.ours import add_in_pieces
from unishard.checkpoint.convert.source import Source
from unishard.checkpoint.keys import GROUPS, MODEL, STATE
from unishard.checkpoint.storage import RankFile, Reader
from unishard.errors import CheckpointError, CorruptCheckpointError

_USUAL = ("model", "module", "state_dict", "app")


class DcpFormat:
    """`.metadata` and `*.distcp`."""

    name = "dcp"
    title = "torch.distributed.checkpoint"
    honours = frozenset({"dtype", "weights_only", "exclude_frozen", "overwrite"})

    def detect(self, path: Path) -> bool:
        return (path / METADATA).is_file()

    def open(self, path: Path, hints: Hints) -> Opened:
        from torch.distributed.checkpoint import FileSystemReader

        try:
            raw = Catalog.from_dcp(path)
            paths = FileSystemReader(path).read_metadata().planner_data or {}
        except Exception as error:
            raise CorruptCheckpointError(
                f"{path / METADATA} cannot be read ({type(error).__name__}: {error})"
            ) from error
        catalog = Catalog(about=raw.about)
        opened = Opened(path, catalog, self.name)
        optimizer = _optimizer_prefix(raw)
        model = _model_prefix(raw, optimizer, paths)
        for key, info in raw.tensors.items():
            new = _renamed(key, model, optimizer)
            if new is None:
                opened.notes.append(f"{key} is neither weight nor optimizer state and was left out")
            else:
                catalog.tensors[new] = info
        client: dict[str, Any] = {}
        with Reader(path, raw, verify=False) as reader:
            _put_values(raw, reader, opened, client, optimizer)
        put_counters(catalog, client)
        return _with_files(note_files(opened))

    def verify(self, opened: Opened, progress: Progress) -> Iterator[str]:
        """Compares each record with the CRC-32 that torch stored with it."""
        for key, info in opened.catalog.tensors.items():
            for chunk in info.chunks if info.value is None else ():
                if chunk.file not in opened.catalog.files:
                    continue
                problem = _problem(opened.folder / chunk.file, chunk, progress)
                if problem:
                    yield f"{chunk.file}: the bytes of {key} {problem}"

    def write(self, source: Source, target: Path, options: Options) -> tuple[Path, list[str]]:
        with aside(target, folder=True, overwrite=options.overwrite) as draft:
            with RankFile(draft, "__0_0.distcp") as file:
                for name, info in source.weights().items():
                    add_in_pieces(file, f"{MODEL}.{name}", info.shape, source.weight_pieces(name))
                for name, kinds in source.states().items():
                    for kind, info in kinds.items():
                        add_in_pieces(
                            file,
                            f"{STATE}.{name}.{kind}",
                            info.shape,
                            source.pieces(f"{STATE}.{name}.{kind}"),
                        )
                for position, group in enumerate(_complete(source)):
                    for option, value in group.items():
                        file.add_blob(f"{GROUPS}.{position}.{option}", value)
                for key, value in source.client_state().items():
                    file.add_blob(str(key), value)
            file.catalog.aliases = {f"{MODEL}.{a}": f"{MODEL}.{n}" for a, n in source.ties().items()}
            file.catalog.require_covered()
            write_durably(draft / METADATA, file.catalog.to_dcp())
        notes = (
            ["counters, loss scale and schedule have no place in a plain DCP folder"]
            if source.engine()
            else []
        )
        return target, notes


# keys -----------------------------------------------------------------------------------------------------------


def _optimizer_prefix(raw: Catalog) -> str | None:
    """What stands before `.state.` and `.param_groups.`; empty for an optimizer that was saved by itself."""
    found = {
        key.split("param_groups.", 1)[0]
        for key in raw.blobs
        if ".param_groups." in f".{key}" and not key.startswith("unishard.")
    }
    if len(found) > 1:
        raise CheckpointError(
            f"the folder holds several optimizers ({', '.join(sorted(found))}); save one of them by itself"
        )
    return found.pop() if found else None


def _model_prefix(raw: Catalog, optimizer: str | None, paths: Mapping[str, Any]) -> str:
    """What stands before parameter names: the nesting that was saved tells, and the names that the optimizer has."""
    state = "" if optimizer is None else f"{optimizer}state."
    names = [key for key in raw.tensors if not state or not key.startswith(state)]
    trained = {key[len(state) :].rpartition(".")[0] for key in raw.tensors if state and key.startswith(state)}
    found = Counter(_before(key, paths.get(key)) for key in names)
    fitting = [prefix for prefix in found if all(f"{prefix}{name}" in raw.tensors for name in trained)]
    return max(fitting or [""], key=lambda prefix: found[prefix])


def _before(key: str, path: Any) -> str:
    """A key without its last part, by the path of which torch made it; else up to the first dot."""
    if path is not None and key.endswith(str(path[-1])):
        return key[: len(key) - len(str(path[-1]))]
    first, dot, _ = key.partition(".")
    return first + dot if dot and first in _USUAL else ""


def _renamed(key: str, model: str, optimizer: str | None) -> str | None:
    if optimizer is not None and key.startswith(f"{optimizer}state."):
        return f"{STATE}.{key[len(optimizer) + len('state.') :]}"
    if optimizer and key.startswith(optimizer):
        return None
    return f"{MODEL}.{key[len(model) :]}" if key.startswith(model) else None


def _put_values(
    raw: Catalog, reader: Reader, opened: Opened, client: dict[str, Any], optimizer: str | None
) -> None:
    groups: dict[str, dict[str, Any]] = {}
    for key in raw.blobs:
        try:
            value = reader.blob(key)
        except CheckpointError:
            opened.notes.append(f"{key} holds objects of other classes and was left out")
            continue
        if optimizer is not None and key.startswith(f"{optimizer}param_groups."):
            owner, _, option = key[len(optimizer) + len("param_groups.") :].rpartition(".")
            groups.setdefault(owner, {})[option] = value
        elif optimizer is not None and key.startswith(f"{optimizer}state."):
            opened.catalog.blobs[f"{STATE}.{key[len(optimizer) + len('state.') :]}"] = Known(value)
        else:
            client[key] = value
    if groups:
        _put_groups(opened.catalog, groups)


def _put_groups(catalog: Catalog, groups: Mapping[str, dict[str, Any]]) -> None:
    """By position; or, flattened, by parameter name: then parameters with the same options make a group."""
    if all(owner.isdigit() for owner in groups):
        ordered = [groups[owner] for owner in sorted(groups, key=int)]
        put_groups(catalog, ordered, [list(group.get("params", ())) for group in ordered])
        return
    gathered: dict[str, tuple[dict[str, Any], list[str]]] = {}
    for name, options in groups.items():
        gathered.setdefault(repr(sorted(options.items())), (options, []))[1].append(name)
    put_groups(catalog, [o for o, _ in gathered.values()], [names for _, names in gathered.values()])


def _with_files(opened: Opened) -> Opened:
    missing = [name for name, size in opened.catalog.files.items() if size < 0]
    if missing:
        keys = [k for k, i in opened.catalog.tensors.items() if any(c.file == missing[0] for c in i.chunks)]
        raise CorruptCheckpointError(
            f"{opened.folder}: {missing[0]}, which holds {', '.join(keys[:4])}, is missing"
        )
    return opened


def _complete(source: Source) -> list[dict[str, Any]]:
    """Options as torch's optimizers have them: `dcp.load` refuses a group that lacks one."""
    import torch

    groups = source.groups()
    kinds = {kind for state in source.states().values() for kind in state}
    classes = {
        "exp_avg_sq": torch.optim.AdamW,
        "momentum_buffer": torch.optim.SGD,
        "sum": torch.optim.Adagrad,
    }
    for kind, cls in classes.items():
        if kind in kinds:
            defaults = cls([torch.nn.Parameter(torch.zeros(1))]).param_groups[0]
            return [{**{k: v for k, v in defaults.items() if k != "params"}, **group} for group in groups]
    return groups


class _Part(io.RawIOBase):
    """A stretch of a file, as a file."""

    def __init__(self, path: Path, offset: int, length: int) -> None:
        self._file, self._offset, self._length, self._at = open(path, "rb"), offset, length, 0  # noqa: SIM115

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, to: int, whence: int = 0) -> int:
        self._at = to + (0, self._at, self._length)[whence]
        return self._at

    def readinto(self, buffer: Any) -> int:
        self._file.seek(self._offset + self._at)
        content = self._file.read(max(0, min(len(buffer), self._length - self._at)))
        buffer[: len(content)] = content
        self._at += len(content)
        return len(content)

    def close(self) -> None:
        self._file.close()
        super().close()


def _problem(path: Path, chunk: Chunk, progress: Progress) -> str | None:
    if path.stat().st_size < chunk.offset + chunk.length:
        return (
            f"end after {path.stat().st_size} instead of {chunk.offset + chunk.length}: the file is truncated"
        )
    with _Part(path, chunk.offset, chunk.length) as part:
        try:
            with zipfile.ZipFile(part) as archive:  # pyright: ignore[reportArgumentType]
                for info in archive.infolist():
                    info.CRC = info.CRC or None  # pyright: ignore[reportAttributeAccessIssue]  # ours keep none there
                    with archive.open(info) as record:
                        while block := record.read(1 << 20):
                            progress(len(block))
        except (zipfile.BadZipFile, EOFError):
            return "are not those that were written (CRC-32)"
    return None
