"""Memory of this process: resident size and its peak from /proc, tensors alive from the garbage collector."""

from __future__ import annotations

import gc
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from unishard.bench.contestant import Held
from unishard.sharding.host_memory import trim_heap

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


def _status_bytes(name: str) -> int:
    for line in _STATUS.read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"{_STATUS} has no {name}")


def resident() -> int:
    """Bytes of this process in memory now (VmRSS)."""
    return _status_bytes("VmRSS")


def peak_resident() -> int:
    """The most that was resident since `reset_peak()`, in bytes (VmHWM), kept by the kernel: nothing is sampled."""
    return _status_bytes("VmHWM")


def reset_peak() -> None:
    """Let `peak_resident()` begin anew from what is resident now."""
    _CLEAR.write_text("5")


def trim() -> None:
    """Collect garbage and give the C heap's free pages back, so that neither counts for whoever comes next."""
    gc.collect()
    trim_heap()


def live_bytes() -> int:
    """Bytes of all storages that a Python object or a gradient refers to, each storage once.

    Memory that only C++ holds (buckets of DDP's reducer) is not in it; it is in the resident size.
    """
    tensors: list[Tensor] = [found for found in gc.get_objects() if issubclass(type(found), Tensor)]
    # A gradient that autograd made has no Python object until someone asks for it.
    gradients = [t.grad for t in tensors if t.is_leaf and t.grad is not None]
    return sum(_storages([*tensors, *gradients]).values())


def bytes_by_kind(held: Held) -> dict[str, int]:
    """Bytes of each kind of what persists; a storage counts for the first kind that has it.

    >>> held = Held([torch.zeros(2)], [], [torch.zeros(3)])
    >>> bytes_by_kind(held)
    {'parameters': 8, 'gradients': 0, 'optimizer': 12}
    """
    sizes, seen = {}, set()
    for kind, tensors in zip(Held._fields, held, strict=True):
        storages = _storages(tensors)
        sizes[kind] = sum(size for key, size in storages.items() if key not in seen)
        seen |= storages.keys()
    return sizes


def _storages(tensors: Iterable[Tensor]) -> dict[int, int]:
    """Address -> bytes of the storages behind `tensors`."""
    found: dict[int, int] = {}
    for tensor in tensors:
        local = _local(tensor)
        if local is not None and local.untyped_storage().nbytes():
            storage = local.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
    return found


def _local(tensor: Tensor) -> Tensor | None:
    """The tensor with memory on this rank: a DTensor's own storage has none."""
    inner = getattr(tensor, "_local_tensor", tensor)
    inner = getattr(inner, "elem", inner)  # an AsyncCollectiveTensor around the local one
    return inner if inner.layout is torch.strided and inner.device.type == "cpu" else None
