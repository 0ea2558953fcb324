"""From a draft to a checkpoint: written aside, made durable, and put in its place at one instant.

A folder with a manifest is a whole checkpoint, since the manifest is written last and the folder gets its name after
that. Whatever dies before leaves a hidden draft, which nobody reads and a later save removes.
"""

from __future__ import annotations

import ctypes
import os
import platform
import shutil
import socket
import uuid
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from unishard.checkpoint.catalog import MANIFEST, METADATA, Catalog
from unishard.errors import CheckpointError

LATEST = "latest"
_DRAFT, _OLD, _NEXT = ".part-", ".old-", f".{LATEST}-"
_RENAMEAT2, _AT_FDCWD, _EXCHANGE = 316, -100, 2


def new_draft(parent: Path, tag: str) -> Path:
    """An empty folder beside the future checkpoint, called after who writes it; drafts of dead processes are removed.

    Raises `CheckpointError` for a tag that is no plain name, `OSError` where nothing can be written.
    """
    if not tag or tag != Path(tag).name or tag.startswith(".") or tag == LATEST:
        raise CheckpointError(
            f"tag={tag!r} cannot be a folder's name inside {parent}; use something like global_step100"
        )
    parent.mkdir(parents=True, exist_ok=True)
    for old in _abandoned(parent):
        shutil.rmtree(old, ignore_errors=True)
    for pointer in parent.glob(f"{_NEXT}*"):
        if _is_of_the_dead(pointer.name, _NEXT):
            pointer.unlink(missing_ok=True)
    draft = parent / f".{tag}{_DRAFT}{_signature()}"
    draft.mkdir()
    return draft


def _signature() -> str:
    """Who writes: part of the name of what must not stay if that process dies, from the first instant."""
    return f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:12]}"


def _is_of_the_dead(name: str, mark: str) -> bool:
    """Whether the signature after `mark` is that of a process of this host that is gone."""
    host, _, pid = name.rpartition(mark)[2].rpartition("-")[0].rpartition("-")
    return host == socket.gethostname() and pid.isdigit() and not Path(f"/proc/{pid}").exists()


def _abandoned(parent: Path) -> Iterator[Path]:
    """Drafts and replaced checkpoints whose writer is gone."""
    for path in parent.glob(".*"):
        mark = next((mark for mark in (_DRAFT, _OLD) if mark in path.name), None)
        if mark is not None and path.is_dir() and _is_of_the_dead(path.name, mark):
            yield path


def _read(path: Path) -> str:
    with suppress(OSError):
        return path.read_text()
    return ""


def commit(draft: Path, catalog: Catalog, parent: Path, tag: str) -> Path:
    """Finish the draft and give it its name, replacing a checkpoint that has it. Durable on return."""
    write_durably(draft / METADATA, catalog.to_dcp())
    write_durably(draft / MANIFEST, catalog.to_json().encode())
    sync_folder(draft)
    final = parent / tag
    replaced = draft.with_name(draft.name.replace(_DRAFT, _OLD))
    if final.exists():
        _keep_foreign_files(final, draft)
        _exchange(draft, final, replaced)
    else:
        draft.rename(final)
    sync_folder(parent)
    shutil.rmtree(replaced, ignore_errors=True)
    return final


def _exchange(draft: Path, final: Path, replaced: Path) -> None:
    """Put `draft` in the place of `final`, which becomes `replaced`."""
    if not _exchange_at_once(draft, final):
        # For an instant neither is in place; `restore` undoes that.
        final.rename(replaced)
        draft.rename(final)
        return
    draft.rename(replaced)


def _keep_foreign_files(final: Path, draft: Path) -> None:
    """Let files that users put beside the shards of a checkpoint stay when another takes its place."""
    for path in final.iterdir():
        if path.name.startswith(".") or path.name == MANIFEST or is_shard(path.name):
            continue
        if (draft / path.name).exists():  # this one has its own
            continue
        if path.is_dir():
            shutil.copytree(path, draft / path.name, symlinks=True, copy_function=_link)
        else:
            _link(path, draft / path.name)


def _link(source: Any, target: Any) -> Any:
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:  # a file system without hard links
        shutil.copy2(source, target, follow_symlinks=False)
    return target


def is_shard(name: str) -> bool:
    """Whether a file is called as those that ranks write.

    >>> is_shard("__0_0.distcp"), is_shard("model.bin")
    (True, False)
    """
    return name.startswith("__") and name.endswith(".distcp")


def _exchange_at_once(a: Path, b: Path) -> bool:
    """Swap two names in one step, where the system can."""
    if platform.machine() not in ("x86_64", "AMD64") or os.name != "posix":
        return False
    libc = ctypes.CDLL(None)
    result = libc.syscall(
        _RENAMEAT2, _AT_FDCWD, os.fsencode(a), _AT_FDCWD, os.fsencode(b), ctypes.c_uint(_EXCHANGE)
    )
    return result == 0


def restore(parent: Path) -> None:
    """Bring back a checkpoint that a process which died was just about to replace."""
    for path in parent.glob(f".*{_OLD}*"):
        final = parent / path.name[1 : path.name.rindex(_OLD)]
        if (path / MANIFEST).is_file() and not final.exists():
            with suppress(OSError):
                path.rename(final)


def point_latest(parent: Path, tag: str) -> None:
    """Let the file `latest` name `tag`, atomically."""
    write_aside(parent / LATEST, tag.encode(), parent / f"{_NEXT}{_signature()}")
    sync_folder(parent)


def write_aside(path: Path, content: bytes, temporary: Path) -> None:
    """Give a small file its content in one step: written durably as `temporary` first, of which nothing is left."""
    try:
        write_durably(temporary, content)
        temporary.replace(path)
    except OSError:
        with suppress(OSError):
            temporary.unlink()
        raise


def committed(parent: Path) -> list[tuple[int, str]]:
    """(step, tag) of every whole checkpoint of ours in `parent`, oldest first."""
    found = []
    for manifest in parent.glob(f"*/{MANIFEST}"):
        if manifest.parent.name.startswith("."):
            continue  # a draft just before it gets its name, or a checkpoint that is being removed
        with suppress(CheckpointError):
            about = Catalog.from_json(manifest.read_text(), str(manifest)).about
            found.append((about.get("step", -1), manifest.stat().st_mtime, manifest.parent.name))
    return [(step, tag) for step, _, tag in sorted(found)]


def retain(parent: Path, keep_last: int) -> None:
    """Remove all but the `keep_last` checkpoints of the highest steps."""
    for _, tag in committed(parent)[:-keep_last]:
        old = parent / f".{tag}{_OLD}{_signature()}"
        # Out of sight at once: a reader must not find it half removed.
        (parent / tag).rename(old)
        (old / MANIFEST).unlink(missing_ok=True)
        shutil.rmtree(old, ignore_errors=True)


def write_durably(path: Path, content: bytes) -> None:
    """Write a small file and have it on the disk."""
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Have the names in a folder on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def discard(draft: Path) -> None:
    """Remove a draft that will not become a checkpoint."""
    shutil.rmtree(draft, ignore_errors=True)


def find(parent: Path, tag: str | None = None) -> Path:
    """The folder of checkpoint `tag`; without one, what `latest` names, or else the newest whole one.

    Raises `CheckpointError` with what is there instead.
    """
    if not parent.is_dir():
        raise CheckpointError(f"{parent} is no folder; check the path")
    restore(parent)
    if tag is None:
        named = _read(parent / LATEST).strip()
        if named and (parent / named).is_dir():
            return parent / named
        known = committed(parent)
        if known:
            tag = known[-1][1]
        else:
            raise CheckpointError(
                f"{parent} holds no checkpoint: it has neither a file named {LATEST!r} nor a folder with {MANIFEST}"
            )
    if not (parent / tag).is_dir():
        names = [name for _, name in committed(parent)]
        there = f"there are {', '.join(names)}" if names else "there is none"
        raise CheckpointError(f"{parent} holds no checkpoint {tag!r}; {there}")
    return parent / tag
