"""Backward, clipping and the step of a Lightning run, which the engine does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from unishard.errors import UnsupportedError
from unishard.sharding.group import ShardGroup

if TYPE_CHECKING:
    from unishard.integrations.lightning_strategy import StrategyParts

_Base: Any = object
"""Lightning's plain `Precision` comes in where the class is made."""


def clamp(groups: Sequence[ShardGroup], bound: float) -> None:
    """Clip reduced gradients element by element."""
    for group in groups:
        with group.gradients.in_memory(changed=True):
            if group.gradients.shard is not None:
                group.gradients.shard.clamp_(-bound, bound)


class PrecisionParts(_Base):
    """What makes Lightning's plain precision plugin the engine's: dtypes are the engine's affair."""

    def __init__(self, strategy: StrategyParts, precision: str) -> None:
        super().__init__()
        self._strategy = strategy
        self.precision = precision  # pyright: ignore[reportAttributeAccessIssue]

    def backward(self, tensor: Any, model: Any, optimizer: Any, *args: Any, **kwargs: Any) -> None:
        engine = self._strategy.engine
        own = type(model).backward is not self._strategy.library.LightningModule.backward
        if own or args or set(kwargs) - {"retain_graph"}:
            model.backward(engine.scale(tensor), *args, **kwargs)
        else:
            # Lightning has divided the loss by the batches of a step.
            engine.backward(tensor, scale_wrt_gas=False, **kwargs)

    def optimizer_step(self, optimizer: Any, model: Any, closure: Callable[[], Any], **kwargs: Any) -> Any:
        if kwargs:
            raise UnsupportedError(
                f"optimizer.step({', '.join(kwargs)}=...): the sharded step takes a closure only; leave it out"
            )
        engine = self._strategy.engine
        sharded = engine._optimizer()
        if model.automatic_optimization:
            sharded.max_norm = 0.0  # `configure_gradient_clipping`, which runs below, says what to clip to
        result = closure()
        self._after_closure(model, optimizer)
        engine.set_gradient_accumulation_boundary(True)
        engine.step()
        sharded.max_norm, sharded.before_update = engine.gradient_clipping(), None
        return result

    def clip_gradients(
        self, optimizer: Any, clip_val: float = 0.0, gradient_clip_algorithm: Any = "norm"
    ) -> None:
        """Let the coming step clip; gradients are whole nowhere, so nothing can be clipped here."""
        sharded, by_value = self._strategy.engine._optimizer(), gradient_clip_algorithm == "value"
        sharded.max_norm = 0.0 if by_value else clip_val
        sharded.before_update = partial(clamp, bound=clip_val) if by_value and clip_val > 0 else None
