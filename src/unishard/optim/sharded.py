"""ShardedOptimizer: any elementwise torch optimizer, over this rank's pieces of the parameters."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from unishard.dist.labels import labelled
from unishard.errors import NonFiniteError, StateError, UnsupportedError
from unishard.kernels import squared_norm
from unishard.optim.clip import clip_factor, shard_norm
from unishard.optim.flat import FlatSteps, Piece, Used
from unishard.optim.loss_scale import LossScale, NoLossScale
from unishard.optim.pieces import Pieces
from unishard.optim.resting import RestingSteps
from unishard.sharding.group import ShardGroup, unshard_together
from unishard.sharding.hooks import has_step_hooks
from unishard.sharding.host_memory import trim_after_step
from unishard.sharding.schedule import Schedule
from unishard.sharding.touched import agree_on_touched

if TYPE_CHECKING:
    from unishard.optim.delayed import DelayedUpdate


@dataclass(frozen=True)
class UpdateRules:
    """How an update treats gradients before the optimizer sees them."""

    max_norm: float = 0.0
    """0 clips nothing."""
    norm_type: float = 2.0
    defer_gather: bool = False
    """Leave the gather of updated parameters to the next forward; a plain read of a parameter is then out of date."""
    delayed: bool = False
    """Carry out each update during the next backward, which computes with the parameters before it."""


class ShardedOptimizer(torch.optim.Optimizer):
    """Steps local shards with `inner` after reducing, unscaling and clipping what backward left in the groups.

    `param_groups` and `state` are the inner optimizer's own, so schedulers and users change the real ones.
    """

    def __init__(
        self,
        inner: torch.optim.Optimizer,
        schedule: Schedule,
        pieces: Pieces,
        loss_scale: LossScale | None = None,
        rules: UpdateRules | None = None,
    ) -> None:
        self.inner = inner
        self.defaults = inner.defaults
        self.members = pieces.members
        """The pieces of each parameter group, in the users' order; those that are empty on this rank too."""
        self._schedule = schedule
        self._pieces = list(pieces.made.values())
        self._flat = FlatSteps(inner, self._pieces)
        self._resting = RestingSteps(inner, self._flat, self._pieces)
        self._stepped: list[ShardGroup] = []
        """Groups updated in backward, since the last `step()`."""
        self._stepped_norm = 0.0
        self._delayed: DelayedUpdate | None = None
        self._attached = False
        self._loss_scale = loss_scale or NoLossScale()
        self._rules = rules or UpdateRules()
        for group in schedule.groups:
            group.gradients.norm_type = self._rules.norm_type
        self.grad_norm: float | None = None
        """Norm of the last update's gradients, unscaled and before clipping."""
        self.skipped = False
        """Whether the last `step()` met an overflow and changed nothing."""
        self.skipped_steps = 0
        self.skips_overflow = False
        self.tokens: float | None = None
        """Valid tokens of this rank since the last update, when losses are token sums."""
        self.before_update: Callable[[Sequence[ShardGroup]], None] | None = None
        """Called with reduced, unscaled and clipped gradients in the groups, right before the update; read them inside
        `group.gradients.in_memory()`."""

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.inner.param_groups

    @param_groups.setter
    def param_groups(self, value: list[dict[str, Any]]) -> None:
        self.inner.param_groups = value

    @property
    def state(self) -> Any:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.inner.state

    @property
    def loss_scale(self) -> float:
        return self._loss_scale.scale

    cur_scale = loss_scale

    @property
    def scaler(self) -> LossScale:
        return self._loss_scale

    @property
    def delayed(self) -> bool:
        """Whether an update waits for the next backward."""
        return self._delayed is not None

    @property
    def max_norm(self) -> float:
        """What the next updates clip the gradients' norm to; 0 clips nothing."""
        return self._rules.max_norm

    @max_norm.setter
    def max_norm(self, value: float) -> None:
        self._rules = replace(self._rules, max_norm=float(value))

    @property
    def pieces(self) -> Sequence[Piece]:
        """This rank's parts of all parameters that are optimized; some may be empty."""
        return self._pieces

    def state_names(self) -> tuple[str, ...] | None:
        """The kinds of state that the inner optimizer keeps, where that is known beforehand."""
        return self._flat.state_names()

    @property
    def fresh(self) -> bool:
        """Whether there is no state yet, and none will rest on a tier."""
        return not self._resting.active and not any(self.inner.state.get(p.param) for p in self._pieces)

    def forget_state(self) -> None:
        """Begin anew, as before the first step."""
        self.inner.state.clear()
        self._flat.forget()

    def make_room(self, kinds: Callable[[Piece], Iterable[str]]) -> None:
        """Before state is read into slots: each piece counts by itself, and keeps only the kinds that will be read."""
        self._flat.separate()
        dropped = {
            piece: set(self.inner.state.get(piece.param) or {}) - set(kinds(piece)) for piece in self._pieces
        }
        for group in dict.fromkeys(piece.group for piece, names in dropped.items() if names):
            with self.shown(group, changed=True):
                for piece in [p for p in dropped if p.group is group]:
                    self._drop(piece, dropped[piece])

    def _drop(self, piece: Piece, names: Iterable[str]) -> None:
        state = self.inner.state[piece.param]
        for name in names:
            value = state.pop(name)
            if isinstance(value, torch.Tensor):
                # Kernels keep what it was a view of.
                value.zero_()

    def shown(self, group: ShardGroup, *, changed: bool) -> AbstractContextManager[None]:
        """Weights and state of `group` are in memory inside the block, and in `state`, wherever they rest."""
        return self._resting.shown(group, changed=changed)

    def state_slot(
        self, piece: Piece, name: str, dtype: torch.dtype, shape: tuple[int, ...] | None = None
    ) -> torch.Tensor:
        """The state tensor `name` of one piece, made of zeros if there is none: 1-D as the piece, or of `shape`, for
        values that belong to the parameter as a whole."""
        if shape is not None:
            return self.inner.state[piece.param].setdefault(name, torch.zeros(shape, dtype=dtype))
        return self._flat.slot(piece, name, dtype)

    def __repr__(self) -> str:
        return f"ShardedOptimizer({self.inner!r})"

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        raise UnsupportedError(
            "add_param_group after sharding is not available; pass every group to initialize(model_parameters=[...])"
        )

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget all gradients, reduced or not. `set_to_none=False` does the same: nobody keeps a view of them."""
        for group in self._schedule.groups:
            group.gradients.clear()
        self._detach()
        self._resting.finish()
        self._stepped, self._stepped_norm = [], 0.0
        self.tokens = None
        if self._resting.active:
            trim_after_step()

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Reduce what is still local, unscale, clip, update, bring parameters up to date. All ranks call together."""
        if closure is not None:
            raise UnsupportedError(
                "step(closure) is not available on sharded gradients; call step() after backward"
            )
        if self._schedule.backward_active:
            raise StateError("step() was called during backward; call it after loss.backward() has returned")
        self.complete_update()
        if any(group.gradients.unreduced for group in self._schedule.groups):
            self._schedule.reduce_pending()
        groups = [g for g in self._schedule.groups if g.gradients.shard is not None]
        if self._stepped:
            self._finish_stepped()
            return
        if not groups:
            self.skipped = False
            return
        norm = shard_norm(groups, self._rules.norm_type)
        unscale = self._unscale_factor(groups)
        self.grad_norm = norm * unscale
        self.skipped = self.skips_overflow and not math.isfinite(norm)
        if self.skipped:
            self._skip(groups)
            return
        # As torch labels the steps of its optimizers.
        with labelled(f"Optimizer.step#{type(self.inner).__name__}.step"):
            factor = unscale * clip_factor(self.grad_norm, self._rules.max_norm)
            if self._rules.delayed:
                self._delay(groups, factor)
            else:
                self._update(groups, factor)
                self._resting.finish()
        if self._delayed is None:
            self._refresh(groups)
        self._loss_scale.update(False)

    def _unscale_factor(self, groups: Sequence[ShardGroup]) -> float:
        # The scale that backward used: it changes only below, after this update.
        factor = 1.0 / self._loss_scale.scale
        if self.tokens is None:
            return factor
        axes = groups[0].axes
        count = torch.tensor([self.tokens], dtype=torch.float64, device=groups[0].buffer.device)
        total = axes.all_reduce_control(count, "sum").item()
        if total <= 0:
            raise StateError(
                f"backward(loss, tokens=...) counted {total} valid tokens over all ranks; nothing to average"
            )
        # Groups hold the mean over ranks of token sums, or their sum where the configuration asks for that.
        return factor * groups[0].gradients.divisor / total

    def _skip(self, groups: Sequence[ShardGroup]) -> None:
        self.skipped_steps += 1
        scale = self._loss_scale.scale
        self._loss_scale.update(True)
        if self._loss_scale.exhausted:
            name = self._first_non_finite(groups)
            raise NonFiniteError(
                f"gradients overflowed {self.skipped_steps} times and the loss scale is down to {scale:g}: the "
                f"first non-finite gradient is that of {name!r}. Look at its inputs, lower the learning "
                "rate, or train in bf16"
            )

    def _first_non_finite(self, groups: Sequence[ShardGroup]) -> str:
        found = None
        for position, group in enumerate(groups):
            with group.gradients.in_memory():
                shard = group.gradients.shard
                for index, registration in enumerate(group.registrations):
                    if shard is not None and not torch.isfinite(group.buffer.local(index, shard)).all():
                        found = found or (position, index, registration.fqn)
        everywhere = [f for f in groups[0].axes.shard.all_gather_object(found) if f is not None]
        return min(everywhere)[2] if everywhere else "unknown"

    def _delay(self, groups: Sequence[ShardGroup], factor: float) -> None:
        from unishard.optim.delayed import DelayedUpdate, options_of

        used, factor = self._prepare(groups, factor)
        for group in groups:
            group.gradients.set_aside()
        self._delayed = DelayedUpdate(dict(used), factor, options_of(self.inner))

    @torch.no_grad()
    def continue_update(self, groups: Sequence[ShardGroup], upcoming: Sequence[ShardGroup] = ()) -> None:
        """Carry out those parts of a delayed update that are about `groups`, which no rank computes with any more."""
        delayed = self._delayed
        waiting = [] if delayed is None else [group for group in groups if group in delayed.waiting]
        if delayed is None or not waiting:
            return
        from unishard.optim.delayed import options_shown

        line = [*waiting, *(group for group in upcoming if group in delayed.waiting)]
        with options_shown(self.inner, delayed.options):
            for position, group in enumerate(waiting):
                with group.gradients.aside_shown():
                    self._apply({group: delayed.waiting[group]}, delayed.factor, line[position + 1 :])
                    self._detach()
                # Only now: what failed may be tried again.
                del delayed.waiting[group]
                group.gradients.drop_aside()
                self._note_written([group])
                delayed.carried_out.append(group)

    def complete_update(self) -> None:
        """Carry out what is left of a delayed update, so that parameters are current. All ranks call together."""
        delayed = self._delayed
        if delayed is None:
            return
        self.continue_update(list(delayed.waiting))
        self._resting.finish()
        self._delayed = None
        for group in delayed.carried_out:
            if not group.resident:
                group.forget_gathered()  # a backward that failed leaves groups whole
        self._gather_updated(delayed.carried_out)

    def forget_delayed(self) -> None:
        """Drop a delayed update, since parameters are about to be replaced."""
        delayed, self._delayed = self._delayed, None
        self._resting.finish()
        for group in () if delayed is None else delayed.waiting:
            group.gradients.drop_aside()

    @torch.no_grad()
    def step_in_backward(self, groups: Sequence[ShardGroup], upcoming: Sequence[ShardGroup] = ()) -> None:
        """Update `groups`, whose gradients have just been reduced, and forget those. All ranks call together.

        For gradients that need neither a global norm nor agreement on an overflow. `step()` completes the update.
        """
        if self.tokens is not None:
            raise StateError(
                "backward(loss, tokens=...) divides by the tokens of all micro-batches, which optimizer_in_backward "
                "does not wait for; use mean losses, or remove optimizer_in_backward"
            )
        groups = [g for g in groups if g.gradients.shard is not None]
        for group in groups:
            group.gradients.end_backward()
        if groups:
            shards = [g.gradients.shard for g in groups if g.gradients.shard is not None]
            self._stepped_norm += squared_norm(shards).item()
            self._update(groups, 1.0, upcoming)
            self._note_written(groups)
        for group in groups:
            group.gradients.clear()
        self._stepped += groups

    def _finish_stepped(self) -> None:
        groups, self._stepped = self._stepped, []
        total = torch.tensor([self._stepped_norm], dtype=torch.float64, device=groups[0].buffer.device)
        self._stepped_norm = 0.0
        self.grad_norm = groups[0].axes.shard.all_reduce_control(total, "sum").item() ** 0.5
        self.skipped = False
        self._resting.finish()
        self._gather_updated(groups)

    def _update(
        self, groups: Sequence[ShardGroup], factor: float, upcoming: Sequence[ShardGroup] = ()
    ) -> None:
        """Step `inner` with gradients times `factor`."""
        used, factor = self._prepare(groups, factor)
        self._apply(used, factor, upcoming)

    def _prepare(self, groups: Sequence[ShardGroup], factor: float) -> tuple[Used, float]:
        """What of each group is stepped, and the factor that is left once users have seen the gradients."""
        used = self._used(groups)
        if self.before_update is not None:
            if factor != 1.0:
                for group in groups:
                    with group.gradients.in_memory(changed=True):
                        _scale([group], factor)
                factor = 1.0
            self.before_update(groups)
        return used, factor

    def _apply(self, used: Used, factor: float, upcoming: Sequence[ShardGroup]) -> None:
        flat = FlatSteps.can_step(self.inner, self._pieces) and not has_step_hooks(self.inner)

        def update(members: Sequence[ShardGroup]) -> None:
            if factor != 1.0 and not flat:
                _scale(members, factor)
            self._step({group: used[group] for group in members}, factor if flat else None)

        here, away = self._resting.split(list(used))
        if here:
            update(here)
        self._resting.run(away, lambda group: update([group]), upcoming)

    def _step(self, used: Used, factor: float | None) -> None:
        """Step the groups in `used`: with kernels by gradients times `factor`, or as the optimizer does."""
        if factor is not None:
            self._flat.step(used, factor)
            return
        self._flat.release()
        self._attach(used)
        self.inner.step()

    def unused(self) -> list[str]:
        """Names of trainable parameters that no rank used since the last update. All ranks call together."""
        groups = [group for group in self._schedule.groups if group.trainable]
        used = self._used(groups)
        return [g.registrations[i].fqn for g in groups for i in sorted(g.trainable - used[g])]

    def _used(self, groups: Sequence[ShardGroup]) -> Used:
        """By group, the trainable parameters that some rank used. All ranks call together."""
        used: dict[ShardGroup, Set[int]] = {}
        for axes in dict.fromkeys(g.axes for g in groups):
            members = [g for g in groups if g.axes == axes]
            for group, touched in zip(members, agree_on_touched(members, axes), strict=True):
                frozen = len(group.trainable) < len(group.registrations)
                used[group] = touched & group.trainable if frozen else touched
        return used

    def _attach(self, used: Mapping[ShardGroup, Set[int]]) -> None:
        """Show gradients to the inner optimizer; a parameter that no rank used keeps none and is left alone."""
        self._attached = True
        for piece in self._pieces:
            shard = piece.group.gradients.shard
            piece.param.grad = None
            if shard is not None and piece.index in used.get(piece.group, ()):
                piece.param.grad = piece.group.buffer.local(piece.index, shard).to(piece.param.dtype)

    def _detach(self) -> None:
        if self._attached:
            self._attached = False
            for piece in self._pieces:
                piece.param.grad = None

    def _refresh(self, groups: Sequence[ShardGroup]) -> None:
        self._note_written(groups)
        self._gather_updated(groups)

    def _note_written(self, groups: Sequence[ShardGroup]) -> None:
        # Kernels do not count their writes.
        torch.autograd.graph.increment_version([g.buffer.shard for g in groups])
        for group in groups:
            group.note_update()

    def _gather_updated(self, groups: Sequence[ShardGroup]) -> None:
        unshard_together(group for group in groups if group.resident)
        if not self._rules.defer_gather:
            for group in groups:
                if group.resident:
                    group.wait()
            self._schedule.drain()

    def take_over(self, options: Mapping[int, Mapping[str, Any]]) -> None:
        """Continue with the options that a checkpoint has for each parameter group, by position; state is in place."""
        for position, stored in options.items():
            group = self.inner.param_groups[position]
            group.update({name: value for name, value in stored.items() if name != "params"})

    def state_dict(self) -> dict[str, Any]:
        """This rank's part: the inner optimizer's state over local pieces, and the loss scale."""
        if self._delayed is not None:
            raise StateError(
                "state_dict() while an update is delayed would lack it; call complete_update() on all ranks first"
            )
        if self._resting.active:
            raise UnsupportedError(
                "state_dict() of an optimizer whose state rests on a tier would bring all of it into memory; save it "
                "with engine.save_checkpoint(folder)"
            )
        return {"inner": self.inner.state_dict(), "loss_scale": self._loss_scale.state_dict()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load what `state_dict` gave on the same rank of the same layout."""
        missing = {"inner", "loss_scale"} - set(state_dict)
        if missing:
            raise StateError(
                f"this is not a state dict of a ShardedOptimizer: {', '.join(sorted(missing))} missing"
            )
        self.forget_delayed()
        self._flat.release()
        self.inner.load_state_dict(state_dict["inner"])
        self._loss_scale.load_state_dict(state_dict["loss_scale"])


def _scale(groups: Sequence[ShardGroup], factor: float) -> None:
    torch._foreach_mul_([g.gradients.shard for g in groups if g.gradients.shard is not None], factor)
