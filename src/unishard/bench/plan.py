"""What a benchmark run does: the model, the data, and how often each thing is measured."""

from __future__ import annotations

from typing import Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, field_validator

from unishard.errors import ConfigError


class Size(NamedTuple):
    """A GPT and the batch that goes with it: `sequence` tokens in each of `micro_batch` sequences a rank."""

    vocabulary: int
    context: int
    width: int
    heads: int
    depth: int
    micro_batch: int
    sequence: int


SIZES = {
    "tiny": Size(vocabulary=256, context=32, width=64, heads=4, depth=2, micro_batch=2, sequence=32),
    "30m": Size(vocabulary=8192, context=256, width=512, heads=8, depth=8, micro_batch=4, sequence=128),
    "124m": Size(vocabulary=50257, context=1024, width=768, heads=12, depth=12, micro_batch=2, sequence=128),
}
"""Model sizes by name. 124m has GPT-2's shapes (Radford et al. 2019, table 2)."""

ADAMW = {"lr": 3e-4, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
"""Every contestant's optimizer, on every parameter alike."""


class Plan(BaseModel):
    """One run's settings, the same for every contestant.

    `steps` are timed after `warmup` in each of `rounds`; `curve` steps are taken once, in fresh processes, for the loss
    curve, memory, traffic and time by kind (0: not at all). `timeout` is in seconds, for one contestant in one round.
    With `transport="sockets"` unishard's ranks exchange messages as they would between hosts, instead of reading each
    other's memory. `micro_batch` (sequences) and `sequence` (tokens) default to those of the size.

    >>> Plan(size="30m", accumulation=2).tokens_per_step
    2048
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    size: str = "30m"
    dtype: Literal["fp32", "bf16"] = "fp32"
    ranks: int = Field(2, ge=1)
    rounds: int = Field(3, ge=0)
    steps: int = Field(4, ge=1)
    warmup: int = Field(2, ge=1)
    accumulation: int = Field(1, ge=1)
    recompute: bool = False
    threads: int = Field(1, ge=1)
    transport: Literal["memory", "sockets"] = "memory"
    micro_batch: int | None = Field(None, ge=1)
    sequence: int | None = Field(None, ge=1)
    curve: int = Field(12, ge=0)
    seed: int = 0
    timeout: float = Field(600.0, gt=0)

    @field_validator("size")
    @classmethod
    def _known(cls, value: str) -> str:
        if value.lower() not in SIZES:
            raise ConfigError(f"unknown size {value!r}; choose one of {', '.join(SIZES)}")
        return value.lower()

    @field_validator("curve")
    @classmethod
    def _enough(cls, value: int) -> int:
        if 0 < value < 5:
            raise ConfigError(
                f"curve={value}: memory and traffic take 5 steps in fresh processes; pass more, or 0 for none"
            )
        return value

    @property
    def shape(self) -> Size:
        """The size with this plan's batch in it."""
        size = SIZES[self.size]
        return size._replace(
            micro_batch=self.micro_batch or size.micro_batch, sequence=self.sequence or size.sequence
        )

    @property
    def tokens_per_step(self) -> int:
        """Tokens that all ranks together train on in one optimizer step."""
        shape = self.shape
        return shape.micro_batch * shape.sequence * self.ranks * self.accumulation
