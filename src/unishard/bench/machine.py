"""The machine of a run, without anything that identifies it."""

from __future__ import annotations

import os
import platform
import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from unishard import __version__
from unishard.errors import UnsupportedError

_ALLOCATOR = re.compile(r"^(MALLOC_|GLIBC_TUNABLES$|LD_PRELOAD$)")


class Machine(BaseModel):
    """What numbers depend on. `memory` is bytes; `load` is the one-minute load average when the run began."""

    model_config = ConfigDict(extra="forbid")

    cpu: str
    cores: int
    memory: int
    system: str
    python: str
    versions: dict[str, str]
    allocator: dict[str, str]
    """Environment variables that change the C heap; the libraries in LD_PRELOAD without their folders."""
    load: float


def describe_machine() -> Machine:
    """This machine, now.

    Raises:
        UnsupportedError: memory and traffic are read from /proc, which only Linux has.
    """
    if not Path("/proc/self/clear_refs").exists():
        raise UnsupportedError("unishard bench reads memory and traffic from /proc, so it needs Linux")
    return Machine(
        cpu=_cpu_model(),
        cores=len(os.sched_getaffinity(0)),
        memory=os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        system=f"{platform.system()} {platform.machine()}",
        python=platform.python_version(),
        versions=_versions(),
        allocator={
            name: _without_folders(value) for name, value in os.environ.items() if _ALLOCATOR.match(name)
        },
        load=os.getloadavg()[0],
    )


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.lower().startswith(("model name", "cpu model")):
            return line.partition(":")[2].strip()
    return platform.machine()


def _versions() -> dict[str, str]:
    found = {"unishard": __version__}
    for name in ("torch", "deepspeed"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def _without_folders(value: str) -> str:
    return ":".join(Path(part).name if "/" in part else part for part in value.split(":"))
