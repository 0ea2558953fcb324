"""What scripts ask about the machine and about torch."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from typing import Any

import torch
from packaging.version import Version


def required_torch_version(min_version: Any = None, max_version: Any = None) -> bool:
    """Whether torch's version lies between two, both included.

    >>> required_torch_version(min_version=2.0)
    True
    """
    if min_version is None and max_version is None:
        raise ValueError("required_torch_version needs min_version or max_version")
    have = Version(Version(torch.__version__).base_version)
    low = min_version is None or have >= Version(str(min_version))
    return low and (max_version is None or have <= Version(str(max_version)))


def register_grad_hook(param: torch.Tensor, hook: Callable[..., Any]) -> Any:
    """Call `hook` with the parameter once its gradient is accumulated."""
    return param.register_post_accumulate_grad_hook(hook)


def jit_script_compat(fn: Any) -> Any:
    """Returned as it is."""
    return fn


def is_compile_supported() -> bool:
    """Whether torch has `torch.compile`."""
    return True


def is_compiling() -> bool:
    """Whether the code runs under `torch.compile`."""
    return torch.compiler.is_compiling()


def disable(func: Any) -> Any:
    """Keep `func` out of compiled regions."""
    return torch.compiler.disable(func)


def enable(min_version: Any = None) -> Callable[[Any], Any]:
    """A decorator that leaves functions as they are."""
    return lambda func: func


def parse_range(rng: str) -> list[int]:
    """The numbers of `3` or `1-4`.

    >>> parse_range("1-3")
    [1, 2, 3]
    """
    try:
        first, _, last = rng.partition("-")
        numbers = list(range(int(first), int(last or first) + 1))
    except ValueError as error:
        raise ValueError(f"range {rng!r}: expected a number, or two with '-' between them") from error
    if not numbers:
        raise ValueError(f"range {rng!r}: the first number is above the last")
    return numbers


def parse_range_list(range_str: str) -> list[int]:
    """The numbers of ranges with commas between them, ascending and without repetition.

    >>> parse_range_list("0,2-3")
    [0, 2, 3]
    """
    numbers = [number for rng in range_str.split(",") for number in parse_range(rng)]
    if numbers != sorted(set(numbers)):
        raise ValueError(f"range list {range_str!r}: numbers must ascend, each once")
    return numbers


def check_for_numactl_pkg() -> bool:
    """Whether the program numactl is there."""
    return shutil.which("numactl") is not None


def get_numa_cores() -> list[list[int]]:
    """The cores of each NUMA node; one node with none when numactl cannot tell."""
    if not check_for_numactl_pkg():
        return []
    told = subprocess.run(["numactl", "--hardware"], capture_output=True, text=True, check=False).stdout
    rows = [line.partition("cpus:")[2].split() for line in told.splitlines() if " cpus:" in line]
    return [[int(core) for core in row] for row in rows]


def get_numactl_cmd(
    bind_core_list: str | None, num_local_procs: int, local_rank: int
) -> tuple[int, list[str]]:
    """(cores for each process, words to start it with) so that each process of a machine has cores of its own.

    Raises:
        ValueError: the program numactl, which binds them, is not there.
    """
    if not check_for_numactl_pkg():
        raise ValueError("binding processes to cores needs the program numactl: install it, or do not bind")
    import psutil

    cores = (
        parse_range_list(bind_core_list)
        if bind_core_list
        else list(range(psutil.cpu_count(logical=False) or 1))
    )
    each = max(len(cores) // num_local_procs, 1)
    own = cores[each * local_rank : each * (local_rank + 1)]
    return each, ["numactl", "-C", ",".join(map(str, own))]
