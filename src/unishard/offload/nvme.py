"""A local disk as a tier (ZeRO-Infinity): direct transfers, many at a time, each read compared with what was written.

Rajbhandari et al. 2021, "ZeRO-Infinity: Breaking the GPU Memory Wall for Extreme Scale Deep Learning", section 6.3.
"""

from __future__ import annotations

import os
import weakref
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from unishard.errors import OffloadError
from unishard.offload.aligned import RecycledPages
from unishard.offload.base import BaseTier, Entry, Transfer
from unishard.offload.swap_file import SwapFile, default_run
from unishard.offload.transfers import Ending, Outcome, Place, Transfers, best_transfers
from unishard.sharding.host_memory import PAGE

BLOCK = 8 << 20
"""Bytes of one operation on the disk."""
DEPTH = 8
"""Operations on the disk at a time."""


@dataclass(slots=True)
class _Extent(Entry):
    """A key's room in the file."""

    offset: int = 0
    checksums: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    """int64, one a block, of the version stored last."""
    version: int = 0
    """How often the key was stored. 0: it holds zeros, which nobody wrote and nobody has to read."""


class _Zeros(Transfer):
    """A read of what was never written."""

    def done(self) -> bool:
        return True

    def finish(self) -> None:
        self.tensor.zero_()


class _DiskTransfer(Transfer):
    def __init__(
        self, tier: NvmeTier, key: str, extent: _Extent, tensor: torch.Tensor, *, writes: bool
    ) -> None:
        super().__init__(key, tensor, writes=writes)
        self._tier = tier
        self._checksums = extent.checksums  # alive while the engine fills or reads them
        # What is on another device passes through host memory.
        self._host = tensor.detach()
        self._staged = not tier.reaches(tensor)
        if self._staged:
            self._host = tier.staging.empty(tensor.numel(), tensor.dtype)
            if writes:
                self._host.copy_(tensor.detach())
        place = Place(tier.file.descriptor, extent.offset, tier.file.alignment)
        self._handle = tier.transfers.start(place, self._host, extent.checksums, writes=writes)

    def done(self) -> bool:
        return self.ended or self._tier.transfers.done(self._handle)

    def finish(self) -> None:
        outcome = self._tier.transfers.finish(self._handle)
        if self._staged:
            if not self.writes and outcome.ending == Ending.WELL:
                self.tensor.detach().copy_(self._host)
            self._host = self.tensor  # others may have its memory
        if outcome.ending != Ending.WELL:
            raise self._tier.trouble(self.key, outcome, writes=self.writes)


class NvmeTier(BaseTier[_Extent]):
    """State rests in a file of this rank's own under `nvme_path`, which is removed with the tier or the process.

    Args:
        nvme_path: a folder on a local disk.
        rank: whose state it is, for messages and the file's name; the launcher's RANK by default.
        run: names a folder for the files of a run; the launcher's run id by default.
        block: bytes of one operation on the disk, in whole pages.
        depth: operations on the disk at a time.
        transfers: another engine to move bytes with, closed with the tier.

    Buffers from `aligned_empty` are read and written in place; others are copied on the way. Checksums and positions
    are in memory only: a swap file means nothing to another process.

    >>> import tempfile
    >>> from unishard.offload.aligned import aligned_empty
    >>> with tempfile.TemporaryDirectory() as folder, NvmeTier(Path(folder)) as tier:
    ...     tier.put("master", torch.arange(3.0))
    ...     tier.wait(tier.fetch("master", into=aligned_empty(3, torch.float32)))
    tensor([0., 1., 2.])
    """

    name = "nvme"

    def __init__(
        self,
        nvme_path: Path | str,
        *,
        rank: int | None = None,
        run: str | None = None,
        block: int = BLOCK,
        depth: int = DEPTH,
        transfers: Transfers | None = None,
    ) -> None:
        super().__init__()
        if block <= 0 or block % PAGE or depth <= 0:
            raise OffloadError(
                f"nvme tier: block={block}, depth={depth}; block has to be a multiple of {PAGE} bytes, and "
                "depth at least 1"
            )
        rank = int(os.environ.get("RANK", "0")) if rank is None else rank
        self.transfers = transfers or best_transfers(block, depth)
        self.staging = RecycledPages()
        """Memory through which tensors of other devices pass."""
        self.file = SwapFile(Path(nvme_path), run or default_run(), rank)
        # At exit too: a process that ends normally leaves no file.
        self._cleanup = weakref.finalize(self, _give_back, self.transfers, self.file)

    def reaches(self, tensor: torch.Tensor) -> bool:
        """Whether the engine can read and write the memory of `tensor`."""
        return tensor.device.type == "cpu"

    def trouble(self, key: str, outcome: Outcome, *, writes: bool) -> OffloadError:
        """The error for a transfer of `key` that did not end well."""
        if outcome.ending == Ending.FAILED:
            what = "written" if writes else "read"
            error = OSError(outcome.error, os.strerror(outcome.error))
            return self.file.refusal(error, key, f"{what} at byte {outcome.offset}")
        if outcome.ending == Ending.TRUNCATED:
            return self.file.loss(key, f"ends before byte {outcome.offset}")
        version = self._entries[key].version
        return self.file.loss(
            key,
            f"does not hold at byte {outcome.offset} what was stored there last (version {version}, checksum)",
        )

    def _reserve(self, key: str, numel: int, dtype: torch.dtype) -> _Extent:
        nbytes = numel * dtype.itemsize
        offset = self.file.take(key, nbytes)
        return _Extent(numel, dtype, offset=offset, checksums=self._new_checksums(nbytes))

    def _new_checksums(self, nbytes: int) -> torch.Tensor:
        return torch.zeros(-(-nbytes // self.transfers.block), dtype=torch.int64)

    def _start(self, key: str, entry: _Extent, tensor: torch.Tensor, *, writes: bool) -> Transfer:
        self.file.check(key)
        if writes:
            entry.version += 1
        elif entry.version == 0:
            return _Zeros(key, tensor.detach(), writes=False)
        return _DiskTransfer(self, key, entry, tensor, writes=writes)

    def _memory(self, entry: _Extent) -> torch.Tensor | None:
        return None

    def _release(self, key: str, entry: _Extent) -> None:
        self.file.give(entry.offset, entry.nbytes)

    def _shut(self) -> None:
        self._cleanup()


def _give_back(transfers: Any, file: SwapFile) -> None:
    transfers.close()  # what is under way ends first
    file.close()
