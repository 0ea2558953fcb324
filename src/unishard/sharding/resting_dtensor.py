"""DTensors whose local tensors rest on a tier: operations on them read the tier first, and write back what they wrote.

The memory that `_local_tensor` shows is a placeholder of NaN. What operates on such a tensor gets an ordinary DTensor
over the memory that `desk` brought, so that the answer is right, or in place, whatever the operation.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils import _pytree as pytree

from unishard.errors import ShardingError, StateError, UnsupportedError
from unishard.sharding.group import ShardGroup
from unishard.sharding.parameter import SwappedParameter
from unishard.sharding.resting import Resting, absent, desk

_aten = torch.ops.aten
_reading: list[Any] = []
"""Not empty while a tensor is brought for somebody who only reads it."""


@dataclass(frozen=True)
class Place:
    """Parameter `index` inside the flat tensor `kind` of what rests of a group."""

    group: ShardGroup
    resting: Resting
    kind: str
    index: int
    epoch: int = 0

    @property
    def rests(self) -> bool:
        """Whether the tensor is away between uses; a parameter whose shard stays in memory is not."""
        return self.kind in self.resting.kinds

    def require_current(self) -> None:
        """Raise `StateError` if another tensor took this one's place."""
        if self.resting.epochs.get((self.kind, self.index), 0) != self.epoch:
            fqn = self.group.registrations[self.index].fqn
            raise StateError(
                f"this is the {self.kind} of {fqn} from an earlier backward, and a later one has taken its place on "
                "the tier; clone() what is to be kept"
            )

    def local(self) -> torch.Tensor:
        """This rank's part, in the memory where it is now."""
        flat = self.resting.flat(self.kind) if self.rests else self.group.buffer.shard
        return self.group.buffer.local(self.index, flat)


class RestingDTensor(DTensor):
    """A DTensor over a `Place`. `detach()` and `.data` give another of the same place, which needs no memory."""

    __slots__ = []
    place: Place

    @classmethod
    def at(cls, place: Place, spec: Any) -> RestingDTensor:
        """The tensor of `place`; `spec` is that of a DTensor over all its parts."""
        shape = place.group.buffer.local(place.index, place.group.buffer.shard).shape
        flat = place.resting.flat(place.kind) if place.rests else place.group.buffer.shard
        shown = absent(flat)[:1].as_strided(shape, (0,) * len(shape))
        made = cls(shown, spec, requires_grad=False)  # pyright: ignore[reportCallIssue]
        made.place = place
        return made

    @classmethod
    def __torch_dispatch__(  # pyright: ignore[reportIncompatibleMethodOverride]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func is _aten.detach.default:
            return cls.at(args[0].place, args[0]._spec)
        if func is _aten.zeros_like.default and desk.zeros_like is not None:
            made = desk.zeros_like(args[0], (kwargs or {}).get("dtype") or args[0].dtype)
            if made is not None:
                return made
        leaves, tree = pytree.tree_flatten((args, kwargs or {}))
        found = [leaf for leaf in leaves if isinstance(leaf, RestingDTensor)]
        wanted: dict[Resting, list[str]] = {}
        for tensor in found:
            tensor.place.require_current()
            wanted.setdefault(tensor.place.resting, []).append(tensor.place.kind)
        desk.bring(wanted)
        plain = {id(tensor): _over_memory(tensor) for tensor in found}
        if func is _aten.alias.default:
            if not _reading:
                desk.note_change(args[0].place.resting, args[0].place.kind)
            return plain[id(args[0])]
        inner_args, inner_kwargs = pytree.tree_unflatten([plain.get(id(x), x) for x in leaves], tree)
        result = func(*inner_args, **inner_kwargs)
        for tensor in _written(func, args, kwargs or {}):
            desk.note_change(tensor.place.resting, tensor.place.kind)
        outside = {id(plain[id(tensor)]): tensor for tensor in found}
        result = pytree.tree_map(lambda value: outside.get(id(value), value), result)
        inner_args = inner_kwargs = None
        plain.clear()
        if len({resting.unit for resting in wanted}) > 1:
            desk.keep_one()
        return result

    def here(self) -> DTensor:
        """An ordinary DTensor over this one's memory, which stays as long as somebody has that, and is written back."""
        return torch.ops.aten.alias(self)

    def seen(self) -> DTensor:
        """As `here`, for those who only read."""
        _reading.append(self)
        try:
            return self.here()
        finally:
            _reading.pop()

    def to_local(self, **kwargs: Any) -> torch.Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return self.here().to_local(**kwargs)

    def redistribute(self, *args: Any, **kwargs: Any) -> DTensor:
        return self.seen().redistribute(*args, **kwargs)

    def full_tensor(self, **kwargs: Any) -> torch.Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        whole = self.seen().full_tensor(**kwargs)
        # On a single rank the whole is the part: a view of it would keep the part in memory.
        return whole.clone() if self.device_mesh.size() == 1 else whole

    def __repr__(self) -> str:  # pyright: ignore[reportIncompatibleMethodOverride]
        shape, where = tuple(self.shape), self.place.group.name
        return f"RestingDTensor({self.place.kind} of {where}, shape={shape}, placements={self.placements})"

    def __reduce_ex__(self, protocol: Any) -> Any:
        with torch.no_grad():
            # A copy: of the memory itself, torch would write the whole group, and it cannot where the offset is not 0.
            return self.seen().clone().__reduce_ex__(protocol)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        raise UnsupportedError(
            f"deepcopy of a parameter of {self.place.group.name}, which rests on a tier, would need two of it there; "
            "copy the model before fully_shard, or save and load its state"
        )

    def __tensor_flatten__(self) -> Any:
        raise UnsupportedError(
            f"a parameter of {self.place.group.name} rests on a tier and has no memory that a compiler could use; "
            "compile the module's forward, which computes with whole parameters"
        )


@torch.no_grad()
def _over_memory(tensor: RestingDTensor) -> DTensor:
    return DTensor(tensor.place.local().detach(), tensor._spec, requires_grad=False)  # pyright: ignore[reportCallIssue]


def _written(func: Any, args: Any, kwargs: dict[str, Any]) -> Iterable[RestingDTensor]:
    """The resting tensors that `func` changes in place, or gives a view of, which may be written later."""
    targets: list[Any] = []
    for position, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None:
            targets.append(args[position] if position < len(args) else kwargs.get(argument.name))
    return [x for x in pytree.tree_leaves(targets) if isinstance(x, RestingDTensor)]


def rest_parameters(group: ShardGroup, *, keep_objects: bool = False) -> None:
    """From now on the sharded parameters of `group` rest on `group.tiers`.

    With `keep_objects`, the parameters that modules and optimizers hold turn into resting ones.
    """
    group.rest(group.tiers)
    resting = group.resting
    if resting is None:
        return
    for index, registration in enumerate(group.registrations):
        if not isinstance(registration, SwappedParameter):
            raise StateError(f"{registration.fqn}: only parameters of the code door become resting DTensors")
        sharded: Any = registration.sharded
        made = RestingDTensor.at(Place(group, resting, "shard", index), sharded._spec)
        param: Any = nn.Parameter(made, requires_grad=sharded.requires_grad)
        for key, value in vars(sharded).items():
            if not hasattr(param, key):
                setattr(param, key, value)
        registration.replace_sharded(param, keep_object=keep_objects)
    group.gradients.kept = lambda: _with_gradient(group)


def _with_gradient(group: ShardGroup) -> set[int]:
    """The parameters of which users have not cleared the gradient that rests."""
    resting = group.gradients.resting
    return {
        index
        for index, registration in enumerate(group.registrations)
        if isinstance(registration.visible.grad, RestingDTensor)
        and registration.visible.grad.place.resting is resting
    }


def deliver_resting(group: ShardGroup, used: Iterable[int]) -> None:
    """Let the sharded parameters show gradients that have landed on a tier. Sums over backwards are made there."""
    gradients = group.gradients
    resting, kept = gradients.resting, _with_gradient(group)
    if resting is None:
        return
    for index in used:
        registration: Any = group.registrations[index]
        sharded = registration.sharded
        if index in kept:
            registration.run_hooks()
        elif sharded.grad is None:
            slot = ("gradient", index)
            resting.epochs[slot] = resting.epochs.get(slot, 0) + 1
            place = Place(group, resting, "gradient", index, resting.epochs[slot])
            sharded.grad = RestingDTensor.at(place, registration.spec.wrap(_shape_only(group, index))._spec)
            registration.run_hooks()
        else:
            with gradients.in_memory():
                flat = gradients.shard
                if flat is not None:
                    registration.accept(group.buffer.local(index, flat).clone())


def _shape_only(group: ShardGroup, index: int) -> torch.Tensor:
    return torch.empty(group.buffer.local(index, group.buffer.shard).shape, dtype=group.precision.grad)


def take_over(group: ShardGroup) -> None:
    """Modules may have been given other tensors in place of resting parameters: take over their values."""
    _restore(group)
    for registration in group.registrations:
        home, sharded = registration.homes[0], registration.visible
        current: Any = home.module._parameters[home.name]
        if current is None or current is sharded or current is registration.whole:
            continue
        if not isinstance(current, DTensor):
            raise ShardingError(
                f"{registration.fqn} was replaced by a plain tensor; a sharded module takes DTensors: load with "
                "torch.distributed.checkpoint.state_dict.set_model_state_dict(..., full_state_dict=True)"
            )
        with torch.no_grad():
            sharded.copy_(current)
        for each in registration.homes:
            each.register(sharded)
    group.forget_gathered()


def _restore(group: ShardGroup) -> None:
    """`to_empty` and the like turn the parameter objects themselves into ordinary DTensors: let them rest again."""
    for index, registration in enumerate(group.registrations):
        plain: Any = registration.visible
        if group.resting is None or isinstance(plain, RestingDTensor):
            continue
        made = RestingDTensor.at(Place(group, group.resting, "shard", index), plain._spec)
        with torch.no_grad():
            made.copy_(plain)
        torch.utils.swap_tensors(plain, nn.Parameter(made, requires_grad=plain.requires_grad))
