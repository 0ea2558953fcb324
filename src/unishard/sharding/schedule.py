"""When groups are gathered and reduced: one schedule per root module, shared by every unit below it.

Collectives pair up by order, so every order here is one that all ranks share. Gathers follow the order in which
modules run, which ranks have in common. Gradients arrive in an order that ranks do not always share (a branch that
only some take), so reductions leave in a fixed sequence: a group that is ready early waits for its turn, one that
never becomes ready is reduced at the end of backward with zeros in the gaps.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch

from unishard.dist.mesh import Axes
from unishard.sharding import group as group_module
from unishard.sharding.gradient import CoalescedReduction, Reduction
from unishard.sharding.group import ShardGroup, unshard_together
from unishard.sharding.host_memory import prepare_heap, trim_heap
from unishard.sharding.unit import Phase, ShardUnit

# Forwards recorded without any backward in between (an evaluation with gradients on) are forgotten past this.
_MAX_RECORDED_FORWARDS = 8


def in_backward() -> bool:
    """Whether autograd is running on this thread: a forward now is a recomputation."""
    return torch._C._current_graph_task_id() != -1


OnReduced = Callable[[Sequence[ShardGroup], Sequence[ShardGroup]], None]
"""Takes groups, and those that will follow them."""


class InFlight(NamedTuple):
    """A reduction under way, and the groups whose gradients it carries."""

    reduction: Reduction | CoalescedReduction
    groups: Sequence[ShardGroup]


class ReductionQueue:
    """Launches each group's reduction in the agreed sequence and keeps few in flight."""

    def __init__(self, sequence: Sequence[ShardGroup]) -> None:
        self.sequence = list(sequence)
        self.limit: int | None = None
        """Most reductions in flight, where users set it."""
        self.completed: list[ShardGroup] = []
        """Order in which groups became ready in this backward."""
        self._across: dict[ShardGroup, bool] = {}
        self._position = 0
        self._ready: set[ShardGroup] = set()
        self.on_reduced: OnReduced | None = None
        """Called with groups whose gradients have been summed over all ranks, in the same order on all ranks."""
        self.keeps_landed = False
        """Whether `on_reduced` wants gradients that rest on a tier in memory."""
        self._in_flight: deque[InFlight] = deque()
        self._landed: Sequence[ShardGroup] = ()
        """Groups whose gradients are being stored."""
        self._lagging: Reduction | CoalescedReduction | None = None
        """Finished here; peers may still be reading this rank's part of it."""
        self._small: list[ShardGroup] = []
        """Groups whose turn has come, too small to be sent alone."""

    def restart(self, groups: Sequence[tuple[ShardGroup, bool]]) -> None:
        """Begin a backward in which exactly `groups` are reduced, each with whether to go across replicas."""
        self._across = dict(groups)
        self._position = 0
        self._ready.clear()
        self.completed.clear()

    def ready(self, group: ShardGroup) -> None:
        """All of `group`'s gradients are in; launch whatever has its turn."""
        if group not in self._across or group in self._ready:
            return
        self._ready.add(group)
        self.completed.append(group)
        while self._position < len(self.sequence):
            head = self.sequence[self._position]
            if head in self._across and head not in self._ready:
                return
            self._position += 1
            if head in self._across:
                self._take_turn(head)

    @property
    def active(self) -> bool:
        """Whether this backward reduces anything; the same on all ranks."""
        return bool(self._across)

    def _take_turn(self, group: ShardGroup) -> None:
        """Launch `group`, together with the small ones before it; or keep it if they are still too small together."""
        if self._small and self._small[0].axes != group.axes:
            self._launch_small()
        if not CoalescedReduction.can_take(group.gradients):
            self._launch_small()
            self._launch([group], lambda: group.reduce(across_replicas=self._across[group]))
            return
        self._small.append(group)
        if sum(g.gradients.wire_bytes for g in self._small) >= group_module.COALESCE_BYTES:
            self._launch_small()

    def _launch_small(self) -> None:
        small, self._small = self._small, []
        if len(small) == 1:
            self._launch(small, lambda: small[0].reduce(across_replicas=True))
        elif small:
            members = [group.gradients for group in small]
            self._launch(small, lambda: CoalescedReduction(members))

    def _launch(
        self, groups: Sequence[ShardGroup], start: Callable[[], Reduction | CoalescedReduction]
    ) -> None:
        while len(self._in_flight) >= (self.limit or groups[0].axes.shard.in_flight):
            self._finish_oldest()
        # The second phase of an older reduction starts in the same place on every rank, so that it pairs up.
        for reduction, _ in self._in_flight:
            if reduction.has_next_phase:
                reduction.advance()
        self._in_flight.append(InFlight(start(), groups))

    def _finish_oldest(self) -> None:
        oldest, groups = self._in_flight.popleft()
        oldest.finish()
        if self._lagging is not None:
            # At most one group's gradients are kept for slower ranks.
            self._lagging.release()
        self._lagging = oldest
        self._land(groups)
        if self.on_reduced is not None:
            self.on_reduced(groups, self._following(groups[-1]))

    def _following(self, group: ShardGroup) -> list[ShardGroup]:
        rest = self.sequence[self.sequence.index(group) + 1 :]
        return [other for other in rest if other in self._across]

    def _land(self, groups: Sequence[ShardGroup]) -> None:
        """Gradients that rest on a tier go there; those that went before are stored by now, or waited for."""
        for group in self._landed:
            group.gradients.settle()
        self._landed = groups
        for group in groups:
            group.gradients.land(stay=self.on_reduced is not None and self.keeps_landed)

    def flush(self) -> None:
        """Launch every group of this backward that is still waiting, then finish all."""
        for group in self.sequence[self._position :]:
            if group in self._across:
                self._take_turn(group)
        self._launch_small()
        self._position = len(self.sequence)
        for group in self.sequence:
            # Nested backwards (reentrant checkpointing) may deliver to a group that has already left.
            if group in self._across and group.gradients.pending:
                self._take_turn(group)
        self._launch_small()
        while self._in_flight:
            self._finish_oldest()
        self._lagging = None
        self._land(())

    def abandon(self) -> None:
        """Drop what a failed backward left; its collectives are still waited for."""
        self.on_reduced = None
        while self._in_flight:
            self._finish_oldest()
        self._lagging = None
        self._small.clear()
        self._across.clear()
        self._ready.clear()


class Schedule:
    """The order of gathers and reductions under one root."""

    def __init__(
        self,
        root: ShardUnit,
        units: Sequence[ShardUnit],
        deliver: Callable[[Sequence[ShardGroup]], None] = lambda groups: None,
    ) -> None:
        """`deliver` is called at the end of each backward with the groups whose reduced gradients are complete."""
        self.root = root
        self.deliver = deliver
        self.after_backward: Callable[[], None] = lambda: None
        self.units = list(units)
        self.groups = [group for unit in self.units for group in unit.groups]
        self.queue = ReductionQueue([g for unit in reversed(self.units) for g in unit.groups])
        self.axes: list[Axes] = list(dict.fromkeys(g.axes for g in self.groups))
        self.prefetch = True
        self.training = True
        """Whether the forward under way began with gradients enabled."""
        self.backward_active = False
        self._expected: list[ShardUnit] = self.units[:]
        self._current: list[ShardUnit] = []
        self._position = 0
        self._ran: list[ShardUnit] = []
        self._depth = 0
        self._order_agreed = False
        self._root_calls: int | None = None
        """Calls of the root under way, inside `one_forward`."""
        resting = [group.buffer.layout.shard_numel for group in self.groups if group.resting is not None]
        on_cpu = any(group.buffer.device.type == "cpu" for group in self.groups)
        self.scarce = (on_cpu or bool(resting)) and prepare_heap(sum(resting))
        """Whether freed memory is given back between the parts of a step, which costs time."""

    # forward -----------------------------------------------------------------------------------------------

    @contextmanager
    def one_forward(self) -> Iterator[None]:
        """Calls of the root inside its own forward, as a step method makes that calls its model, are part of it."""
        before, self._root_calls = self._root_calls, 0
        try:
            yield
        finally:
            self._root_calls = before

    def enter_root(self) -> bool:
        """Count a call of the root; whether its forward begins with it."""
        if self._root_calls is None:
            return True
        self._root_calls += 1
        return self._root_calls == 1

    def leave_root(self) -> bool:
        """Count the end of a call of the root; whether its forward ends with it."""
        if self._root_calls is None:
            return True
        self._root_calls -= 1
        return self._root_calls == 0

    def enter_forward(self, unit: ShardUnit) -> None:
        if unit is self.root or self._depth <= 0:
            self._begin_forward()
        self._depth += 1
        self._current.append(unit)

    def _begin_forward(self) -> None:
        self._depth = 0
        self._position = 0
        self._current = []
        self.training = torch.is_grad_enabled()
        if self.backward_active:
            self.recover()
        if len(self._ran) > _MAX_RECORDED_FORWARDS * len(self.units):
            self._ran = self._ran[-len(self.units) :]
        for unit in self.units:
            for group in unit.groups:
                group.refresh_trainable()

    def prefetch_forward(self, unit: ShardUnit) -> None:
        """Start the gather of the unit that ran after this one last time (at first: in module order)."""
        if unit.forward_prefetch is not None:
            for target in unit.forward_prefetch:
                target.unshard()
            return
        if not self.prefetch or self._current[0] is not self.root:
            return
        position = _find(self._expected, unit, self._position)
        if position is None:
            return
        self._position = position + 1
        _unshard_ahead(self._expected[self._position :])

    def unfinished(self, unit: ShardUnit) -> list[ShardUnit]:
        """Units whose forward began inside that of `unit`, the outermost now running, and did not end; inner first."""
        if not self._current or self._current[0] is not unit:
            return []
        ran = set(self._current)
        return [u for u in reversed(self.units) if u is not unit and u in ran and u.hooks.unfinished]

    def leave_forward(self, unit: ShardUnit) -> None:
        self._depth -= 1
        if self.training:
            self._ran.append(unit)
        if self._depth > 0:
            return
        if not self.training:
            for other in self.units:
                other.reshard()
            self.drain()
        elif unit is self.root:
            ran = set(self._current)
            for other in self.units:
                if (
                    other not in ran
                ):  # prefetched after the order of the previous step, and not run in this one
                    other.reshard()
        if unit is self.root:
            self._expected = self._current
            self._trim()

    def _trim(self) -> None:
        if self.scarce:
            trim_heap()

    def drain(self) -> None:
        """Return once no rank reads this one's parameters or gradients any more: now they may change."""
        for axes in self.axes:
            axes.shard.drain()
            axes.replicate.drain()

    # backward ----------------------------------------------------------------------------------------------

    def begin_backward(self) -> None:
        """Called from the first hook of a backward; queues `end_backward` behind everything autograd will run."""
        if self.backward_active:
            return
        self.backward_active = True
        for group in self.groups:
            group.gradients.arrived.clear()
        torch.autograd.Variable._execution_engine.queue_callback(self.end_backward)
        self.queue.limit = max((u.max_reductions for u in self.units if u.max_reductions), default=None)
        self.queue.restart(
            [
                (group, unit.reduce_across_replicas)
                for unit in self.units
                if unit.reduce_gradients
                for group in unit.groups
                if group.trainable
            ]
        )

    def prefetch_backward(self, unit: ShardUnit) -> None:
        if unit.backward_prefetch is not None:
            for target in unit.backward_prefetch:
                target.unshard()
            return
        if not self.prefetch:
            return
        if unit not in self._ran:
            return
        while self._ran.pop() is not unit:
            pass
        _unshard_ahead(self._ran[::-1])

    def end_backward(self) -> None:
        """Reduce what is left, hand out gradients, release parameters."""
        self.queue.flush()
        for group in self.groups:
            group.gradients.end_backward()
        self.drain()
        self._agree_on_order()
        self.backward_active = False
        self._end_forward()
        for unit in self.units:
            unit.phase = Phase.RESTING
            unit.open_calls = 0
            if unit.reshard_after_backward:
                unit.reshard()
        self._ran.clear()
        self._trim()
        self.deliver([g for unit in self.units if unit.reduce_gradients for g in unit.groups if g.trainable])
        self.after_backward()

    def _end_forward(self) -> None:
        """Calls of single modules out of a list never add up to a forward of their unit."""
        for unit in self.units:
            if unit.hooks.unfinished:
                unit.hooks.forget_forward()
                self._depth = 0

    def _agree_on_order(self) -> None:
        """After the first backward that reduced, take rank 0's order of completion for all later ones."""
        if self._order_agreed or not self.queue.active:
            return
        self._order_agreed = True
        if len(self.axes) > 1:
            return  # no axis spans all ranks that would have to agree; module order stays
        index = {group: i for i, group in enumerate(self.groups)}
        order = [index[group] for group in self.queue.completed]
        order += [i for i in range(len(self.groups)) if i not in set(order)]
        axes = self.axes[0]
        order = axes.shard.broadcast_object(axes.replicate.broadcast_object(order))
        self.queue.sequence = [self.groups[i] for i in order]

    def reduce_pending(self) -> None:
        """Reduce sums that earlier backwards kept local, on all ranks alike."""
        pending = [g for g in self.groups if g.gradients.unreduced]
        self.queue.restart([(g, True) for g in pending])
        self.queue.flush()
        self.deliver(pending)

    def recover(self) -> None:
        """Forget a backward that an exception cut short."""
        self.backward_active = False
        self.queue.abandon()
        self._ran.clear()
        self._depth = 0
        for unit in self.units:
            unit.hooks.forget_forward()
            unit.phase = Phase.RESTING
            unit.open_calls = 0
            for group in unit.groups:
                group.gradients.forget_fresh()


def _find(sequence: Sequence[ShardUnit], unit: ShardUnit, start: int) -> int | None:
    """Where `unit` stands in `sequence`, looking from `start` on and then from the beginning."""
    for position in [*range(start, len(sequence)), *range(start)]:
        if sequence[position] is unit:
            return position
    return None


def _unshard_ahead(units: Sequence[ShardUnit]) -> None:
    """Gather the first of `units`; if it is small, those after it too until it pays; begin to read the one behind."""
    ahead: list[ShardGroup] = []
    rest = iter(units)
    for unit in rest:
        ahead += unit.groups
        if not all(group.joins_gathers for group in unit.groups):
            break
        if sum(group.shard_bytes for group in ahead) >= group_module.COALESCE_BYTES:
            break
    unshard_together(ahead)
    for unit in itertools.islice(rest, 1):
        for group in unit.groups:
            group.begin_reading()
