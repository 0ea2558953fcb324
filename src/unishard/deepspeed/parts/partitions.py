"""Small pieces of `runtime.zero` that libraries import by name."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.utils import _pytree as pytree

from unishard.errors import ShardingError

partitioned_param_data_shape = [0]
"""Shape of a released parameter's data."""

_orig_torch_tensor = torch.tensor
_orig_torch_empty = torch.empty
_orig_torch_zeros = torch.zeros
_orig_torch_arange = torch.arange


class ZeRORuntimeException(ShardingError):
    """What ZeRO cannot do with a model or an optimizer."""


def zero_wrapper_for_fp_tensor_constructor(
    fn: Callable[..., torch.Tensor], target_fp_dtype: torch.dtype, target_device: Any = None
) -> Callable[..., torch.Tensor]:
    """`fn` with results of a floating dtype cast to `target_fp_dtype`. `zero.Init` here casts parameters only."""

    def make(*args: Any, **options: Any) -> torch.Tensor:
        if target_device is not None and options.get("device") is None:
            options["device"] = target_device
        made = fn(*args, **options)
        return made.to(target_fp_dtype) if made.is_floating_point() else made

    return make


def free_param(param: nn.Parameter) -> None:
    """Release a parameter that is whole."""
    from unishard.deepspeed.parts.zero_init import close_parameters

    close_parameters([param])


def get_all_subclasses(cls: type, include_root: bool = True) -> set[type]:
    """Every class derived from `cls`, directly or not."""
    found = {sub for direct in cls.__subclasses__() for sub in get_all_subclasses(direct)}
    return found | ({cls} if include_root else set())


class NoGatherHandle:
    """A gather of what is whole already."""

    def __init__(self, param: nn.Parameter) -> None:
        self._param = param

    def wait(self, **options: Any) -> None:
        return None


class MultipleAllGatherHandles:
    """Several gathers under way, waited for together."""

    def __init__(self, handles: Sequence[Any]) -> None:
        self.handles = list(handles)

    def wait(self, **options: Any) -> None:
        """Return once all are over."""
        for handle in self.handles:
            handle.wait(**options)


def _supported() -> list[type]:
    from unishard.deepspeed.parts import optimizers

    torch_ones = [torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD, torch.optim.Adagrad]
    return [*torch_ones, *optimizers.ALL]


def is_zero_supported_optimizer(optimizer: Any) -> bool:
    """Whether ZeRO steps this optimizer without `zero_allow_untested_optimizer`."""
    return type(optimizer) in _supported()


def __getattr__(name: str) -> Any:
    if name == "ZERO_SUPPORTED_OPTIMIZERS":
        return _supported()
    raise AttributeError(name)


def apply_to_tensors_only(function: Callable[[Any], Any], value: Any, warning_msg_fn: Any = None) -> Any:
    """`function` of every tensor in a tree of lists, tuples and dicts."""
    return pytree.tree_map(lambda leaf: function(leaf) if isinstance(leaf, torch.Tensor) else leaf, value)


def get_lst_from_rank0(lst: Sequence[int]) -> list[int]:
    """Rank 0's list, on every rank."""
    box: list[Any] = [list(lst)]
    dist.broadcast_object_list(box)
    return box[0]


def assert_ints_same_as_other_ranks(ints: Sequence[int]) -> None:
    """Raise `ZeRORuntimeException` on ranks whose numbers differ from rank 0's."""
    first = get_lst_from_rank0(ints)
    if list(ints) != first:
        raise ZeRORuntimeException(f"rank {dist.get_rank()} has {list(ints)}, and rank 0 has {first}")


def assert_lst_len_same_as_other_ranks(lst: Sequence[Any]) -> None:
    """Raise `ZeRORuntimeException` on ranks whose list is not as long as rank 0's."""
    assert_ints_same_as_other_ranks([len(lst)])


def get_mapping_to_flat_buffer(tensors: Iterable[torch.Tensor]) -> list[tuple[torch.Tensor, int, int]]:
    """(tensor, offset, elements) of tensors laid end to end."""
    found, offset = [], 0
    for tensor in tensors:
        found.append((tensor, offset, tensor.numel()))
        offset += tensor.numel()
    return found


def defragment(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Move tensors into one flat buffer, which is returned; each then is a view of it."""
    if len({(t.dtype, t.device) for t in tensors}) != 1:
        raise ZeRORuntimeException("defragment needs tensors of one dtype on one device")
    flat = torch.empty(sum(t.numel() for t in tensors), dtype=tensors[0].dtype, device=tensors[0].device)
    for tensor, offset, numel in get_mapping_to_flat_buffer(tensors):
        flat[offset : offset + numel].copy_(tensor.data.reshape(-1))
        tensor.data = flat[offset : offset + numel].view(tensor.shape)
    return flat
