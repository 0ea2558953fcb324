"""The memory behind one group: the shard that rests, the whole that is gathered, and gradients on their way out.

A buffer knows a layout and one mesh axis. Two kinds differ in the layout alone: `FlatBuffer` gathers straight into
place; `DimBuffer` splits every parameter along its own dim and copies out.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from functools import cached_property
from math import prod
from typing import Any

import torch

from unishard.dist.collectives import DONE, Communicator, Pending, Works
from unishard.dist.in_place import (
    GatherPart,
    GatherPlan,
    ReducePlan,
    Span,
    plan_flat,
    plan_gather,
    plan_packed_reduce,
    plan_reduce,
)
from unishard.sharding.dim_layout import DimLayout
from unishard.sharding.host_memory import published_empty
from unishard.sharding.layout import FlatLayout
from unishard.sharding.no_grad import no_grad


class GroupBuffer(ABC):
    """Storage of one group's parameters on this rank.

    - `shard`: 1-D, `layout.shard_numel` elements of `master` dtype; what the optimizer updates.
    - `full`: 1-D, `layout.numel` elements of `compute` dtype; its storage is resized to zero while released and
      refilled in place, because tensors that autograd saved alias that very storage.
    - `views`: the whole parameters inside `full`. Each owns its version counter, so that writing one parameter does
      not invalidate what backward saved of its neighbours.
    """

    layout: FlatLayout | DimLayout
    views: list[torch.Tensor]
    aliased: bool = False
    """Whether `shard` is this rank's slice of a resident `full`: one memory, and nothing to copy before a gather."""
    copied: bool = False
    """Whether `copy_of_shard` was written since the last gather."""
    compute_shard: torch.Tensor | None = None
    """The shard in compute dtype, kept where master weights rest on a tier of their own."""

    def __init__(
        self,
        layout: FlatLayout | DimLayout,
        comm: Communicator,
        *,
        compute: torch.dtype,
        master: torch.dtype,
        device: torch.device,
        resident: bool,
    ) -> None:
        self.comm = comm
        self.compute = compute
        self.master = master
        self.device = device
        self.resident = resident
        numel = layout.numel
        with torch.inference_mode(False):
            # Released memory must be resizable.
            make = published_empty if resident else torch.empty
            self.full = make(numel, dtype=compute, device=device)
        self._bytes = self.full.untyped_storage().nbytes()
        self.allocated = True
        self._reduce_plans: dict[torch.dtype, ReducePlan] = {}

    def _make_views(self) -> list[torch.Tensor]:
        return [self._view(*place) for place in self._slots]

    @cached_property
    def _slots(self) -> list[tuple[tuple[int, ...], tuple[int, ...], int]]:
        """Sizes, strides and offset of each parameter in a whole buffer."""
        shapes = [tuple(shape) for shape in self.layout.shapes]
        return list(zip(shapes, map(_row_major, shapes), self.layout.offsets, strict=True))

    def _view(self, shape: tuple[int, ...], strides: tuple[int, ...], offset: int) -> torch.Tensor:
        with torch.inference_mode(False):
            empty = torch.empty(0, dtype=self.compute, device=self.device)
            return empty.set_(self.full.untyped_storage(), offset, shape, strides)

    def allocate(self) -> None:
        """Give `full` its memory back; contents are undefined."""
        if not self.allocated:
            self.full.untyped_storage().resize_(self._bytes)
            self.allocated = True

    def release(self) -> None:
        """Free the memory of `full`; every view of it is unusable until the next gather."""
        if self.allocated:
            self.full.untyped_storage().resize_(0)
            self.allocated = False

    @property
    def users(self) -> int:
        """How many tensors share the memory of `full`."""
        return torch._C._storage_Use_Count(self.full.untyped_storage()._cdata)

    def part_with_memory(self) -> None:
        """Leave the memory of `full` to the tensors outside that share it; the next gather gets other memory."""
        with torch.inference_mode(False):
            # `set_` checks the size, so the memory is there for a moment.
            fresh = torch.empty_like(self.full).untyped_storage()
            for tensor in (self.full, *self.views):
                tensor.set_(fresh, tensor.storage_offset(), tensor.shape, tensor.stride())
            fresh.resize_(0)
        self.allocated = False

    @property
    def copy_of_shard(self) -> torch.Tensor | None:
        """Where an update may write the shard in compute dtype, in the same pass; it then sets `copied`."""
        return None

    @property
    def padding(self) -> int:
        """Elements this rank's shard holds beyond an exact 1/N of the payload."""
        return self.layout.shard_numel - self.layout.payload // self.comm.size

    @abstractmethod
    def gather(self, label: str = "") -> Pending:
        """Fill `full` from every rank's shard. Wait before reading; `full` is allocated at once."""

    @abstractmethod
    def gather_part(self) -> GatherPart:
        """What a gather that reads in place needs; `full` is allocated, this rank's own part in it is filled."""

    @property
    def reads_in_place(self) -> bool:
        """Whether `gather_part` may be used."""
        return self.comm.window is not None

    def _outgoing(self) -> torch.Tensor:
        """The shard in compute dtype: the shard itself, its copy, or a fresh tensor."""
        if self.compute_shard is not None:
            return self.compute_shard
        return self.shard if self.master == self.compute else self.shard.to(self.compute)

    @abstractmethod
    def shard_spans(self, rank: int) -> list[Span] | None:
        """Where `rank`'s shard comes from: from parameter `index` to the shard. `None` if runs are not contiguous."""

    @cached_property
    def own_spans(self) -> dict[int, Span] | None:
        """Where this rank's shard comes from, by parameter; those of which it has nothing are left out."""
        spans = self.shard_spans(self.comm.rank)
        return None if spans is None else {span.index: span for span in spans}

    @cached_property
    def sums_single(self) -> bool:
        """Whether gradients can be summed where autograd left them, one tensor a parameter."""
        return self.comm.window is not None and self.shard_spans(self.comm.rank) is not None

    def reduce_plan(self, dtype: torch.dtype) -> ReducePlan:
        """How this rank's shard is summed out of what ranks publish in `dtype`."""
        plan = self._reduce_plans.get(dtype)
        if plan is None:
            length, spans = self.layout.shard_numel, self.shard_spans(self.comm.rank)
            start = self.comm.rank * length
            if spans is None:
                plan = plan_packed_reduce(start, length, dtype.itemsize, self.comm.size)
            else:
                plan = plan_reduce(spans, start, dtype.itemsize, self.comm.size)
            self._reduce_plans[dtype] = plan
        return plan

    def new_shard(
        self, dtype: torch.dtype, make: Callable[[int, torch.dtype], torch.Tensor] | None = None
    ) -> torch.Tensor:
        """A shard's worth of memory, of `make`; only what `reduce_plan` leaves alone is zeroed."""
        numel = self.layout.shard_numel
        fresh = torch.empty(numel, dtype=dtype, device=self.device) if make is None else make(numel, dtype)
        position = 0
        for start, numel in self._covered:
            fresh[position:start].zero_()
            position = start + numel
        fresh[position:].zero_()
        return fresh

    @cached_property
    def _covered(self) -> list[tuple[int, int]]:
        spans = self.shard_spans(self.comm.rank)
        if spans is None:
            return [(0, self.layout.shard_numel)]
        return [(chunk.start, chunk.numel) for chunk in plan_reduce(spans, 0, 4, self.comm.size)]

    def whole_views(self, flat: torch.Tensor) -> list[torch.Tensor]:
        """The parameters inside `flat`, any 1-D tensor laid out like `full`."""
        return [
            flat[offset : offset + prod(shape)].view(shape)
            for offset, shape in zip(self.layout.offsets, self.layout.shapes, strict=True)
        ]

    @torch.no_grad()
    def load(self, whole: torch.Tensor) -> None:
        """Take this rank's shard from `whole`, laid out like `full` in `master` dtype; resident buffers keep all."""
        if self.resident:
            self.full.copy_(whole)
        if not self.aliased:
            self.shard = self._shard_of(whole)
        if not self.resident:
            self.release()

    @torch.no_grad()
    def absorb(self) -> None:
        """Carry what was written to `full` into the shard.

        Only where it differs from the shard's own cast: elements that nobody wrote keep their full precision.
        """
        if self.aliased:
            return
        written = self._shard_of(self.full)
        changed = written != self.shard.to(self.compute)
        self.shard.copy_(torch.where(changed, written.to(self.master), self.shard))
        self.carry_over()

    @torch.no_grad()
    def carry_over(self) -> None:
        """The shard was written: bring what rests in compute dtype up to date, unless the update did."""
        if self.compute_shard is not None and not self.copied:
            self.compute_shard.copy_(self.shard)
        self.copied = self.copied and self.resident

    def replace_shard(self, shard: torch.Tensor) -> None:
        """Take other memory, or memory on another device, as the shard; one that is part of `full` takes the values."""
        if self.aliased and shard.device == self.shard.device and shard.dtype == self.shard.dtype:
            with torch.no_grad():
                self.shard.copy_(shard)
            return
        self.aliased = False
        self.shard = shard

    def _shard_of(self, whole: torch.Tensor) -> torch.Tensor:
        """A fresh tensor with this rank's part of `whole`, in the dtype of `whole`."""
        shard = published_empty(self.layout.shard_numel, whole.dtype, whole.device)
        self._fill_shard(shard, whole)
        return shard

    @abstractmethod
    def _fill_shard(self, shard: torch.Tensor, whole: torch.Tensor) -> None:
        """Copy this rank's part of `whole` into `shard`."""

    @abstractmethod
    def local(self, index: int, shard: torch.Tensor) -> torch.Tensor:
        """This rank's part of parameter `index` inside `shard`, a flat tensor laid out like `self.shard`."""

    @abstractmethod
    def write(self, target: torch.Tensor, index: int, grad: torch.Tensor | None, accumulate: bool) -> None:
        """Put the whole gradient of parameter `index` (`None`: zeros) where `target`, a reduce buffer, wants it."""

    def write_all(self, target: torch.Tensor, grads: Mapping[int, torch.Tensor], accumulate: bool) -> None:
        """`write` for several parameters, in fewer calls."""
        for index, grad in grads.items():
            self.write(target, index, grad, accumulate)

    @abstractmethod
    def new_reduce_buffer(self, dtype: torch.dtype) -> torch.Tensor:
        """A buffer of `comm.size * shard_numel` elements for `write` to fill, padding already zero."""


class FlatBuffer(GroupBuffer):
    """Zero-copy: rank r's shard is `full[r * n : (r + 1) * n]`, gathered and reduced in place."""

    layout: FlatLayout

    def __init__(self, layout: FlatLayout, comm: Communicator, **kwargs: Any) -> None:
        super().__init__(layout, comm, **kwargs)
        self.layout = layout
        self.views = self._make_views()
        self.aliased = self.resident and self.master == self.compute
        self.shard = self._own(self.full) if self.aliased else self.full.new_empty(0, dtype=self.master)
        self._pieces = {piece.index: piece for piece in layout.pieces(comm.rank)}
        for start, stop in self.layout.gaps:
            self.full[start:stop].zero_()

    def _own(self, whole: torch.Tensor) -> torch.Tensor:
        length = self.layout.shard_numel
        return whole[self.comm.rank * length : (self.comm.rank + 1) * length]

    def _fill_shard(self, shard: torch.Tensor, whole: torch.Tensor) -> None:
        shard.copy_(self._own(whole))

    def gather(self, label: str = "") -> Pending:
        if self.reads_in_place:
            return self.comm.gather_in_place([self.gather_part()], "all_gather", label)
        self._fill_own()
        return self.comm.all_gather(self.full, label=label)

    @no_grad
    def _fill_own(self) -> torch.Tensor:
        """Put the shard where it belongs in `full`; returns a place where its values stay until they are read."""
        self.allocate()
        source = own = self._own(self.full)
        if not self.aliased and not (self.copied and self.resident):
            source = self._outgoing()
            own.copy_(source)
        self.copied = False
        return source

    def gather_part(self) -> GatherPart:
        source = self._fill_own()
        plan = plan_flat(self.layout.numel, self.comm.size, self.comm.rank, self.compute.itemsize)[1]
        return GatherPart(source, self.full, plan)

    @property
    def copy_of_shard(self) -> torch.Tensor | None:
        return self._own(self.full) if self.resident and self.master != self.compute else self.compute_shard

    def shard_spans(self, rank: int) -> list[Span]:
        return [Span(p.index, p.param_start, p.shard_start, p.numel) for p in self.layout.pieces(rank)]

    def local(self, index: int, shard: torch.Tensor) -> torch.Tensor:
        piece = self._pieces.get(index)
        return shard[:0] if piece is None else shard[piece.shard_start : piece.shard_start + piece.numel]

    def write(self, target: torch.Tensor, index: int, grad: torch.Tensor | None, accumulate: bool) -> None:
        offset, shape = self.layout.offsets[index], self.layout.shapes[index]
        slot = target[offset : offset + prod(shape)]
        if grad is None:
            slot.zero_()
        elif accumulate:
            slot.view(shape).add_(grad)
        else:
            slot.view(shape).copy_(grad)

    def write_all(self, target: torch.Tensor, grads: Mapping[int, torch.Tensor], accumulate: bool) -> None:
        slots = [target.as_strided(*self._slots[index]) for index in grads]
        write = torch._foreach_add_ if accumulate else torch._foreach_copy_
        write(slots, list(grads.values()))

    def new_reduce_buffer(self, dtype: torch.dtype) -> torch.Tensor:
        buffer = torch.empty(self.layout.numel, dtype=dtype, device=self.device)
        for start, stop in self.layout.gaps:
            buffer[start:stop].zero_()
        return buffer


class DimBuffer(GroupBuffer):
    """Every rank holds a `Shard(dim)` chunk of every parameter; gathers pass through a staging buffer."""

    layout: DimLayout

    def __init__(self, layout: DimLayout, comm: Communicator, **kwargs: Any) -> None:
        super().__init__(layout, comm, **kwargs)
        self.layout = layout
        self.views = self._make_views()
        # A single rank's chunks are the whole parameters, one after the other.
        alone = comm.size == 1 and layout.offsets == layout.shard_offsets
        self.aliased = alone and self.resident and self.master == self.compute
        self.shard = (
            self.full[: layout.shard_numel] if self.aliased else self.full.new_empty(0, dtype=self.master)
        )
        # A second set, so that filling them leaves the version counters of `views` alone.
        self._targets = self._make_views()

    def _fill_shard(self, shard: torch.Tensor, whole: torch.Tensor) -> None:
        shard.zero_()
        for index, view in enumerate(self.whole_views(whole)):
            self.local(index, shard).copy_(self._chunk(view, index, self.comm.rank))

    def _chunk(self, whole: torch.Tensor, index: int, rank: int) -> torch.Tensor:
        if whole.dim() == 0:
            return whole[None][: self.layout.chunk(index, rank)[1]]
        return whole.narrow(self.layout.dims[index], *self.layout.chunk(index, rank))

    def local(self, index: int, shard: torch.Tensor) -> torch.Tensor:
        start, stop, shape = self._places[index]
        return shard[start:stop].view(shape)

    @cached_property
    def _places(self) -> list[tuple[int, int, tuple[int, ...]]]:
        """Of each parameter's chunk on this rank: start and stop in the shard, and shape."""
        rank, found = self.comm.rank, []
        for index, start in enumerate(self.layout.shard_offsets):
            shape = self.layout.chunk_shape(index, rank) or (self.layout.chunk(index, rank)[1],)
            found.append((start, start + prod(shape), shape))
        return found

    @cached_property
    def _own_targets(self) -> list[torch.Tensor]:
        return [self._chunk(target, index, self.comm.rank) for index, target in enumerate(self._targets)]

    def _local(self, index: int, shard: torch.Tensor, rank: int) -> torch.Tensor:
        shape = self.layout.chunk_shape(index, rank) or (self.layout.chunk(index, rank)[1],)
        start = self.layout.shard_offsets[index]
        return shard[start : start + prod(shape)].view(shape)

    def gather(self, label: str = "") -> Pending:
        if self.reads_in_place:
            return self.comm.gather_in_place([self.gather_part()], "all_gather", label)
        if self.aliased:
            return DONE
        self.allocate()
        length = self.layout.shard_numel
        with torch.inference_mode(False), torch.no_grad():
            staging = torch.empty(self.comm.size * length, dtype=self.compute, device=self.device)
            staging[self.comm.rank * length : (self.comm.rank + 1) * length].copy_(self.shard)
        pending = self.comm.all_gather(staging, label=label)
        return Works([pending], lambda: self._copy_out(staging))

    def shard_spans(self, rank: int) -> list[Span] | None:
        layout = self.layout
        if any(layout.dims):
            return None
        spans = []
        for index, shape in enumerate(layout.shapes):
            start, length = layout.chunk(index, rank)
            row = prod(shape[1:])
            spans.append(Span(index, start * row, layout.shard_offsets[index], length * row))
        return [span for span in spans if span.numel]

    @cached_property
    def _gather_plan(self) -> GatherPlan | None:
        """From each rank's shard straight into the whole parameters, which saves the staging buffer and a copy."""
        ranks = [self.shard_spans(rank) for rank in range(self.comm.size)]
        if self.comm.window is None or any(spans is None for spans in ranks):
            return None
        moved = [
            [
                Span(0, target, self.layout.offsets[index] + source, numel)
                for index, source, target, numel in spans or ()
            ]
            for spans in ranks
        ]
        return plan_gather(moved, self.compute.itemsize)

    @property
    def reads_in_place(self) -> bool:
        return self._gather_plan is not None

    @no_grad
    def gather_part(self) -> GatherPart:
        self.allocate()
        source = self._outgoing()
        locals_ = [self.local(index, source) for index in range(len(self._targets))]
        torch._foreach_copy_(self._own_targets, locals_)
        return GatherPart(source, self.full, self._gather_plan or ())

    @no_grad
    def _copy_out(self, staging: torch.Tensor) -> None:
        by_rank = staging.view(self.comm.size, -1)
        for index, target in enumerate(self._targets):
            start, length = self.layout.shard_offsets[index], self.layout.chunk_numels[index]
            if self.layout.even(index):
                target.view(self.comm.size, length).copy_(by_rank[:, start : start + length])
                continue
            for rank in range(self.comm.size):
                self._chunk(target, index, rank).copy_(self._local(index, by_rank[rank], rank))

    def write(self, target: torch.Tensor, index: int, grad: torch.Tensor | None, accumulate: bool) -> None:
        by_rank = target.view(self.comm.size, -1)
        start, length = self.layout.shard_offsets[index], self.layout.chunk_numels[index]
        if grad is None:
            by_rank[:, start : start + length].zero_()
            return
        if self.layout.even(index):
            slot = by_rank[:, start : start + length]
            grad = grad.reshape(self.comm.size, length)
            _ = slot.add_(grad) if accumulate else slot.copy_(grad)
            return
        for rank in range(self.comm.size):
            slot = self._local(index, by_rank[rank], rank)
            chunk = self._chunk(grad, index, rank)
            _ = slot.add_(chunk) if accumulate else slot.copy_(chunk)

    def new_reduce_buffer(self, dtype: torch.dtype) -> torch.Tensor:
        size = self.comm.size * self.layout.shard_numel
        even = all(self.layout.even(i) for i in range(len(self.layout.shapes)))
        make = torch.empty if even else torch.zeros
        return make(size, dtype=dtype, device=self.device)


def _row_major(shape: tuple[int, ...]) -> tuple[int, ...]:
    strides, step = [], 1
    for extent in reversed(shape):
        strides.append(step)
        step *= max(extent, 1)
    return tuple(reversed(strides))
