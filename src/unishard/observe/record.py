"""StepRecord: everything worth knowing about one update, in one place."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class StepRecord:
    """One update. `tokens_per_second` counts all ranks; `bytes_sent` is this rank's parameters and gradients.

    >>> StepRecord(step=1, loss=2.5, learning_rate=1e-3).as_dict()["loss"]
    2.5
    """

    step: int
    loss: float
    learning_rate: float
    grad_norm: float | None = None
    tokens_per_second: float | None = None
    skipped_steps: int = 0
    loss_scale: float = 1.0
    bytes_sent: int | None = None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def scalars(self) -> dict[str, float]:
        """The numbers by name, without those that were not measured."""
        return {k: float(v) for k, v in self.as_dict().items() if k != "step" and v is not None}
