"""All-gather extensions of the code door: parameters whose local tensor says itself what travels.

A tensor subclass (or a tensor that users patched) with `fsdp_pre_all_gather` and `fsdp_post_all_gather` decides what
is sent and how the whole parameter is made of what arrives, as in FSDP2 (a float8 weight gathers bytes and scales).
Such parameters form groups of their own: every input is gathered separately, gradients go the usual way.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from unishard.dist.collectives import Pending, Works
from unishard.dist.in_place import GatherPart
from unishard.dist.mesh import Axes
from unishard.errors import MisuseError, ShardingError, StateError, UnsupportedError
from unishard.sharding.buffer import DimBuffer
from unishard.sharding.group import ShardGroup
from unishard.sharding.parameter import ParameterRecord
from unishard.sharding.precision import MixedPrecision


def is_extended(param: torch.Tensor) -> bool:
    """Whether `param` takes the per-parameter path: a wrapper subclass, or a tensor with the hooks."""
    return is_traceable_wrapper_subclass(param) or hasattr(param, "fsdp_pre_all_gather")


def broadcast_inner(tensor: torch.Tensor, axes: Axes) -> None:
    """Give every rank the first rank's plain tensors inside a wrapper subclass, in place."""
    if not is_traceable_wrapper_subclass(tensor):
        axes.broadcast(tensor.detach())
        return
    for name in tensor.__tensor_flatten__()[0]:
        broadcast_inner(getattr(tensor, name), axes)


class ExtendedBuffer(DimBuffer):
    """Only the layout of gradients: local tensors rest in the parameters, gathered ones in `GatheredParameter`."""

    def forget_memory(self, device: torch.device) -> None:
        self.release()
        self.shard = torch.empty(0, dtype=self.master, device=device)

    def gather(self, label: str = "") -> Pending:
        raise StateError("a parameter with all-gather extensions is gathered by its own group")

    @property
    def reads_in_place(self) -> bool:
        return False

    def gather_part(self) -> GatherPart:
        raise StateError("a parameter with all-gather extensions is gathered by its own group")

    def absorb(self) -> None:
        raise UnsupportedError(
            "gather(modifier_rank=...) cannot write back a parameter with all-gather extensions; write its local "
            "tensor (param.to_local()) instead"
        )


class GatheredParameter:
    """The memory of one whole parameter: what was gathered, and what the extension made of it."""

    def __init__(self, shape: torch.Size, compute: torch.dtype) -> None:
        self.whole: nn.Parameter | None = None
        self._shape = shape
        self._compute = compute
        self._outputs: list[torch.Tensor] = []
        self._targets: list[torch.Tensor] = []
        self._shapes: list[torch.Size] = []
        self._metadata: Any = None
        self._storages: dict[int, tuple[torch.UntypedStorage, int]] = {}

    def start(self, local: Any, axes: Axes, arguments: Sequence[Any]) -> list[Pending]:
        """Ask the local tensor what to send and gather each input. All ranks call together."""
        inputs, self._metadata = _pre_all_gather(local, arguments)
        self._shapes = [tensor.shape for tensor in inputs]
        self._allocate(inputs, axes.shard.size)
        flat = [_plain(tensor.contiguous().view(-1)) for tensor in inputs]
        for tensor, target in zip(flat, self._targets, strict=True):
            target.chunk(axes.shard.size)[axes.shard.rank].copy_(tensor)
        return [axes.shard.all_gather(t, source=s) for s, t in zip(flat, self._targets, strict=True)]

    def _allocate(self, inputs: Sequence[torch.Tensor], ranks: int) -> None:
        for storage, size in self._storages.values():
            if storage.size() == 0:
                storage.resize_(size)
        sizes = [(ranks * tensor.numel(), tensor.dtype) for tensor in inputs]
        if [(t.numel(), t.dtype) for t in self._targets] == sizes:
            return
        self._outputs = [
            torch.empty(n, dtype=d, device=t.device) for (n, d), t in zip(sizes, inputs, strict=True)
        ]
        # Refilling through a second tensor leaves the version counters of what autograd saved alone.
        self._targets = [
            t.new_empty(0).set_(t.untyped_storage(), 0, tuple(t.shape), (1,)) for t in self._outputs
        ]

    def finish(self, local: Any, requires_grad: bool) -> nn.Parameter:
        """What arrived becomes the whole parameter: the same object every time."""
        gathered = tuple(
            output.view(-1, *shape[1:]) for output, shape in zip(self._outputs, self._shapes, strict=True)
        )
        if self.whole is not None:
            local.fsdp_post_all_gather(gathered, self._metadata, self._compute, out=self.whole)
            return self.whole
        whole, inner = local.fsdp_post_all_gather(gathered, self._metadata, self._compute)
        for tensor in (*self._outputs, *inner):
            storage = tensor.untyped_storage()
            self._storages[storage._cdata] = (storage, storage.size())
        if whole.shape != self._shape:
            whole = whole.narrow(0, 0, self._shape[0])
        self.whole = nn.Parameter(whole, requires_grad=requires_grad)
        return self.whole

    def release(self) -> None:
        for storage, _ in self._storages.values():
            storage.resize_(0)


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    """What travels is memory: a tensor subclass is copied out of whatever holds its value."""
    if type(tensor) is torch.Tensor:
        return tensor
    return torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device).copy_(tensor)


def _pre_all_gather(local: Any, arguments: Sequence[Any]) -> tuple[tuple[torch.Tensor, ...], Any]:
    if not (hasattr(local, "fsdp_pre_all_gather") and hasattr(local, "fsdp_post_all_gather")):
        raise MisuseError(
            f"{type(local).__name__} is a tensor subclass: to be gathered it needs both fsdp_pre_all_gather and "
            "fsdp_post_all_gather; define them on the class"
        )
    wanted = len(inspect.signature(local.fsdp_pre_all_gather).parameters)
    if wanted not in (1, len(arguments)):
        raise MisuseError(
            f"{type(local).__name__}.fsdp_pre_all_gather takes {wanted} arguments; it is called with (mesh), or with "
            "(mesh, outer_size, outer_stride, module, mp_policy)"
        )
    inputs, metadata = local.fsdp_pre_all_gather(*arguments[:wanted])
    return (inputs,) if isinstance(inputs, torch.Tensor) else tuple(inputs), metadata


class ExtendedGroup(ShardGroup):
    """The parameters of one unit that gather through their extensions."""

    registrations: list[Any]

    def prepare(self, mesh: DeviceMesh, policy: MixedPrecision) -> None:
        """Finish construction: the mesh and the policy that extensions are told."""
        if self.resident:
            raise UnsupportedError(
                f"{self.registrations[0].fqn}: all-gather extensions need sharded parameters; use sharding=ZERO3"
            )
        self._mesh = mesh if mesh.ndim == 1 else mesh[list(mesh.mesh_dim_names or ())[-1]]
        self._told = policy
        self._memory: list[GatheredParameter] = []
        self.take_over()

    def take_over(self) -> None:
        """Start from the parameters that modules show now; their dtype or device may have changed."""
        for registration in self.registrations:
            home = registration.homes[0]
            current = home.module._parameters[home.name]
            if current is not None and current is not registration.whole:
                registration.sharded = current
            registration.is_whole = False
            for other in registration.homes:
                other.register(registration.resting)
        self._memory = [
            GatheredParameter(r.sharded.shape, self.precision.compute) for r in self.registrations
        ]
        self.reset()
        self.shown_whole = False
        if isinstance(self.buffer, ExtendedBuffer):
            self.buffer.forget_memory(self.registrations[0].sharded._local_tensor.device)

    def _version(self) -> int:
        return sum(r.visible._version for r in self.registrations)

    def unshard(self) -> None:
        if self.is_whole:
            return
        pending: list[Pending] = []
        with torch.inference_mode(False), torch.no_grad():
            for registration, memory in zip(self.registrations, self._memory, strict=True):
                sharded = registration.sharded
                if sharded.is_meta:
                    raise StateError(
                        f"{self.name}: parameter {registration.fqn} is on the meta device; materialize the model "
                        "first: model.to_empty(device=...) and initialize it, or load a checkpoint"
                    )
                module = registration.homes[0].module
                arguments = (self._mesh, sharded.shape, sharded.stride(), module, self._told)
                pending += memory.start(sharded._local_tensor, self.axes, arguments)
        self._pending = Works(pending)

    def wait(self) -> None:
        if self._pending is None:
            return self.show_whole()
        self._pending.wait()
        self._pending = None
        self._gathered = True
        with torch.inference_mode(False), torch.no_grad():
            for registration, memory in zip(self.registrations, self._memory, strict=True):
                local = registration.sharded._local_tensor
                registration.use_whole(memory.finish(local, registration.sharded.requires_grad))
        self.show_whole()

    def reshard(self, keep_within: Any = None) -> None:
        """Release the whole parameters; extensions know no smaller subgroup, so `keep_within` changes nothing."""
        if self._pending is not None:
            self.wait()
        self.show_sharded()
        if self._gathered:
            for memory in self._memory:
                memory.release()
            self._gathered = False

    @property
    def persistent_bytes(self) -> dict[str, int]:
        sizes = [r.sharded._local_tensor for r in self.registrations]
        gradient = self.gradients.shard
        return {
            "parameters": sum(t.numel() * t.element_size() for t in sizes),
            "gradients": 0 if gradient is None else gradient.numel() * gradient.element_size(),
        }


@torch.no_grad()
def local_part(
    record: ParameterRecord, buffer: DimBuffer, index: int, axes: Axes, broadcast: bool
) -> torch.Tensor:
    """This rank's chunk of a wrapper subclass: the same subclass, its own memory."""
    whole = record.param.detach()
    if whole.dim() == 0:
        raise ShardingError(
            f"{record.fqn}: a scalar parameter cannot be sharded; make it 1-D with one element"
        )
    if broadcast:
        broadcast_inner(whole, axes)
    start, length = buffer.layout.chunk(index, axes.shard.rank)
    return whole.narrow(buffer.layout.dims[index], start, length).clone()
