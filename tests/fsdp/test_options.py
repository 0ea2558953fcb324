"""Arguments that are refused, each with a message that says what to do; and those that change nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import BackwardPrefetch as TorchPrefetch
from torch.distributed.fsdp import CPUOffload as TorchOffload

from unishard import fsdp
from unishard.errors import ShardingError, UnsupportedError
from unishard.fsdp import FSDP, BackwardPrefetch, CPUOffload, MixedPrecision, ShardingStrategy, options
from unishard.fsdp.mesh import compute_device
from unishard.fsdp.wrap import CustomPolicy, ModuleWrapPolicy
from unishard.testing.models import Block, TinyTransformer

REFUSED: list[tuple[dict[str, Any], type[Exception], str]] = [
    (
        {"sharding_strategy": "ZERO9"},
        ShardingError,
        "sharding_strategy='ZERO9' is not one of ShardingStrategy.FULL_SHARD",
    ),
    (
        {"backward_prefetch": "SOON"},
        ShardingError,
        "backward_prefetch='SOON' is not one of BackwardPrefetch.BACKWARD_PRE",
    ),
    ({"mixed_precision": 16}, ShardingError, "mixed_precision=16 is not.*pass unishard.fsdp.MixedPrecision"),
    ({"cpu_offload": True}, ShardingError, "cpu_offload=True is not a CPUOffload; pass CPUOffload"),
    ({"process_group": (1, 2)}, ShardingError, "tuple of 2; ZERO3 takes one group"),
    ({"process_group": 5}, ShardingError, "process_group=5 is not a ProcessGroup"),
    ({"device_mesh": 5}, ShardingError, "device_mesh=5 is not a DeviceMesh; build one with init_device_mesh"),
    ({"device_mesh": 5, "process_group": 6, "device_id": "cpu"}, ShardingError, "both given; pass one"),
    (
        {"auto_wrap_policy": 3},
        ShardingError,
        "auto_wrap_policy=3 is no policy; pass one of unishard.fsdp.wrap",
    ),
    (
        {"ignored_modules": [], "ignored_states": []},
        ShardingError,
        "exclude each other; pass ignored_states=",
    ),
    ({"ignored_modules": [3]}, ShardingError, "the ignored 3 is not a module"),
    ({"ignored_states": ["x"]}, ShardingError, "the ignored 'x' is not a parameter or a module"),
    (
        {"auto_wrap_policy": CustomPolicy(lambda m: {"device_id": 1} if isinstance(m, nn.Linear) else False)},
        UnsupportedError,
        "a policy asked for device_id on one module.*Wrap that module by hand",
    ),
]


@pytest.mark.parametrize("case", REFUSED, ids=lambda c: next(iter(c[0])))
def test_refused_arguments(case):
    arguments, error, message = case
    if "device_mesh" in arguments and "device_id" not in arguments:
        arguments = {**arguments, "device_id": "cpu"}
    with pytest.raises(error, match=message):
        FSDP(nn.Sequential(nn.Linear(2, 2)), **arguments)


def test_refused_modules():
    with pytest.raises(ShardingError, match=r"FSDP wraps an nn.Module, not int"):
        FSDP(3)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ShardingError, match="cannot wrap a ModuleList, which has no forward"):
        FSDP(nn.ModuleList([nn.Linear(2, 2)]))
    wrapped = FSDP(nn.Linear(2, 2))
    for again in (wrapped, wrapped.module):
        with pytest.raises(ShardingError, match="twice"):
            FSDP(again)
    layer = nn.Linear(2, 2)
    with pytest.raises(ShardingError, match="nothing would be sharded"):
        FSDP(layer, ignored_modules=[layer])
    scalar = nn.Sequential(nn.Linear(2, 2))
    scalar.scale = nn.Parameter(torch.tensor(1.0))
    with pytest.raises(ShardingError, match=r"scale: a scalar parameter.*ignored_states"):
        FSDP(scalar)


def test_dtypes_are_checked():
    with pytest.raises(
        ShardingError, match=r"MixedPrecision.buffer_dtype must be a floating torch.dtype, not 'bf16'"
    ):
        MixedPrecision(buffer_dtype="bf16")  # pyright: ignore[reportArgumentType]


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_an_accelerator_that_is_not_there():
    message = r"device_id=0 names cuda:0, but this host has no CUDA devices; on a CPU leave device_id out"
    with pytest.raises(ShardingError, match=message):
        FSDP(nn.Linear(2, 2), device_id=0)
    assert compute_device(None, None, None) == torch.device("cpu")


def test_offload_on_an_accelerator():
    with pytest.raises(UnsupportedError, match=r"offload_params=True\) on cuda.*unishard.CPUOffloadPolicy"):
        options.check_offload(TorchOffload(offload_params=True), torch.device("cuda"))


def test_torch_members_are_read_by_name():
    assert options.as_backward_prefetch(TorchPrefetch.BACKWARD_POST) is BackwardPrefetch.BACKWARD_POST
    assert options.as_strategy(None) is ShardingStrategy.FULL_SHARD


def case_no_local_world_size() -> None:
    with pytest.raises(
        ShardingError, match=r"LOCAL_WORLD_SIZE is not set; launch with torchrun, or pass device_mesh="
    ):
        FSDP(nn.Linear(2, 2), sharding_strategy=ShardingStrategy.HYBRID_SHARD)


def case_odd_local_world_size() -> None:
    with pytest.raises(ShardingError, match=r"LOCAL_WORLD_SIZE=3 ranks, which does not divide the 2 ranks"):
        FSDP(nn.Linear(2, 2), sharding_strategy=ShardingStrategy.HYBRID_SHARD)


def case_env(case: Any, value: str | None) -> None:
    import os

    before = os.environ.pop("LOCAL_WORLD_SIZE", None)
    if value is not None:
        os.environ["LOCAL_WORLD_SIZE"] = value
    try:
        case()
    finally:
        os.environ.pop("LOCAL_WORLD_SIZE", None)
        if before is not None:
            os.environ["LOCAL_WORLD_SIZE"] = before


def test_hybrid_needs_to_know_the_node(ranks):
    ranks(case_env, case_no_local_world_size, None)
    ranks(case_env, case_odd_local_world_size, "3")


def case_indifferent() -> None:
    """Options that say how, not what, leave every gradient as it is."""
    found = []
    for arguments in (
        {},
        {
            "use_orig_params": True,
            "limit_all_gathers": False,
            "forward_prefetch": True,
            "sync_module_states": True,
        },
        {"backward_prefetch": None, "cpu_offload": CPUOffload(True), "device_id": torch.device("cpu")},
        {"backward_prefetch": TorchPrefetch.BACKWARD_POST, "process_group": dist.group.WORLD},
    ):
        torch.manual_seed(dist.get_rank())
        model: Any = FSDP(TinyTransformer(), auto_wrap_policy=ModuleWrapPolicy({Block}), **arguments)
        for seed in range(2):
            batch = model.example_batch(10 * seed + dist.get_rank(), 2)
            model.loss(model(batch.inputs), batch.targets).backward()
        found.append({name: p.grad.full_tensor() for name, p in model.named_parameters()})
    for other in found[1:]:
        for name, value in found[0].items():
            torch.testing.assert_close(value, other[name], msg=name)


def test_options_that_change_no_result(ranks):
    ranks(case_indifferent)


def test_names_that_are_refused():
    with pytest.raises(UnsupportedError, match="FlatParameter is not available in this version; "):
        _ = fsdp.FlatParameter


def test_unknown_names_are_attribute_errors():
    with pytest.raises(AttributeError):
        _ = fsdp.NoSuchThing


def test_methods_are_refused_by_name():
    with pytest.raises(UnsupportedError, match=r"register_comm_hook is not available.*reduce_dtype"):
        FSDP(nn.Linear(2, 2)).register_comm_hook(None, None)
