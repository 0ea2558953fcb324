"""The file behind one nvme tier of one process: its own, locked while the process lives, with a place for every key.

    <nvme_path>/unishard-swap-<user id>/<run>/rank<rank>-<random>.swap

A swap file means nothing without the process that wrote it. The kernel drops a lock when its holder dies, however it
dies, so a swap file that can be locked is a dead run's and is removed by whoever comes next. Random names and locks
keep live runs apart on one path, also runs of one name.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from unishard.errors import OffloadError
from unishard.offload.aligned import aligned_empty
from unishard.offload.extents import Extents
from unishard.sharding.host_memory import PAGE, padded

_log = logging.getLogger("unishard")

_SUFFIX = ".swap"
_CHUNK = 4 << 20
_NOT_SUPPORTED = (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOTSUP)
O_DIRECT: int = getattr(os, "O_DIRECT", 0)


def default_run() -> str:
    """What the launcher calls this run, or the process's own name.

    >>> bool(default_run())
    True
    """
    for variable in ("TORCHELASTIC_RUN_ID", "SLURM_JOB_ID", "MASTER_PORT"):
        value = os.environ.get(variable, "")
        if value and value != "none":
            return "".join(c if c.isalnum() or c in "-_." else "-" for c in value).lstrip(".") or "run"
    return f"pid{os.getpid()}"


class SwapFile:
    """One file, open for direct transfers where the file system has them, cut into extents of whole pages."""

    def __init__(self, nvme_path: Path, run: str, rank: int) -> None:
        if not run or run != Path(run).name or run.startswith("."):
            raise OffloadError(
                f"run={run!r} cannot be a folder's name under {nvme_path}; use letters and digits"
            )
        self.rank = rank
        self._root = nvme_path / f"unishard-swap-{os.getuid()}"
        self._room = Extents()
        self._process = os.getpid()
        self.path = self._root / run / f"rank{rank}-{uuid.uuid4().hex[:12]}{_SUFFIX}"
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            with _locked(self._root / ".lock"):
                _remove_dead_runs(self._root)
                self.path.parent.mkdir(exist_ok=True, mode=0o700)
                self.descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
                fcntl.flock(self.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise OffloadError(
                f"rank {rank}: no swap file can be made and locked in {nvme_path} ({error.strerror}); nvme_path has to "
                "be a folder on a local file system that this user may write to"
            ) from error
        self.direct = self._turn_direct()

    def _turn_direct(self) -> bool:
        """Whether transfers may go around the page cache. Refusals come at the flag or at the first write."""
        before = fcntl.fcntl(self.descriptor, fcntl.F_GETFL)
        try:
            if not O_DIRECT:
                raise OSError(errno.EINVAL, "this system has no O_DIRECT")
            fcntl.fcntl(self.descriptor, fcntl.F_SETFL, before | O_DIRECT)
            page = aligned_empty(PAGE, torch.uint8)
            os.pwrite(self.descriptor, page.zero_().numpy().data, 0)
        except OSError as error:
            if error.errno not in _NOT_SUPPORTED:
                raise self.refusal(error, "", "written") from error
            fcntl.fcntl(self.descriptor, fcntl.F_SETFL, before)
            _warn_buffered(self.path.parent.parent, error)
            return False
        return True

    @property
    def alignment(self) -> int:
        """Bytes, of memory, offsets and lengths of a transfer."""
        return PAGE if self.direct else 1

    # extents -----------------------------------------------------------------------------------------------

    def take(self, key: str, nbytes: int) -> int:
        """The offset of room for `nbytes`, set aside by the file system. Raises `OffloadError` if it has none."""
        size = padded(nbytes)
        if size == 0:
            return 0
        offset = self._room.take(size)
        if offset is None:
            self.check(key)
            self._grow(key, self._room.missing(size))
            offset = self._room.take(size)
        assert offset is not None  # it has just been made
        return offset

    def _grow(self, key: str, size: int) -> None:
        end = self._room.end
        try:
            try:
                os.posix_fallocate(self.descriptor, end, size)
            except OSError as error:
                if error.errno not in _NOT_SUPPORTED:
                    raise
                # A file system without preallocation; where libc would write single bytes, O_DIRECT refuses them.
                _write_zeros(self.descriptor, end, size)
        except OSError as error:
            with suppress(OSError):
                os.ftruncate(self.descriptor, end)  # what was had of it is for others
            raise self.refusal(error, key, f"enlarged by {size} bytes to {end + size}") from error
        self._room.grow(size)

    def give(self, offset: int, nbytes: int) -> None:
        """Room of `nbytes` at `offset` may be used again."""
        if nbytes:
            self._room.give(offset, padded(nbytes))

    # trouble -----------------------------------------------------------------------------------------------

    def check(self, key: str) -> None:
        """Raise `OffloadError` if the file was deleted or cut since it was made, or is another process's."""
        if self._process != os.getpid():
            raise OffloadError(
                f"rank {self.rank}: {key} rests in the swap file {self.path} of process {self._process}, and a process "
                f"forked from it ({os.getpid()}) asks for it; make a tier of its own there"
            )
        status = os.fstat(self.descriptor)
        if status.st_nlink == 0:
            raise self.loss(key, "was deleted")
        if status.st_size < self._room.end:
            raise self.loss(key, f"was truncated to {status.st_size} bytes of {self._room.end}")

    def loss(self, key: str, what: str) -> OffloadError:
        """The error for state that is not there as it was stored."""
        return OffloadError(
            f"rank {self.rank}: the swap file {self.path} {what}, so {key} cannot be used. Nothing else may touch swap "
            "files while their run lives; resume from the last checkpoint"
        )

    def refusal(self, error: OSError, key: str, what: str) -> OffloadError:
        """The error for an operation on the file that the system refuses."""
        who = f" for {key}" if key else ""
        message = (
            f"rank {self.rank}: the swap file {self.path} cannot be {what}{who}: {error.strerror or error}. "
        )
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            room = os.fstatvfs(self.descriptor)
            free = room.f_bavail * room.f_frsize
            return OffloadError(
                message
                + f"{free} bytes are free there; free some, offload less, or point nvme_path elsewhere"
            )
        return OffloadError(
            message + "Check the disk and its mount (dmesg), then resume from the last checkpoint"
        )

    def close(self) -> None:
        """Remove the file. A forked child only lets go of it."""
        if self.descriptor < 0:
            return
        if self._process == os.getpid():
            with suppress(OSError), _locked(self._root / ".lock"):
                if os.fstat(self.descriptor).st_nlink:
                    self.path.unlink()
                self.path.parent.rmdir()  # if it was the last file of the run
        os.close(self.descriptor)
        self.descriptor = -1


def _write_zeros(descriptor: int, offset: int, size: int) -> None:
    zeros = aligned_empty(min(size, _CHUNK), torch.uint8).zero_().numpy().data
    for start in range(0, size, _CHUNK):
        os.pwrite(descriptor, zeros[: min(_CHUNK, size - start)], offset + start)


_warned: set[Path] = set()


def _warn_buffered(root: Path, error: OSError) -> None:
    if root not in _warned:
        _warned.add(root)
        _log.warning(
            "nvme tier: %s refuses O_DIRECT (%s); transfers go through the page cache, which copies and takes memory. "
            "Point nvme_path at a disk's own file system for direct transfers",
            root,
            error.strerror,
        )


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _remove_dead_runs(root: Path) -> None:
    """Remove every swap file that nobody holds. The caller has the root's lock, so none is just being made."""
    for path in sorted(root.glob(f"*/*{_SUFFIX}")):
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except OSError:
            continue  # gone meanwhile
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            size = os.fstat(descriptor).st_size
            path.unlink()
            _log.info("removed %s (%s bytes), which a run left that no longer lives", path, size)
        except OSError:
            pass  # alive
        finally:
            os.close(descriptor)
        with suppress(OSError):
            path.parent.rmdir()
