"""Gradients of one group, from autograd's fresh tensors to this rank's reduced shard."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from unishard.dist.collectives import Pending
from unishard.dist.in_place import Contribution, Sources, Target, sum_dtype
from unishard.dist.mesh import Axes
from unishard.errors import StateError
from unishard.sharding.buffer import GroupBuffer
from unishard.sharding.precision import GroupPrecision


class GroupGradients:
    """Accumulates one group's gradients; reset only by `clear()`, whatever number of backwards came before.

    Four resting places. `fresh`: autograd's own tensors of this backward, summed from where they are. Each of the
    others is a sum over the micro-batches so far: `whole` (this rank's own, not reduced, laid out for the
    reduce-scatter), `replica_partial` (reduced along dp_shard, not yet across replicas) and `shard` (reduced over all
    ranks and averaged: 1-D, `layout.shard_numel` elements, `precision.grad` dtype).
    """

    def __init__(self, buffer: GroupBuffer, axes: Axes, precision: GroupPrecision, name: str = "") -> None:
        self.buffer = buffer
        self.axes = axes
        self.precision = precision
        self.name = name
        self.divisor: float = axes.world_size
        """What sums over ranks are divided by; `predivide` of it before the wire, the rest after."""
        self.predivide: float = 1.0
        self.all_reduce_hook: Callable[[torch.Tensor], None] | None = None
        self.fresh: dict[int, torch.Tensor] = {}
        self.whole: torch.Tensor | None = None
        self.filled: set[int] = set()
        """Parameters that `whole` holds a gradient of, from this backward or an earlier one."""
        self.arrived: set[int] = set()
        """Parameters that delivered a gradient in this backward."""
        self.replica_partial: torch.Tensor | None = None
        self.shard: torch.Tensor | None = None
        self.touched: set[int] = set()
        """Parameters that received a gradient on this rank in a finished backward since the last `clear()`."""

    def collect(self, index: int, grad: torch.Tensor, reduce_follows: bool) -> None:
        """Take the fresh whole gradient of parameter `index`, to keep or to copy into the buffer it leaves from.

        Without a reduction this backward, sums rest in the gradient dtype: 16-bit wires must not round running sums.
        """
        if torch.is_grad_enabled():
            # A backward that makes a graph. Otherwise gradients are off, and asking for it costs as much as the rest.
            with torch.no_grad():
                return self.collect(index, grad, reduce_follows)
        self.arrived.add(index)
        if self.predivide != 1.0:
            # Before the cast to the wire dtype, which is what keeps a 16-bit wire from overflowing.
            grad = grad / self.predivide
        # Peers read memory, where a tensor subclass (an extension's, a collective's under way) need not have its value.
        plain = type(grad) is torch.Tensor
        stays = reduce_follows and self.whole is None and self.buffer.sums_single and plain
        if stays and grad.dtype == self.precision.reduce:
            known = self.fresh.get(index)
            self.fresh[index] = grad.detach().contiguous() if known is None else known.add_(grad)
            return
        if self.fresh:
            self._pack()
        self._write(index, grad, self.precision.reduce if reduce_follows else self.precision.grad)

    def _pack(self) -> None:
        for index, grad in self.fresh.items():
            self._write(index, grad, self.precision.reduce)
        self.fresh.clear()

    def _write(self, index: int, grad: torch.Tensor, dtype: torch.dtype) -> None:
        if self.whole is None:
            self.whole = self.buffer.new_reduce_buffer(dtype)
            self.filled.clear()
        self.buffer.write(self.whole, index, grad, accumulate=index in self.filled)
        self.filled.add(index)

    @torch.no_grad()
    def take(self) -> Sources:
        """Everything collected so far, to be reduced; parameters without a gradient contribute zeros."""
        whole, self.whole = self.whole, None
        if whole is None and self.buffer.sums_single:
            fresh, self.fresh = self.fresh, {}
            tensors = [fresh.get(index) for index in range(len(self.buffer.layout.shapes))]
            return Sources(tensors, packed=False, dtype=self.precision.reduce)
        if whole is None:
            whole = self.buffer.new_reduce_buffer(self.precision.reduce)
            self.filled.clear()
        for index in range(len(self.buffer.layout.shapes)):
            if index not in self.filled:
                self.buffer.write(whole, index, None, accumulate=False)
        self.filled.clear()
        whole = whole.to(self.precision.reduce)
        return Sources([whole], packed=True, dtype=whole.dtype)

    def contribution(self, target: Callable[[], Target]) -> Contribution:
        """This group's part in a reduction that reads in place."""
        sources = self.take()
        plan, parameters = self.buffer.reduce_plan(sources.dtype), len(self.buffer.layout.shapes)
        return Contribution(sources, plan, parameters, target, lambda: None)

    @property
    def wire_bytes(self) -> int:
        """What one peer reads of this group's gradients."""
        return self.buffer.layout.shard_numel * self.precision.reduce.itemsize

    @property
    def scale(self) -> float:
        """What turns a sum over ranks into the mean."""
        return self.predivide / self.divisor

    @property
    def takes_sums(self) -> bool:
        """Whether `shard` can be what a reduction sums into."""
        return self.all_reduce_hook is None and self.precision.grad == sum_dtype(self.precision.reduce)

    def target(self) -> Target:
        """`shard`, as the place for one more sum over all ranks."""
        if self.shard is not None:
            return Target(self.shard, accumulate=True, scale=self.scale)
        self.shard = self.buffer.new_shard(self.precision.grad)
        return Target(self.shard, accumulate=False, scale=self.scale)

    @torch.no_grad()
    def receive(self, total: torch.Tensor, scale: float) -> None:
        """Add `scale` times a sum over all ranks."""
        if scale != 1.0:
            total = total.mul_(scale)
        if self.all_reduce_hook is not None:
            self.all_reduce_hook(total)
        total = total.to(self.precision.grad)
        if self.shard is None:
            self.shard = total
            return
        # An all-reduced sum that peers may still be reading.
        self.axes.replicate.drain()
        self.shard.add_(total)

    def receive_partial(self, total: torch.Tensor) -> None:
        """Add a sum over the dp_shard axis only."""
        self.replica_partial = total if self.replica_partial is None else self.replica_partial.add_(total)

    def end_backward(self) -> None:
        """Everything that this backward brings has arrived."""
        self.touched |= self.arrived

    @property
    def pending(self) -> bool:
        """Whether gradients of this rank wait to be reduced."""
        return self.whole is not None or bool(self.fresh)

    def waiting(self, index: int) -> torch.Tensor | None:
        """This rank's own whole gradient of parameter `index` that is not reduced yet, if there is one."""
        if index in self.fresh:
            return self.fresh[index]
        if self.whole is None or index not in self.filled:
            return None
        return self.buffer.whole_views(self.whole)[index]

    @property
    def unreduced(self) -> bool:
        """Whether sums wait here that other ranks have not seen."""
        return self.pending or self.replica_partial is not None

    def forget_fresh(self) -> None:
        """Drop what a failed backward left."""
        self.whole = None
        self.fresh.clear()
        self.filled.clear()

    def clear(self) -> None:
        self.forget_fresh()
        self.replica_partial = self.shard = None
        self.touched.clear()


class Reduction:
    """One group's gradients on their way: along dp_shard, then across replicas."""

    def __init__(self, gradients: GroupGradients, across_replicas: bool) -> None:
        self._gradients = gradients
        replicas = gradients.axes.replicate.size > 1
        self._across = across_replicas and replicas
        self._needs_replicas = replicas
        self._total = torch.empty(0)
        self._taken = False
        """Whether the sum went straight into the group's shard."""
        self._done = False
        self._pending: Pending = self._start()
        if gradients.axes.shard.size == 1:
            self.advance()

    def _start(self) -> Pending:
        gradients, comm = self._gradients, self._gradients.axes.shard
        if comm.window is not None:
            mine = [gradients.contribution(self._target)]
            return comm.reduce_in_place(mine, "reduce_scatter", gradients.name, gradients.wire_bytes)
        [whole] = gradients.take().tensors
        if whole is None:
            raise StateError(f"{gradients.name}: a reduction through sockets needs a packed buffer")
        return comm.reduce_scatter(whole, self._take, label=gradients.name)

    def _target(self) -> Target:
        gradients = self._gradients
        if not self._needs_replicas and gradients.takes_sums:
            self._taken = True
            return gradients.target()
        self._total = gradients.buffer.new_shard(sum_dtype(gradients.precision.reduce))
        return Target(self._total, accumulate=False, scale=1.0)

    def _take(self, total: torch.Tensor) -> None:
        self._total = total

    @property
    def has_next_phase(self) -> bool:
        return self._across

    @torch.no_grad()
    def advance(self) -> bool:
        """Finish the collective under way and start the next. True once the gradient has arrived.

        All ranks advance their reductions in the same order, so the second collectives pair up too.
        """
        if self._done:
            return True
        self._pending.wait()
        if self._across:
            self._across = False
            self._start_across()
            return False
        self._done = True
        if self._taken:
            return True
        # fp32 from here on: the wire dtype was for the wire.
        total = self._total if self._total.element_size() >= 4 else self._total.float()
        if self._needs_replicas:
            self._gradients.receive_partial(total)
        else:
            # Sums across replicas have arrived scaled.
            self._gradients.receive(
                total, 1.0 if self._gradients.axes.replicate.size > 1 else self._gradients.scale
            )
        return True

    def _start_across(self) -> None:
        gradients = self._gradients
        if gradients.replica_partial is not None:
            self._total = self._total.add_(gradients.replica_partial)
            gradients.replica_partial = None
        self._total = self._total.to(gradients.precision.reduce)
        comm = gradients.axes.replicate
        self._pending = comm.all_reduce(self._total, label=gradients.name, scale=gradients.scale)
        self._needs_replicas = False

    def finish(self) -> None:
        while not self.advance():
            pass

    def release(self) -> None:
        """Return once peers no longer read what this rank contributed."""
        self._pending.release()


class CoalescedReduction:
    """Several small groups' gradients on their way together, along dp_shard alone."""

    has_next_phase = False

    def __init__(self, members: Sequence[GroupGradients]) -> None:
        first = members[0]
        label = f"{first.name} and {len(members) - 1} more"
        parts = [each.contribution(each.target) for each in members]
        sent = sum(each.wire_bytes for each in members)
        self._pending = first.axes.shard.reduce_in_place(parts, "reduce_scatter", label, sent)

    @staticmethod
    def can_take(gradients: GroupGradients) -> bool:
        """Whether the group's sum goes straight into its shard, which is all that this does."""
        axes = gradients.axes
        return axes.shard.window is not None and axes.replicate.size == 1 and gradients.takes_sums

    def advance(self) -> bool:
        self._pending.wait()
        return True

    finish = advance

    def release(self) -> None:
        """Return once peers no longer read what this rank contributed."""
        self._pending.release()
