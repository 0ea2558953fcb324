"""Bytes sent, bytes held and bytes in passing equal the formulas of the ZeRO paper (sections 7 and 8)."""

from __future__ import annotations

import os
import socket
import sys
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tests.sharding.test_step import Stack
from torch import Tensor, nn

from unishard import fully_shard
from unishard.dist.mesh import axes_of, build_mesh
from unishard.dist.traffic import Traffic, record_traffic
from unishard.sharding import group as group_module
from unishard.sharding.buffer import GroupBuffer
from unishard.sharding.build import ShardPlan
from unishard.sharding.gradient import GroupGradients
from unishard.sharding.in_place import ShardedModel, shard_in_place
from unishard.sharding.placement import PRESETS, Placement, Reshard
from unishard.sharding.precision import MixedPrecision
from unishard.testing.transport import through_sockets

FLAT = ["NO_SHARD", "ZERO1", "ZERO2", "SHARD_GRAD_OP", "ZERO3"]
HYBRID = [name for name, preset in PRESETS.items() if preset.needs_replicas]


def shard(model: nn.Module, preset: str, policy: MixedPrecision = MixedPrecision()) -> ShardedModel:  # noqa: B008
    sharding = PRESETS[preset]
    mesh = build_mesh("cpu", dp_replicate=2 if sharding.needs_replicas else 1)
    axes = axes_of(mesh, replicate_only=not sharding.sharded_anywhere)
    return shard_in_place(model, ShardPlan(sharding, axes, policy, torch.device("cpu")))


def run_step(sharded: ShardedModel, micro_batches: int, inputs: Tensor) -> None:
    """What the engine does around `micro_batches` forwards and backwards."""
    preset = sharded.units[0].sharding
    for micro in range(micro_batches):
        boundary = micro == micro_batches - 1
        for unit in sharded.units:
            unit.reduce_gradients = boundary or preset.gradient is Placement.SHARD
            unit.reduce_across_replicas = boundary
            unit.reshard_after_backward = boundary or preset.reshard is Reshard.AFTER_FORWARD
        sharded.module(inputs).pow(2).mean().backward()
    for group in sharded.groups:
        with torch.no_grad():
            group.buffer.shard -= 0.1 * group.gradients.shard
        group.gradients.clear()
        group.refresh()
        if group.resident:
            group.wait()


def expected_bytes(sharded: ShardedModel, micro_batches: int, itemsize: int) -> dict[str, int]:
    """By operation: the paper's volumes over padded groups. The root stays whole from forward to backward, which
    saves one of its gathers each micro-batch."""
    preset, a = sharded.units[0].sharding, micro_batches
    gathers = {Reshard.NEVER: 1, Reshard.AFTER_BACKWARD: 1, Reshard.AFTER_FORWARD: 2 * a}[preset.reshard]
    expected = {"all_gather": 0, "reduce_scatter": 0, "all_reduce": 0}
    for unit in sharded.units:
        for group in unit.groups:
            n, r = group.axes.shard.size, group.axes.replicate.size
            own = group.buffer.layout.shard_numel * itemsize
            root = unit is sharded.units[0] and preset.reshard is Reshard.AFTER_FORWARD
            expected["all_gather"] += (a if root else gathers) * (n - 1) * own
            reductions = a if preset.gradient is Placement.SHARD else 1
            expected["reduce_scatter"] += reductions * (n - 1) * own
            expected["all_reduce"] += 2 * (r - 1) * own // r
    return {op: sent for op, sent in expected.items() if sent}


def measure(preset: str, micro_batches: int, dtype: torch.dtype) -> None:
    sharded = shard(Stack(depth=4), preset, MixedPrecision(param_dtype=dtype, master_dtype=torch.float32))
    inputs = torch.randn(5, 6)
    run_step(sharded, micro_batches, inputs)
    with record_traffic() as traffic:
        run_step(sharded, micro_batches, inputs)
    if dtype == torch.float32:
        assert dict(traffic.data) == expected_bytes(sharded, micro_batches, 4), (
            preset,
            dict(traffic.data),
            expected_bytes(sharded, micro_batches, 4),
        )
    else:
        # The 16-bit all-reduce pads to whole slices; everything else is exact.
        expected = expected_bytes(sharded, micro_batches, 2)
        assert traffic.data["all_gather"] == expected.get("all_gather", 0), (
            preset,
            dict(traffic.data),
            expected_bytes(sharded, micro_batches, 4),
        )
        assert traffic.data["reduce_scatter"] == expected.get("reduce_scatter", 0), (
            preset,
            dict(traffic.data),
            expected_bytes(sharded, micro_batches, 4),
        )
        slack = 4 * sharded.groups[0].axes.replicate.size * len(sharded.groups)
        assert abs(traffic.data["all_reduce"] - expected.get("all_reduce", 0)) <= slack, (
            preset,
            dict(traffic.data),
            expected_bytes(sharded, micro_batches, 4),
        )


@pytest.mark.parametrize("micro_batches", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_sent_equal_the_formula(
    micro_batches: int, dtype: torch.dtype, ranks: Callable[..., Any]
) -> None:
    for world_size in (2, 3):
        for preset in FLAT:
            ranks(measure, preset, micro_batches, dtype, world_size=world_size)
    for preset in HYBRID:
        ranks(measure, preset, micro_batches, dtype, world_size=4)


def psi_volumes(preset: str) -> float:
    """Bytes sent in units of psi (N - 1) / N for a model whose root holds next to nothing."""
    model = nn.Sequential(*(nn.Sequential(nn.Linear(64, 64, bias=False), nn.Tanh()) for _ in range(8)))
    sharded = shard(model, preset)
    assert len(sharded.units) == 9
    assert not sharded.units[0].groups
    run_step(sharded, 1, torch.randn(2, 64))
    with record_traffic() as traffic:
        run_step(sharded, 1, torch.randn(2, 64))
    n = dist.get_world_size()
    return traffic.data_bytes / (8 * 64 * 64 * 4 * (n - 1) / n)


@pytest.mark.parametrize(
    ("preset", "volume"), [("NO_SHARD", 2), ("ZERO1", 2), ("ZERO2", 2), ("SHARD_GRAD_OP", 2), ("ZERO3", 3)]
)
def test_the_papers_volumes(preset: str, volume: int, ranks: Callable[..., Any]) -> None:
    for world_size in (2, 4):
        assert ranks(psi_volumes, preset, world_size=world_size) == [volume] * world_size


def wire_and_counted(preset: str) -> tuple[int, int]:
    with through_sockets():
        return _wire_and_counted(preset)


def _wire_and_counted(preset: str) -> tuple[int, int]:
    sharded = shard(nn.Sequential(*(nn.Sequential(nn.Linear(512, 512), nn.Tanh()) for _ in range(6))), preset)
    inputs = torch.randn(2, 512)
    run_step(sharded, 1, inputs)
    dist.barrier()
    before = _bytes_acknowledged()
    with record_traffic() as traffic:
        run_step(sharded, 1, inputs)
    dist.barrier()
    return _bytes_acknowledged() - before, traffic.data_bytes


def _bytes_acknowledged() -> int:
    """What peers have acknowledged on this process's TCP connections, as the kernel counts it (`tcpi_bytes_acked`)."""
    total = 0
    for entry in Path("/proc/self/fd").iterdir():
        try:
            if not os.readlink(entry).startswith("socket:"):
                continue
            with socket.socket(fileno=os.dup(int(entry.name))) as connection:
                info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 192)
        except OSError:
            continue  # closed meanwhile, or no TCP socket
        total += int.from_bytes(info[120:128], sys.byteorder)
    return total


@pytest.mark.skipif(not hasattr(socket, "TCP_INFO"), reason="needs Linux's TCP_INFO")
@pytest.mark.parametrize("preset", FLAT)
def test_the_wire_carries_what_is_counted(preset: str, ranks: Callable[..., Any]) -> None:
    for wire, counted in ranks(wire_and_counted, preset):
        assert wire == pytest.approx(counted, rel=0.03), (wire, counted)


def persistent(preset: str, dtype: torch.dtype) -> None:
    sharded = shard(Stack(depth=4), preset, MixedPrecision(param_dtype=dtype, master_dtype=torch.float32))
    sharded.module(torch.randn(5, 6)).sum().backward()
    for group in sharded.groups:
        n = group.axes.shard.size
        padded, own = n * group.buffer.layout.shard_numel, group.buffer.layout.shard_numel
        assert own * n - group.buffer.layout.payload == group.buffer.layout.padding
        compute = torch.empty(0, dtype=dtype).element_size()
        whole = padded * compute if group.resident else 0
        master = 0 if group.resident and dtype == torch.float32 else own * 4
        assert group.persistent_bytes == {"parameters": whole + master, "gradients": own * 4}, preset
        held = group.buffer.full.untyped_storage().nbytes()
        assert held == (padded * compute if group.resident else 0), "gathered memory outlived the step"


@pytest.mark.parametrize("preset", FLAT)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_at_rest_equal_the_formula(preset: str, dtype: torch.dtype, ranks: Callable[..., Any]) -> None:
    ranks(persistent, preset, dtype)


def peaks(door: str, transport: str) -> tuple[int, int]:
    """Most groups that were gathered, and most whose whole gradients lived, at once; the root's apart."""
    with through_sockets() if transport == "sockets" else nullcontext():
        return _peaks(door)


def _peaks(door: str) -> tuple[int, int]:
    model = Stack(depth=6)
    gathered: set[int] = set()
    most = {"gathered": 0, "reducing": 0}
    reducing: dict[GroupGradients, list[weakref.ref[Tensor]]] = {}
    allocate, release, collect = GroupBuffer.allocate, GroupBuffer.release, GroupGradients.collect

    def note_allocate(self: GroupBuffer) -> None:
        allocate(self)
        if id(self) not in roots:
            gathered.add(id(self))
            most["gathered"] = max(most["gathered"], len(gathered))

    def note_release(self: GroupBuffer) -> None:
        release(self)
        gathered.discard(id(self))

    def note_collect(self: GroupGradients, *args: Any, **kwargs: Any) -> None:
        collect(self, *args, **kwargs)
        if id(self.buffer) not in roots:
            kept = [*self.fresh.values(), *([] if self.whole is None else [self.whole])]
            reducing.setdefault(self, []).extend(weakref.ref(t) for t in kept)
            alive = [g for g, refs in reducing.items() if any(r() is not None for r in refs)]
            most["reducing"] = max(most["reducing"], len(alive))

    if door == "config":
        units = shard(model, "ZERO3").units
    else:
        from unishard.sharding.unit import units_under

        for block in model.blocks:
            fully_shard(block)
        units = list(units_under(fully_shard(model)))
    roots = {id(g.buffer) for g in units[0].groups}
    GroupBuffer.allocate, GroupBuffer.release, GroupGradients.collect = (
        note_allocate, note_release, note_collect,
    )  # fmt: skip
    small, group_module.COALESCE_BYTES = group_module.COALESCE_BYTES, 1
    try:
        for _ in range(3):
            model(torch.randn(5, 6)).sum().backward()
    finally:
        GroupBuffer.allocate, GroupBuffer.release, GroupGradients.collect = allocate, release, collect
        group_module.COALESCE_BYTES = small
    return most["gathered"], most["reducing"]


@pytest.mark.parametrize("transport", ["memory", "sockets"])
@pytest.mark.parametrize("door", ["config", "code"])
def test_at_most_three_groups_in_passing(door: str, transport: str, ranks: Callable[..., Any]) -> None:
    for gathered, reducing in ranks(peaks, door, transport):
        assert gathered == 2  # the one in use and the one prefetched
        assert 2 <= reducing <= 3


def test_traffic_is_counted_only_inside_its_block() -> None:
    with record_traffic() as outer, record_traffic() as inner:
        pass
    assert outer == inner == Traffic()


def _control_calls_of_a_code_door_step() -> int:
    model = Stack(depth=4)
    for child in [*model.children(), model]:
        if not isinstance(child, nn.ModuleList):
            fully_shard(child)
    inputs = torch.randn(5, 6)
    model(inputs).sum().backward()
    with record_traffic() as traffic:
        model(inputs).sum().backward()
    return traffic.calls["control"]


def test_the_code_door_agrees_once_a_backward(ranks: Callable[..., Any]) -> None:
    """Not once for each unit: all units of a model share their axes."""
    assert ranks(_control_calls_of_a_code_door_step, world_size=2) == [1, 1]


def _calls_for_small_groups(preset: str) -> tuple[int, int, int]:
    sharded = shard(Stack(depth=6), preset)
    inputs = torch.randn(5, 6)
    run_step(sharded, 1, inputs)
    with record_traffic() as traffic:
        run_step(sharded, 1, inputs)
    return traffic.calls["reduce_scatter"], traffic.calls["all_gather"], len(sharded.groups)


@pytest.mark.parametrize(("preset", "gathers"), [("ZERO2", 7), ("ZERO3", 3)])
def test_small_groups_travel_together(preset: str, gathers: int, ranks: Callable[..., Any]) -> None:
    """One reduction; under ZERO3 the root's gather, all blocks' for forward, and all but the last block's again.

    (`run_step` gathers resident groups one by one, as users may; the optimizer does it at once.)
    """
    for reductions, gathered, groups in ranks(_calls_for_small_groups, preset):
        assert (reductions, gathered, groups) == (1, gathers, 7)


def _code_door_at_rest() -> tuple[int, int]:
    from unishard.sharding.unit import units_under

    model = Stack()
    parameters = sum(p.numel() * p.element_size() for p in model.parameters())
    for block in model.blocks:
        fully_shard(block, sharding="NO_SHARD")
    fully_shard(model, sharding="NO_SHARD")
    model(torch.randn(5, 6)).sum().backward()
    held = sum(sum(g.persistent_bytes.values()) for u in units_under(model) for g in u.groups)
    return held, parameters


def test_one_copy_of_parameters_that_are_not_sharded(ranks: Callable[..., Any]) -> None:
    for held, parameters in ranks(_code_door_at_rest):
        assert held == parameters  # gradients are the parameters' by now
