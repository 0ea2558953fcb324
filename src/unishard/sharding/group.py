"""ShardGroup: the parameters of one module, of one dtype, gathered and reduced together."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch

from unishard.dist.collectives import Communicator, Pending
from unishard.dist.mesh import Axes
from unishard.errors import StateError
from unishard.sharding.buffer import GroupBuffer
from unishard.sharding.gradient import GroupGradients, Reduction
from unishard.sharding.parameter import Registration
from unishard.sharding.placement import Placement, Sharding
from unishard.sharding.ports import ON_DEVICE, Tiers
from unishard.sharding.precision import GroupPrecision, MixedPrecision
from unishard.sharding.resting import Resting, desk, is_absent

COALESCE_BYTES = 1 << 18
"""Per rank. Below this, what an operation costs (some 50 us of calls and waiting) outweighs what it moves."""


WEIGHTS = ("shard", "compute")
"""The kinds of resting tensors that are parameters."""


class ShardGroup:
    """One unit of communication.

    At rest the parameters are this rank's `buffer.shard` (and, for presets that replicate them, whole as well).
    `unshard` starts a gather, `wait` shows the whole parameters in their modules, `reshard` takes them away again.
    """

    def __init__(
        self,
        name: str,
        sharding: Sharding,
        axes: Axes,
        precision: GroupPrecision,
        buffer: GroupBuffer,
        registrations: Sequence[Registration],
    ) -> None:
        self.name = name
        self.sharding = sharding
        self.axes = axes
        self.precision = precision
        self.policy = MixedPrecision()
        """What `precision` was resolved from; resolved again when users change the parameters' dtype."""
        self.buffer = buffer
        self.registrations = list(registrations)
        self.gradients = GroupGradients(buffer, axes, precision, name)
        self.resident = sharding.parameter is Placement.REPLICATE
        self._pending: Pending | None = None
        self._gathered = False
        self._gathered_version = -1
        self._secondary: tuple[Communicator, torch.Tensor] | None = None
        self.tiers = ON_DEVICE
        self.resting: Resting | None = None
        """What of this group rests on `tiers`."""
        self._lent: Pending | None = None
        """The gather for which the resting shard is in memory: peers may be reading it."""
        self.shown_whole = False
        self.held = False
        """Whether a `gather` block keeps the whole parameters in sight, whatever runs inside it."""
        self.trainable: frozenset[int] = frozenset()
        self._flags: list[bool] = []
        self.refresh_trainable()

    def __repr__(self) -> str:
        return f"ShardGroup({self.name!r}, {len(self.registrations)} parameters, {self.buffer.layout.describe()})"

    def refresh_trainable(self) -> bool:
        """Read `requires_grad` again, which users may flip between steps. True if anything changed."""
        flags = [r.visible.requires_grad for r in self.registrations]
        if flags == self._flags:
            return False
        self._flags = flags
        self.trainable = frozenset(i for i, flag in enumerate(flags) if flag)
        return True

    def adopt(self) -> None:
        """The buffer was just loaded: resident parameters are whole and current, others released."""
        if self.resident:
            self._gathered = True
            self._gathered_version = self._version()
        if self.resident and self.registrations[0].in_place:
            self.show_whole()
        else:
            self.shown_whole = True
            self.show_sharded()

    def rest(self, tiers: Tiers) -> None:
        """From now on keep on `tiers` what they are for, and in memory only while it is used."""
        buffer = self.buffer
        # Through the code door the parameter itself is the master, in whatever dtype it computes.
        mixed = buffer.master != buffer.compute and self.registrations[0].in_place
        parameter = None if self.resident else tiers.parameter
        shard = tiers.optimizer if mixed else parameter
        if parameter is None and tiers.optimizer is None and tiers.gradient is None:
            return
        self.tiers, self.resting = tiers, Resting(self.name, tiers)
        self.gradients.rest(tiers, self.resting)
        if mixed and not self.resident:
            buffer.compute_shard = buffer.shard.to(buffer.compute)
            if parameter is not None:
                self.resting.add("compute", buffer.compute_shard, parameter)
        if shard is not None and not buffer.aliased:
            self.resting.add("shard", buffer.shard, shard)

    @property
    def _gathered_kinds(self) -> tuple[str, ...]:
        """What of the resting tensors a gather reads."""
        if self.resident and self.buffer.copied:
            return ()
        return ("shard",) if self.buffer.compute_shard is None else ("compute",)

    def begin_reading(self) -> None:
        """Start bringing a resting shard into memory, for a gather that will come."""
        if self.resting is not None and not self.is_whole:
            self.resting.prefetch(self._gathered_kinds)

    @contextmanager
    def in_memory(self, kinds: Iterable[str] | None = None, *, changed: bool) -> Iterator[None]:
        """Resting tensors of `kinds`, by default all and the optimizer's too, are in memory inside the block."""
        if self.resting is None:
            yield
            return
        with self.resting.opened(kinds, changed=changed):
            yield
        self.resting.settle()

    def _gather_resting(self, resting: Resting) -> Pending:
        kinds = self._gathered_kinds
        desk.clear()
        resting.open(kinds)
        pending = self.buffer.gather(self.name)
        if self.resident:
            # What is sent lies in `full`, or in a cast of its own.
            resting.close(kinds, changed=False)
            resting.settle()
        else:
            self._lent = pending
        return pending

    def _take_back(self) -> None:
        """Peers have read the shard: it may leave memory again."""
        pending, self._lent = self._lent, None
        if pending is not None and self.resting is not None:
            pending.release()
            self.resting.close(self._gathered_kinds, changed=False)
            self.resting.settle()

    @property
    def stale(self) -> bool:
        """Whether the shard was written since the last gather."""
        return self._version() != self._gathered_version

    def _version(self) -> int:
        # Views of the shard share its counter. What is written through a DTensor counts on the DTensor only (its
        # operators run below the layer that counts for the tensor inside), and its local tensor counts for itself.
        if self.registrations[0].in_place:
            return self.buffer.shard._version
        return self.buffer.shard._version + sum(r.writes for r in self.registrations)

    @property
    def is_whole(self) -> bool:
        """Whether the whole parameters are in memory, or on their way."""
        return self._pending is not None or (self._gathered and not (self.resident and self.stale))

    def unshard(self) -> None:
        """Start gathering the whole parameters, unless they are here or on their way. All ranks call together."""
        if self.is_whole:
            return
        self._require_real()
        if self._secondary is not None:
            comm, piece = self._secondary
            self.buffer.allocate()
            with torch.no_grad():
                self.buffer.full.chunk(comm.size)[comm.rank].copy_(piece)
            self._pending = comm.all_gather(self.buffer.full, label=self.name, source=piece)
            self._secondary = None
        elif self.resting is not None:
            self._pending = self._gather_resting(self.resting)
        else:
            self._pending = self.buffer.gather(self.name)

    def _require_real(self) -> None:
        if self.buffer.shard.is_meta:
            raise StateError(
                f"{self.name}: parameter {self.registrations[0].fqn} is on the meta device; materialize the model "
                "first: model.to_empty(device=...) and initialize it, or load a checkpoint"
            )

    @property
    def shard_bytes(self) -> int:
        """What one peer reads of this group's parameters."""
        return self.buffer.layout.shard_numel * self.precision.compute.itemsize

    @property
    def joins_gathers(self) -> bool:
        """Whether this group is so small that it is better gathered together with others."""
        alone = self._secondary is not None or self.resting is not None
        return self.shard_bytes < COALESCE_BYTES and not alone and self.buffer.reads_in_place

    def wait(self) -> None:
        """Finish the gather and show the whole parameters in their modules."""
        if self._pending is not None:
            self._pending.wait()
            self._pending = None
            self._gathered = True
            self._gathered_version = self._version()
        self.show_whole()

    def show_whole(self) -> None:
        if not self.shown_whole:
            self.shown_whole = True
            for registration in self.registrations:
                registration.to_whole()

    def show_sharded(self) -> None:
        """Show what rests; memory stays as it is."""
        if self.shown_whole and not self.held:
            self.shown_whole = False
            for registration in self.registrations:
                registration.to_sharded()

    def reshard(self, keep_within: Communicator | None = None) -> None:
        """Release the whole parameters. With `keep_within`, hold 1/size of them for a gather inside that subgroup."""
        if self._pending is not None:
            self.wait()
        if self.held or (self.resident and self.registrations[0].in_place):
            return
        self.show_sharded()
        if self.resident or not self._gathered:
            return
        if keep_within is not None and keep_within.size < self.axes.shard.size:
            piece = self.buffer.full.chunk(keep_within.size)[keep_within.rank].detach().clone()
            self._secondary = (keep_within, piece)
        self.buffer.release()
        self._gathered = False
        self._take_back()

    def part_with_memory(self) -> None:
        """Show what rests, and leave the gathered memory to the tensors outside that share it."""
        self.show_sharded()
        self.buffer.part_with_memory()

    def mark_current(self) -> None:
        """What is gathered and the shard were written alike."""
        self._gathered_version = self._version()

    def forget_secondary(self) -> None:
        """A part kept after forward no longer matches the shard."""
        self._secondary = None

    def forget_gathered(self) -> None:
        """The shard changed: gathered copies are out of date."""
        self._secondary = None
        self._gathered_version = -1
        if not self.resident:
            self.reshard()

    def reset(self) -> None:
        """The buffer was replaced: nothing is gathered."""
        self._pending = None
        self._gathered = False
        self._gathered_version = -1
        self._secondary = None

    def reduce(self, *, across_replicas: bool = True) -> Reduction:
        """Start reducing what was collected. All ranks call together, in the same order of groups."""
        return Reduction(self.gradients, across_replicas)

    def refresh(self) -> None:
        """After the optimizer wrote the shard: start bringing resident whole parameters up to date."""
        self.note_update()
        if self.resident:
            self.unshard()

    def note_update(self) -> None:
        """The shard was written; nothing is gathered yet."""
        self._secondary = None
        if self.shown_whole:
            # Graphs built before the update must not use the new values unnoticed.
            torch.autograd.graph.increment_version([r.whole for r in self.registrations])

    @property
    def persistent_bytes(self) -> dict[str, int]:
        """Bytes this rank holds between steps, by kind."""
        shard = 0 if is_absent(self.buffer.shard) else self.buffer.shard.nbytes
        copy = self.buffer.compute_shard
        shard += 0 if copy is None or is_absent(copy) else copy.nbytes
        full = self.buffer.full.numel() * self.buffer.full.element_size() if self.resident else 0
        gradients = [self.gradients.shard, self.gradients.aside]
        held = sum(g.nbytes for g in gradients if g is not None and not is_absent(g))
        return {"parameters": full if self.buffer.aliased else full + shard, "gradients": held}


def unshard_together(groups: Iterable[ShardGroup]) -> None:
    """Start gathering all of `groups`, small ones in one operation. All ranks call together."""
    small: dict[Communicator, list[ShardGroup]] = {}
    for group in groups:
        if not group.is_whole and group.joins_gathers:
            small.setdefault(group.axes.shard, []).append(group)
        else:
            group.unshard()
    for comm, members in small.items():
        if len(members) == 1:
            members[0].unshard()
            continue
        for group in members:
            group._require_real()
        label = f"{members[0].name} and {len(members) - 1} more"
        pending = comm.gather_in_place([group.buffer.gather_part() for group in members], "all_gather", label)
        for group in members:
            group._pending = pending
