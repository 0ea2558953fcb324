"""Gradients of one group, from autograd's fresh tensors to this rank's reduced shard."""

from __future__ import annotations

from collections.abc import Callable

import torch

from unishard.dist.collectives import DONE, Pending
from unishard.dist.mesh import Axes
from unishard.sharding.buffer import GroupBuffer
from unishard.sharding.precision import GroupPrecision


class GroupGradients:
    """Accumulates one group's gradients; reset only by `clear()`, whatever number of backwards came before.

    Three resting places, each a sum over the micro-batches so far: `whole` (this rank's own, not reduced, laid out
    for the reduce-scatter), `replica_partial` (reduced along dp_shard, not yet across replicas) and `shard` (reduced
    over all ranks and averaged: 1-D, `layout.shard_numel` elements, `precision.grad` dtype).
    """

    def __init__(self, buffer: GroupBuffer, axes: Axes, precision: GroupPrecision) -> None:
        self.buffer = buffer
        self.axes = axes
        self.precision = precision
        self.divisor: float = axes.world_size
        """What sums over ranks are divided by; `predivide` of it before the wire, the rest after."""
        self.predivide: float = 1.0
        self.all_reduce_hook: Callable[[torch.Tensor], None] | None = None
        self.whole: torch.Tensor | None = None
        self.filled: set[int] = set()
        """Parameters that `whole` holds a gradient of, from this backward or an earlier one."""
        self.arrived: set[int] = set()
        """Parameters that delivered a gradient in this backward."""
        self.replica_partial: torch.Tensor | None = None
        self.shard: torch.Tensor | None = None
        self.touched: set[int] = set()
        """Parameters that received a gradient on this rank since the last `clear()`."""

    @torch.no_grad()
    def collect(self, index: int, grad: torch.Tensor, *, reduce_follows: bool) -> None:
        """Take the fresh whole gradient of parameter `index`: one copy into the buffer it leaves from.

        Without a reduction this backward, sums rest in the gradient dtype: 16-bit wires must not round running sums.
        """
        if self.whole is None:
            dtype = self.precision.reduce if reduce_follows else self.precision.grad
            self.whole = self.buffer.new_reduce_buffer(dtype)
            self.filled.clear()
        if reduce_follows and self.predivide != 1.0 and self.whole.dtype == self.precision.reduce:
            # Scaled before the cast to the wire dtype, which is what keeps a 16-bit wire from overflowing.
            grad = grad / self.predivide
        self.buffer.write(self.whole, index, grad, accumulate=index in self.filled)
        self.filled.add(index)
        self.arrived.add(index)
        self.touched.add(index)

    @torch.no_grad()
    def launch(self, *, across_replicas: bool) -> Reduction:
        """Reduce everything collected so far; parameters without a gradient contribute zeros."""
        whole, self.whole = self.whole, None
        if whole is None:
            whole = self.buffer.new_reduce_buffer(self.precision.reduce)
            self.filled.clear()
        for index in range(len(self.buffer.layout.shapes)):
            if index not in self.filled:
                self.buffer.write(whole, index, None, accumulate=False)
        self.filled.clear()
        if whole.dtype != self.precision.reduce:
            whole = (whole / self.predivide).to(self.precision.reduce)
        return Reduction(self, whole, across_replicas)

    @torch.no_grad()
    def receive(self, total: torch.Tensor, complete: bool) -> None:
        """Add a reduced sum: over all ranks if `complete`, else over the dp_shard axis only."""
        if not complete:
            self.replica_partial = total if self.replica_partial is None else self.replica_partial.add_(total)
            return
        scale = self.predivide / self.divisor
        if scale != 1.0:
            total = total.mul_(scale)
        if self.all_reduce_hook is not None:
            self.all_reduce_hook(total)
        total = total.to(self.precision.grad)
        self.shard = total if self.shard is None else self.shard.add_(total)

    @property
    def unreduced(self) -> bool:
        """Whether sums wait here that other ranks have not seen."""
        return self.whole is not None or self.replica_partial is not None

    def clear(self) -> None:
        self.whole = self.replica_partial = self.shard = None
        self.filled.clear()
        self.touched.clear()


class Reduction:
    """One group's gradients on their way: along dp_shard, then across replicas."""

    def __init__(self, gradients: GroupGradients, whole: torch.Tensor, across_replicas: bool) -> None:
        self._gradients = gradients
        self._across = across_replicas and gradients.axes.replicate.size > 1
        self._needs_replicas = gradients.axes.replicate.size > 1
        self._total = torch.empty(0)
        self._done = False
        self._pending: Pending = gradients.axes.shard.reduce_scatter(whole, self._take)
        if gradients.axes.shard.size == 1:
            self.advance()

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
        self._pending = DONE
        if self._across:
            self._across = False
            self._start_across()
            return False
        self._done = True
        # fp32 from here on: the wire dtype was for the wire.
        total = self._total if self._total.element_size() >= 4 else self._total.float()
        self._gradients.receive(total, complete=not self._needs_replicas)
        return True

    def _start_across(self) -> None:
        gradients = self._gradients
        if gradients.replica_partial is not None:
            self._total = self._total.add_(gradients.replica_partial)
            gradients.replica_partial = None
        self._total = self._total.to(gradients.precision.reduce)
        self._pending = gradients.axes.replicate.all_reduce(self._total)
        self._needs_replicas = False

    def finish(self) -> None:
        while not self.advance():
            pass
