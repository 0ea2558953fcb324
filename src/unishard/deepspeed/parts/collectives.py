"""`deepspeed.comm`: DeepSpeed's names for torch.distributed, on whichever backend the process group has."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

log = logging.getLogger("unishard")

ReduceOp = dist.ReduceOp
ProcessGroup = dist.ProcessGroup


def init_distributed(
    dist_backend: str | None = None,
    auto_mpi_discovery: bool = True,
    distributed_port: int = 29500,
    verbose: bool = True,
    timeout: timedelta | None = None,
    init_method: str | None = None,
    dist_init_required: bool | None = None,
    config: Any = None,
    rank: int = -1,
    world_size: int = -1,
) -> None:
    """Create torch's default process group unless there is one.

    Args:
        dist_backend: default: nccl with a GPU, else gloo. `nccl` on a machine without GPUs falls back to gloo.
        distributed_port: used where the launcher set no MASTER_PORT. timeout: of collectives.
        rank, world_size: default: the launcher's environment, MPI's or Slurm's variables, or a single process.
    """
    if dist.is_initialized():
        return
    if dist_init_required is False:
        raise RuntimeError(
            "dist_init_required=False, but torch.distributed is not initialized; initialize it first"
        )
    if auto_mpi_discovery and "RANK" not in os.environ:
        _from_other_launchers()
    backend = dist_backend or ("nccl" if torch.cuda.is_available() else "gloo")
    if backend == "nccl" and not torch.cuda.is_available():
        log.warning("unishard: there is no GPU here; gloo is used instead of nccl")
        backend = "gloo"
    if backend in ("ccl", "mpi", "hccl"):
        backend = "gloo"
    options: dict[str, Any] = {} if timeout is None else {"timeout": timeout}
    if rank >= 0 and world_size > 0:
        options |= {"rank": rank, "world_size": world_size}
    elif "RANK" not in os.environ and init_method is None:
        options |= {"rank": 0, "world_size": 1, "store": dist.HashStore()}
    if "store" not in options:
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        os.environ.setdefault("MASTER_PORT", str(distributed_port))
    dist.init_process_group(backend, init_method=None if "store" in options else init_method, **options)
    from unishard.dist.mesh import leave_process_group_at_exit

    leave_process_group_at_exit()


_LAUNCHERS = (
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID"),
    ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"),
)


def _from_other_launchers() -> None:
    """Take rank and size from MPI's or Slurm's variables, where each process has its own."""
    for rank, size, local in _LAUNCHERS:
        if rank in os.environ and int(os.environ.get(size, "1")) > 1 and "MASTER_ADDR" in os.environ:
            os.environ["RANK"], os.environ["WORLD_SIZE"] = os.environ[rank], os.environ[size]
            os.environ.setdefault("LOCAL_RANK", os.environ.get(local, "0"))
            return


def _plain(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of torch.distributed without the arguments that only DeepSpeed's logger reads."""

    def call(*args: Any, **options: Any) -> Any:
        for name in ("prof", "log_name", "debug"):
            options.pop(name, None)
        return function(*args, **options)

    call.__name__ = call.__qualname__ = function.__name__
    call.__doc__ = f"`torch.distributed.{function.__name__}`; `prof`, `log_name` and `debug` are accepted."
    return call


all_gather = _plain(dist.all_gather)
all_gather_object = _plain(dist.all_gather_object)
all_reduce = inference_all_reduce = _plain(dist.all_reduce)
all_to_all = _plain(dist.all_to_all)
all_to_all_single = _plain(dist.all_to_all_single)
broadcast = _plain(dist.broadcast)
broadcast_object_list = _plain(dist.broadcast_object_list)
gather = _plain(dist.gather)
irecv = _plain(dist.irecv)
isend = _plain(dist.isend)
batch_isend_irecv = _plain(dist.batch_isend_irecv)
P2POp = dist.P2POp
monitored_barrier = _plain(dist.monitored_barrier)
recv = _plain(dist.recv)
reduce = _plain(dist.reduce)
reduce_scatter = _plain(dist.reduce_scatter)
scatter = _plain(dist.scatter)
send = _plain(dist.send)


def barrier(group: Any = None, async_op: bool = False, device_ids: Any = None, **logging_options: Any) -> Any:
    """Wait for all ranks of `group`."""
    return dist.barrier(group=group, async_op=async_op, device_ids=device_ids)


def all_gather_into_tensor(
    output_tensor: torch.Tensor, tensor: torch.Tensor, group: Any = None, async_op: bool = False, **_: Any
) -> Any:
    """Fill `output_tensor`, size times as long as `tensor`, with every rank's `tensor` in rank order."""
    return dist.all_gather_into_tensor(output_tensor, tensor, group=group, async_op=async_op)


allgather_fn = all_gather_into_tensor


def reduce_scatter_tensor(
    output_tensor: torch.Tensor,
    tensor: torch.Tensor,
    op: Any = ReduceOp.SUM,
    group: Any = None,
    async_op: bool = False,
    **_: Any,
) -> Any:
    """Reduce `tensor` over ranks, and leave this rank's part of it in `output_tensor`."""
    return dist.reduce_scatter_tensor(output_tensor, tensor, op=op, group=group, async_op=async_op)


reduce_scatter_fn = reduce_scatter_tensor


def all_gather_coalesced(
    output_tensors: Sequence[torch.Tensor],
    input_tensors: Sequence[torch.Tensor],
    group: Any = None,
    async_op: bool = False,
) -> Any:
    """`all_gather_into_tensor` of several tensors; a handle with `wait()` for all when `async_op`."""
    pairs = zip(output_tensors, input_tensors, strict=True)
    works = [all_gather_into_tensor(out, own, group, async_op) for out, own in pairs]
    return _Handles(works) if async_op else None


def all_reduce_coalesced(
    tensors: Sequence[torch.Tensor],
    op: Any = ReduceOp.SUM,
    group: Any = None,
    async_op: bool = False,
    **_: Any,
) -> Any:
    """`all_reduce` of several tensors; a handle with `wait()` for all when `async_op`."""
    works = [dist.all_reduce(tensor, op=op, group=group, async_op=async_op) for tensor in tensors]
    return _Handles(works) if async_op else None


class _Handles:
    def __init__(self, works: Sequence[Any]) -> None:
        self._works = works

    def wait(self) -> None:
        for work in self._works:
            work.wait()


def has_all_gather_into_tensor() -> bool:
    return True


has_reduce_scatter_tensor = has_all_reduce_coalesced = has_coalescing_manager = has_all_gather_into_tensor


def is_available() -> bool:
    """Whether torch was built with its distributed package."""
    return dist.is_available()


def is_initialized() -> bool:
    """Whether there is a default process group."""
    return dist.is_initialized()


def new_group(ranks: Sequence[int], **options: Any) -> Any:
    """A process group of `ranks`. All ranks call together."""
    return dist.new_group(list(ranks), **options)


def destroy_process_group(group: Any = None) -> None:
    """Destroy `group`, or the default one and all others."""
    dist.destroy_process_group(group)


def get_world_group() -> Any:
    """The default process group."""
    return dist.group.WORLD


def get_world_size(group: Any = None) -> int:
    """Ranks in `group`."""
    return dist.get_world_size(group)


def get_rank(group: Any = None) -> int:
    """This process's rank in `group`."""
    return dist.get_rank(group)


def get_local_rank() -> int:
    """This process's number on its node, by the launcher's LOCAL_RANK."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def get_global_rank(group: Any = None, group_rank: int = 0) -> int:
    """The rank in the world of rank `group_rank` of `group`."""
    return group_rank if group is None else dist.get_global_rank(group, group_rank)


def get_all_ranks_from_group(group: Any = None) -> list[int]:
    """The ranks in the world of the members of `group`."""
    return dist.get_process_group_ranks(group or dist.group.WORLD)


def initialize_mesh_device(mesh_shape: Sequence[int], mesh_dim_names: Sequence[str]) -> Any:
    """A `DeviceMesh` over the world."""
    from torch.distributed.device_mesh import init_device_mesh

    kind = "cuda" if torch.cuda.is_available() else "cpu"
    return init_device_mesh(kind, tuple(mesh_shape), mesh_dim_names=tuple(mesh_dim_names))


def configure(deepspeed_config: Any = None, enabled: bool | None = None, **options: Any) -> None:
    """Accepted; DeepSpeed's communication log is not kept here."""
    if enabled:
        log.warning(
            "unishard: comm.configure(enabled=True): there is no communication log; use torch.profiler"
        )


def known_world_size(world_size: int | None) -> int | None:
    """The number of ranks, as given or out of `WORLD_SIZE`; `None` where it is not known yet.

    >>> known_world_size(2)
    2
    """
    if world_size is not None and world_size > 0:
        return world_size
    named = os.environ.get("WORLD_SIZE", "")
    return int(named) if named.isdigit() and int(named) > 0 else None
