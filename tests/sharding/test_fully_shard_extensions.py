"""Parameters that say themselves what travels when they are gathered."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.autograd.grad_mode import _unsafe_preserve_version_counter as preserve_versions
from torch.utils import _pytree as pytree

from unishard import fully_shard
from unishard.errors import MisuseError

Ranks = Callable[..., list[Any]]


class Half(torch.Tensor):
    """Rests in fp32, travels in bf16."""

    sent: list[torch.dtype] = []

    @staticmethod
    def __new__(cls, data: torch.Tensor) -> Any:
        return torch.Tensor._make_wrapper_subclass(cls, data.shape, dtype=data.dtype, device=data.device)

    def __init__(self, data: torch.Tensor) -> None:
        self.data_ = data

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["data_"], None

    @staticmethod
    def __tensor_unflatten__(inner: Any, meta: Any, size: Any, stride: Any) -> Half:
        return Half(inner["data_"])

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = pytree.tree_map_only(Half, lambda t: t.data_, (args, kwargs or {}))
        return pytree.tree_map_only(torch.Tensor, Half, func(*args, **kwargs))


def _pre(self: Any, mesh: Any, outer_size: Any, outer_stride: Any, module: Any, mp_policy: Any) -> Any:
    rows = -(-outer_size[0] // mesh.size())
    padded = torch.zeros(rows, *outer_size[1:], dtype=torch.bfloat16)
    padded[: self.data_.shape[0]].copy_(self.data_)
    Half.sent.append(padded.dtype)
    return (padded,), "note"


def _post(
    self: Any, outputs: tuple[torch.Tensor, ...], metadata: Any, param_dtype: torch.dtype, *, out: Any = None
) -> Any:
    assert metadata == "note"
    if out is not None:
        with preserve_versions(out):
            out.copy_(outputs[0][: out.shape[0]])
        return None
    whole = outputs[0].to(param_dtype)
    return whole, (outputs[0], whole)


def _model(seed: int, rows: int) -> nn.Sequential:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, rows), nn.Linear(rows, 3))
    for layer in model:
        weight: Any = Half(layer.get_parameter("weight").detach())
        layer.weight = nn.Parameter(weight)  # pyright: ignore[reportAttributeAccessIssue]
    return model


def _train(reshard: bool, rows: int) -> tuple[float, int, int]:
    from torch.distributed.tensor import DTensor

    Half.fsdp_pre_all_gather, Half.fsdp_post_all_gather = _pre, _post  # type: ignore[attr-defined]
    Half.sent.clear()
    model = _model(torch.distributed.get_rank(), rows)
    fully_shard(model[0], reshard_after_forward=reshard)
    fully_shard(model, reshard_after_forward=reshard)
    reference = nn.Sequential(nn.Linear(3, rows), nn.Linear(rows, 3))
    for ours, theirs in zip(model.parameters(), reference.parameters(), strict=True):
        theirs.data.copy_(_whole(ours))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    worst = 0.0
    for _ in range(3):
        source = torch.ones(2, 3)
        model(source).square().sum().backward()
        rounded = nn.Sequential(nn.Linear(3, rows), nn.Linear(rows, 3))
        rounded.load_state_dict({k: _sent(k, v) for k, v in reference.state_dict().items()})
        rounded(source).square().sum().backward()
        with torch.no_grad():
            for ours, theirs, used in zip(
                model.parameters(), reference.parameters(), rounded.parameters(), strict=True
            ):
                grad: Any = used.grad
                worst = max(worst, (_whole(ours.grad) - grad).abs().max().item())
                theirs -= 0.1 * grad
        optimizer.step()
        optimizer.zero_grad()
    sharded = sum(isinstance(p, DTensor) and isinstance(p._local_tensor, Half) for p in model.parameters())
    return worst, len(Half.sent), sharded


def _sent(name: str, value: torch.Tensor) -> torch.Tensor:
    return value.bfloat16().float() if "weight" in name else value


def _whole(param: Any) -> torch.Tensor:
    local = param._local_tensor
    local = local.data_ if isinstance(local, Half) else local
    pieces = [torch.empty(0)] * param.device_mesh.size()
    torch.distributed.all_gather_object(pieces, local.detach().clone())
    return torch.cat(pieces)


@pytest.mark.parametrize("reshard", [True, False])
@pytest.mark.parametrize("rows", [4, 5])
def test_training_gathers_what_the_extension_sends(ranks: Ranks, reshard: bool, rows: int) -> None:
    for worst, sent, sharded in ranks(_train, reshard, rows):
        assert worst < 1e-5
        # Two weights, three steps, once or (gathered again for backward) twice a step.
        assert sent == (12 if reshard else 6)
        assert sharded == 2


def _missing() -> None:
    for name in ("fsdp_pre_all_gather", "fsdp_post_all_gather"):
        if hasattr(Half, name):
            delattr(Half, name)
    model = _model(0, 4)
    fully_shard(model)
    with pytest.raises(MisuseError, match="Half is a tensor subclass"):
        model(torch.ones(2, 3))


def test_a_subclass_without_the_hooks_is_refused(ranks: Ranks) -> None:
    ranks(_missing)


def _sends_subclasses() -> float:
    def pre(self: Any, mesh: Any) -> Any:
        return (Half(self.data_.clone()),), "note"

    Half.fsdp_pre_all_gather, Half.fsdp_post_all_gather = pre, _post  # type: ignore[attr-defined]
    model: Any = nn.Linear(4, 4, bias=False)
    model.weight = nn.Parameter(Half(torch.full((4, 4), 2.0)))  # pyright: ignore[reportArgumentType]
    fully_shard(model)
    output = model(torch.ones(1, 4))
    torch.distributed.barrier()
    return output.sum().item()


def test_what_is_sent_may_be_a_subclass(ranks: Ranks) -> None:
    assert ranks(_sends_subclasses) == [32.0, 32.0]


def _subclass_gradient() -> float:
    model: Any = nn.Linear(4, 4, bias=False)
    fully_shard(model)
    model.register_forward_pre_hook(lambda module, args: module.weight.register_hook(Half) and None)
    model(torch.ones(1, 4)).sum().backward()
    return model.weight.grad.full_tensor().sum().item()


def test_a_gradient_may_be_a_subclass(ranks: Ranks) -> None:
    assert ranks(_subclass_gradient) == [16.0, 16.0]
