"""The batch triad: `train_batch_size = micro batch x accumulation x data-parallel world size`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from unishard.config.fields import Auto, Count, Honoured, Section

TRAIN, MICRO, ACCUMULATION = (
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
)
TRIAD = (TRAIN, MICRO, ACCUMULATION)


class BatchKeys(Section):
    """Top-level keys about batches; two of the triad give the third."""

    train_batch_size: Annotated[Count | None, Auto("batch"), Honoured()] = None
    train_micro_batch_size_per_gpu: Annotated[Count | None, Auto("batch"), Honoured()] = None
    gradient_accumulation_steps: Annotated[Count | None, Auto("batch"), Honoured()] = None
    managed_gradient_accumulation: Annotated[bool, Honoured()] = True
    dataloader_drop_last: Annotated[bool, Honoured()] = False


@dataclass(frozen=True)
class Triad:
    """The three sizes, in samples (train, micro) and micro-batches (accumulation)."""

    train: int
    micro: int
    accumulation: int


class TriadError(ValueError):
    """The given sizes fit no triad; the message holds all numbers and the remedy."""


def implied_world_size(train: int | None, micro: int | None, accumulation: int | None) -> int | None:
    """The data-parallel size that a full triad describes, or None when it describes none.

    >>> implied_world_size(32, 4, 2)
    4
    """
    if train is None or micro is None or accumulation is None or train % (micro * accumulation):
        return None
    return train // (micro * accumulation)


def solve(train: int | None, micro: int | None, accumulation: int | None, world: int, source: str) -> Triad:
    """Complete and check the triad on `world` data-parallel ranks; `source` says where that number is from.

    Raises `TriadError` with every number involved.

    >>> solve(32, 4, None, 2, "an argument")
    Triad(train=32, micro=4, accumulation=4)
    """
    numbers = (
        f"train_batch_size={_shown(train)}, train_micro_batch_size_per_gpu={_shown(micro)}, "
        f"gradient_accumulation_steps={_shown(accumulation)}, data-parallel world size {world} "
        f"(from {source})"
    )
    if train is None:
        if micro is None:
            raise TriadError(f"{numbers}: set train_batch_size or train_micro_batch_size_per_gpu")
        steps = accumulation or 1
        return Triad(micro * steps * world, micro, steps)
    if micro is None:
        steps = accumulation or 1
        if train % (steps * world):
            raise TriadError(
                f"{numbers}: train_batch_size must be a multiple of {steps} x {world} = {steps * world}; "
                f"{_nearest(train, steps * world)}"
            )
        return Triad(train, train // (steps * world), steps)
    if accumulation is None:
        if train % (micro * world):
            raise TriadError(
                f"{numbers}: train_batch_size must be a multiple of {micro} x {world} = {micro * world}; "
                f"{_nearest(train, micro * world)}"
            )
        return Triad(train, micro, train // (micro * world))
    product = micro * accumulation * world
    if train != product:
        raise TriadError(
            f"{numbers}: {train} != {micro} x {accumulation} x {world} = {product}; set train_batch_size to "
            f"{product}, or leave one of the three out"
        )
    return Triad(train, micro, accumulation)


def _shown(value: int | None) -> str:
    return "unset" if value is None else str(value)


def _nearest(value: int, step: int) -> str:
    above = -(-value // step) * step
    below = above - step
    return f"use {above}" if below < 1 else f"use {below} or {above}"
