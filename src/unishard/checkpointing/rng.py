"""Random numbers that recomputation draws again, and streams of them that tensor-parallel ranks do not share."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch.utils.checkpoint import get_device_states, set_device_states

from unishard.checkpointing.settings import current, from_mpu
from unishard.errors import StateError

MODEL_PARALLEL = "model-parallel-rng"
_OFFSET = 2718
"""Between the seed that tensor-parallel ranks share and the first of their own, as in Megatron-LM and DeepSpeed."""


def _get_state() -> torch.Tensor:
    if torch.accelerator.is_available():
        return torch.get_device_module().get_rng_state()
    return torch.get_rng_state()


def _set_state(state: torch.Tensor) -> None:
    if torch.accelerator.is_available():
        torch.get_device_module().set_rng_state(state)
    else:
        torch.set_rng_state(state)


class RngStatesTracker:
    """Named states of the accelerator's generator, or of the CPU's where there is no accelerator.

    >>> tracker = RngStatesTracker()
    >>> tracker.add("dropout", 1)
    >>> with tracker.fork("dropout"):
    ...     first = torch.rand(1)
    >>> with tracker.fork("dropout"):
    ...     second = torch.rand(1)
    >>> bool(first == second)
    False
    """

    def __init__(self) -> None:
        self._states: dict[str, torch.Tensor] = {}
        self._seeds: set[int] = set()

    def reset(self) -> None:
        """Forget every state."""
        self._states.clear()
        self._seeds.clear()

    def get_states(self) -> dict[str, torch.Tensor]:
        """A copy: each name with its state."""
        return {name: state.clone() for name, state in self._states.items()}

    def set_states(self, states: dict[str, torch.Tensor]) -> None:
        """Replace every state."""
        self._states = {name: state.clone() for name, state in states.items()}

    def add(self, name: str, seed: int) -> None:
        """Start a state. Raises `StateError` if the name or the seed is taken: two streams would be one."""
        if seed in self._seeds:
            raise StateError(f"seed {seed} is used by another state already; give {name!r} a seed of its own")
        if name in self._states:
            raise StateError(f"state {name!r} exists already; call reset() first")
        before = _get_state()
        torch.manual_seed(
            seed
        ) if not torch.accelerator.is_available() else torch.get_device_module().manual_seed(seed)
        self._states[name] = _get_state()
        self._seeds.add(seed)
        _set_state(before)

    @contextmanager
    def fork(self, name: str = MODEL_PARALLEL) -> Iterator[None]:
        """Draw from state `name` inside, and go on with the default one after. Raises `StateError` if it is unknown."""
        if name not in self._states:
            raise StateError(
                f"there is no random state {name!r}; add it, or call model_parallel_cuda_manual_seed"
            )
        before = _get_state()
        _set_state(self._states[name])
        try:
            yield
        finally:
            self._states[name] = _get_state()
            _set_state(before)


_tracker = RngStatesTracker()


def get_cuda_rng_tracker() -> RngStatesTracker:
    """The tracker whose states `checkpoint` restores for recomputation. The name is DeepSpeed's; a CPU will do."""
    return _tracker


def model_parallel_cuda_manual_seed(seed: int) -> None:
    """Seed the default stream with `seed`, the same on tensor-parallel ranks, and "model-parallel-rng" with one of this
    rank's own (`seed + 2718 + rank`), after `configure`: replaces `manual_seed`.

    >>> model_parallel_cuda_manual_seed(1234)
    >>> list(get_cuda_rng_tracker().get_states())
    ['model-parallel-rng']
    """
    mpu = current().mpu
    rank = 0 if mpu is None else int(from_mpu(mpu, "rank"))
    _tracker.reset()
    torch.manual_seed(seed)
    _tracker.add(MODEL_PARALLEL, seed + _OFFSET + rank)


def model_parallel_reconfigure_tp_seed(seed: int) -> None:
    """Seed "model-parallel-rng" anew and leave the default stream alone."""
    mpu = current().mpu
    rank = 0 if mpu is None else int(from_mpu(mpu, "rank"))
    _tracker.reset()
    _tracker.add(MODEL_PARALLEL, seed + _OFFSET + rank)


class Draws:
    """Where every generator stood when a function ran, to run it again with the same draws."""

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        self._cpu = torch.get_rng_state()
        self._devices, self._states = get_device_states(*tensors)
        self._device_type = next(
            (t.device.type for t in tensors if t.device.type not in ("cpu", "meta")), None
        )
        self._named = _tracker.get_states()

    @contextmanager
    def again(self) -> Iterator[None]:
        """Inside, generators start from there; afterwards they go on from where they were."""
        named = _tracker.get_states()
        with torch.random.fork_rng(self._devices, device_type=self._device_type or "cuda"):
            torch.set_rng_state(self._cpu)
            if self._device_type is not None:
                set_device_states(self._devices, self._states, device_type=self._device_type)
            _tracker.set_states(self._named)
            try:
                yield
            finally:
                _tracker.set_states(named)
