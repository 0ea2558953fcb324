"""How checkpointed functions keep their inputs: one setting for the process, as in DeepSpeed."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from unishard.config.activation_checkpointing import ActivationCheckpointing
from unishard.dist.collectives import SOLO, Communicator, communicator
from unishard.errors import ConfigError, StateError
from unishard.offload.aligned import PinnedBudget
from unishard.offload.cpu import CpuTier
from unishard.sharding.ports import Tier

_log = logging.getLogger("unishard")

_ALIGNMENT = 64  # bytes, so that a slot holds any dtype


class ContiguousSlots:
    """Room for `count` inputs in one buffer, so that their memory cannot fall to pieces between others'.

    The first says how large one is.

    >>> slots = ContiguousSlots(2, torch.device("cpu"))
    >>> first, second = slots.take(16), slots.take(10)
    >>> first[1].numel(), second[1].numel()
    (16, 10)
    """

    def __init__(self, count: int, device: torch.device) -> None:
        self._count, self._device = count, device
        self._buffer: torch.Tensor | None = None
        self._size = 0
        self._free: list[int] = []

    def take(self, nbytes: int) -> tuple[int, torch.Tensor]:
        """A slot's number and its first `nbytes`, shape (nbytes,), uint8.

        Raises `StateError` if there are more checkpoints than slots, or larger ones than the first.
        """
        if self._buffer is None:
            self._size = -(-nbytes // _ALIGNMENT) * _ALIGNMENT
            self._buffer = torch.empty(self._count * self._size, dtype=torch.uint8, device=self._device)
            self._free = list(reversed(range(self._count)))
        if nbytes > self._size:
            raise StateError(
                f"contiguous_memory_optimization: an input of {nbytes} bytes does not fit the slots of {self._size} "
                "bytes that the first one needed; checkpoint functions with inputs of one size, or set it to false"
            )
        if not self._free:
            raise StateError(
                f"contiguous_memory_optimization: number_checkpoints={self._count}, and one more checkpoint waits for "
                "its backward; set number_checkpoints to the number of checkpointed calls in one forward pass (times "
                "the micro-batches under way at once), or evaluate under torch.no_grad()"
            )
        slot = self._free.pop()
        return slot, self._buffer[slot * self._size : slot * self._size + nbytes]

    def give(self, slot: int) -> None:
        self._free.append(slot)


@dataclass(frozen=True)
class Settings:
    """See `configure`."""

    partition: bool = False
    contiguous: bool = False
    count: int | None = None
    in_cpu: bool = False
    synchronize: bool = False
    profile: bool = False
    tier: Tier | None = None
    mpu: Any = None
    slots: dict[tuple[torch.device, int], ContiguousSlots] = field(default_factory=dict, compare=False)
    """A buffer for each argument of the function: those are of one size from call to call."""

    def ranks(self) -> Communicator:
        """The tensor-parallel ranks that inputs are divided among."""
        if not self.partition or self.mpu is None:
            return SOLO
        return communicator(from_mpu(self.mpu, "group"))

    def slots_for(self, position: int, device: torch.device) -> ContiguousSlots:
        """The buffer of the argument at `position`."""
        if (device, position) not in self.slots:
            assert self.count is not None  # checked by `configure`
            self.slots[device, position] = ContiguousSlots(self.count, device)
        return self.slots[device, position]


def from_mpu(mpu: Any, what: str) -> Any:
    """`group`, `rank` or `world_size` of the tensor-parallel ranks, under any of the names that are in use."""
    for prefix in ("get_tensor_model_parallel_", "get_slice_parallel_", "get_model_parallel_"):
        method = getattr(mpu, prefix + what, None)
        if method is not None:
            return method()
    raise ConfigError(
        f"mpu_={mpu!r} has no get_model_parallel_{what}(); pass an object that has it, or None without tensor "
        "parallelism"
    )


_FIELDS = {
    "partition_activations": "partition",
    "contiguous_memory_optimization": "contiguous",
    "number_checkpoints": "count",
    "cpu_checkpointing": "in_cpu",
    "synchronize_checkpoint_boundary": "synchronize",
    "profile": "profile",
}
_DEFAULT = Settings()
_current: Settings | None = None


def current() -> Settings:
    """The settings in force; recomputation with inputs that stay on the device until `configure` was called."""
    return _current or _DEFAULT


def configure(
    mpu_: Any = None,
    deepspeed_config: Mapping[str, Any] | str | Path | None = None,
    partition_activations: bool | None = None,
    contiguous_checkpointing: bool | None = None,
    num_checkpoints: int | None = None,
    checkpoint_in_cpu: bool | None = None,
    synchronize: bool | None = None,
    profile: bool | None = None,
    *,
    tier: Tier | None = None,
) -> None:
    """Say where inputs of checkpointed functions rest until backward. Replaces what was configured before.

    Args:
        mpu_: has `get_model_parallel_group`, `_rank` and `_world_size` (or `get_tensor_model_parallel_...`).
        deepspeed_config: a ds_config or its file; its `activation_checkpointing` holds for what is not given.
        partition_activations: each tensor-parallel rank keeps its part of an input, and all gather it in backward.
            Every one of these ranks has to call with the same inputs.
        contiguous_checkpointing: inputs rest in one buffer with room for `num_checkpoints`.
        num_checkpoints: how many checkpoints wait for their backward at once.
        checkpoint_in_cpu: inputs rest in host memory.
        synchronize: wait for the accelerator before and after each checkpoint and its recomputation.
        profile: log the time of each.
        tier: inputs rest on this tier of `unishard.offload`, for example an `NvmeTier`.

    Raises:
        ConfigError: options that cannot hold together; each is named with what to use instead.

    >>> configure(None, checkpoint_in_cpu=True)
    >>> is_configured()
    True
    >>> configure(None, contiguous_checkpointing=True)
    Traceback (most recent call last):
    ...
    unishard.errors.ConfigError: contiguous_memory_optimization (contiguous_checkpointing) needs number_checkpoints...
    """
    section = _section(deepspeed_config)
    values: dict[str, Any] = {field: getattr(section, key) for key, field in _FIELDS.items()}
    arguments = {
        "partition": partition_activations,
        "contiguous": contiguous_checkpointing,
        "count": num_checkpoints,
        "in_cpu": checkpoint_in_cpu,
        "synchronize": synchronize,
        "profile": profile,
    }
    values |= {field: value for field, value in arguments.items() if value is not None}
    _install(Settings(mpu=mpu_, tier=tier, **values))


def configure_keys(values: Mapping[str, Any]) -> None:
    """Set keys of the section `activation_checkpointing`; the rest stays as configured.

    >>> configure_keys({"cpu_checkpointing": True})
    >>> current().in_cpu
    True
    """
    fields = {_FIELDS[key]: value for key, value in values.items()}
    _install(dataclasses.replace(current(), **fields, slots={}, tier=_own_tier(current())))


def _section(source: Mapping[str, Any] | str | Path | None) -> ActivationCheckpointing:
    if source is None:
        return ActivationCheckpointing()
    if isinstance(source, (str, Path)):
        try:
            source = json.loads(Path(source).read_text())
        except (OSError, ValueError) as error:
            raise ConfigError(f"deepspeed_config={source}: not a readable JSON file ({error})") from error
    if not isinstance(source, Mapping):
        raise ConfigError(f"deepspeed_config={source!r}: pass a mapping, or the path of a JSON file")
    try:
        return ActivationCheckpointing.model_validate(source.get("activation_checkpointing", {}))
    except ValueError as error:
        raise ConfigError(f"activation_checkpointing of deepspeed_config: {error}") from error


def _install(settings: Settings) -> None:
    if settings.contiguous and not settings.count:
        raise ConfigError(
            "contiguous_memory_optimization (contiguous_checkpointing) needs number_checkpoints (num_checkpoints): the "
            "number of checkpointed calls in one forward pass, which sizes its buffer"
        )
    if settings.tier is not None and (settings.in_cpu or settings.contiguous):
        name = "contiguous_memory_optimization" if settings.contiguous else "cpu_checkpointing"
        raise ConfigError(f"tier and {name} both say where inputs rest; pass one of them")
    if settings.partition and settings.mpu is None:
        _log.info(
            "partition_activations: no mpu_ is given, so there is one tensor-parallel rank and nothing to divide"
        )
    if settings.count and not settings.contiguous:
        _log.info("number_checkpoints sizes the buffer of contiguous_memory_optimization, which is off")
    if settings.in_cpu and not settings.contiguous:
        settings = dataclasses.replace(settings, tier=CpuTier(PinnedBudget()))
    global _current
    _current = settings


def is_configured() -> bool:
    """Whether `configure` was called."""
    return _current is not None


def reset() -> None:
    """Forget the buffers of `contiguous_checkpointing`, after forward passes that had no backward.

    Checkpoints that still wait for their backward keep their memory.
    """
    current().slots.clear()


def partition_activations_in_checkpoint(partition_activation: bool) -> None:
    """Turn `partition_activations` on or off; the rest stays as configured."""
    _install(dataclasses.replace(current(), partition=partition_activation, tier=_own_tier(current())))


def set_num_layers(nlayers: int) -> None:
    """Set `num_checkpoints`; the rest stays as configured."""
    _install(dataclasses.replace(current(), count=nlayers, slots={}, tier=_own_tier(current())))


def _own_tier(settings: Settings) -> Tier | None:
    """The tier that the user gave, not the one that `checkpoint_in_cpu` stands for."""
    return None if settings.in_cpu else settings.tier
