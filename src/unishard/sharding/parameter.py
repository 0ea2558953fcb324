"""One parameter of a group: its homes in modules, and how it appears there while whole and while sharded.

Two registrations over one buffer. The config door keeps the user's `Parameter` objects and points their data at the
gathered memory or at nothing, as DeepSpeed's users expect. The code door registers a DTensor while sharded and a plain
`Parameter` while whole, as FSDP2's users expect.
"""

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from unishard.errors import ShardingError
from unishard.sharding.single import single_of

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor, Placement


@dataclass(frozen=True)
class Home:
    """A module attribute that holds a parameter; tied weights have several."""

    module: nn.Module
    name: str

    def register(self, param: nn.Parameter) -> None:
        self.module._parameters[self.name] = param


@dataclass
class ParameterRecord:
    """A parameter as found in the model, before it is sharded."""

    fqn: str
    param: nn.Parameter
    homes: list[Home] = field(default_factory=list)

    @property
    def shape(self) -> torch.Size:
        """Shape of `local`, without gathering anything."""
        single = single_of(self.param)
        return self.local.shape if single is None else single.shape

    @property
    def local(self) -> torch.Tensor:
        """What is laid out: the tensor itself, or this rank's part of a tensor-parallel DTensor.

        A parameter released by `init_sharded` is gathered for it: all ranks read together.
        """
        single = single_of(self.param)
        if single is not None:
            return single.whole()
        data: Any = self.param.detach()
        return data.to_local() if is_dtensor(data) else data


def is_dtensor(tensor: torch.Tensor) -> bool:
    """Whether `tensor` is a DTensor, without importing `torch.distributed.tensor` to find out."""
    return hasattr(tensor, "_spec") and any(base.__name__ == "DTensor" for base in type(tensor).__mro__)


def place_of(tensor: Any) -> Any:
    """Where a DTensor whose local part rests on a tier has it (`resting_dtensor.Place`); `None` for other tensors."""
    return getattr(tensor, "place", None)


def find_parameters(
    modules: list[nn.Module],
    prefix_of: dict[nn.Module, str],
    ignored: set[nn.Parameter],
    skip: set[nn.Module],
) -> list[ParameterRecord]:
    """Every parameter under `modules` once, with all its homes, in module order; not below modules in `skip`."""
    found: dict[nn.Parameter, ParameterRecord] = {}
    visited: set[nn.Module] = set()

    def visit(module: nn.Module, prefix: str) -> None:
        if module in visited or module in skip:
            return
        visited.add(module)
        for name, param in module._parameters.items():
            if param is None or param in ignored:
                continue
            record = found.setdefault(param, ParameterRecord(prefix + name, param))
            record.homes.append(Home(module, name))
        for name, child in module._modules.items():
            if child is not None:
                visit(child, f"{prefix}{name}.")

    for module in modules:
        visit(module, prefix_of.get(module, ""))
    return list(found.values())


_taken: dict[int, tuple[weakref.ref[nn.Parameter], str]] = {}


def mark_taken(record: ParameterRecord) -> None:
    """Remember that the user's parameter now lives in a group; the entry goes with the parameter."""
    key = id(record.param)
    _taken[key] = (weakref.ref(record.param, lambda _: _taken.pop(key, None)), record.fqn)


def taken_by(param: nn.Parameter) -> str | None:
    """The name under which `param` was sharded before, if it was."""
    found = _taken.get(id(param))
    return found[1] if found is not None and found[0]() is param else None


class Registration(ABC):
    """How one parameter shows in its modules. `whole` is the tensor that computes and collects a gradient."""

    in_place: bool
    """Whether users keep the same object, so that resident parameters are simply always whole."""

    def __init__(self, record: ParameterRecord) -> None:
        self.fqn = record.fqn
        self.homes = record.homes

    @property
    @abstractmethod
    def visible(self) -> nn.Parameter:
        """The parameter that users see at rest; its `requires_grad` is theirs to flip."""

    @property
    def writes(self) -> int:
        """Grows with every write to the visible parameter."""
        return self.visible._version

    @property
    @abstractmethod
    def whole(self) -> nn.Parameter:
        """The parameter that takes part in compute."""

    @abstractmethod
    def to_whole(self) -> None: ...

    @abstractmethod
    def to_sharded(self) -> None: ...

    def take_grad(self) -> torch.Tensor | None:
        """The fresh local gradient, removed from the parameter so that autograd's next one is fresh as well."""
        grad, self.whole.grad = self.whole.grad, None
        return None if grad is None else self.localize(grad)

    def localize(self, grad: torch.Tensor) -> torch.Tensor:
        if grad.layout is not torch.strided:
            return grad.to_dense()
        return grad


class InPlaceParameter(Registration):
    """The user's own object: data is a view of the gathered buffer, or an empty tensor while released."""

    in_place = True

    def __init__(self, record: ParameterRecord, view: torch.Tensor) -> None:
        super().__init__(record)
        if is_dtensor(record.param):
            raise ShardingError(
                f"{record.fqn}: tensor-parallel DTensor parameters go through unishard.fully_shard, which keeps them "
                "DTensors; the config door shards plain parameters"
            )
        self._param = record.param
        self._view = view
        # A parameter without elements has nothing to release, and keeps its shape.
        shape = (0,) if view.numel() else view.shape
        self._empty = torch.empty(shape, dtype=view.dtype, device=view.device)

    @property
    def visible(self) -> nn.Parameter:
        return self._param

    @property
    def whole(self) -> nn.Parameter:
        return self._param

    def take_grad(self) -> torch.Tensor | None:
        param = self._param
        grad = param.grad
        param.grad = None
        return grad if grad is None or grad.layout is torch.strided else grad.to_dense()

    def to_whole(self) -> None:
        self._param.data = self._view

    def to_sharded(self) -> None:
        self._param.data = self._empty


@dataclass(frozen=True)
class TensorParallel:
    """What a parameter was before it was sharded along the data-parallel axes: a DTensor on its own mesh."""

    mesh: DeviceMesh
    placements: tuple[Placement, ...]
    shape: torch.Size
    stride: tuple[int, ...]
    data_parallel: frozenset[int] = frozenset()
    """Dims of `mesh` that our own reduction covers: a gradient may arrive partial along them."""


def tensor_parallel_of(param: torch.Tensor) -> TensorParallel | None:
    if not is_dtensor(param):
        return None
    dtensor: Any = param
    return TensorParallel(dtensor.device_mesh, tuple(dtensor.placements), dtensor.shape, dtensor.stride())


class SwappedParameter(Registration):
    """A DTensor at rest and a plain parameter in compute, swapped in every home."""

    in_place = False

    def __init__(self, record: ParameterRecord, view: torch.Tensor, sharded: nn.Parameter) -> None:
        super().__init__(record)
        self.tensor_parallel = tensor_parallel_of(record.param)
        self.sharded = sharded
        self._shown_at_rest: nn.Parameter | None = None
        mark_taken(record)
        self._whole = self._make_whole(view, record.param)
        self.is_whole = False
        for home in self.homes:
            home.register(sharded)

    def _make_whole(self, view: torch.Tensor, original: nn.Parameter) -> nn.Parameter:
        if self.tensor_parallel is not None:
            from torch.distributed.tensor import DTensor

            tp = self.tensor_parallel
            view = DTensor.from_local(
                view, tp.mesh, tp.placements, run_check=False, shape=tp.shape, stride=tp.stride
            )
        whole = nn.Parameter(view, requires_grad=original.requires_grad)
        _copy_attributes(original, whole)
        return whole

    def reduce_along(self, dims: frozenset[int]) -> None:
        """Let gradients arrive partial along these dims of the tensor-parallel mesh."""
        if self.tensor_parallel is not None:
            self.tensor_parallel = replace(self.tensor_parallel, data_parallel=dims)

    @property
    def resting(self) -> nn.Parameter:
        """What modules show between uses: the sharded parameter, unless `rest_as` put another in its place."""
        return self.sharded if self._shown_at_rest is None else self._shown_at_rest

    def rest_as(self, param: nn.Parameter | None) -> None:
        """Show `param` between uses; `None` means the sharded parameter again."""
        self._shown_at_rest = param
        if not self.is_whole:
            for home in self.homes:
                home.register(self.resting)

    def replace_sharded(self, param: nn.Parameter, *, keep_object: bool) -> None:
        """Rest as `param` from now on. With `keep_object`, the object that others hold becomes what `param` is."""
        if keep_object:
            torch.utils.swap_tensors(self.sharded, param)
            return
        self.sharded = param
        if not self.is_whole:
            for home in self.homes:
                home.register(self.resting)

    def replace_whole(self, view: torch.Tensor) -> None:
        """Compute with new memory from now on; the module must show the sharded parameter."""
        self._whole = self._make_whole(view, self._whole)

    def use_whole(self, whole: nn.Parameter) -> None:
        """Compute with `whole` from now on."""
        self._whole = whole

    @property
    def visible(self) -> nn.Parameter:
        return self.sharded

    @property
    def whole(self) -> nn.Parameter:
        return self._whole

    def to_whole(self) -> None:
        if not self.is_whole:
            self.is_whole = True
            if self._whole.requires_grad != self.sharded.requires_grad:
                self._whole.requires_grad_(self.sharded.requires_grad)
            for home in self.homes:
                home.register(self._whole)

    def to_sharded(self) -> None:
        if self.is_whole:
            self.is_whole = False
            for home in self.homes:
                home.register(self.resting)

    def localize(self, grad: torch.Tensor) -> torch.Tensor:
        if self.tensor_parallel is not None and is_dtensor(grad):
            dtensor: DTensor = grad  # pyright: ignore[reportAssignmentType]
            wanted = tuple(
                arrived if dim in self.tensor_parallel.data_parallel else own
                for dim, (arrived, own) in enumerate(
                    zip(dtensor.placements, self.tensor_parallel.placements, strict=True)
                )
            )
            if tuple(dtensor.placements) != wanted:
                dtensor = dtensor.redistribute(placements=wanted)
            return dtensor.to_local()
        return super().localize(grad)


def _copy_attributes(source: nn.Parameter, target: nn.Parameter) -> None:
    """Carry over what users or libraries hung on a parameter (`is_embedding`, ...)."""
    for key, value in vars(source).items():
        if not hasattr(target, key):
            setattr(target, key, value)
