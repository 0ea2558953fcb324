"""Descriptions of pipelines: layers that are built later, and topologies of ranks."""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Callable, Sequence
from itertools import product
from typing import Any

from torch import nn


class LayerSpec:
    """A layer that is built where it is needed.

    >>> LayerSpec(nn.Linear, 2, 3).build()
    Linear(in_features=2, out_features=3, bias=True)
    """

    def __init__(self, typename: type[nn.Module], *module_args: Any, **module_kwargs: Any) -> None:
        if not (isinstance(typename, type) and issubclass(typename, nn.Module)):
            raise RuntimeError(f"LayerSpec takes a class derived from torch.nn.Module, not {typename!r}")
        self.typename, self.module_args, self.module_kwargs = typename, module_args, module_kwargs
        self.global_rank = -1

    def __repr__(self) -> str:
        parts = [repr(arg) for arg in self.module_args]
        parts += [f"{key}={value!r}" for key, value in self.module_kwargs.items()]
        return f"{self.typename.__name__}({', '.join(parts)})"

    def build(self, log: bool = False) -> nn.Module:
        """The layer."""
        return self.typename(*self.module_args, **self.module_kwargs)


class TiedLayerSpec(LayerSpec):
    """A layer that shares weights with others of the same key."""

    def __init__(
        self,
        key: str,
        typename: type[nn.Module],
        *module_args: Any,
        forward_fn: Callable[..., Any] | None = None,
        tied_weight_attr: str | Sequence[str] = "weight",
        **module_kwargs: Any,
    ) -> None:
        super().__init__(typename, *module_args, **module_kwargs)
        self.key, self.forward_fn = key, forward_fn
        self.tied_weight_attr = (
            [tied_weight_attr] if isinstance(tied_weight_attr, str) else list(tied_weight_attr)
        )


class ProcessTopology:
    """Ranks as points of a grid with named axes, the last varying fastest.

    >>> ProcessTopology(["x", "y"], [2, 2]).get_rank(x=1, y=0)
    2
    """

    def __init__(self, axes: Sequence[str], dims: Sequence[int]) -> None:
        self.axes, self.dims = list(axes), list(dims)
        self.ProcessCoord = namedtuple("ProcessCoord", axes)
        points = product(*(range(dim) for dim in dims))
        self.mapping = {self.ProcessCoord(*point): rank for rank, point in enumerate(points)}

    def get_rank(self, **coord_kwargs: int) -> int:
        """The rank at a point, all axes given."""
        if set(coord_kwargs) != set(self.axes):
            raise ValueError(
                f"get_rank needs a coordinate for each of {self.axes}; use filter_match for slices"
            )
        return self.mapping[self.ProcessCoord(**coord_kwargs)]

    def get_axis_names(self) -> list[str]:
        return self.axes

    def get_dim(self, axis: str) -> int:
        """Size of an axis; 0 for one that does not exist."""
        return self.dims[self.axes.index(axis)] if axis in self.axes else 0

    def get_coord(self, rank: int) -> Any:
        """The point of a rank."""
        for coord, found in self.mapping.items():
            if found == rank:
                return coord
        raise ValueError(f"rank {rank} not found in topology")

    def get_rank_repr(
        self,
        rank: int,
        omit_axes: Sequence[str] = ("data", "pipe"),
        inner_sep: str = "_",
        outer_sep: str = "-",
    ) -> str:
        """The coordinates of a rank as a word."""
        coord = self.get_coord(rank)
        names = [axis for axis in self.axes if axis not in omit_axes]
        return outer_sep.join(f"{axis}{inner_sep}{getattr(coord, axis):02d}" for axis in names)

    def get_axis_comm_lists(self, axis: str) -> list[list[int]]:
        """Lists of ranks that differ along `axis` only."""
        if axis not in self.axes:
            return []
        others = [name for name in self.axes if name != axis]
        lists = []
        for point in product(*(range(self.get_dim(name)) for name in others)):
            fixed = dict(zip(others, point, strict=True))
            lists.append([self.get_rank(**fixed, **{axis: place}) for place in range(self.get_dim(axis))])
        return lists

    def filter_match(self, **filter_kwargs: int) -> list[int]:
        """Ranks whose coordinates agree with the given ones."""
        return [
            rank
            for coord, rank in self.mapping.items()
            if all(getattr(coord, name) == value for name, value in filter_kwargs.items())
        ]

    def get_axis_list(self, axis: str, idx: int) -> list[int]:
        """Ranks at place `idx` of an axis."""
        return self.filter_match(**{axis: idx})

    def world_size(self) -> int:
        return len(self.mapping)

    def __str__(self) -> str:
        return str(self.mapping)


class PipeDataParallelTopology(ProcessTopology):
    """Stages of a pipeline, and copies of each."""

    def __init__(self, num_pp: int, num_dp: int) -> None:
        super().__init__(["pipe", "data"], [num_pp, num_dp])


class PipeModelDataParallelTopology(ProcessTopology):
    """Stages of a pipeline, copies of each, and tensor-parallel ranks within."""

    def __init__(self, num_pp: int, num_mp: int, num_dp: int) -> None:
        super().__init__(["pipe", "data", "model"], [num_pp, num_dp, num_mp])
