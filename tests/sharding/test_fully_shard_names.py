"""FSDP2's names around a training step: settings, other composable APIs, data-parallel dims of one mesh."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import unishard
from unishard import DataParallelMeshDims, fully_shard
from unishard.errors import ShardingError, UnsupportedError
from unishard.sharding import group as group_module

Ranks = Callable[..., list[Any]]


def test_every_name_of_fsdp2_is_exported() -> None:
    from torch.distributed.fsdp import _fully_shard

    assert [name for name in _fully_shard.__all__ if not hasattr(unishard, name)] == []


def test_every_method_of_fsdp2_is_ours() -> None:
    from torch.distributed.fsdp import FSDPModule

    methods = [name for name, value in vars(FSDPModule).items() if callable(value) and name != "__dict__"]
    assert [name for name in methods if name not in vars(unishard.FSDPModule)] == []


def _two_chunks(model: nn.Module, reference: nn.Module, data: torch.Tensor) -> float:
    """How far the gradients of sharded `model` are from the mean of `reference`'s."""
    rank, size = dist.get_rank(), dist.get_world_size()
    model(data.chunk(size)[rank]).sum().backward()
    (reference(data).sum() / size).backward()
    worst = 0.0
    ours: Any
    theirs: Any
    for ours, theirs in zip(model.parameters(), reference.parameters(), strict=True):
        grad = ours.grad.full_tensor() if hasattr(ours.grad, "full_tensor") else ours.grad
        worst = max(worst, ((grad - theirs.grad).norm() / theirs.grad.norm()).item())
    return worst


# settings -------------------------------------------------------------------------------------------------------


def _shared() -> None:
    stages = [fully_shard(nn.Linear(2, 2)) for _ in range(2)]
    unishard.share_comm_ctx(stages)
    with pytest.raises(ShardingError, match="fully_shard was applied to, got Linear"):
        unishard.share_comm_ctx([*stages, nn.Linear(2, 2)])


def test_share_comm_ctx_takes_sharded_modules(ranks: Ranks) -> None:
    ranks(_shared)


class Half(nn.Module):
    """Uses one of its two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, data: torch.Tensor) -> torch.Tensor:
        return self.used(data)


def _unused(zeros: bool) -> tuple[bool, bool, bool]:
    model: Any = fully_shard(Half())
    model.unused.bias.requires_grad_(False)
    model.set_reduce_scatter_unused_params(zeros)
    model(torch.ones(1, 4)).sum().backward()
    unused = model.unused.weight.grad
    return model.used.weight.grad is None, unused is None, model.unused.bias.grad is None


@pytest.mark.parametrize("zeros", [False, True])
def test_unused_parameters_get_zeros_on_request(ranks: Ranks, zeros: bool) -> None:
    assert ranks(_unused, zeros) == [(False, not zeros, True)] * 2


def _in_flight() -> int:
    model: Any = nn.Sequential(*[nn.Linear(4, 4) for _ in range(4)])
    for layer in model:
        fully_shard(layer)
    fully_shard(model)
    model.set_reduce_scatter_max_input_buffers(1)
    model[0].set_reduce_scatter_max_input_buffers(3)
    model(torch.ones(1, 4)).sum().backward()
    queue, most = fully_shard.state(model).schedule.queue, 0  # pyright: ignore[reportFunctionMemberAccess]
    launch = queue._launch

    def watched(*args: Any) -> None:
        nonlocal most
        launch(*args)
        most = max(most, len(queue._in_flight))

    queue._launch = watched
    small, group_module.COALESCE_BYTES = (
        group_module.COALESCE_BYTES,
        1,
    )  # so that layers are reduced one by one
    try:
        model(torch.ones(1, 4)).sum().backward()
    finally:
        group_module.COALESCE_BYTES = small
    return most


def test_the_largest_wish_bounds_the_reductions_in_flight(ranks: Ranks) -> None:
    assert ranks(_in_flight) == [3, 3]


def _bad_counts() -> None:
    model: Any = fully_shard(nn.Linear(2, 2))
    for count, error in ((0, ValueError), (2.5, TypeError), (True, TypeError)):
        with pytest.raises(error, match="at least 1"):
            model.set_reduce_scatter_max_input_buffers(count)


def test_counts_of_buffers_are_checked(ranks: Ranks) -> None:
    ranks(_bad_counts, world_size=1)


def _settings_of_backends() -> None:
    model: Any = fully_shard(nn.Linear(2, 2))
    model.set_separate_reduce_scatter_group()
    model.set_allocate_memory_from_process_group_for_comm(True)
    with pytest.raises(UnsupportedError, match="set_custom_all_gather"):
        model.set_custom_all_gather(None)


def test_settings_that_only_nccl_has_change_nothing_on_gloo(ranks: Ranks) -> None:
    ranks(_settings_of_backends)


def _hook_on_stream() -> tuple[bool, float]:
    model: Any = fully_shard(nn.Linear(2, 2, bias=False))
    stream, seen = torch.cpu.Stream(), []

    def double(flat: torch.Tensor) -> None:
        seen.append(torch.cpu.current_stream())
        flat.mul_(2)

    model.set_all_reduce_hook(double, stream=stream)
    model(torch.ones(1, 2)).sum().backward()
    return seen == [stream], model.weight.grad.full_tensor()[0, 0].item()


def test_an_all_reduce_hook_runs_on_the_stream_it_was_given(ranks: Ranks) -> None:
    assert ranks(_hook_on_stream) == [(True, 2.0)] * 2


# other composable APIs ------------------------------------------------------------------------------------------


def _inside_replicate() -> float:
    from torch.distributed._composable import replicate

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    reference = copy.deepcopy(model)
    fully_shard(model[1])
    replicate(model)
    return _two_chunks(model, reference, torch.arange(16.0).view(4, 4))


def test_replicate_leaves_sharded_modules_alone(ranks: Ranks) -> None:
    assert max(ranks(_inside_replicate)) < 1e-6


def _around_replicate() -> list[str]:
    from torch.distributed._composable import replicate

    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    replicate(model[1])
    fully_shard(model)
    return [type(param.data).__name__ for param in model.parameters()]


def test_fully_shard_leaves_replicated_modules_alone(ranks: Ranks) -> None:
    assert ranks(_around_replicate)[0] == ["DTensor", "DTensor", "Tensor", "Tensor"]


def _states() -> None:
    state: Any = fully_shard.state  # pyright: ignore[reportFunctionMemberAccess]
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    fully_shard(model[0])
    fully_shard(model)
    assert state(model) is not None
    assert state(model[0]) not in (None, state(model))
    assert state(model[1]) is None


def test_state_is_one_for_each_call(ranks: Ranks) -> None:
    ranks(_states, world_size=1)


# one mesh for everything ----------------------------------------------------------------------------------------


def _mesh(sizes: tuple[int, ...], names: tuple[str, ...]) -> Any:
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh("cpu", sizes, mesh_dim_names=names)


def _distributed(mesh: Any) -> tuple[Any, nn.Module]:
    from torch.distributed.tensor import distribute_module

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 4))
    reference = copy.deepcopy(model)
    return distribute_module(model, mesh), reference


def _one_mesh(sizes: tuple[int, ...], dims: DataParallelMeshDims) -> tuple[float, str]:
    from torch.distributed.tensor import DTensor, Replicate, Shard

    mesh = _mesh(sizes, ("a", "b")[: len(sizes)])
    model, reference = _distributed(mesh)
    fully_shard(model, mesh=mesh, dp_mesh_dims=dims)
    data = torch.arange(32.0).view(8, 4)
    # The batch is cut along the mesh, so gradients of the parameters arrive as partial sums.
    cut = [Shard(0)] * mesh.ndim
    mine = data.chunk(dist.get_world_size())[dist.get_rank()]
    output: Any = model(DTensor.from_local(mine, mesh, cut, run_check=False))
    output.redistribute(placements=[Replicate()] * mesh.ndim).to_local().sum().backward()
    (reference(data).sum() / dist.get_world_size()).backward()
    ours, theirs = model[0].weight, reference[0].weight  # pyright: ignore[reportIndexIssue]
    assert theirs.grad is not None
    error = (ours.grad.full_tensor() - theirs.grad).norm() / theirs.grad.norm()
    return error.item(), str(ours.placements)


@pytest.mark.parametrize(
    ("sizes", "dims", "placements"),
    [
        ((2,), DataParallelMeshDims(shard="a"), "(Shard(dim=0),)"),
        ((2,), DataParallelMeshDims(replicate="a"), "(Replicate(),)"),
        ((2, 2), DataParallelMeshDims(shard="b", replicate="a"), "(Replicate(), Shard(dim=0))"),
        ((2, 2), DataParallelMeshDims(shard=("a", "b")), "(Shard(dim=0),)"),
    ],
)
def test_data_parallel_dims_of_one_mesh(
    ranks: Ranks, sizes: tuple[int, ...], dims: DataParallelMeshDims, placements: str
) -> None:
    error, found = ranks(_one_mesh, sizes, dims, world_size=2 ** len(sizes))[0]
    assert error < 1e-6
    assert found == placements


def _beside_tensor_parallelism() -> tuple[float, str]:
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

    mesh = _mesh((2, 2), ("dp", "tp"))
    torch.manual_seed(0)
    model: Any = nn.Linear(4, 8, bias=False)
    reference = copy.deepcopy(model)
    model.weight = nn.Parameter(distribute_tensor(model.weight.data, mesh, [Replicate(), Shard(0)]))
    fully_shard(model, mesh=mesh, dp_mesh_dims=DataParallelMeshDims(shard="dp"))
    data = torch.arange(16.0).view(4, 4)
    mine = DTensor.from_local(data.chunk(2)[dist.get_rank() // 2], mesh, [Replicate(), Replicate()])
    model(mine).sum().backward()
    (reference(data).sum() / 2).backward()
    error = (model.weight.grad.full_tensor() - reference.weight.grad).norm() / reference.weight.grad.norm()
    return error.item(), str(model.weight.placements)


def test_tensor_parallel_dims_of_the_same_mesh_stay(ranks: Ranks) -> None:
    error, placements = ranks(_beside_tensor_parallelism, world_size=4)[0]
    assert error < 1e-6
    assert "_StridedShard(dim=0, sf=2)" in placements


def _refused_dims() -> None:
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh, dims = _mesh((2,), ("dp",)), DataParallelMeshDims(shard="dp")
    model, _ = _distributed(mesh)
    with pytest.raises(ShardingError, match=r"'no' not found in mesh.mesh_dim_names \('dp',\)"):
        fully_shard(model, mesh=mesh, dp_mesh_dims=DataParallelMeshDims(shard="no"))
    with pytest.raises(UnsupportedError, match="reshard_after_forward as int"):
        fully_shard(model, mesh=mesh, dp_mesh_dims=dims, reshard_after_forward=2)
    with pytest.raises(ShardingError, match="on the same mesh"):
        fully_shard(model, mesh=_mesh((2, 1), ("dp", "tp")), dp_mesh_dims=dims)
    with pytest.raises(ShardingError, match=r"must be DTensors.*distribute_module"):
        fully_shard(nn.Linear(2, 2), mesh=mesh, dp_mesh_dims=dims)
    cut: Any = nn.Linear(2, 2, bias=False)
    cut.weight = nn.Parameter(distribute_tensor(cut.weight.data, mesh, [Shard(0)]))
    with pytest.raises(ShardingError, match=r"Expected Replicate\(\) along data-parallel dim 'dp'"):
        fully_shard(cut, mesh=mesh, dp_mesh_dims=dims)
    with pytest.raises(ShardingError, match="needs the mesh"):
        fully_shard(nn.Linear(2, 2), dp_mesh_dims=dims)
    with pytest.raises(ShardingError, match="ZERO2 needs"):
        fully_shard(model, mesh=mesh, sharding="ZERO2", dp_mesh_dims=DataParallelMeshDims(replicate="dp"))
    with pytest.raises(ShardingError, match="does not name mesh dims"):
        fully_shard(model, mesh=mesh, dp_mesh_dims="dp")


def test_dims_that_do_not_fit_are_refused(ranks: Ranks) -> None:
    ranks(_refused_dims)
    with pytest.raises(ShardingError, match="At least one of shard or replicate"):
        DataParallelMeshDims()
