"""What every implementation may take for granted. Kernels work on addresses: an unchecked tensor is a crash."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.nn import Parameter

from unishard.errors import KernelError
from unishard.kernels.rules import Rule
from unishard.kernels.target import Target

FLOATS = frozenset({torch.float32, torch.bfloat16, torch.float16})
SHORT_FLOATS = frozenset({torch.bfloat16, torch.float16})
MOMENTS = frozenset({torch.float32, torch.bfloat16})
FP32 = frozenset({torch.float32})

# Exactly these types: a subclass may have no memory of its own, or several.
_PLAIN = frozenset({Tensor, Parameter})


def fail(who: str, what: str, remedy: str) -> None:
    raise KernelError(f"kernels.{who}: {what}; {remedy}")


def check_tensor(who: str, name: str, tensor: Tensor, dtypes: frozenset[torch.dtype]) -> None:
    """Raise `KernelError` unless `tensor` is dense, contiguous, allocated memory of one of `dtypes`."""
    if type(tensor) not in _PLAIN and not is_fake(tensor):
        fail(
            who,
            f"{name} is a {type(tensor).__name__}",
            "pass the plain local tensor, to_local() of a DTensor",
        )
    if tensor.dtype not in dtypes:
        accepted = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
        fail(who, f"{name} is {str(tensor.dtype).removeprefix('torch.')}", f"it must be one of {accepted}")
    if not tensor.is_contiguous():
        what = f"{name} of shape {tuple(tensor.shape)} has strides {tensor.stride()}"
        fail(who, what, "pass contiguous memory")
    if not _allocated(tensor):
        fail(who, f"the storage of {name} is released", "gather it first, or pass the shard")


def _allocated(tensor: Tensor) -> bool:
    """Whether the storage reaches to the end of the tensor; that of a resharded parameter does not."""
    end = (tensor.storage_offset() + tensor.numel()) * tensor.element_size()
    return tensor.untyped_storage().nbytes() >= end


def is_fake(tensor: Tensor) -> bool:
    """Whether `tensor` has a shape and a dtype but no memory behind it."""
    if type(tensor) in _PLAIN:
        return tensor.device.type == "meta"
    from torch._subclasses.fake_tensor import FakeTensor

    return isinstance(tensor, FakeTensor)


def check_device(who: str, named: Iterable[tuple[str, Tensor]]) -> torch.device:
    """The device of all tensors. Raises `KernelError` if there are several."""
    first: tuple[str, torch.device] | None = None
    for name, tensor in named:
        if first is None:
            first = (name, tensor.device)
        elif tensor.device != first[1]:
            fail(who, f"{name} is on {tensor.device} and {first[0]} on {first[1]}", "move them to one device")
    return first[1] if first is not None else torch.device("cpu")


def check_targets(who: str, targets: Sequence[Target], rule: Rule) -> None:
    """Raise `KernelError` unless every target has what `rule` needs, in dtypes and lengths that kernels take."""
    if not targets:
        return
    device, states = targets[0].param.device, len(rule.state_names)
    for target in targets:
        numel = target.param.numel()
        # A step may have hundreds of targets: one expression each when nothing is wrong, the search for words after.
        if not (
            len(target.state) == states
            and _fits(target.param, FLOATS, numel, device)
            and _fits(target.grad, FLOATS, numel, device)
            and all(_fits(state, MOMENTS, numel, device) for state in target.state)
            and (target.copy is None or target.param.dtype == torch.float32)
            and (target.copy is None or _fits(target.copy, SHORT_FLOATS, numel, device))
        ):
            _explain(who, target, rule)
    if any(target.param.device != device for target in targets):
        check_device(who, (named for target in targets for named in target.tensors()))


def _fits(tensor: Tensor, dtypes: frozenset[torch.dtype], numel: int, device: torch.device) -> bool:
    return (
        type(tensor) in _PLAIN
        and tensor.dtype in dtypes
        and tensor.numel() == numel
        and tensor.device == device
        and tensor.is_contiguous()
        and _allocated(tensor)
    )


def _explain(who: str, target: Target, rule: Rule) -> None:
    """Raise for what `check_targets` found wrong; return if it is only that the tensors are fake."""
    if len(target.state) != len(rule.state_names):
        wanted = ", ".join(rule.state_names) or "none"
        fail(who, f"{len(target.state)} state tensors were given", f"{type(rule).__name__} has: {wanted}")
    for name, tensor in target.tensors():
        accepted = FLOATS if name in ("param", "grad") else SHORT_FLOATS if name == "copy" else MOMENTS
        check_tensor(who, name, tensor, accepted)
        if tensor.numel() != target.param.numel():
            what = f"{name} has {tensor.numel()} elements and param {target.param.numel()}"
            fail(who, what, "pass equal lengths")
    check_device(who, target.tensors())
    if target.copy is not None and target.param.dtype != torch.float32:
        fail(who, f"copy was given for a {target.param.dtype} param", "only fp32 master weights have a copy")


def check_pieces(who: str, out: Tensor, pieces: Sequence[Tensor]) -> None:
    """Raise `KernelError` unless `pieces` are tensors of one dtype, each as long as `out`, which is fp32."""
    check_tensor(who, "out", out, FP32)
    if not pieces:
        fail(who, "there are no pieces", "pass at least one tensor")
    for index, piece in enumerate(pieces):
        check_tensor(who, f"pieces[{index}]", piece, FLOATS)
        if piece.dtype != pieces[0].dtype:
            fail(who, f"pieces[{index}] is {piece.dtype} and pieces[0] {pieces[0].dtype}", "pass one dtype")
        if piece.numel() != out.numel():
            fail(
                who,
                f"pieces[{index}] has {piece.numel()} elements and out {out.numel()}",
                "pass equal lengths",
            )


def check_packed(who: str, out: Tensor, tensors: Sequence[Tensor]) -> None:
    """Raise `KernelError` unless `tensors`, end to end, have as many elements as `out`."""
    check_tensor(who, "out", out, FLOATS)
    for index, tensor in enumerate(tensors):
        check_tensor(who, f"tensors[{index}]", tensor, FLOATS)
    total = sum(tensor.numel() for tensor in tensors)
    if total != out.numel():
        fail(
            who,
            f"the tensors have {total} elements together and out {out.numel()}",
            "pass a view of the right length",
        )
