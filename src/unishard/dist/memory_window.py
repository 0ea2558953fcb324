"""Reading the memory of other ranks on the same host, in place of sending it through a socket.

A loopback socket costs two copies, kernel buffers and wake-ups; the kernel can also copy straight from one process's
memory into another's (`process_vm_readv`, "cross memory attach"). A rank *publishes* the addresses of what peers may
read, in a page that all ranks of the group map; a peer waits for the publication, copies what it needs, and marks
it read. Publications are numbered alike on all ranks and carry a label: ranks that do different things are told so.

The owner keeps published memory as it is until `drain` says that all peers have read it.
"""

from __future__ import annotations

import atexit
import ctypes
import logging
import mmap
import os
import platform
import secrets
import sys
import tempfile
import time
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from unishard.dist.labels import labelled
from unishard.errors import RankError

log = logging.getLogger("unishard")

SWITCH = "UNISHARD_TRANSPORT"
"""Environment variable: `sockets` sends everything through the process group."""

_SLOTS = 256
_LABEL = 112
_SLOT = np.dtype([("ticket", "<u4"), ("count", "<u4"), ("address", "<u8"), ("label", f"S{_LABEL}")])
# Some 50 us: peers in step are there by then, and going to sleep costs as much.
_SPINS = 100
# A sleeper announces itself and looks again; a store and a load may still pass each other, which costs one nap.
_NAP_SECONDS = 0.002
_LOOK_AROUND_SECONDS = 0.5
_FUTEX_NUMBER, _FUTEX_WAIT, _FUTEX_WAKE = 202, 0, 1
_SET_PTRACER, _ANYBODY = 0x59616D61, ctypes.c_ulong(-1)

_libc = ctypes.CDLL(None, use_errno=True)


class _Timespec(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


_NAP = _Timespec(0, int(_NAP_SECONDS * 1e9))


def _nap(word: int, value: int) -> None:
    """Sleep until somebody wakes `word`, at most `_NAP_SECONDS`; at once if it no longer holds `value`."""
    _libc.syscall(_FUTEX_NUMBER, ctypes.c_void_p(word), _FUTEX_WAIT, value, ctypes.byref(_NAP), None, 0)


def _wake(word: int) -> None:
    _libc.syscall(_FUTEX_NUMBER, ctypes.c_void_p(word), _FUTEX_WAKE, 0x7FFFFFFF, None, None, 0)


_readv = _libc.process_vm_readv
_readv.restype = ctypes.c_ssize_t
_readv.argtypes = (
    ctypes.c_int, ctypes.c_void_p, ctypes.c_ulong, ctypes.c_void_p, ctypes.c_ulong, ctypes.c_ulong,
)  # fmt: skip


MAX_VECTORS = 1024
"""How many pieces one `copy_from` takes: the kernel's IOV_MAX."""


def copy_from(pid: int, local: np.ndarray, remote: np.ndarray, size: int) -> None:
    """Copy `size` bytes of process `pid`'s memory into this one's.

    `local` and `remote` are (k, 2) uint64 arrays of address and bytes, C-contiguous, k at most `MAX_VECTORS`. Raises
    `RankError` if the other process or its memory is gone.
    """
    copied = _readv(pid, local.ctypes.data, len(local), remote.ctypes.data, len(remote), 0)
    if copied != size:
        cause = os.strerror(ctypes.get_errno()) if copied < 0 else f"only {copied} of {size} bytes could be read"
        raise RankError(f"reading the memory of process {pid} failed: {cause}; did that rank end?")


class MemoryWindow:
    """One process group's mutual view. All ranks publish in the same order."""

    def __init__(self, rank: int, page: mmap.mmap, pids: Sequence[int], patience: float) -> None:
        self.rank, self.size = rank, len(pids)
        self.pids = list(pids)
        self._page = page
        self._patience = patience
        base = ctypes.addressof(ctypes.c_char.from_buffer(page))
        n, slots = self.size, _SLOTS * _SLOT.itemsize
        self._slots = np.frombuffer(page, _SLOT, n * _SLOTS).reshape(n, _SLOTS)
        self._done = np.frombuffer(page, np.uint32, n * _SLOTS * n, n * slots).reshape(n, _SLOTS, n)
        self._left = np.frombuffer(page, np.uint32, n, n * slots + n * _SLOTS * n * 4)
        self._asleep = np.frombuffer(page, np.uint32, n, n * slots + n * _SLOTS * n * 4 + n * 4)
        self._slots_at, self._done_at = base, base + n * slots
        self._next = 1
        self._held: dict[int, Any] = {}
        """What published tickets need alive, oldest first."""
        self._finished: set[int] = set()
        self._readings: dict[int, weakref.WeakMethod[Callable[[], None]]] = {}
        """What finishes reading a ticket, of those that are in no hurry."""
        self._given_up: list[int] = []

    @staticmethod
    def page_bytes(size: int) -> int:
        return size * _SLOTS * _SLOT.itemsize + size * _SLOTS * size * 4 + 2 * size * 4

    # publishing --------------------------------------------------------------------------------------------

    def publish(
        self,
        tensors: Sequence[torch.Tensor | None],
        label: bytes,
        reading: Callable[[], None] | None = None,
    ) -> int:
        """Let peers read `tensors` (`None` stands for nothing there) until they have; returns the ticket.

        `label`, at most 112 bytes, must be the same on all ranks. `reading`, a method that is not kept alive, reads
        this ticket from peers, and is called where its place in the page is needed and nobody has called it yet.
        """
        self._finish_given_up()
        self._reap()
        ticket, self._next = self._next, self._next + 1
        index = ticket % _SLOTS
        self._vacate(ticket - _SLOTS)
        if reading is not None:
            self._readings[ticket] = weakref.WeakMethod(reading)
        addresses = np.array([0 if t is None else t.data_ptr() for t in tensors], np.uint64)
        self._held[ticket] = (tensors, addresses)
        slot = self._slots[self.rank, index]
        slot["count"] = len(tensors)
        slot["address"] = addresses[0] if len(tensors) == 1 else addresses.ctypes.data
        slot["label"] = label
        slot["ticket"] = ticket  # last: whoever sees it may read the rest
        if any(self._asleep.tolist()):
            _wake(self._slots_at + (self.rank * _SLOTS + index) * _SLOT.itemsize)
        return ticket

    def finish(self, ticket: int) -> None:
        """This rank has read what it needs of `ticket` from every peer."""
        index = ticket % _SLOTS
        self._done[:, index, self.rank] = ticket
        for owner, asleep in enumerate(self._asleep.tolist()):
            if asleep and owner != self.rank:
                _wake(self._reader_word(owner, index, self.rank))
        self._finished.add(ticket)

    def give_up(self, ticket: int) -> None:
        """This rank will not read `ticket`. May be called at any time, by a destructor too: peers learn of it later."""
        self._given_up.append(ticket)

    def _finish_given_up(self) -> None:
        for _ in range(len(self._given_up)):
            ticket = self._given_up.pop(0)
            if all(int(shown) == ticket for shown in self._slots["ticket"][:, ticket % _SLOTS]):
                self.finish(ticket)
            else:  # a peer that has not come to it may still wait for what had this place before
                self._given_up.append(ticket)

    def _vacate(self, ticket: int) -> None:
        """Make room in the page: all ranks come here at the same operation."""
        if ticket not in self._held:
            return
        known = self._readings.get(ticket)
        reading = known() if known is not None else None
        if ticket not in self._finished and reading is not None:
            reading()
        elif ticket in self._given_up:
            self._given_up.remove(ticket)
            label = bytes(self._slots[self.rank, ticket % _SLOTS]["label"])
            for peer in range(self.size):
                self.addresses(peer, ticket, label)
            self.finish(ticket)
        self.await_readers(ticket)

    def tidy(self) -> None:
        """Let go of what peers have read by now."""
        self._finish_given_up()
        self._reap()

    def drain(self) -> None:
        """Return once peers have read everything published whose own reading this rank has finished.

        Tickets that this rank still has to read are left: peers have the same ones open.
        """
        with labelled("unishard::drain"):
            self._finish_given_up()
            for ticket in sorted(self._finished):
                self.await_readers(ticket)
            self._reap()

    def _reader_word(self, owner: int, index: int, reader: int) -> int:
        return self._done_at + ((owner * _SLOTS + index) * self.size + reader) * 4

    def _released(self, ticket: int) -> bool:
        return bool((self._done[self.rank, ticket % _SLOTS] == ticket).all())

    def _reap(self) -> None:
        while self._held:
            ticket = next(iter(self._held))
            if not self._released(ticket):
                return
            self._forget(ticket)

    def _forget(self, ticket: int) -> None:
        self._held.pop(ticket, None)
        self._finished.discard(ticket)
        self._readings.pop(ticket, None)

    def await_readers(self, ticket: int) -> None:
        """Return once every peer has read `ticket`, which this rank must have finished."""
        if ticket in self._held:
            index = ticket % _SLOTS
            readers = self._done[self.rank, index]
            for reader in range(self.size):
                word = self._reader_word(self.rank, index, reader)
                self._wait(lambda r=reader: int(readers[r]), word, reader, ticket)
            self._forget(ticket)

    # reading -----------------------------------------------------------------------------------------------

    def addresses(self, peer: int, ticket: int, label: bytes) -> np.ndarray:
        """Where `peer` published ticket `ticket`: uint64 addresses, 0 for nothing. Waits for it.

        Raises `RankError` if the peer is gone, or published something else under this number.
        """
        if peer == self.rank:
            return self._held[ticket][1]
        index = ticket % _SLOTS
        slot = self._slots[peer, index]
        word = self._slots_at + (peer * _SLOTS + index) * _SLOT.itemsize
        self._wait(lambda: int(slot["ticket"]), word, peer, ticket)
        if slot["label"] != label[:_LABEL]:
            mine, theirs = (text.decode(errors="replace") for text in (label, slot["label"]))
            raise RankError(
                f"ranks do not do the same: as operation {ticket} of this group, rank {self.rank} does {mine!r} and "
                f"rank {peer} does {theirs!r}; all ranks must run the same modules in the same order"
            )
        count = int(slot["count"])
        if count == 1:
            return np.array([slot["address"]], np.uint64)
        found = np.empty(count, np.uint64)
        size = 8 * count
        local, remote = np.array([[[found.ctypes.data, size]], [[slot["address"], size]]], np.uint64)
        copy_from(self.pids[peer], local, remote, size)
        return found

    def _wait(self, value: Callable[[], int], word: int, peer: int, ticket: int) -> None:
        """Return once `value`, which is what the 32-bit `word` holds, is `ticket`; `peer` is to make it so."""
        for _ in range(_SPINS):
            if value() == ticket:
                return
            os.sched_yield()
        started = looked = time.monotonic()
        self._asleep[self.rank] = 1
        try:
            while (seen := value()) != ticket:
                _nap(word, seen)
                now = time.monotonic()
                if now - looked > _LOOK_AROUND_SECONDS:
                    looked = now
                    self._require_alive(peer, ticket, now - started)
        finally:
            self._asleep[self.rank] = 0

    def _require_alive(self, peer: int, ticket: int, waited: float) -> None:
        mine = bytes(self._slots[self.rank, ticket % _SLOTS]["label"]).decode(errors="replace")
        where = f"in {mine!r} (operation {ticket} of this process group)"
        if self._left[peer] or not _alive(self.pids[peer]):
            raise RankError(f"rank {peer} left while rank {self.rank} waited for it {where}")
        if waited > self._patience:
            raise RankError(
                f"rank {self.rank} waited {waited:.0f} s, the timeout of its process group, for rank {peer} {where}; "
                "that rank is alive and did not come to it"
            )

    def leave(self) -> None:
        """Tell peers that this rank will not publish again."""
        self._left[self.rank] = 1


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


_windows: weakref.WeakSet[MemoryWindow] = weakref.WeakSet()


def leave_all() -> None:
    """Tell the peers of every window that this rank is gone. Called before process groups are destroyed."""
    for window in list(_windows):
        window.leave()


atexit.register(leave_all)


def open_window(group: dist.ProcessGroup) -> MemoryWindow | None:
    """The window of `group`, or `None` where its ranks cannot read each other. All ranks of the group call together."""
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    able = sys.platform == "linux" and platform.machine() in ("x86_64", "AMD64")
    able = able and os.environ.get(SWITCH, "") != "sockets"
    page, token = _offer(size) if able and rank == 0 else (None, b"")
    proof = np.frombuffer(secrets.token_bytes(16), np.uint8).copy()
    mine = (able, os.getpid(), proof.ctypes.data, proof.tobytes(), page.name if page else "", token)
    everyone: list[Any] = [None] * size
    dist.all_gather_object(everyone, mine, group=group)
    mapped = _join(everyone, rank) if all(each[0] for each in everyone) else None
    joined: list[Any] = [None] * size
    dist.all_gather_object(joined, mapped is not None, group=group)
    if page is not None:
        page.close()  # deletes the name; the mappings stay
    if mapped is None or not all(joined):
        _say_once("unishard: ranks cannot read each other's memory here; CPU collectives go through sockets")
        return None
    window = MemoryWindow(rank, mapped, [each[1] for each in everyone], _patience(group))
    _windows.add(window)
    return window


def _offer(size: int) -> tuple[Any, bytes]:
    """A file for all ranks to map, in memory where there is such a place."""
    folder = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    token = secrets.token_bytes(16)
    file = tempfile.NamedTemporaryFile(prefix="unishard-", dir=folder)  # noqa: SIM115 - its name must outlive this
    file.truncate(MemoryWindow.page_bytes(size) + len(token))
    file.seek(MemoryWindow.page_bytes(size))
    file.write(token)
    file.flush()
    return file, token


def _join(everyone: Sequence[tuple[Any, ...]], rank: int) -> mmap.mmap | None:
    """Map the first rank's page and read every peer's proof; `None` if either fails."""
    _libc.prctl(_SET_PTRACER, _ANYBODY, 0, 0, 0)  # where Yama lets only ancestors read, peers ask to be let in
    size = MemoryWindow.page_bytes(len(everyone))
    name, token = everyone[0][4], everyone[0][5]
    try:
        with open(name, "r+b") as file:
            page = mmap.mmap(file.fileno(), size + len(token))
        if page[size:] != token:
            return None
        for peer, (_, pid, address, proof, _, _) in enumerate(everyone):
            found = np.zeros(len(proof), np.uint8)
            size = len(proof)
            local, remote = np.array([[[found.ctypes.data, size]], [[address, size]]], np.uint64)
            if peer != rank:
                copy_from(pid, local, remote, size)
                if found.tobytes() != proof:
                    return None
    except (OSError, ValueError, RankError):
        return None
    return page


def _patience(group: dist.ProcessGroup) -> float:
    backend: Any = group._get_backend(torch.device("cpu"))
    return backend.options._timeout.total_seconds()


_said: set[str] = set()


def _say_once(text: str) -> None:
    if text not in _said:
        _said.add(text)
        log.info(text)
