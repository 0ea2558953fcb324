"""What runs inside one rank process of a `RankPool`: receive a task, run it, send back its outcome.

Everything crosses the pipe as bytes made by plain pickle, so that no shared memory outlives a test.
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import importlib
import importlib.util
import io
import os
import pickle
import random
import reprlib
import select
import signal
import sys
import threading
import traceback
from dataclasses import dataclass
from multiprocessing.connection import Connection
from types import ModuleType
from typing import Any


@dataclass(frozen=True)
class FunctionRef:
    """A module-level function by name, with the file to load where the module cannot be imported by name."""

    module: str
    file: str | None
    qualname: str

    @classmethod
    def of(cls, fn: Any) -> FunctionRef:
        """Describe `fn`; raises TypeError for a lambda, a closure or anything without a module-level name."""
        name = getattr(fn, "__qualname__", "")
        if not name or "<" in name or getattr(fn, "__module__", None) is None:
            raise TypeError(
                f"{fn!r} cannot run on other ranks: it is not a module-level function. "
                "Move it to the top of its module and pass what it closes over as arguments."
            )
        module = sys.modules.get(fn.__module__)
        return cls(fn.__module__, getattr(module, "__file__", None), name)

    def resolve(self) -> Any:
        """The function, its module imported if need be; raises ImportError or AttributeError."""
        found: Any = _import(self.module, self.file)
        for part in self.qualname.split("."):
            found = getattr(found, part)
        return found


@dataclass(frozen=True)
class Task:
    """One call on one rank. `payload` is the pickled (args, kwargs); a new `store` path means a new group."""

    ref: FunctionRef
    payload: bytes
    rank: int
    world_size: int
    backend: str | None
    store: str
    cwd: str
    env: dict[str, str]


@dataclass(frozen=True)
class RankFault:
    """An exception on one rank, as text: its class may not be importable or picklable elsewhere."""

    kind: str
    message: str
    traceback: str


@dataclass(frozen=True)
class Outcome:
    """What one rank returned (pickled) or raised, and how many process groups it now holds."""

    value: bytes | None = None
    fault: RankFault | None = None
    groups: int = 0


def main(pipe: Connection, dump_path: str) -> None:
    """Serve tasks until the pipe closes. `dump_path` receives every thread's stack on SIGUSR1."""
    threading.Thread(target=_end_when_closed, args=(pipe,), daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the pool's to handle
    dump = open(dump_path, "w")  # noqa: SIM115 - held open for the signal handler
    faulthandler.register(signal.SIGUSR1, file=dump, all_threads=True)
    _one_thread()
    gc.collect()
    gc.freeze()  # the collection after each task then visits that task's objects only
    session = _Session()
    while True:
        try:
            message = pipe.recv_bytes()
        except (EOFError, OSError):
            os._exit(0)
        outcome = session.run(pickle.loads(message))
        pipe.send_bytes(pickle.dumps(outcome))
        if outcome.fault is not None:
            # Closing our connections makes peers that wait for us in a collective fail at once.
            session.leave_group()
            pipe.send_bytes(b"idle")


class _Session:
    """The state a rank process keeps between tasks: its process group and its original environment."""

    def __init__(self) -> None:
        self._store: str | None = None

    def run(self, task: Task) -> Outcome:
        try:
            os.chdir(task.cwd)
            _set_environment(task.env)
            _reset_torch()
            self._join_group(task)
            fn = task.ref.resolve()  # before the payload, which may hold this module's classes
            args, kwargs = pickle.loads(task.payload)
            value = dump_value(fn(*args, **kwargs))
            del args, kwargs
        except BaseException as error:
            fault = _describe(error)
            traceback.clear_frames(error.__traceback__)
            return Outcome(fault=fault)
        finally:
            gc.collect()
        if task.backend is None:
            self.leave_group()
        return Outcome(value=value, groups=_group_count())

    def _join_group(self, task: Task) -> None:
        import torch.distributed as dist

        if self._store == task.store and dist.is_initialized():
            return
        self.leave_group()
        if task.backend is not None:
            store = dist.FileStore(task.store, task.world_size)
            dist.init_process_group(task.backend, store=store, rank=task.rank, world_size=task.world_size)
        self._store = task.store

    def leave_group(self) -> None:
        """Destroy every process group of this process. Returns only when their threads have ended."""
        import torch.distributed as dist

        self._store = None
        window = sys.modules.get("unishard.dist.memory_window")
        if window is not None:
            window.leave_all()
        if dist.is_initialized():
            dist.destroy_process_group()
        if "torch.distributed.tensor" in sys.modules:
            # What DTensor remembers of an operation holds its mesh, and with that names of groups that are gone.
            from torch.distributed.tensor import debug

            getattr(debug, "_clear_sharding_prop_cache", lambda: None)()


class _ValuePickler(pickle.Pickler):
    """Plain pickle, with tensors sent as detached CPU copies: a view would drag its whole storage along."""

    def reducer_override(self, obj: Any) -> Any:
        import torch

        if type(obj) in (torch.Tensor, torch.nn.Parameter):
            return obj.detach().cpu().clone().__reduce_ex__(pickle.HIGHEST_PROTOCOL)
        return NotImplemented


def dump_value(value: Any) -> bytes:
    """Pickle arguments or a result for another process; tensors arrive detached, on the CPU."""
    buffer = io.BytesIO()
    _ValuePickler(buffer, pickle.HIGHEST_PROTOCOL).dump(value)
    return buffer.getvalue()


def _import(name: str, file: str | None) -> ModuleType:
    if name in sys.modules:
        return sys.modules[name]
    spec = None
    with contextlib.suppress(ImportError, ValueError, AttributeError):
        spec = importlib.util.find_spec(name)
    if file is None or (spec is not None and spec.origin == file):
        return importlib.import_module(name)
    # A test module: pytest imports it by path, under a name that nothing else can import.
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise ImportError(f"module {name} cannot be loaded from {file}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _describe(error: BaseException) -> RankFault:
    kind = type(error)
    name = kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
    text = "".join(traceback.format_exception(kind, error, error.__traceback__)).rstrip()
    if isinstance(error, AssertionError) and not str(error):
        text += "\n" + _locals(error)  # pytest rewrites asserts in its own process only
    return RankFault(name, str(error), text)


def _locals(error: BaseException) -> str:
    frame = error.__traceback__
    while frame is not None and frame.tb_next is not None:
        frame = frame.tb_next
    if frame is None:
        return ""
    short = reprlib.Repr()
    short.maxother = short.maxstring = 200
    values = [f"    {name} = {short.repr(value)}" for name, value in frame.tb_frame.f_locals.items()]
    return "  where\n" + "\n".join(values)


def _set_environment(env: dict[str, str]) -> None:
    for name in os.environ.keys() - env.keys():
        del os.environ[name]
    for name, value in env.items():
        if os.environ.get(name) != value:
            os.environ[name] = value


def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)
    with contextlib.suppress(RuntimeError):  # already set, or threads already running
        torch.set_num_interop_threads(1)


def _reset_torch() -> None:
    import numpy
    import torch

    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float32)
    torch.set_default_device(None)
    torch.set_grad_enabled(True)
    torch.manual_seed(0)
    random.seed(0)
    numpy.random.seed(0)


def _group_count() -> int:
    from torch.distributed import distributed_c10d

    return len(distributed_c10d._world.pg_map)


def _end_when_closed(pipe: Connection) -> None:
    """End this process, busy or not, when the pool's end of `pipe` closes: the pool may have been killed."""
    poll = select.poll()
    poll.register(pipe.fileno(), 0)  # no events asked for: a hang-up is always reported
    poll.poll()
    os._exit(1)
