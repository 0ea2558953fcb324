"""A persistent pool of rank processes, so that a distributed test costs a tenth of a second, not ten.

Processes are forked from a server that has imported torch once and never run it, so a start costs one import
and a restart after a hang costs little. Process groups use gloo over a `FileStore`: no ports to collide on.
"""

from __future__ import annotations

import atexit
import contextlib
import itertools
import multiprocessing
import multiprocessing.forkserver
import os
import pickle
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from unishard.testing import worker
from unishard.testing.worker import FunctionRef, Outcome, RankFault, Task

PRELOAD = (
    "torch",
    "torch.distributed",
    "torch.distributed.tensor",
    "torch._dynamo",  # the first optimizer of a process imports it, which takes seconds
    "numpy",
    "unishard.engine",
    "unishard.testing.worker",
)
_MAX_GROUPS = 16  # each gloo group holds threads and sockets; past this many the next task starts afresh


class RankFailure(RuntimeError):
    """One or more ranks raised, died or hung.

    Attributes:
        faults: rank -> what it raised, in the order in which the reports arrived (the first is the cause).
        stacks: rank -> the stacks of its threads, for each rank that was still running and had to be killed.
    """

    def __init__(self, headline: str, faults: dict[int, RankFault], stacks: dict[int, str]) -> None:
        self.faults = faults
        self.stacks = stacks
        parts = [headline]
        parts += [f"--- rank {rank}: {f.kind}: {f.message}\n{f.traceback}" for rank, f in faults.items()]
        parts += [f"--- rank {rank} was still running here:\n{text}" for rank, text in stacks.items()]
        super().__init__("\n".join(parts))


class RankTimeout(RankFailure):
    """No rank raised, but some did not finish in time; `stacks` shows where they were."""


@dataclass(frozen=True)
class _Worker:
    process: Any  # multiprocessing's process classes differ by start method
    pipe: Connection
    dump_path: Path


class RankPool:
    """Runs module-level functions on several ranks at once and returns what each rank returned.

    Args:
        max_world_size: largest `world_size` that `run` accepts; processes start when first needed.
        grace: seconds that the other ranks get to finish once one has failed.

    Example:
        >>> import operator
        >>> with RankPool(max_world_size=2) as pool:
        ...     pool.run(operator.add, 2, 3)
        [5, 5]
    """

    def __init__(self, max_world_size: int = 4, *, grace: float = 5.0) -> None:
        self.max_world_size = max_world_size
        self.grace = grace
        self._workers: list[_Worker] = []
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._serial = itertools.count()
        self._group: tuple[int, str | None, str] | None = None  # world size, backend, store path
        self._busy = False

    def run(
        self,
        fn: Callable[..., Any],
        *args: Any,
        world_size: int = 2,
        timeout: float = 60.0,
        backend: str | None = "gloo",
        fail_fast: bool = True,
        **kwargs: Any,
    ) -> list[Any]:
        """Call `fn(*args, **kwargs)` on ranks 0 to world_size - 1; return their results in rank order.

        Each rank starts with seed 0, one CPU thread, this process's environment and working directory,
        torchrun's variables, and a default process group that consecutive calls of one world size share
        (`backend=None`: no group). Tensors are returned as detached CPU copies.

        Args:
            fn: a module-level function; test modules are found by their file.
            world_size: 1 to `max_world_size`.
            timeout: seconds before the ranks' stacks are dumped and the processes killed.
            fail_fast: after a first failure, wait `grace` seconds for the others instead of `timeout`.

        Raises:
            RankFailure: a rank raised or died; lists every such rank with its traceback.
            RankTimeout: no rank raised, but some did not finish.
            TypeError: `fn` cannot be named from another process.
            ValueError: `world_size` is out of range.
        """
        if not 1 <= world_size <= self.max_world_size:
            raise ValueError(
                f"world_size={world_size} is outside 1..{self.max_world_size}; "
                "build the RankPool with a larger max_world_size"
            )
        ref = FunctionRef.of(fn)
        payload = worker.dump_value((args, kwargs))
        if self._busy:
            raise RuntimeError("RankPool.run was called while another call was running")
        self._busy = True
        try:
            self._start(world_size)
            store = self._store_path(world_size, backend)
            for rank, env in enumerate(_environments(world_size)):
                task = Task(ref, payload, rank, world_size, backend, store, os.getcwd(), env)
                self._workers[rank].pipe.send_bytes(pickle.dumps(task))
            return self._collect(world_size, timeout, fail_fast)
        except RankFailure:
            raise
        except BaseException:  # Ctrl-C, a test timeout: the ranks are in an unknown state
            self._kill()
            raise
        finally:
            self._busy = False

    def close(self) -> None:
        """End the processes and remove the temporary folder. The pool starts again if it is used again."""
        for each in self._workers:
            each.pipe.close()  # an idle rank leaves when its pipe closes
        deadline = time.monotonic() + 2.0
        for each in self._workers:
            each.process.join(max(0.0, deadline - time.monotonic()))
        self._kill()
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None

    def __enter__(self) -> RankPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- processes -------------------------------------------------------------------------------------

    def _start(self, count: int) -> None:
        if any(not each.process.is_alive() for each in self._workers):
            self._kill()
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="unishard-ranks-")
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(list(PRELOAD))
        with _single_threaded_environment():
            multiprocessing.forkserver.ensure_running()
        while len(self._workers) < count:
            ours, theirs = context.Pipe()
            dump_path = Path(self._folder.name) / f"stacks-{next(self._serial)}"
            process = context.Process(target=worker.main, args=(theirs, str(dump_path)), daemon=True)
            process.start()
            theirs.close()
            self._workers.append(_Worker(process, ours, dump_path))

    def _kill(self) -> None:
        for each in self._workers:
            each.process.kill()
        for each in self._workers:
            each.process.join(5.0)
            each.pipe.close()
        self._workers.clear()
        self._group = None

    def _store_path(self, world_size: int, backend: str | None) -> str:
        if self._group is None or self._group[:2] != (world_size, backend) or backend is None:
            assert self._folder is not None
            path = str(Path(self._folder.name) / f"store-{next(self._serial)}")
            self._group = (world_size, backend, path)
        return self._group[2]

    # -- outcomes --------------------------------------------------------------------------------------

    def _collect(self, world_size: int, timeout: float, fail_fast: bool) -> list[Any]:
        pending = {self._workers[rank].pipe: rank for rank in range(world_size)}
        outcomes: dict[int, Outcome] = {}
        faults: dict[int, RankFault] = {}
        deadline = time.monotonic() + timeout
        while pending:
            ready = wait(list(pending), max(0.0, deadline - time.monotonic()))
            if not ready:
                break
            for pipe in ready:
                rank = pending.pop(pipe)  # type: ignore[index]
                outcomes[rank] = self._receive(rank)
                if (fault := outcomes[rank].fault) is not None:
                    faults[rank] = fault
            if faults and fail_fast:
                deadline = min(deadline, time.monotonic() + self.grace)
        if faults or pending:
            self._fail(faults, sorted(pending.values()), world_size, timeout)
        if max(outcome.groups for outcome in outcomes.values()) > _MAX_GROUPS:
            self._group = None
        return [pickle.loads(outcomes[rank].value or b"") for rank in range(world_size)]

    def _receive(self, rank: int) -> Outcome:
        each = self._workers[rank]
        try:
            return pickle.loads(each.pipe.recv_bytes())
        except (EOFError, OSError):
            each.process.join(1.0)
            code = each.process.exitcode
            reason = f"killed by signal {-code}" if code is not None and code < 0 else f"exit code {code}"
            return Outcome(fault=RankFault("process death", reason, "(no traceback: the process is gone)"))

    def _fail(self, faults: dict[int, RankFault], stuck: list[int], world_size: int, timeout: float) -> None:
        stacks = self._stacks(stuck)
        if stuck or not self._settled(faults):
            self._kill()
        self._group = None
        if faults:
            names = ", ".join(str(rank) for rank in sorted(faults))
            headline = f"rank {names} of {world_size} failed"
            headline += f", rank {', '.join(map(str, stuck))} did not finish" if stuck else ""
            raise RankFailure(headline, faults, stacks)
        names = ", ".join(map(str, stuck))
        raise RankTimeout(f"rank {names} of {world_size} did not finish in {timeout:g} s", faults, stacks)

    def _settled(self, faults: dict[int, RankFault]) -> bool:
        """Whether every failed rank has left its process group and is idle again."""
        deadline = time.monotonic() + self.grace
        for rank in faults:
            pipe = self._workers[rank].pipe
            try:
                if not pipe.poll(max(0.0, deadline - time.monotonic())) or pipe.recv_bytes() != b"idle":
                    return False
            except (EOFError, OSError):
                return False
        return True

    def _stacks(self, stuck: list[int]) -> dict[int, str]:
        for rank in stuck:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._workers[rank].process.pid, signal.SIGUSR1)
        if stuck:
            time.sleep(0.3)  # the handler writes within milliseconds; nothing signals that it has
        return {rank: _read(self._workers[rank].dump_path) for rank in stuck}


def _read(path: Path) -> str:
    try:
        return path.read_text().rstrip() or "(no stack was written: the process does not answer signals)"
    except OSError as error:
        return f"(no stack: {error})"


def _environments(world_size: int) -> Iterator[dict[str, str]]:
    """This process's environment with the variables torchrun sets, for each rank on one node."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = dict(os.environ)
    if sys.platform == "linux":
        shared.setdefault("GLOO_SOCKET_IFNAME", "lo")
    shared |= {"OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    shared |= {"WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": str(world_size), "GROUP_RANK": "0"}
    for rank in range(world_size):
        yield shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}


@contextlib.contextmanager
def _single_threaded_environment() -> Iterator[None]:
    # OpenMP reads this once, when the server imports torch; forked ranks inherit what it read.
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["OMP_NUM_THREADS"]
        else:
            os.environ["OMP_NUM_THREADS"] = before


_shared: RankPool | None = None


def shared_pool() -> RankPool:
    """The pool of this process, made on first use and closed when the interpreter ends."""
    global _shared
    if _shared is None:
        _shared = RankPool()
        atexit.register(_shared.close)
    return _shared
