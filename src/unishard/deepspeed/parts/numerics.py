"""`runtime.utils`: partitions, norms, memory reports and other small functions that scripts call."""

from __future__ import annotations

import importlib
import math
import os
import random
from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate
from math import prod
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from unishard.deepspeed.parts.accelerator import get_accelerator
from unishard.errors import StateError

Tensors = Tensor | Iterable[Tensor]


# partitions -------------------------------------------------------------------------------------------------


def prefix_sum_inc(weights: Sequence[float]) -> list[float]:
    """Running sums.

    >>> prefix_sum_inc([3, 4, 5])
    [3, 7, 12]
    """
    return list(accumulate(weights))


def partition_uniform(num_items: int, num_parts: int) -> list[int]:
    """Bounds of `num_parts` runs of `num_items` items, the longer ones first; parts beyond the items are empty.

    >>> partition_uniform(7, 3)
    [0, 3, 5, 7]
    """
    if num_items <= num_parts:
        return [min(part, num_items) for part in range(num_parts + 1)]
    length, longer = divmod(num_items, num_parts)
    return [part * length + min(part, longer) for part in range(num_parts + 1)]


def partition_balanced(weights: Sequence[float], num_parts: int) -> list[int]:
    """Bounds of `num_parts` runs whose sums lie as close together as possible (smallest difference of extremes).

    >>> partition_balanced([1, 1, 1, 3], 2)
    [0, 3, 4]
    """
    items = len(weights)
    if items <= num_parts:
        return partition_uniform(items, num_parts)
    sums = [0.0, *accumulate(map(float, weights))]
    # Per (end, parts): spread, largest and smallest sum of the best division found, and where its last run begins.
    best: dict[tuple[int, int], tuple[float, float, float, int]] = {(0, 0): (0.0, 0.0, math.inf, 0)}
    for end in range(1, items + 1):
        for parts in range(1, min(end, num_parts) + 1):
            for start in range(parts - 1, end):
                before = best.get((start, parts - 1))
                if before is None:
                    continue
                run = sums[end] - sums[start]
                high, low = max(before[1], run), min(before[2], run)
                known = best.get((end, parts))
                if known is None or high - low < known[0]:
                    best[end, parts] = high - low, high, low, start
    bounds = [items]
    for parts in range(num_parts, 0, -1):
        bounds.append(best[bounds[-1], parts][3])
    return bounds[::-1]


class PartitionedTensor:
    """A tensor of which every rank of `group` keeps a run of the flattened elements."""

    def __init__(self, tensor: Tensor, group: Any, partition_meta: Any = None) -> None:
        self.group = group
        self.num_parts, self.rank = dist.get_world_size(group), dist.get_rank(group)
        self.orig_size, self.orig_device = list(tensor.size()), tensor.device
        self.partition = partition_uniform(tensor.numel(), self.num_parts)
        start, stop = self.partition[self.rank : self.rank + 2]
        self.local_data = tensor.detach().reshape(-1)[start:stop].clone()

    @classmethod
    def from_meta(cls, meta: Tensor, local_part: Tensor, group: Any, device: Any = None) -> PartitionedTensor:
        """What `to_meta` described, with this rank's elements `local_part`."""
        numbers = [int(n) for n in meta.tolist()]
        made = cls.__new__(cls)
        made.group, made.local_data = group, local_part
        made.orig_size = numbers[1 : 1 + numbers[0]]
        made.num_parts, made.rank = numbers[1 + numbers[0]], dist.get_rank(group)
        made.partition = partition_uniform(prod(made.orig_size), made.num_parts)
        made.orig_device = torch.device(device) if device is not None else local_part.device
        return made

    def to_meta(self) -> Tensor:
        """Number of dims, size, number of parts: what another rank needs besides its elements."""
        numbers = [len(self.orig_size), *self.orig_size, self.num_parts]
        return torch.tensor(numbers, dtype=torch.int64, device=self.orig_device)

    def full_size(self) -> list[int]:
        return self.orig_size

    def local_size(self) -> torch.Size:
        return self.local_data.size()

    def data(self) -> Tensor:
        """This rank's elements."""
        return self.local_data

    def full(self, device: Any = None) -> Tensor:
        """The whole tensor. All ranks of the group call together."""
        flat = self.local_data.new_zeros(prod(self.orig_size))
        start, stop = self.partition[self.rank : self.rank + 2]
        flat[start:stop].copy_(self.local_data)
        dist.all_reduce(flat, group=self.group)
        return flat.view(self.orig_size).to(device or self.orig_device)


def reduce_scatter_coalesced(tensors: Sequence[Tensor], group: Any = None) -> list[Tensor]:
    """Mean of each tensor over ranks, of which this rank gets its 1/size of the flattened elements (padded)."""
    size, rank = dist.get_world_size(group), dist.get_rank(group)
    parts = []
    for tensor in tensors:
        length = -(-tensor.numel() // size)
        padded = tensor.new_zeros(length * size)
        padded[: tensor.numel()].copy_(tensor.reshape(-1))
        dist.all_reduce(padded.div_(size), group=group)
        parts.append(padded[rank * length : min((rank + 1) * length, tensor.numel())].clone())
    return parts


# norms ------------------------------------------------------------------------------------------------------


def _norm(tensors: Sequence[Tensor], norm_type: float) -> Tensor:
    if not tensors:
        return torch.zeros(())
    return torch.nn.utils.get_total_norm([t.detach().float() for t in tensors], norm_type)


def _over_model_parallel(norm: Tensor, norm_type: float, mpu: Any) -> Tensor:
    if mpu is None or mpu.get_model_parallel_world_size() == 1:
        return norm
    group = mpu.get_model_parallel_group()
    if math.isinf(norm_type):
        dist.all_reduce(norm, op=dist.ReduceOp.MAX, group=group)
        return norm
    powers = norm**norm_type
    dist.all_reduce(powers, group=group)
    return powers ** (1.0 / norm_type)


def _listed(tensors: Tensors) -> list[Tensor]:
    return [tensors] if isinstance(tensors, Tensor) else list(tensors)


def get_global_norm(norm_list: Iterable[float]) -> float:
    """The 2-norm of parts whose 2-norms are given; infinite if one is not finite, or -1, which stands for that.

    >>> get_global_norm([3.0, 4.0])
    5.0
    """
    norms = [float(norm) for norm in norm_list]
    return math.hypot(*norms) if all(0 <= norm < math.inf for norm in norms) else math.inf


def combine_grad_norm_groups(norm_groups: Iterable[torch.Tensor], norm_type: float = 2.0) -> torch.Tensor:
    """As `get_global_norm`, of tensors and for any norm.

    >>> combine_grad_norm_groups([torch.tensor(3.0), torch.tensor(4.0)])
    tensor(5.)
    """
    norms = torch.stack([norm.reshape(()).float() for norm in norm_groups])
    valid = torch.isfinite(norms).all() & (norms >= 0).all()
    return torch.where(valid, torch.linalg.vector_norm(norms, norm_type), math.inf)


def get_global_norm_of_tensors(
    input_tensors: Tensors, norm_type: float = 2, mpu: Any = None, **ignored: Any
) -> float:
    """The norm of all elements together; infinite if it is not finite."""
    norm = _over_model_parallel(_norm(_listed(input_tensors), float(norm_type)), float(norm_type), mpu).item()
    return norm if math.isfinite(norm) else math.inf


def get_grad_norm(parameters: Tensors, norm_type: float = 2, mpu: Any = None) -> float:
    """The norm of the parameters' gradients; -1 if it is not finite."""
    grads = [p.grad for p in _listed(parameters) if p.grad is not None]
    norm = get_global_norm_of_tensors(grads, norm_type, mpu)
    return norm if math.isfinite(norm) else -1


def get_flattened_grad_norm(
    parameters: Tensors, norm_type: float = 2, mpu: Any = None, grad_norm_mask: Any = None
) -> float:
    """As `get_grad_norm`."""
    return get_grad_norm(parameters, norm_type, mpu)


def get_weight_norm(parameters: Tensors, norm_type: float = 2, mpu: Any = None) -> float:
    """The norm of the parameters; -1 if it is not finite."""
    norm = get_global_norm_of_tensors(parameters, norm_type, mpu)
    return norm if math.isfinite(norm) else -1


def clip_grad_norm_(parameters: Tensors, max_norm: float, norm_type: float = 2, mpu: Any = None) -> Tensor:
    """Scale the gradients of plain parameters to a norm of at most `max_norm`; returns the norm before.

    Under the engine `step()` clips, by `gradient_clipping`.
    """
    grads = [p.grad for p in _listed(parameters) if p.grad is not None]
    total = _over_model_parallel(_norm(grads, float(norm_type)), float(norm_type), mpu)
    factor = (max_norm / (total + 1e-6)).clamp(max=1.0)
    for grad in grads:
        grad.detach().mul_(factor.to(grad.device))
    return total


def clip_tensors_by_global_norm(
    input_tensors: Sequence[Tensor],
    max_norm: float = 1.0,
    global_norm: float | None = None,
    mpu: Any = None,
    eps: float = 1e-6,
) -> float:
    """Scale tensors to a common norm of at most `max_norm`; returns the norm before."""
    norm = get_global_norm_of_tensors(input_tensors, mpu=mpu) if global_norm is None else global_norm
    factor = max_norm / (norm + eps)
    if factor < 1:
        for tensor in input_tensors:
            tensor.detach().mul_(factor)
    return norm


def has_inf_or_nan(x: Tensor) -> Tensor:
    """Whether any element is not finite: a tensor of one float."""
    return (~torch.isfinite(x.float())).any().float()


def mask_nan_or_inf_with_val_inplace(input: Tensor, device: Any = None, val: float = -1.0) -> None:
    """Write `val` over the elements of `input` that are not finite.

    >>> norm = torch.tensor([float("inf"), 2.0])
    >>> mask_nan_or_inf_with_val_inplace(norm)
    >>> norm.tolist()
    [-1.0, 2.0]
    """
    input.masked_fill_(~torch.isfinite(input), val)


class CheckOverflow:
    """Whether gradients of plain parameters overflowed on any rank."""

    def __init__(
        self,
        param_groups: Iterable[Iterable[Tensor]] | None = None,
        mpu: Any = None,
        zero_reduce_scatter: bool = False,
        deepspeed: Any = None,
    ) -> None:
        self.mpu = mpu
        self.params = None if param_groups is None else [p for group in param_groups for p in group]

    def check(self, param_groups: Iterable[Iterable[Tensor]] | None = None) -> bool:
        """Look at the given groups, or at those of the constructor. All ranks call together."""
        params = self.params if param_groups is None else [p for group in param_groups for p in group]
        if params is None:
            raise ValueError("CheckOverflow.check needs param_groups, here or in the constructor")
        return self.has_overflow(params)

    def has_overflow(self, params: Iterable[Tensor], has_moe_params: bool | None = None) -> bool:
        """Whether a gradient of `params` is not finite on any rank."""
        return self._anywhere(any(bool(has_inf_or_nan(p.grad)) for p in params if p.grad is not None))

    def check_using_norm(self, norm_group: Iterable[float], reduce_overflow: bool = True) -> bool:
        """Whether a norm is -1 or not finite, on any rank."""
        bad = any(float(norm) == -1 or not math.isfinite(float(norm)) for norm in norm_group)
        return self._anywhere(bad) if reduce_overflow else bad

    @staticmethod
    def _anywhere(here: bool) -> bool:
        flag = torch.tensor([float(here)], device=get_accelerator().current_device_name())
        if dist.is_initialized():
            dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return bool(flag.item())


# memory and the rest ----------------------------------------------------------------------------------------


def get_ma_status() -> int:
    """Bytes in use on rank 0's device, and 0 elsewhere."""
    return get_accelerator().memory_allocated() if not dist.is_initialized() or dist.get_rank() == 0 else 0


def see_memory_usage(message: str, force: bool = False) -> None:
    """Print rank 0's memory, if `force`."""
    if force and (not dist.is_initialized() or dist.get_rank() == 0):
        device = get_accelerator()
        used, peak = device.memory_allocated() / 2**30, device.max_memory_allocated() / 2**30
        print(f"{message}\nMA {used:.2f} GB  Max_MA {peak:.2f} GB")
        device.reset_peak_memory_stats()


def memory_status(msg: str, print_rank: int = -1, reset_max: bool = False) -> None:
    """Print one line about the memory of `print_rank`, or of every rank."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    if print_rank in (-1, rank):
        print(
            f"RANK={rank} MEMSTATS {msg} current alloc={get_accelerator().memory_allocated() / 2**30:.4f}GB"
        )


def empty_cache() -> None:
    """Give cached device memory back."""
    get_accelerator().empty_cache()


def bytes_of(item: Any) -> int:
    """Bytes of all tensors in a tree of lists, tuples and dicts."""
    from torch.utils import _pytree as pytree

    return sum(t.numel() * t.element_size() for t in pytree.tree_leaves(item) if isinstance(t, Tensor))


get_tensor_bytes = bytes_of


def ensure_directory_exists(filename: str) -> None:
    """Make the folder that `filename` lies in."""
    os.makedirs(os.path.dirname(filename) or ".", exist_ok=True)


def set_random_seed(seed: int) -> None:
    """Seed Python, numpy and torch."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def is_model_parallel_parameter(p: Any) -> bool:
    """Whether libraries marked `p` as split over model-parallel ranks."""
    return bool(getattr(p, "model_parallel", False) or getattr(p, "tensor_model_parallel", False))


def move_to_device(item: Any, device: Any, criterion_func: Callable[[Any], bool] = lambda x: True) -> Any:
    """`item` with the tensors in it that meet the criterion on `device`."""
    from torch.utils import _pytree as pytree

    return pytree.tree_map(lambda x: x.to(device) if isinstance(x, Tensor) and criterion_func(x) else x, item)


def copy_to_device(item: Any, device: Any, criterion_func: Callable[[Any], bool] = lambda x: True) -> Any:
    """As `move_to_device`, with copies of tensors that lie there already."""
    from torch.utils import _pytree as pytree

    def copied(x: Any) -> Any:
        return x.detach().to(device, copy=True) if isinstance(x, Tensor) and criterion_func(x) else x

    return pytree.tree_map(copied, item)


def align_dense_tensors(tensor_list: list[Tensor], alignment: int) -> list[Tensor]:
    """The tensors, and zeros after them until their elements are a multiple of `alignment`."""
    missing = -sum(t.numel() for t in tensor_list) % alignment
    return [*tensor_list, tensor_list[0].new_zeros(missing)] if missing else tensor_list


def get_only_unique_item(items: Iterable[Any]) -> Any:
    """The one value that all items have. Raises `RuntimeError` if there are several, or none."""
    unique = set(items)
    if len(unique) != 1:
        raise RuntimeError(f"all items should be equal, and are {unique}")
    return unique.pop()


def call_to_str(base: str, *args: Any, **kwargs: Any) -> str:
    """How a call is written.

    >>> call_to_str("f", 1, b=2)
    'f(1, b=2)'
    """
    parts = [repr(arg) for arg in args] + [f"{key}={value!r}" for key, value in kwargs.items()]
    return f"{base}({', '.join(parts)})"


def filter_empty_parameters(params: Iterable[Any]) -> list[Any]:
    """Parameters (or groups of them) without those that have no elements."""
    kept = []
    for param in params:
        if isinstance(param, dict):
            kept.append({**param, "params": [p for p in param["params"] if p.numel()]})
        elif param.numel():
            kept.append(param)
    return kept


class DummyOptim:
    """Stands for no optimizer."""

    def __init__(self, params: Iterable[nn.Parameter]) -> None:
        self.param_groups = [{"params": params}]


def noop_decorator(func: Any) -> Any:
    """Returns `func`."""
    return func


class noop_context:
    """A context that does nothing."""

    def __enter__(self) -> None: ...

    def __exit__(self, *failure: Any) -> None: ...


def check_internal_apis_for_count_used_parameters() -> bool:
    """Whether this torch can tell which parameters the backward under way reaches."""
    asked = ("_current_graph_task_id", "_will_engine_execute_node")
    return hasattr(torch.autograd.graph, "_get_grad_fn_or_grad_acc") and all(
        hasattr(torch._C, name) for name in asked
    )


def count_used_parameters_in_backward(parameters: Sequence[Any]) -> int:
    """How many of `parameters` get a gradient in the backward that is running.

    Where torch cannot tell, all that want one count.

    Raises:
        StateError: no backward is running.
    """
    trained = [p for p in parameters if isinstance(p, Tensor) and p.requires_grad]
    # By its public name: scripts replace it there.
    surface = importlib.import_module("unishard.deepspeed.runtime.utils")
    if not surface.check_internal_apis_for_count_used_parameters():
        return len(trained)
    if torch._C._current_graph_task_id() == -1:
        raise StateError(
            "count_used_parameters_in_backward() must be called during backward execution, from a hook"
        )
    with torch.enable_grad():
        nodes = [torch.autograd.graph._get_grad_fn_or_grad_acc(p) for p in trained]
    return sum(torch._C._will_engine_execute_node(node) for node in nodes)


def split_half_float_double(tensors: Iterable[Tensor]) -> list[list[Tensor]]:
    """Dense fp16, fp32, fp64 and bf16 tensors by dtype, in this order; dtypes that do not occur are left out.

    >>> [len(same) for same in split_half_float_double([torch.ones(1), torch.ones(1).bfloat16(), torch.ones(2)])]
    [2, 1]
    """
    dense = [t for t in tensors if t.layout is torch.strided]
    by_dtype = [
        [t for t in dense if t.dtype == d] for d in (torch.half, torch.float, torch.double, torch.bfloat16)
    ]
    return [same for same in by_dtype if same]
