"""The rank processes of a run, forked from a server that has imported torch and never run it."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import signal
import tempfile
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from unishard.bench import worker
from unishard.bench.worker import Answer, Seat
from unishard.errors import UnishardError


class RankFault(UnishardError, RuntimeError):
    """A rank raised, died or did not answer in time; the message names it, `trace` holds its traceback."""

    def __init__(self, message: str, trace: str = "") -> None:
        super().__init__(message)
        self.trace = trace


class Ranks:
    """`size` processes with one gloo process group, which call what they are told to.

    Args:
        size: number of ranks. threads: CPU threads of each.
        timeout: seconds for one call, and for one collective.
        log: a file for what libraries print.
        transport: how unishard's ranks exchange tensors; see `Plan`.
        private_network: give the ranks a loopback interface of their own, if the system allows it.

    Example:
        >>> import os
        >>> with Ranks(2, threads=1, timeout=60.0, log=os.devnull) as ranks:
        ...     ranks.call(divmod, 7, 2)
        [(3, 1), (3, 1)]
    """

    def __init__(
        self,
        size: int,
        *,
        threads: int,
        timeout: float,
        log: str,
        transport: str = "memory",
        private_network: bool = False,
    ) -> None:
        self._timeout = timeout
        self._folder = tempfile.TemporaryDirectory(prefix="unishard-bench-")
        self._processes: list[Any] = []
        self._pipes: list[Connection] = []
        self.own_network = False
        """Whether the loopback interface that the ranks see is theirs alone."""
        store = str(Path(self._folder.name) / "store")
        try:
            network = 0 if private_network else None
            for rank in range(size):
                self._start(Seat(rank, size, threads, timeout, store, log, transport, network))
                [alone] = self._collect([rank])
                if rank == 0:
                    self.own_network = bool(alone)
                    network = self._processes[0].pid if alone else None
            self._collect(range(size))
        except BaseException:
            self.kill()
            raise

    def _start(self, seat: Seat) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["unishard.bench.worker"])
        ours, theirs = context.Pipe()
        process = context.Process(target=worker.main, args=(theirs, seat), daemon=True)
        process.start()
        theirs.close()
        self._processes.append(process)
        self._pipes.append(ours)

    def call(self, function: Callable[..., Any], *args: Any, only: Sequence[int] | None = None) -> list[Any]:
        """Run the module-level `function(*args)` on all ranks, or on those in `only`; results in rank order.

        Raises:
            RankFault: a rank raised, died, or took longer than the timeout; all ranks are ended then, since their
                collectives no longer match.
        """
        ranks = range(len(self._pipes)) if only is None else only
        payload = pickle.dumps((function, args))
        try:
            for rank in ranks:
                self._pipes[rank].send_bytes(payload)
            return self._collect(ranks)
        except BaseException:
            self.kill()
            raise

    def _collect(self, ranks: Sequence[int]) -> list[Any]:
        waiting = {self._pipes[rank]: rank for rank in ranks}
        values: dict[int, Any] = {}
        deadline = time.monotonic() + self._timeout
        while waiting:
            ready = wait(list(waiting), max(0.0, deadline - time.monotonic()))
            if not ready:
                self._dump_stacks()
                late = ", ".join(map(str, sorted(waiting.values())))
                raise RankFault(f"rank {late} did not answer in {self._timeout:g} s; ranks.log has its stack")
            for pipe in ready:
                rank = waiting.pop(pipe)  # type: ignore[index]
                values[rank] = self._receive(rank)
        return [values[rank] for rank in ranks]

    def _receive(self, rank: int) -> Any:
        try:
            answer: Answer = pickle.loads(self._pipes[rank].recv_bytes())
        except (EOFError, OSError):
            self._processes[rank].join(1.0)
            raise RankFault(f"rank {rank} died with exit code {self._processes[rank].exitcode}") from None
        if answer.error is not None:
            raise RankFault(f"rank {rank}: {answer.error}", answer.trace)
        return answer.value

    def _dump_stacks(self) -> None:
        for process in self._processes:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGUSR1)
                # One after the other, into one file; nothing signals that the handler has written.
                time.sleep(0.2)

    def kill(self) -> None:
        """End all ranks, whatever they do. The object is of no use afterwards."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join(5.0)
        for pipe in self._pipes:
            pipe.close()
        self._processes.clear()
        self._pipes.clear()
        self._folder.cleanup()

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
