"""Loaders as DeepSpeed's engine makes them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

from torch.utils.data import DataLoader, Dataset, DistributedSampler, IterableDataset

from unishard.engine.data import build_dataloader

T = TypeVar("T")

ROUTE_TRAIN, ROUTE_EVAL, ROUTE_PREDICT = "train", "eval", "predict"


class RepeatingLoader(Iterable[Any]):
    """A loader that begins again when it is through.

    >>> loader = RepeatingLoader([1, 2])
    >>> [next(loader) for _ in range(3)]
    [1, 2, 1]
    """

    def __init__(self, loader: Any) -> None:
        self.loader = loader
        self.data_iter = iter(loader)

    def __iter__(self) -> RepeatingLoader:
        return self

    def __next__(self) -> Any:
        try:
            return next(self.data_iter)
        except StopIteration:
            self.data_iter = iter(self.loader)
            return next(self.data_iter)

    def __len__(self) -> int:
        return len(self.loader)


class DeepSpeedDataLoader(Iterable[Any]):
    """A loader with a length, `next()`, and a function that every batch goes through (`post_process_func`)."""

    def __init__(
        self,
        dataset: Any,
        batch_size: int = 1,
        pin_memory: bool = False,
        local_rank: int = -1,
        tput_timer: Any = None,
        collate_fn: Callable[[Any], Any] | None = None,
        num_local_io_workers: int | None = None,
        data_sampler: Any = None,
        data_parallel_world_size: int | None = None,
        data_parallel_rank: int | None = None,
        dataloader_drop_last: bool = False,
        deepspeed_dataloader_config: Any = None,
    ) -> None:
        if data_sampler is None and data_parallel_world_size and not isinstance(dataset, IterableDataset):
            data_sampler = DistributedSampler(dataset, data_parallel_world_size, data_parallel_rank)
        self._take(
            DataLoader(
                dataset,
                batch_size=batch_size,
                sampler=data_sampler,
                collate_fn=collate_fn,
                num_workers=num_local_io_workers or 0,
                pin_memory=pin_memory,
                drop_last=dataloader_drop_last,
            )
        )

    def _take(self, loader: DataLoader[Any]) -> None:
        self.dataloader = loader
        self.post_process_func: Callable[[Any, Any], Any] | None = None
        self.data: Iterator[Any] | None = None

    @classmethod
    def around(cls, loader: DataLoader[Any]) -> DeepSpeedDataLoader:
        """A view of a loader that exists."""
        made = cls.__new__(cls)
        made._take(loader)
        return made

    @property
    def dataset(self) -> Any:
        return self.dataloader.dataset

    @property
    def batch_size(self) -> int | None:
        return self.dataloader.batch_size

    @property
    def sampler(self) -> Any:
        return self.dataloader.sampler

    data_sampler = sampler

    def __len__(self) -> int:
        return len(self.dataloader)

    def __iter__(self) -> DeepSpeedDataLoader:
        self.data = iter(self.dataloader)
        return self

    def __next__(self) -> Any:
        if self.data is None:
            self.data = iter(self.dataloader)
        batch = next(self.data)
        return batch if self.post_process_func is None else self.post_process_func(batch, {})


class DataIO:
    """The engine's methods about data."""

    def deepspeed_io(
        self,
        dataset: Dataset[Any],
        batch_size: int | None = None,
        route: str = ROUTE_TRAIN,
        pin_memory: bool = True,
        data_sampler: Any = None,
        collate_fn: Callable[[Any], Any] | None = None,
        num_local_io_workers: int | None = None,
    ) -> DeepSpeedDataLoader:
        """A loader of micro-batches of `dataset` for this rank.

        Training data is sampled as `initialize(training_data=...)` does it (and resumes where a checkpoint was),
        evaluation data in order; `data_sampler` replaces both.
        """
        engine: Any = self
        if not (hasattr(dataset, "__getitem__") or isinstance(dataset, IterableDataset)):
            raise ValueError(f"deepspeed_io needs a torch Dataset, not {type(dataset).__name__}")
        collate = collate_fn if collate_fn is not None else engine.collate_fn
        size = batch_size or engine.train_micro_batch_size_per_gpu()
        own = size == engine.train_micro_batch_size_per_gpu()
        if data_sampler is None and route == ROUTE_TRAIN and own and not num_local_io_workers:
            return DeepSpeedDataLoader.around(build_dataloader(dataset, collate, engine.config, engine.axes))
        if data_sampler is None and not isinstance(dataset, IterableDataset):
            data_sampler = DistributedSampler(
                dataset, engine.dp_world_size, engine.get_data_parallel_rank(), shuffle=route == ROUTE_TRAIN
            )
        return DeepSpeedDataLoader(
            dataset,
            batch_size=size,
            data_sampler=data_sampler,
            collate_fn=collate,
            num_local_io_workers=num_local_io_workers,
            pin_memory=pin_memory and engine.device.type == "cuda",
            dataloader_drop_last=bool(engine.config.dataloader_drop_last),
        )

    def set_data_post_process_func(self, post_process_func: Callable[[Any, Any], Any]) -> None:
        """Let every batch of the training loader go through `post_process_func(batch, sampler_state)`."""
        engine: Any = self
        if engine.training_dataloader is not None:
            engine.training_dataloader.post_process_func = post_process_func
