"""Which samples a rank sees, as a function of how many samples the whole run has seen."""

from __future__ import annotations

from collections.abc import Iterator, Sized

import torch
from torch.utils.data import Sampler


class PositionedSampler(Sampler[int]):
    """Samples of one data-parallel rank, in an order that depends on seed and epoch only.

    Global micro-batch k of an epoch is the slice [k B N, (k + 1) B N) of the epoch's permutation, B samples a rank on N
    ranks; a run with another N but the same global batch takes the same samples in every step. The last micro-batch of
    an epoch is filled up from its beginning, or left out with `drop_last`.

    Args:
        data: anything with a length. micro_batch: B. ranks, rank: N and this one. seed: of the permutations.

    >>> [list(PositionedSampler(range(5), 1, 2, rank, shuffle=False)) for rank in (0, 1)]
    [[0, 2, 4], [1, 3, 0]]
    """

    def __init__(
        self,
        data: Sized,
        micro_batch: int,
        ranks: int,
        rank: int,
        *,
        seed: int = 0,
        shuffle: bool = True,
        drop_last: bool = False,
    ) -> None:
        self._data = data
        self._micro_batch = micro_batch
        self._ranks, self._rank = ranks, rank
        self._seed, self._shuffle, self._drop_last = seed, shuffle, drop_last
        self._epoch = 0
        self._done = 0
        """Global micro-batches of the coming epoch that were taken before a resume."""

    @property
    def _global(self) -> int:
        return self._micro_batch * self._ranks

    @property
    def _batches(self) -> int:
        """Global micro-batches of a whole epoch."""
        size = len(self._data)
        return size // self._global if self._drop_last else -(-size // self._global)

    def __len__(self) -> int:
        """Samples of this rank in the coming epoch."""
        return (self._batches - self._done) * self._micro_batch

    def set_epoch(self, epoch: int) -> None:
        """Begin the coming iteration at the start of `epoch`, counted from 0."""
        self._epoch, self._done = epoch, 0

    def resume_at(self, samples: int) -> None:
        """Continue where a run stands that has seen `samples` samples, on all ranks together."""
        batches = max(self._batches, 1)
        self._epoch, self._done = divmod(samples // self._global, batches)

    def __iter__(self) -> Iterator[int]:
        size, epoch, done = len(self._data), self._epoch, self._done
        self._epoch, self._done = epoch + 1, 0
        order: range | list[int] = range(size)
        if self._shuffle:
            draw = torch.Generator().manual_seed(self._seed * 1_000_003 + epoch)
            order = torch.randperm(size, generator=draw).tolist()
        for batch in range(done, self._batches):
            start = batch * self._global + self._rank * self._micro_batch
            for position in range(start, start + self._micro_batch):
                yield order[position % size]
