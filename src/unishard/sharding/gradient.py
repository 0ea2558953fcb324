"""Gradients of one group, from autograd's fresh tensors to this rank's reduced shard."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence, Set
from contextlib import contextmanager

import torch

from unishard.dist.collectives import Pending
from unishard.dist.in_place import Contribution, Sources, Target, sum_dtype
from unishard.dist.mesh import Axes
from unishard.errors import StateError
from unishard.kernels import power_sum
from unishard.sharding.buffer import GroupBuffer
from unishard.sharding.no_grad import no_grad
from unishard.sharding.ports import ON_DEVICE, Tiers
from unishard.sharding.precision import GroupPrecision
from unishard.sharding.resting import Resting, desk

_KIND = "gradient"
_ASIDE = "gradient of a delayed update"

_SMALL = 1 << 16
"""Bytes up to which a gradient waits for others, to be copied together: a call costs more than such a copy."""


class GroupGradients:
    """Accumulates one group's gradients; reset only by `clear()`, whatever number of backwards came before.

    Resting places. `fresh`: autograd's own tensors of this backward, summed from where they are. Each of the
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
        self.small: dict[int, torch.Tensor] = {}
        """Autograd's own tensors too, of little memory, that wait to be copied into `whole` together."""
        self.whole: torch.Tensor | None = None
        self.filled: set[int] = set()
        """Parameters that `whole` holds a gradient of, from this backward or an earlier one."""
        self.arrived: set[int] = set()
        """Parameters that delivered a gradient in this backward."""
        self.replica_partial: torch.Tensor | None = None
        self.shard: torch.Tensor | None = None
        """Where gradients rest on a tier, in memory only inside `in_memory()`; otherwise it shows NaN."""
        self.landing: torch.Tensor | None = None
        """Where gradients rest on a tier: what this backward brings, until `land()`."""
        self.power: torch.Tensor | None = None
        """`power_sum` of a `shard` that rests on a tier."""
        self.aside: torch.Tensor | None = None
        """Reduced gradients of an update that is yet to be carried out; they rest where `shard` does."""
        self.norm_type = 2.0
        self.fresh_sum = True
        """Whether something was added to `shard` since users were shown it."""
        self.kept: Callable[[], Set[int]] | None = None
        """Of what rests, the parameters whose sums go on; by default all do until `clear()`."""
        self._tiers = ON_DEVICE
        self.resting: Resting | None = None
        """What of the gradients rests on a tier."""
        self.touched: set[int] = set()
        """Parameters that received a gradient on this rank in a finished backward since the last `clear()`."""

    def collect(self, index: int, grad: torch.Tensor, reduce_follows: bool) -> None:
        """Take the fresh whole gradient of parameter `index`, to keep or to copy into the buffer it leaves from.

        Without a reduction this backward, sums rest in the gradient dtype: 16-bit wires must not round running sums.
        """
        if torch.is_grad_enabled():
            with torch.no_grad():  # a backward that makes a graph
                return self.collect(index, grad, reduce_follows)
        self.arrived.add(index)
        if self.predivide != 1.0:
            # Before the cast to the wire dtype, which is what keeps a 16-bit wire from overflowing.
            grad = grad / self.predivide
        # Peers read memory, where a tensor subclass (an extension's, a collective's under way) need not have its value.
        plain = type(grad) is torch.Tensor
        dtype = self.precision.reduce if reduce_follows else self.precision.grad
        if (
            plain
            and reduce_follows
            and self.whole is None
            and self.buffer.sums_single
            and grad.dtype == dtype
        ):
            known = self.fresh.get(index)
            self.fresh[index] = grad.detach().contiguous() if known is None else known.add_(grad)
            return
        if self.fresh:
            self._pack()
        self._allocate(dtype)
        if plain and index not in self.small and grad.nbytes <= _SMALL:
            self.small[index] = grad
        else:
            self._write(index, grad)

    def _pack(self) -> None:
        fresh, self.fresh = self.fresh, {}
        self._allocate(self.precision.reduce)
        for index, grad in fresh.items():
            self._write(index, grad)

    @no_grad
    def _pack_small(self) -> None:
        whole, small = self.whole, self.small
        if whole is None or not small:
            return
        self.small = {}
        for accumulate in (False, True):
            part = {index: grad for index, grad in small.items() if (index in self.filled) is accumulate}
            if part:
                self.buffer.write_all(whole, part, accumulate)
        self.filled.update(small)

    def _allocate(self, dtype: torch.dtype) -> None:
        if self.whole is None:
            self.whole = self.buffer.new_reduce_buffer(dtype)
            self.filled.clear()

    def _write(self, index: int, grad: torch.Tensor) -> None:
        if self.whole is not None:
            if index in self.small:
                self._pack_small()
            self.buffer.write(self.whole, index, grad, accumulate=index in self.filled)
            self.filled.add(index)

    @no_grad
    def take(self) -> Sources:
        """Everything collected so far, to be reduced; parameters without a gradient contribute zeros."""
        self._pack_small()
        whole, self.whole = self.whole, None
        if whole is None and self.buffer.sums_single:
            fresh, self.fresh = self.fresh, {}
            tensors = [fresh.get(index) for index in range(len(self.buffer.layout.shapes))]
            return Sources(tensors, packed=False, dtype=self.precision.reduce)
        if whole is None:
            whole = self.buffer.new_reduce_buffer(self.precision.reduce)
            self.filled.clear()
        parameters = len(self.buffer.layout.shapes)
        for index in range(parameters) if len(self.filled) < parameters else ():
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
        held = self.shard if self.resting is None else self.landing
        if held is not None:
            return Target(held, accumulate=True, scale=self.scale)
        return Target(self._hold(self._new_shard()), accumulate=False, scale=self.scale)

    def _new_shard(self) -> torch.Tensor:
        return self.buffer.new_shard(
            self.precision.grad, None if self.resting is None else self._tiers.buffer
        )

    def _hold(self, total: torch.Tensor) -> torch.Tensor:
        if self.resting is None:
            self.shard = total
        else:
            self.landing = total
        return total

    @no_grad
    def receive(self, total: torch.Tensor, scale: float) -> None:
        """Add `scale` times a sum over all ranks."""
        if scale != 1.0:
            total = total.mul_(scale)
        if self.all_reduce_hook is not None:
            self.all_reduce_hook(total)
        total = total.to(self.precision.grad)
        held = self.shard if self.resting is None else self.landing
        if held is None:
            self._hold(total)
            return
        # An all-reduced sum that peers may still be reading.
        self.axes.replicate.drain()
        held.add_(total)

    # on a tier --------------------------------------------------------------------------------------------

    def rest(self, tiers: Tiers, beside: Resting) -> None:
        """From now on keep reduced gradients on `tiers.gradient`; `beside`: what else rests of the group."""
        if tiers.gradient is not None:
            self._tiers, self.resting = tiers, Resting(f"{self.name}/gradient", tiers, beside)

    @property
    def _away(self) -> bool:
        return self.resting is not None and self.shard is not None and self.power is not None

    @torch.no_grad()
    def land(self, *, stay: bool = False) -> None:
        """What was just reduced is added to what rests, and rests too. With `stay`, the sum is in memory instead."""
        landing, resting, tier = self.landing, self.resting, self._tiers.gradient
        if landing is None or resting is None or tier is None:
            return
        self.landing = None
        desk.clear()
        desk.vacate(resting)
        # An all-reduced sum that peers may still be reading.
        self.axes.replicate.drain()
        if self._away:
            self._add_resting(landing, resting)
        if stay:
            self.shard, self.power = landing, None
            return
        if _KIND not in resting.kinds:
            resting.add_zeros(_KIND, landing.numel(), landing.dtype, tier)
        self.power = power_sum([landing], self.norm_type, landing.device)
        resting.replace(_KIND, landing)
        self.shard, self.fresh_sum = resting.flat(_KIND), True

    def _add_resting(self, landing: torch.Tensor, resting: Resting) -> None:
        """Add the sums so far to what has just been reduced."""
        every = range(len(self.buffer.layout.shapes))
        kept = set(every) if self.kept is None else self.kept()
        if not kept:
            return
        with resting.opened([_KIND], changed=False):
            before = resting.flat(_KIND)
            if len(kept) == len(every):
                landing.add_(before)
                return
            for index in kept:
                self.buffer.local(index, landing).add_(self.buffer.local(index, before))

    def settle(self) -> None:
        """Return once what landed is stored, and its memory free."""
        if self.resting is not None:
            self.resting.settle()

    def prefetch(self) -> None:
        """Begin to read what rests."""
        if self.resting is not None and (self._away or self.aside is not None):
            self.resting.prefetch([_KIND if self.aside is None else _ASIDE])

    @contextmanager
    def in_memory(self, *, changed: bool = False) -> Iterator[None]:
        """`shard` is in memory inside the block, wherever it rests."""
        if self.resting is None or not self._away:
            yield
            return
        with self.resting.opened([_KIND], changed=changed):
            yield
            if changed and self.shard is not None:
                self.power = power_sum([self.shard], self.norm_type, self.shard.device)
        self.resting.settle()

    def set_aside(self) -> None:
        """What was summed waits for its update, and sums begin anew."""
        self.aside, self.shard, self.power = self.shard, None, None
        if self.resting is not None and _KIND in self.resting.kinds:
            self.resting.rename(_KIND, _ASIDE)

    @contextmanager
    def aside_shown(self) -> Iterator[None]:
        """What was set aside is in `shard`, and in memory, inside the block."""
        current, self.shard = self.shard, self.aside
        try:
            if self.resting is None or _ASIDE not in self.resting.kinds:
                yield
            else:
                with self.resting.opened([_ASIDE], changed=False):
                    yield
        finally:
            self.shard = current

    def drop_aside(self) -> None:
        self.aside = None
        if self.resting is not None and _ASIDE in self.resting.kinds:
            self.resting.discard(_ASIDE)

    def receive_partial(self, total: torch.Tensor) -> None:
        """Add a sum over the dp_shard axis only."""
        self.replica_partial = total if self.replica_partial is None else self.replica_partial.add_(total)

    def end_backward(self) -> None:
        """Everything that this backward brings has arrived."""
        self._pack_small()
        self.touched |= self.arrived

    @property
    def pending(self) -> bool:
        """Whether gradients of this rank wait to be reduced."""
        return self.whole is not None or bool(self.fresh)

    def waiting(self, index: int) -> torch.Tensor | None:
        """This rank's own whole gradient of parameter `index` that is not reduced yet, if there is one."""
        self._pack_small()
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
        self.small.clear()
        self.filled.clear()

    def clear(self) -> None:
        self.forget_fresh()
        self.replica_partial = self.shard = self.landing = self.power = None
        self.settle()
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

    @no_grad
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
