"""Engine: the micro-batch loop over the parts that `initialize` built."""

from __future__ import annotations

import logging
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from unishard.config import ResolvedConfig
from unishard.dist.mesh import Axes
from unishard.engine.save_load import SaveLoad
from unishard.errors import StateError
from unishard.observe.monitors import monitors_from_config
from unishard.observe.record import StepRecord
from unishard.optim.sharded import ShardedOptimizer
from unishard.sharding.in_place import ShardedModel
from unishard.sharding.placement import Placement, Reshard
from unishard.sharding.precision import as_dtype

log = logging.getLogger("unishard")


class Engine(SaveLoad):
    """A sharded model with its optimizer: `engine(batch)`, `engine.backward(loss)`, `engine.step()`.

    One `step()` call belongs to each micro-batch; parameters change at every `gradient_accumulation_steps`-th.
    Attributes that the engine does not have are those of the module.
    """

    def __init__(
        self,
        sharded: ShardedModel,
        config: ResolvedConfig,
        axes: Axes,
        device: torch.device,
        optimizer: ShardedOptimizer | None,
        lr_scheduler: Any,
        training_dataloader: Any,
    ) -> None:
        super().__init__()
        self.module = sharded.module
        self.config = config
        self.axes = axes
        self.device = device
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        self.training_dataloader = training_dataloader
        self.schedule = sharded.schedule
        self.global_steps = 0
        """Boundaries reached, skipped ones included."""
        self.micro_steps = 0
        self.global_samples = 0
        self._micro = 0
        """Micro-batches since the last update."""
        self._boundary: bool | None = None
        self._syncs = True
        self._in_backward = False
        self._scaled = False
        self._step_applied = False
        self._warned_plain_backward = False
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._last_loss = float("nan")
        self._monitors = monitors_from_config(config) if dist.get_rank() == 0 else []
        self.schedule.after_backward = self._after_backward

    # forward and backward -----------------------------------------------------------------------------------

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's forward, with floating inputs cast to the compute dtype."""
        with self._timed("forward"):
            if torch.is_grad_enabled():
                self._arm()
            else:
                self.complete_update()
            with self._autocast(), self.schedule.one_forward():
                return self.module(*args, **kwargs)

    def _autocast(self) -> AbstractContextManager[Any]:
        """`torch.autocast` where the configuration asks for it."""
        section = self.config.torch_autocast
        if not section.enabled:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=as_dtype(section.dtype))

    def is_gradient_accumulation_boundary(self) -> bool:
        """Whether the micro-batch under way is the last of its step."""
        if self._boundary is not None:
            return self._boundary
        if not self.config.managed_gradient_accumulation:
            return True
        return (self._micro + 1) % self.gradient_accumulation_steps() == 0

    def set_gradient_accumulation_boundary(self, is_boundary: bool | None) -> None:
        """Say yourself whether the next `step()` updates; `None` returns to counting micro-batches."""
        self._boundary = is_boundary

    def _arm(self) -> None:
        """Tell every unit what the coming backward does with gradients and parameters."""
        boundary = self.is_gradient_accumulation_boundary()
        for unit in self.schedule.units:
            every_time = unit.sharding.gradient is Placement.SHARD
            unit.reduce_gradients = self._syncs and (boundary or every_time)
            unit.reduce_across_replicas = self._syncs and boundary
            unit.reshard_after_backward = boundary or unit.sharding.reshard is Reshard.AFTER_FORWARD
        queue = self.schedule.queue
        queue.on_reduced = None
        if self.optimizer is not None and self._syncs and boundary:
            queue.keeps_landed = self.config.optimizer_in_backward
            if self.config.optimizer_in_backward:
                queue.on_reduced = self.optimizer.step_in_backward
            elif self.optimizer.delayed:
                queue.on_reduced = self.optimizer.continue_update

    def scale(self, loss: torch.Tensor) -> torch.Tensor:
        """The loss times the loss scale, for a plain `engine.scale(loss).backward()` under fp16."""
        self._scaled = True
        return loss * self._optimizer().loss_scale

    def backward(
        self,
        loss: torch.Tensor,
        *,
        tokens: float | torch.Tensor | None = None,
        retain_graph: bool = False,
        scale_wrt_gas: bool = True,
    ) -> torch.Tensor:
        """Differentiate `loss`, a scalar, and collect its gradients; returns the loss as it was divided.

        A mean loss is divided by the accumulation steps, here and nowhere else. With `tokens=n` the loss is a sum over
        this rank's n valid tokens; the step then divides by the valid tokens of all ranks and micro-batches, so that
        every token weighs the same. All micro-batches of a step must agree on that.
        """
        optimizer = self._optimizer()
        if loss.numel() != 1:
            raise StateError(
                f"backward needs a scalar loss, got shape {tuple(loss.shape)}; reduce it with .mean()"
            )
        self._count_tokens(optimizer, tokens)
        if tokens is None and scale_wrt_gas:
            loss = loss / self.gradient_accumulation_steps()
        if self._monitors:
            self._last_loss = loss.detach().item()
        self._arm()
        self._in_backward = True
        try:
            with self._timed("backward"):
                self.scale(loss).backward(retain_graph=retain_graph)
        finally:
            self._in_backward = False
        return loss

    def _count_tokens(self, optimizer: ShardedOptimizer, tokens: float | torch.Tensor | None) -> None:
        started = any(group.gradients.touched for group in self.schedule.groups)
        if started and (tokens is None) != (optimizer.tokens is None):
            raise StateError(
                "backward(loss, tokens=...) and backward(loss) were mixed in one step; weigh every micro-batch of "
                "a step the same way"
            )
        if tokens is not None:
            optimizer.tokens = (optimizer.tokens or 0.0) + float(tokens)

    def _after_backward(self) -> None:
        if self._in_backward or self._warned_plain_backward or self.gradient_accumulation_steps() == 1:
            return
        self._warned_plain_backward = True
        if dist.get_rank() == 0:
            log.warning(
                "unishard: loss.backward() was called directly; divide the loss by gradient_accumulation_steps=%d "
                "yourself, or call engine.backward(loss), which does",
                self.gradient_accumulation_steps(),
            )

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Backwards inside do not communicate gradients; the next one outside, or the step, reduces their sum."""
        self._syncs, before = False, self._syncs
        try:
            yield
        finally:
            self._syncs = before

    # step ---------------------------------------------------------------------------------------------------

    def step(self, lr_kwargs: dict[str, Any] | None = None) -> None:
        """Count a micro-batch; at the boundary update parameters, step the scheduler and forget gradients."""
        optimizer = self._optimizer()
        if not self._syncs:
            raise StateError("step() inside no_sync(): gradients have not met; leave the context first")
        self.micro_steps += 1
        self._step_applied = False
        if not self.is_gradient_accumulation_boundary():
            self._micro += 1
            return
        unscaled = optimizer.loss_scale != 1.0 and not self._scaled
        if optimizer.skips_overflow and unscaled and self._has_gradients():
            raise StateError(
                "fp16 gradients were computed without the loss scale; call engine.backward(loss), or "
                "engine.scale(loss).backward()"
            )
        if not self.config.zero_optimization.ignore_unused_parameters:
            self._require_used(optimizer)
        with self._timed("step"):
            optimizer.step()
            optimizer.zero_grad()
        self._micro, self._scaled = 0, False
        self._count_step(optimizer, lr_kwargs)

    def _require_used(self, optimizer: ShardedOptimizer) -> None:
        unused = optimizer.unused()
        if unused:
            named = ", ".join(unused[:5]) + (f" and {len(unused) - 5} more" if len(unused) > 5 else "")
            raise StateError(
                f"zero_optimization.ignore_unused_parameters is false, and no rank has a gradient of {named}; freeze "
                "what the loss does not depend on, or leave the key out"
            )

    def _count_step(self, optimizer: ShardedOptimizer, lr_kwargs: dict[str, Any] | None) -> None:
        self.global_steps += 1
        self.global_samples += self.train_batch_size()
        self._step_applied = not optimizer.skipped
        if self._step_applied and self.lr_scheduler is not None:
            # Once per applied update, whatever the accumulation and the number of ranks.
            self.lr_scheduler.step(**(lr_kwargs or {}))
        self._report()
        for monitor in self._monitors:
            monitor.write(
                StepRecord(
                    step=self.global_steps,
                    loss=self._last_loss,
                    learning_rate=self.get_lr()[0],
                    grad_norm=self.get_global_grad_norm(),
                    skipped_steps=self.skipped_steps,
                    loss_scale=self.loss_scale,
                )
            )
        self._checkpoint_boundary()

    def complete_update(self) -> None:
        """With `delayed_update`: carry out the update that waits for the next backward. All ranks call together.

        Saving and forwards without gradients do this by themselves; call it before parameters are read otherwise.
        """
        if self.optimizer is not None:
            self.optimizer.complete_update()

    def _has_gradients(self) -> bool:
        return any(group.gradients.touched for group in self.schedule.groups)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget all gradients, of unfinished accumulation too."""
        self._optimizer().zero_grad(set_to_none)
        self._micro = 0

    def _optimizer(self) -> ShardedOptimizer:
        if self.optimizer is None:
            raise StateError(
                "this engine has no optimizer: add an optimizer section to the configuration, or pass optimizer= to "
                "initialize; without one it only runs forward"
            )
        return self.optimizer

    # reporting ----------------------------------------------------------------------------------------------

    @contextmanager
    def _timed(self, part: str) -> Iterator[None]:
        if not self.config.wall_clock_breakdown:
            yield
            return
        start = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[part] += time.perf_counter() - start

    def _report(self) -> None:
        if dist.get_rank() != 0 or self.global_steps % self.config.steps_per_print:
            return
        rates = ", ".join(f"{lr:.4g}" for lr in self.get_lr())
        log.info("unishard: step=%d skipped=%d lr=[%s]", self.global_steps, self.skipped_steps, rates)
        if self.config.wall_clock_breakdown:
            spent = ", ".join(f"{part} {1000 * seconds:.1f} ms" for part, seconds in self._seconds.items())
            log.info("unishard: time since the last report: %s", spent)
            self._seconds.clear()

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            module = self.__dict__.get("_modules", {}).get("module")
            if module is None:
                raise
            return getattr(module, name)

    def destroy(self) -> None:
        """Wait for what is under way, background saves included, and release gathered parameters."""
        self.wait_for_checkpoints()
        for unit in self.schedule.units:
            unit.reshard()
        for axes in self.schedule.axes:
            axes.shard.tidy()


def module_of(engine: Engine) -> nn.Module:
    """The user's model."""
    return engine.module
