"""`deepspeed.checkpointing`: recomputation of activations, over `torch.utils.checkpoint`."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint as recompute

from unishard.errors import UnsupportedError

log = logging.getLogger("unishard")

_configured = False


def checkpoint(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """`function(*args, **kwargs)`, whose inner activations are computed again in backward instead of kept."""
    if kwargs:
        function = partial(function, **kwargs)
    return recompute(function, *args, use_reentrant=False)


non_reentrant_checkpoint = checkpoint


class CheckpointFunction:
    """`apply(function, outputs, *args)`: as `checkpoint`; outputs are appended to the list."""

    @staticmethod
    def apply(run_function: Callable[..., Any], all_outputs: list[Any], *args: Any) -> Any:
        outputs = checkpoint(run_function, *args)
        all_outputs += list(outputs) if isinstance(outputs, tuple) else [outputs]
        return outputs


def configure(
    mpu_: Any = None,
    deepspeed_config: Any = None,
    partition_activations: bool | None = None,
    contiguous_checkpointing: bool | None = None,
    num_checkpoints: int | None = None,
    checkpoint_in_cpu: bool | None = None,
    synchronize: bool | None = None,
    profile: bool | None = None,
) -> None:
    """Set how `checkpoint` keeps its inputs. What is not available raises `UnsupportedError`."""
    global _configured
    section: dict[str, Any] = {}
    if deepspeed_config is not None:
        from unishard.deepspeed.parts.configuration import raw_config

        section = raw_config(deepspeed_config).get("activation_checkpointing", {})
    asked = {
        "partition_activations": section.get("partition_activations", False) or partition_activations,
        "contiguous_checkpointing": section.get("contiguous_memory_optimization", False)
        or contiguous_checkpointing,
        "checkpoint_in_cpu": section.get("cpu_checkpointing", False) or checkpoint_in_cpu,
    }
    wanted = [name for name, value in asked.items() if value]
    if asked["contiguous_checkpointing"] and not (num_checkpoints or section.get("number_checkpoints")):
        raise AssertionError(
            "contiguous_checkpointing needs num_checkpoints, the number of layers recomputed"
        )
    if wanted:
        raise UnsupportedError(
            f"checkpointing.configure({', '.join(wanted)}): kept inputs stay whole and on the device in this version; "
            "leave it out"
        )
    _configured = True


def is_configured() -> bool:
    """Whether `configure` was called."""
    return _configured


def reset() -> None:
    """Nothing is kept between steps."""


def set_num_layers(nlayers: int) -> None:
    """Accepted: there is no buffer to size."""


def partition_activations_in_checkpoint(partition_activation: bool) -> None:
    """Only `False`."""
    if partition_activation:
        configure(partition_activations=True)


class CudaRNGStatesTracker:
    """Generator states by name, and a context that uses one of them."""

    def __init__(self) -> None:
        self.states_: dict[str, torch.Tensor] = {}

    def reset(self) -> None:
        self.states_ = {}

    def get_states(self) -> dict[str, torch.Tensor]:
        return dict(self.states_)

    def set_states(self, states: dict[str, torch.Tensor]) -> None:
        self.states_ = states

    def add(self, name: str, seed: int) -> None:
        """Keep a fresh state of `seed` under `name`."""
        if name in self.states_:
            raise Exception(f"seed {seed}: the state {name!r} already exists")
        before = torch.get_rng_state()
        torch.manual_seed(seed)
        self.states_[name] = torch.get_rng_state()
        torch.set_rng_state(before)

    @contextmanager
    def fork(self, name: str = "model-parallel-rng") -> Iterator[None]:
        """Draw from the state called `name` inside."""
        if name not in self.states_:
            raise Exception(f"the state {name!r} does not exist; add it first")
        before = torch.get_rng_state()
        torch.set_rng_state(self.states_[name])
        try:
            yield
        finally:
            self.states_[name] = torch.get_rng_state()
            torch.set_rng_state(before)


_tracker = CudaRNGStatesTracker()


def get_cuda_rng_tracker() -> CudaRNGStatesTracker:
    """The one of this process."""
    return _tracker


def model_parallel_cuda_manual_seed(seed: int) -> None:
    """Seed torch, and a second state for what differs between tensor-parallel ranks."""
    _tracker.reset()
    torch.manual_seed(seed)
    _tracker.add("model-parallel-rng", seed + 2718)


def model_parallel_reconfigure_tp_seed(seed: int) -> None:
    """Replace the second state."""
    _tracker.states_.pop("model-parallel-rng", None)
    _tracker.add("model-parallel-rng", seed + 2718)
