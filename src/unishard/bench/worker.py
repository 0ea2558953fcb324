"""What runs in a rank process: join the network and the process group, then call what the parent sends."""

from __future__ import annotations

import faulthandler
import os
import pickle
import select
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist

from unishard.bench.network import join_network, own_network
from unishard.dist.memory_window import SWITCH


@dataclass(frozen=True)
class Seat:
    """A rank's place: who it is, where its peers meet (`store`), where its output goes (`log`)."""

    rank: int
    size: int
    threads: int
    timeout: float
    store: str
    log: str
    transport: str
    network: int | None
    """None: the shared network. 0: make one. Otherwise the process whose network to join."""


@dataclass(frozen=True)
class Answer:
    """What a call returned, or how it failed: class and message, and the traceback as text."""

    value: Any = None
    error: str | None = None
    trace: str = ""


def main(pipe: Connection, seat: Seat) -> None:
    """The life of a rank process; ends when the parent closes `pipe` or dies."""
    # Ctrl-C reaches the whole foreground group; the parent decides what becomes of the ranks.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _send_output_to(seat.log)
    _answer(pipe, partial(_networked, seat))
    threading.Thread(target=_end_with_parent, args=(pipe,), daemon=True).start()
    _answer(pipe, partial(_start, seat))
    while True:
        try:
            payload = pipe.recv_bytes()
        except EOFError:
            os._exit(0)
        _answer(pipe, partial(_called, payload))


def _called(payload: bytes) -> Any:
    function, args = pickle.loads(payload)
    return function(*args)


def _answer(pipe: Connection, call: Callable[[], Any]) -> None:
    try:
        answer = Answer(value=call())
    except Exception as error:
        answer = Answer(error=f"{type(error).__name__}: {error}", trace=traceback.format_exc())
    pipe.send_bytes(pickle.dumps(answer))


def _send_output_to(log: str) -> None:
    """Libraries print while they start; their lines go to a file, and tables stay readable."""
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    os.close(handle)
    faulthandler.enable(file=sys.stderr, all_threads=True)
    faulthandler.register(signal.SIGUSR1, file=sys.stderr, all_threads=True)


def _networked(seat: Seat) -> bool:
    """Whether this rank's network is the run's own."""
    if seat.network is None:
        return False
    if seat.network == 0:
        return own_network()
    join_network(seat.network)
    return True


def _start(seat: Seat) -> int:
    os.environ.update(_environment(seat))
    torch.set_num_threads(seat.threads)
    torch.set_num_interop_threads(1)
    store = dist.FileStore(seat.store, seat.size)
    dist.init_process_group(
        "gloo", store=store, rank=seat.rank, world_size=seat.size, timeout=timedelta(seconds=seat.timeout)
    )
    dist.barrier()  # connections between all ranks exist from here on
    return os.getpid()


def _environment(seat: Seat) -> Mapping[str, str]:
    return {
        "RANK": str(seat.rank),
        "LOCAL_RANK": str(seat.rank),
        "WORLD_SIZE": str(seat.size),
        "LOCAL_WORLD_SIZE": str(seat.size),
        "LOCAL_SIZE": str(seat.size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29500",  # read by libraries, used by nobody: ranks meet in a file
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": str(seat.threads),
        "DS_ACCELERATOR": "cpu",
        SWITCH: seat.transport,
    }


def _end_with_parent(pipe: Connection) -> None:
    """End this process, busy or not, when the parent's end of `pipe` closes."""
    poll = select.poll()
    poll.register(pipe.fileno(), 0)  # no events asked for: a hang-up is always reported
    poll.poll()
    os._exit(1)
