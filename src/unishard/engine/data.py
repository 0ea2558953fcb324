"""The loader that `initialize(training_data=...)` returns."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.utils.data import DataLoader, Dataset, IterableDataset

from unishard.config import ResolvedConfig
from unishard.dist.mesh import Axes
from unishard.engine.sampling import PositionedSampler


def build_dataloader(
    data: Dataset[Any], collate_fn: Callable[[Any], Any] | None, rc: ResolvedConfig, axes: Axes
) -> DataLoader[Any]:
    """Micro-batches of `data`, each sample on one data-parallel rank an epoch.

    An iterable dataset is taken as it comes: it must split itself over ranks.
    """
    sampler = None
    if not isinstance(data, IterableDataset):
        rank = axes.replicate.rank * axes.shard.size + axes.shard.rank
        sampler = PositionedSampler(
            data,  # pyright: ignore[reportArgumentType] - map-style datasets have a length
            rc.train_micro_batch_size_per_gpu,
            axes.world_size,
            rank,
            seed=rc.seed or 0,
            drop_last=bool(rc.dataloader_drop_last),
        )
    return DataLoader(
        data,
        batch_size=rc.train_micro_batch_size_per_gpu,
        sampler=sampler,
        collate_fn=collate_fn,
        drop_last=bool(rc.dataloader_drop_last),
    )
