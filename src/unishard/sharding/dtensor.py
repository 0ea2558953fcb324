"""Groups of the code door: DTensors at rest, plain parameters in compute, gradients delivered to the DTensors.

Every sharded parameter is an ordinary `Shard(dim)` DTensor, so a torch function on it gives the right answer. The
price against the config door's flat layout is one copy out of the gathered memory and the padding of uneven dims.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.placement_types import Placement

from unishard.dist.mesh import Axes
from unishard.errors import MisuseError, ShardingError, UnsupportedError
from unishard.sharding.buffer import DimBuffer
from unishard.sharding.build import MakeGroup, ShardPlan, fill
from unishard.sharding.dim_layout import DimLayout, plan_dim_layout
from unishard.sharding.extensions import ExtendedBuffer, ExtendedGroup, is_extended, local_part
from unishard.sharding.gradient import GroupGradients
from unishard.sharding.group import ShardGroup
from unishard.sharding.parameter import Home, ParameterRecord, SwappedParameter, tensor_parallel_of
from unishard.sharding.placement import Placement as Rest
from unishard.sharding.ports import ON_DEVICE
from unishard.sharding.precision import GroupPrecision, resolve_precision
from unishard.sharding.spmd import WholeMesh
from unishard.sharding.touched import agree_on_touched

PlacementFn = Callable[[nn.Parameter], "Shard | None"]


@dataclass(frozen=True)
class Spec:
    """Mesh, placements and global shape of one sharded parameter, or of its gradient."""

    mesh: DeviceMesh
    placements: tuple[Placement, ...]
    shape: torch.Size
    stride: tuple[int, ...]

    def wrap(self, local: torch.Tensor) -> DTensor:
        """`local` as this rank's part of a DTensor, without communication."""
        own = _standalone(local)
        known = self._known.get(own.dtype)
        if known is None:
            with torch.no_grad():
                made = DTensor.from_local(
                    own, self.mesh, self.placements, run_check=False, shape=self.shape, stride=self.stride
                )
            self._known[own.dtype] = made._spec
            return made
        # Working out the same layout again for each gradient costs more than all else that is done to it here.
        return DTensor(own.detach(), known, requires_grad=False)  # pyright: ignore[reportCallIssue]

    @cached_property
    def _known(self) -> dict[torch.dtype, Any]:
        return {}


def _standalone(local: torch.Tensor) -> torch.Tensor:
    """The same memory as a storage of its own, without what lies before and after it.

    A DTensor has the storage offset of its local tensor, and torch cannot deepcopy one whose offset is not 0.
    """
    if local.is_meta:
        return local
    if not local.numel():
        return torch.empty_like(local)
    whole, size = local.untyped_storage(), local.numel() * local.element_size()
    if whole.nbytes() == size:
        return local
    start = local.storage_offset() * local.element_size()
    storage = whole[start : start + size]
    return local.new_empty(0).set_(storage, 0, local.shape, local.stride())


class ShardedParameter(SwappedParameter):
    """A registration that also knows how to dress local tensors as DTensors."""

    def __init__(self, record: ParameterRecord, view: torch.Tensor, local: torch.Tensor, spec: Spec) -> None:
        self.spec = spec
        sharded = nn.Parameter(spec.wrap(local), requires_grad=record.param.requires_grad)
        for key, value in vars(record.param).items():
            if not hasattr(sharded, key):
                setattr(sharded, key, value)
        super().__init__(record, view, sharded)
        self.zero_if_unused = False
        """Whether a parameter that no rank used gets a gradient of zeros instead of none."""

    @property
    def writes(self) -> int:
        local: Any = self.sharded
        return super().writes + local._local_tensor._version

    def take_grad(self) -> torch.Tensor | None:
        """The fresh local gradient, after the hooks that users registered on the parameter they see.

        Those get this rank's whole gradient of this backward, before it is reduced, as in one process.
        """
        grad = super().take_grad()
        hooks = self.sharded._backward_hooks
        if not hooks or grad is None:
            return grad
        for hook in list(hooks.values()):
            with torch.no_grad():
                changed = hook(grad)
            if changed is not None and changed.shape != grad.shape:
                raise ShardingError(
                    f"{self.fqn}: a hook of register_hook made a gradient of shape {tuple(changed.shape)} out of "
                    f"{tuple(grad.shape)}; return the same shape, or None to leave it as it is"
                )
            grad = grad if changed is None else changed
        return grad

    def accept(self, local: torch.Tensor) -> None:
        """Add a reduced local gradient to the sharded parameter's, and run the hooks users put there."""
        if self.sharded.grad is None:
            self.sharded.grad = self.spec.wrap(local)
        else:
            grad: Any = self.sharded.grad
            (grad.to_local() if isinstance(grad, DTensor) else grad).add_(local)
        self.run_hooks()

    def run_hooks(self) -> None:
        """Call the hooks that wait for an accumulated gradient."""
        hooks = getattr(self.sharded, "_post_accumulate_grad_hooks", None)
        for hook in list(hooks.values()) if hooks else ():
            hook(self.sharded)


def placement_dim(record: ParameterRecord, placement: Shard | None) -> int:
    """The dim to shard, counted from the front. Raises `ShardingError` for what cannot be sharded."""
    if len(record.shape) == 0:
        raise ShardingError(
            f"{record.fqn}: a scalar parameter has no dim to shard. Change {record.fqn} to a 1D tensor with numel "
            "equal to 1, or pass it in ignored_params"
        )
    if placement is None:
        return 0
    if not isinstance(placement, Shard):
        raise ShardingError(
            f"{record.fqn}: shard_placement_fn returned {placement!r}; return Shard(dim) or None"
        )
    dim = placement.dim + len(record.shape) if placement.dim < 0 else placement.dim
    if not 0 <= dim < len(record.shape):
        raise MisuseError(
            f"{record.fqn}: Shard dim {placement.dim} is invalid for {len(record.shape)}D tensors: shard_placement_fn "
            f"must return a dim of shape {tuple(record.shape)}"
        )
    return dim


def spec_of(
    record: ParameterRecord, mesh: DeviceMesh, axes: Axes, dim: int, whole_mesh: WholeMesh | None = None
) -> Spec:
    """Placements of the sharded parameter over the data-parallel mesh and, in front of it, tensor parallelism's."""
    if whole_mesh is not None:
        on, placements = whole_mesh.spec(record, mesh, dim)
        dtensor: Any = record.param
        return Spec(on, placements, dtensor.shape, dtensor.stride())
    own: Placement = Shard(dim) if axes.shard.group is not None else Replicate()
    data_parallel: list[Placement] = [own] if mesh.ndim == 1 else [Replicate(), own]
    tensor_parallel = tensor_parallel_of(record.param)
    if tensor_parallel is None:
        shape = record.shape
        return Spec(mesh, tuple(data_parallel), shape, torch.empty(shape, device="meta").stride())
    inner = [p for p in tensor_parallel.placements if isinstance(p, Shard) and p.dim == dim]
    if inner and isinstance(own, Shard):
        from torch.distributed.tensor.placement_types import _StridedShard

        # Tensor parallelism cut the dim first: data-parallel chunks interleave with its pieces.
        data_parallel[-1] = _StridedShard(dim, split_factor=tensor_parallel.mesh.size())
    joined = _concatenate(mesh, tensor_parallel.mesh, record.fqn)
    placements = (*data_parallel, *tensor_parallel.placements)
    return Spec(joined, placements, tensor_parallel.shape, tensor_parallel.stride)


def _concatenate(data_parallel: DeviceMesh, tensor_parallel: DeviceMesh, fqn: str) -> DeviceMesh:
    if data_parallel._get_root_mesh() != tensor_parallel._get_root_mesh():
        raise ShardingError(
            f"{fqn}: the data-parallel mesh and the tensor-parallel mesh come from different meshes; slice both from "
            'one: mesh = init_device_mesh(..., mesh_dim_names=("dp", "tp")); mesh["dp"], mesh["tp"]'
        )
    return DeviceMesh._concatenate([data_parallel, tensor_parallel])


def swapped_group(
    plan: ShardPlan, mesh: DeviceMesh, placement_fn: PlacementFn | None, whole_mesh: WholeMesh | None = None
) -> MakeGroup:
    """Groups of the code door. `mesh` is the data-parallel one, a part of `whole_mesh` if that is given."""

    def make(name: str, records: list[ParameterRecord], precision: GroupPrecision) -> ShardGroup:
        dims = [placement_dim(r, placement_fn(r.param) if placement_fn else None) for r in records]
        # All of them before the first parameter is swapped: a refusal leaves the module as it was.
        specs = [spec_of(r, mesh, plan.axes, d, whole_mesh) for r, d in zip(records, dims, strict=True)]
        layout = plan_dim_layout(
            [tuple(r.shape) for r in records], dims, plan.axes.shard.size, [r.fqn for r in records]
        )
        buffer = _new_buffer(
            layout, plan.axes, precision, plan.device, plan.sharding.parameter is Rest.REPLICATE
        )
        if is_extended(records[0].local):
            if plan.tiers is not ON_DEVICE:
                raise UnsupportedError(
                    f"{records[0].fqn}: a {type(records[0].param).__name__} gathers in ways of its own and cannot rest "
                    "on a tier; leave offload_policy out for its module"
                )
            return _extended(name, records, precision, plan, mesh, layout, specs)
        on_meta = any(r.local.is_meta for r in records)
        if on_meta:
            buffer.replace_shard(torch.empty(layout.shard_numel, dtype=precision.master, device="meta"))
            buffer.release()
        else:
            fill(buffer, records, plan)
        registrations = [
            ShardedParameter(r, view, buffer.local(i, buffer.shard), spec)
            for i, (r, view, spec) in enumerate(zip(records, buffer.views, specs, strict=True))
        ]
        if whole_mesh is not None:
            for registration in registrations:
                registration.reduce_along(whole_mesh.data_parallel)
        group = ShardGroup(name, plan.sharding, plan.axes, precision, buffer, registrations)
        group.tiers = plan.tiers
        if not on_meta:
            group.adopt()
            _rest(group)
        return group

    return make


def _rest(group: ShardGroup, *, keep_objects: bool = False) -> None:
    """Once there are values: let them rest where the policy says."""
    if group.tiers is not ON_DEVICE:
        from unishard.sharding.resting_dtensor import rest_parameters

        rest_parameters(group, keep_objects=keep_objects)


def _extended(
    name: str,
    records: list[ParameterRecord],
    precision: GroupPrecision,
    plan: ShardPlan,
    mesh: DeviceMesh,
    layout: DimLayout,
    specs: list[Spec],
) -> ShardGroup:
    """A group of parameters that gather through their own extensions."""
    buffer = ExtendedBuffer(
        layout,
        plan.axes.shard,
        compute=precision.compute,
        master=precision.master,
        device=plan.device,
        resident=False,
    )
    placeholder = torch.empty(0, dtype=precision.compute)
    registrations = [
        ShardedParameter(
            r,
            placeholder,
            local_part(r, buffer, i, plan.axes, plan.broadcast),
            specs[i],
        )
        for i, r in enumerate(records)
    ]
    group = ExtendedGroup(name, plan.sharding, plan.axes, precision, buffer, registrations)
    group.prepare(mesh, plan.policy)
    return group


def _new_buffer(
    layout: DimLayout, axes: Axes, precision: GroupPrecision, device: torch.device, resident: bool
) -> DimBuffer:
    return DimBuffer(
        layout,
        axes.shard,
        compute=precision.compute,
        master=precision.master,
        device=device,
        resident=resident,
    )


def sharded_parameters(group: ShardGroup) -> list[ShardedParameter]:
    return [r for r in group.registrations if isinstance(r, ShardedParameter)]


@torch.no_grad()
def deliver(groups: Sequence[ShardGroup]) -> None:
    """Hand reduced gradients to the sharded parameters. A parameter that no rank used keeps its gradient as it is."""
    for axes in dict.fromkeys(g.axes for g in groups):
        members = [g for g in groups if g.axes == axes]
        touched = agree_on_touched(members, axes)
        for group, used in zip(members, touched, strict=True):
            shard = group.gradients.shard
            # A reduction that did not cross replicas leaves its sum inside for a later backward.
            if shard is None or not group.gradients.fresh_sum:
                continue
            if group.gradients.resting is not None:
                from unishard.sharding.resting_dtensor import deliver_resting

                given = [r.zero_if_unused and r.sharded.requires_grad for r in sharded_parameters(group)]
                deliver_resting(group, [i for i, zeros in enumerate(given) if zeros or i in used])
                group.gradients.fresh_sum = False
                group.gradients.touched.clear()
                continue
            for index, registration in enumerate(sharded_parameters(group)):
                if index in used or (registration.zero_if_unused and registration.sharded.requires_grad):
                    registration.accept(group.buffer.local(index, shard))
            group.gradients.shard = None
            group.gradients.touched.clear()


def was_replaced(group: ShardGroup) -> bool:
    """Whether a module shows other parameters than the group's, or a local tensor outside the group's shard."""
    shard, layout = group.buffer.shard, group.buffer.layout
    for index, registration in enumerate(sharded_parameters(group)):
        home = registration.homes[0]
        current = home.module._parameters[home.name]
        known = (registration.sharded, registration.whole, registration.resting)
        if current is not None and all(current is not param for param in known):
            return True
        if isinstance(group, ExtendedGroup) or not isinstance(layout, DimLayout) or group.resting is not None:
            continue
        sharded: Any = registration.sharded
        local = sharded._local_tensor
        if local.device != shard.device:
            return True
        # By addresses: the first forward may run under a functional transform, which gives new views no storage.
        expected = shard.data_ptr() + layout.shard_offsets[index] * shard.element_size()
        if not local.is_meta and local.numel() and local.data_ptr() != expected:
            return True
    return False


def require_same_kind(group: ShardGroup, convert: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Raise `UnsupportedError` if `convert`, of `module.to(...)`, gives resting parameters another dtype or device."""
    if group.resting is None:
        return
    before = torch.empty(0, dtype=group.precision.master, device=group.buffer.device)
    after = convert(before)
    if (after.dtype, after.device) != (before.dtype, before.device):
        raise UnsupportedError(
            f"{group.name}: its parameters rest on a tier as {before.dtype} for {before.device} and cannot become "
            f"{after.dtype} on {after.device}; convert the model before fully_shard"
        )


@torch.no_grad()
def resync(group: ShardGroup) -> None:
    """Take over what was done to the sharded parameters behind the group's back.

    `module.to(...)`, `to_empty`, `load_state_dict(assign=True)` and the like replace tensors; afterwards the group's
    flat shard holds their values again and each DTensor's local tensor is a view of it.
    """
    if isinstance(group, ExtendedGroup):
        return group.take_over()
    if group.resting is not None:
        from unishard.sharding.resting_dtensor import take_over

        return take_over(group)
    registrations = sharded_parameters(group)
    for registration in registrations:
        home = registration.homes[0]
        current = home.module._parameters[home.name]
        known = (registration.sharded, registration.whole, registration.resting)
        if current is not None and all(current is not param for param in known):
            if not isinstance(current, DTensor):
                raise ShardingError(
                    f"{registration.fqn} was replaced by a plain tensor; a sharded module takes DTensors: load with "
                    "torch.distributed.checkpoint.state_dict.set_model_state_dict(..., full_state_dict=True)"
                )
            registration.sharded = current
    locals_ = [r.sharded._local_tensor for r in registrations]  # pyright: ignore[reportAttributeAccessIssue]
    expected = [group.buffer.local(i, group.buffer.shard) for i in range(len(registrations))]
    same = all(
        a.device == b.device and a.dtype == b.dtype and (a.data_ptr() == b.data_ptr() or not a.numel())
        for a, b in zip(locals_, expected, strict=True)
    )
    if same and not group.buffer.shard.is_meta:
        group.forget_gathered()
        return
    _rebuild(group, registrations, locals_)


def _rebuild(group: ShardGroup, registrations: list[ShardedParameter], locals_: list[torch.Tensor]) -> None:
    dtype, device = locals_[0].dtype, locals_[0].device
    group.precision = resolve_precision(group.policy, dtype)
    layout = group.buffer.layout
    if not isinstance(layout, DimLayout):
        raise ShardingError(f"{group.name}: only groups of the code door can be rebuilt in place")
    real = group.buffer.device if device.type == "meta" else device
    buffer = _new_buffer(layout, group.axes, group.precision, real, group.resident)
    buffer.replace_shard(torch.zeros(layout.shard_numel, dtype=dtype, device=device))
    for index, (registration, local) in enumerate(zip(registrations, locals_, strict=True)):
        target = buffer.local(index, buffer.shard)
        target.copy_(local)
        registration.sharded._local_tensor = _standalone(target)  # pyright: ignore[reportAttributeAccessIssue]
        registration.replace_whole(buffer.views[index])
    if not group.resident:
        buffer.release()
    group.buffer = buffer
    divisor, predivide = group.gradients.divisor, group.gradients.predivide
    group.gradients = GroupGradients(buffer, group.axes, group.precision, group.name)
    group.gradients.divisor, group.gradients.predivide = divisor, predivide
    group.reset()
    if not buffer.shard.is_meta:
        # An optimizer may hold the parameters already.
        _rest(group, keep_objects=True)


def copy_parameter(registration: ShardedParameter) -> nn.Parameter:
    """An independent copy of the sharded parameter, with its gradient and attributes."""
    old: Any = registration.sharded
    new = nn.Parameter(
        registration.spec.wrap(old.to_local().detach().clone()), requires_grad=old.requires_grad
    )
    for key, value in vars(old).items():
        if not hasattr(new, key):
            setattr(new, key, value)
    if old.grad is not None:
        new.grad = registration.spec.wrap(old.grad.to_local().clone())
    return new


def copy_group(group: ShardGroup, homes_of: Callable[[Home], Home], copies: dict[int, Any]) -> ShardGroup:
    """A group over deep copies of `group`'s sharded parameters; `copies` maps id(parameter) to its copy."""
    layout = group.buffer.layout
    if not isinstance(layout, DimLayout) or isinstance(group, ExtendedGroup):
        raise ShardingError(
            f"{group.name}: only groups of the code door without all-gather extensions can be copied; copy the model "
            "before fully_shard"
        )
    buffer = _new_buffer(layout, group.axes, group.precision, group.buffer.device, group.resident)
    buffer.replace_shard(group.buffer.shard.detach().clone())
    if not group.resident:
        buffer.release()
    registrations = []
    for index, old in enumerate(sharded_parameters(group)):
        sharded = copies[id(old.sharded)]
        record = ParameterRecord(old.fqn, old.whole, [homes_of(h) for h in old.homes])
        new = ShardedParameter(record, buffer.views[index], buffer.local(index, buffer.shard), old.spec)
        # The copy that deepcopy made is the one other copied objects may refer to (an optimizer's state).
        sharded._local_tensor = _standalone(buffer.local(index, buffer.shard))
        new.sharded = sharded
        for home in new.homes:
            home.register(sharded)
        registrations.append(new)
    made = ShardGroup(group.name, group.sharding, group.axes, group.precision, buffer, registrations)
    made.policy = group.policy
    return made
