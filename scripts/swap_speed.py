"""Swap bandwidth of the nvme tier beside fio and DeepSpeed's async_io, on one file system, in turns.

    python scripts/swap_speed.py [--rounds 7] [--mebibytes 512] [--folder DIR]

Everybody goes around the page cache, in files that exist already. unishard computes a checksum of all it writes and
compares it with all it reads; the others do not. fio runs with its own memory and with huge pages, as unishard's
buffers have: where they are, transfers cost less. fio (libaio) takes part where it is installed,
DeepSpeed where it is and its extension can be built (libaio's headers). A round measures each contestant once, writing
and reading; rounds give ratios, which a disk that others use disturbs less than rates.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from unishard.offload import NvmeTier, aligned_empty
from unishard.offload.transfers import NativeTransfers, PythonTransfers

MIB = 1 << 20
TENSORS = 8


class Contestant(ABC):
    """Moves its bytes, and says in how many seconds."""

    name: str

    @abstractmethod
    def write(self) -> float: ...

    @abstractmethod
    def read(self) -> float: ...

    def close(self) -> None:
        return None


def timed(action: Callable[[], Any]) -> float:
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


class Unishard(Contestant):
    """Eight tensors, all of them under way at once."""

    def __init__(self, folder: Path, nbytes: int, engine: type, block: int, depth: int) -> None:
        kind = "native" if engine is NativeTransfers else "python"
        self.name = f"{kind} {block // MIB} MiB x {depth}"
        self._tier = NvmeTier(folder, rank=0, transfers=engine(block, depth))
        numel = nbytes // TENSORS // 4
        self._tensors = [aligned_empty(numel, torch.float32).normal_() for _ in range(TENSORS)]
        for index, tensor in enumerate(self._tensors):
            self._tier.put(str(index), tensor)

    def _all(self, move: Callable[[str, torch.Tensor], Any]) -> None:
        tickets = [move(str(index), tensor) for index, tensor in enumerate(self._tensors)]
        for ticket in tickets:
            self._tier.wait(ticket)

    def write(self) -> float:
        return timed(lambda: self._all(self._tier.store))

    def read(self) -> float:
        return timed(lambda: self._all(self._tier.fetch))

    def close(self) -> None:
        self._tier.close()


class Fio(Contestant):
    """Half a second by fio's own clock, which leaves its start out."""

    def __init__(self, folder: Path, nbytes: int, block: int, depth: int, huge: bool) -> None:
        self.name = f"fio {block // MIB} MiB x {depth}" + (" huge" if huge else "")
        self._nbytes = nbytes
        self._environment = {**os.environ, "GLIBC_TUNABLES": f"glibc.malloc.hugetlb={int(huge)}"}
        self._command = [
            "fio", "--name=swap", f"--filename={folder / 'fio'}", f"--size={nbytes}", f"--bs={block}",
            f"--iodepth={depth}", "--ioengine=libaio", "--direct=1", "--overwrite=1", "--output-format=json",
            "--time_based", "--runtime=500ms",
        ]  # fmt: skip

    def _run(self, direction: str) -> float:
        command = [*self._command, f"--rw={direction}"]
        done = subprocess.run(command, check=True, capture_output=True, text=True, env=self._environment)
        return self._nbytes / json.loads(done.stdout)["jobs"][0][direction]["bw_bytes"]

    def write(self) -> float:
        return self._run("write")

    def read(self) -> float:
        return self._run("read")


class DeepSpeed(Contestant):
    """The handle that DeepSpeed's swapper uses, on memory that it has page-locked."""

    def __init__(self, folder: Path, nbytes: int, block: int, depth: int, threads: int) -> None:
        from deepspeed.ops.op_builder import AsyncIOBuilder  # pyright: ignore[reportAttributeAccessIssue]

        self.name = f"DeepSpeed {block // MIB} MiB x {depth}, {threads} threads"
        self._handle: Any = (
            AsyncIOBuilder().load(verbose=False).aio_handle(block, depth, False, True, threads)
        )
        numel = nbytes // TENSORS // 4
        self._tensors = [
            self._handle.new_cpu_locked_tensor(numel, torch.empty(0, dtype=torch.float32)).normal_()
            for _ in range(TENSORS)
        ]
        self._paths = [str(folder / f"deepspeed-{block}-{threads}-{index}") for index in range(TENSORS)]
        self.write()

    def _all(self, move: Callable[[torch.Tensor, str], Any]) -> None:
        for tensor, path in zip(self._tensors, self._paths, strict=True):
            move(tensor, path)
        self._handle.wait()

    def write(self) -> float:
        return timed(lambda: self._all(lambda tensor, path: self._handle.async_pwrite(tensor, path, 0)))

    def read(self) -> float:
        return timed(lambda: self._all(lambda tensor, path: self._handle.async_pread(tensor, path, 0)))


def contestants(folder: Path, nbytes: int, without: list[str]) -> list[Contestant]:
    found: list[Contestant] = []

    def add(kind: str, make: Callable[[], Contestant]) -> None:
        if kind in without:
            return
        try:
            found.append(make())
        except Exception as error:
            print(f"{kind} does not take part: {type(error).__name__}: {error}")

    for block, depth in ((8, 8), (4, 8), (1, 8)):
        add("native", lambda b=block, d=depth: Unishard(folder, nbytes, NativeTransfers, b * MIB, d))
    add("python", lambda: Unishard(folder, nbytes, PythonTransfers, 8 * MIB, 8))
    if shutil.which("fio"):
        for block, depth, huge in ((1, 8, False), (8, 8, False), (1, 8, True), (1, 32, True), (8, 8, True)):
            add("fio", lambda b=block, d=depth, h=huge: Fio(folder, nbytes, b * MIB, d, h))
    else:
        print("fio does not take part: it is not installed")
    for block, threads in ((1, 1), (8, 4)):
        add("deepspeed", lambda b=block, t=threads: DeepSpeed(folder, nbytes, b * MIB, 8, t))
    return found


def measure(entries: list[Contestant], rounds: int, nbytes: int) -> dict[str, dict[str, list[float]]]:
    """MB/s by contestant and direction; who begins changes from round to round."""
    rates: dict[str, dict[str, list[float]]] = {c.name: {"write": [], "read": [], "cpu": []} for c in entries}
    for contestant in entries:  # once for files and memory that are new
        contestant.write()
        contestant.read()
    for number in range(rounds):
        shift = number % len(entries)
        for contestant in entries[shift:] + entries[:shift]:
            before = processor_time()
            for direction in ("write", "read"):
                rates[contestant.name][direction].append(nbytes / 1e6 / getattr(contestant, direction)())
            if not isinstance(contestant, Fio):  # whose start would count
                rates[contestant.name]["cpu"].append((processor_time() - before) / (2 * nbytes / 1e9))
    return rates


def processor_time() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def report(rates: dict[str, dict[str, list[float]]]) -> None:
    best = {
        direction: max(
            (name for name in rates if name.startswith("fio")),
            key=lambda name: statistics.median(rates[name][direction]),
            default=next(iter(rates)),
        )
        for direction in ("write", "read")
    }

    def spread(values: list[float], digits: int) -> str:
        return f"{statistics.median(values):.{digits}f} [{min(values):.{digits}f}, {max(values):.{digits}f}]"

    table = Table("", "write MB/s", f"of {best['write']}", "read MB/s", f"of {best['read']}", "cpu s/GB")
    for name, found in rates.items():
        cells = [name]
        for direction in ("write", "read"):
            against = rates[best[direction]][direction]
            ratios = [own / other for own, other in zip(found[direction], against, strict=True)]
            cells += [spread(found[direction], 0), spread(ratios, 2)]
        table.add_row(*cells, f"{statistics.median(found['cpu']):.3f}" if found["cpu"] else "-")
    Console(width=160).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--mebibytes", type=int, default=512)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--without", nargs="*", default=[], choices=["native", "python", "fio", "deepspeed"])
    options = parser.parse_args()
    torch.set_num_threads(1)
    nbytes = options.mebibytes * MIB
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="unishard-swap-speed-") as name:
        entries = contestants(Path(name), nbytes, options.without)
        report(measure(entries, options.rounds, nbytes))
        for contestant in entries:
            contestant.close()


if __name__ == "__main__":
    main()
