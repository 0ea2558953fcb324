"""What a contestant is: a row that says how to build a trainer, and the two loops that trainers share."""

from __future__ import annotations

import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.profiler import record_function

from unishard.bench.data import Batch
from unishard.bench.plan import Plan

Level = Literal["replicated", "zero1", "zero2", "zero3", "offload"]
"""What is sharded. Contestants of one level are alternatives for each other."""


class Held(NamedTuple):
    """The tensors that persist between steps, by kind. Views of one storage count once, for the first kind."""

    parameters: Sequence[Tensor]
    gradients: Sequence[Tensor]
    optimizer: Sequence[Tensor]


class Trainer(ABC):
    """One contestant's model, ready to train.

    `optimizer` is the torch optimizer whose `step()` is the update itself, below any wrapper: memory is read right
    before it.
    """

    optimizer: torch.optim.Optimizer

    @abstractmethod
    def step(self, batches: Sequence[Batch]) -> float:
        """Forward, backward and update over one micro-batch each; returns this rank's mean loss."""

    @abstractmethod
    def held(self) -> Held:
        """What persists, read right before the update."""

    def settle(self) -> None:  # noqa: B027 - most leave nothing under way
        """Finish what the last step left under way."""

    def close(self) -> None:  # noqa: B027 - most have nothing to undo
        """Leave nothing behind for the next contestant of the same process."""


@dataclass(frozen=True)
class Contestant:
    """One row of the comparison.

    Args:
        name: unique; what tables show and users select.
        family: contestants that differ in a setting only; the fastest of a round stands for them.
        level: what it shards.
        setting: its choices, in words, for the report.
        build: makes the trainer from the plan; a module-level function or a partial of one (it is pickled).
        imports: modules that it needs, imported before memory is measured.
        install: what to install if one of them is missing.
        ours: whether it is unishard.
        alone: runs in one process on the global batch, with all ranks' threads.
        min_ranks, dtypes: where it makes sense.
        waits_in_backward: it waits for collectives in C++ inside `backward()`, where the profiler sees no operator.

    >>> Contestant("mine", family="mine", level="zero3", setting="as it comes", build=print).missing()
    """

    name: str
    family: str
    level: Level
    setting: str
    build: Callable[[Plan], Trainer]
    imports: tuple[str, ...] = ()
    install: str = ""
    ours: bool = False
    alone: bool = False
    min_ranks: int = 1
    dtypes: tuple[str, ...] = ("fp32", "bf16")
    waits_in_backward: bool = False

    def missing(self) -> str | None:
        """A line that says what to install, or None if everything is there."""
        lacking = [m for m in self.imports if importlib.util.find_spec(m.partition(".")[0]) is None]
        if not lacking:
            return None
        return f"{self.name} needs {', '.join(lacking)}, which is not installed: {self.install}"

    def unfit(self, plan: Plan) -> str | None:
        """Why it cannot take part in `plan`, or None."""
        if plan.ranks < self.min_ranks:
            return f"at least {self.min_ranks} ranks needed"
        if plan.dtype not in self.dtypes:
            return f"for {' and '.join(self.dtypes)} only"
        return None


MicroContext = Callable[[bool], AbstractContextManager[Any]]
"""Entered around forward and backward of each micro-batch, with whether it is the step's last."""


def no_context(is_last: bool) -> AbstractContextManager[Any]:
    return nullcontext()


@dataclass
class TorchTrainer(Trainer):
    """The plain loop: forward, `loss.backward()`, `optimizer.step()`."""

    model: nn.Module
    stepped: torch.optim.Optimizer
    """What the loop steps; `optimizer` is the one inside, if it wraps one."""
    micro: MicroContext = no_context
    held_by: Callable[[], Held] | None = None
    close_with: Callable[[], None] = lambda: None
    optimizer: torch.optim.Optimizer = field(init=False)

    def __post_init__(self) -> None:
        inner = getattr(self.stepped, "optim", None)  # ZeroRedundancyOptimizer's name for it
        self.optimizer = inner if isinstance(inner, torch.optim.Optimizer) else self.stepped

    def step(self, batches: Sequence[Batch]) -> float:
        total, count = 0.0, len(batches)
        for index, (inputs, targets) in enumerate(batches):
            with self.micro(index == count - 1):
                loss = self.model(inputs, targets)
                with record_function("bench.backward"):
                    (loss / count if count > 1 else loss).backward()
            total += loss.item()
        self.stepped.step()
        self.stepped.zero_grad()
        return total / count

    def held(self) -> Held:
        if self.held_by is not None:
            return self.held_by()
        parameters = list(self.model.parameters())
        gradients = [p.grad for p in parameters if p.grad is not None]
        return Held(parameters, gradients, optimizer_state(self.optimizer))

    def close(self) -> None:
        self.close_with()


@dataclass
class EngineTrainer(Trainer):
    """The loop of DeepSpeed's engine and of ours, which has its methods."""

    engine: Any
    optimizer: torch.optim.Optimizer
    held_by: Callable[[], Held]
    settle_with: Callable[[], None] = lambda: None

    def step(self, batches: Sequence[Batch]) -> float:
        total = 0.0
        for inputs, targets in batches:
            loss = self.engine(inputs, targets)
            with record_function("bench.backward"):
                self.engine.backward(loss)
            self.engine.step()
            total += loss.item()
        return total / len(batches)

    def held(self) -> Held:
        return self.held_by()

    def settle(self) -> None:
        self.settle_with()

    def close(self) -> None:
        self.engine.destroy()


def optimizer_state(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """The state tensors of `optimizer`, step counters included."""
    entries: Iterable[dict[str, Any]] = optimizer.state.values()
    return [value for entry in entries for value in entry.values() if isinstance(value, Tensor)]
