"""One contract, every tier: what is stored last is what comes back, or an error names the key."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from unishard.errors import OffloadError
from unishard.offload import CpuTier, DeviceTier, LayeredTier, NvmeTier, aligned_empty
from unishard.offload.aligned import PinnedBudget
from unishard.offload.transfers import PythonTransfers
from unishard.sharding.ports import Tier

SMALL_BLOCK = 8192


def python_nvme(folder: Path) -> NvmeTier:
    return NvmeTier(folder, rank=3, transfers=PythonTransfers(SMALL_BLOCK, 2))


class Staged(NvmeTier):
    """Treats every tensor as one of another device."""

    def reaches(self, tensor: torch.Tensor) -> bool:
        return False


def layered(folder: Path) -> LayeredTier:
    nvme = NvmeTier(folder, rank=3, block=SMALL_BLOCK)
    return LayeredTier([(DeviceTier(torch.device("cpu")), 5000.0), (CpuTier(), 20000.0), (nvme, math.inf)])


TIERS: dict[str, Callable[[Path], Tier]] = {
    "device": lambda folder: DeviceTier(torch.device("cpu")),
    "cpu": lambda folder: CpuTier(PinnedBudget()),
    "nvme": lambda folder: NvmeTier(folder, rank=3, block=SMALL_BLOCK, depth=3),
    "nvme, python": python_nvme,
    "nvme, staged": lambda folder: Staged(folder, rank=3, block=SMALL_BLOCK, depth=3),
    "layered": layered,
}


@pytest.fixture(params=TIERS)
def tier(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Tier]:
    made = TIERS[request.param](tmp_path)
    yield made
    made.close()


def some(numel: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    raw = torch.randint(0, 256, (numel * dtype.itemsize,), dtype=torch.uint8, generator=generator)
    return (raw % 2 if dtype == torch.bool else raw).view(dtype)


def same_bytes(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def test_every_tier_has_the_port(tier: Tier) -> None:
    assert isinstance(tier, Tier)
    assert tier.name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int8, torch.bool])
@pytest.mark.parametrize("numel", [0, 1, 1000, 4096, 12345])
def test_what_was_stored_comes_back(tier: Tier, dtype: torch.dtype, numel: int) -> None:
    value = some(numel, dtype, numel)
    tier.put("key", value)
    assert tier.spec("key") == (numel, dtype)
    for into in (torch.empty(numel, dtype=dtype), aligned_empty(numel, dtype)):
        ticket = tier.fetch("key", into)
        assert tier.wait(ticket) is into
        assert tier.wait(ticket) is into, "a second wait returns the same"
        assert ticket.done()
        assert same_bytes(into, value)


def test_buffers_anywhere_in_memory(tier: Tier) -> None:
    """Neighbours of a buffer that starts and ends within a page stay as they are."""
    memory = torch.full((30001,), 7, dtype=torch.uint8)
    memory[3:20003] = some(20000, torch.uint8, 1)
    tier.put("key", memory[3:20003])
    target = torch.full((30001,), 9, dtype=torch.uint8)
    tier.wait(tier.fetch("key", target[5:20005]))
    assert torch.equal(target[5:20005], memory[3:20003])
    assert (target[:5] == 9).all()
    assert (target[20005:] == 9).all()


def test_new_keys_hold_zeros(tier: Tier) -> None:
    tier.allocate("moment", 5000, torch.float32)
    into = torch.full((5000,), 3.0)
    tier.wait(tier.fetch("moment", into))
    assert not into.any()


def test_discarded_room_comes_back_as_zeros(tier: Tier) -> None:
    tier.put("old", torch.ones(5000))
    tier.discard("old")
    tier.allocate("new", 5000, torch.float32)
    assert not tier.wait(tier.fetch("new", torch.ones(5000))).any()
    assert list(tier.keys()) == ["new"]


def test_many_keys_under_way_at_once(tier: Tier) -> None:
    values = {f"k{i}": some(3000 + 17 * i, torch.float32, i) for i in range(20)}
    for key, value in values.items():
        tier.allocate(key, value.numel(), value.dtype)
    tickets = [tier.store(key, value) for key, value in values.items()]
    for ticket in reversed(tickets):
        tier.wait(ticket)
    reads = {key: tier.fetch(key, torch.empty_like(value)) for key, value in values.items()}
    assert all(same_bytes(tier.wait(reads[key]), values[key]) for key in reversed(list(values)))
    assert list(tier.keys()) == list(values)


def test_transfers_of_one_key_happen_in_the_order_of_calls(tier: Tier) -> None:
    first, second = some(50000, torch.float32, 1), some(50000, torch.float32, 2)
    tier.put("key", first)
    old = torch.empty_like(first)
    reading = tier.fetch("key", old)
    writing = tier.store("key", second)
    new = torch.empty_like(first)
    last = tier.fetch("key", new)
    for ticket in (last, writing, reading):
        tier.wait(ticket)
    assert same_bytes(old, first)
    assert same_bytes(new, second)


def test_memory_in_which_a_key_rests_is_its_value(tier: Tier) -> None:
    tier.put("key", torch.zeros(10))
    tier.put("large", torch.zeros(100_000))
    for key, numel in (("key", 10), ("large", 100_000)):
        resting = tier.resident(key)
        if resting is None:
            assert "nvme" in tier.name
            continue
        resting.add_(1)
        assert (tier.wait(tier.fetch(key, torch.empty(numel))) == 1).all()


def ask(tier: Tier, wrong: str) -> Any:
    return {
        "length": lambda: tier.store("key", torch.zeros(11)),
        "dtype": lambda: tier.fetch("key", torch.zeros(10, dtype=torch.int32)),
        "dims": lambda: tier.fetch("key", torch.zeros(2, 5)),
        "strides": lambda: tier.store("key", torch.zeros(20)[::2]),
        "twice": lambda: tier.allocate("key", 10, torch.float32),
        "unknown": lambda: tier.fetch("nothing of that name", torch.zeros(10)),
        "discarded": lambda: (tier.discard("key"), tier.fetch("key", torch.zeros(10))),
    }[wrong]()


@pytest.mark.parametrize("wrong", ["length", "dtype", "dims", "strides", "twice", "unknown", "discarded"])
def test_misuse_names_the_key(tier: Tier, wrong: str) -> None:
    tier.put("key", torch.ones(10))
    with pytest.raises(OffloadError, match="nothing of that name" if wrong == "unknown" else "key"):
        ask(tier, wrong)


def test_a_closed_tier_raises(tier: Tier) -> None:
    tier.put("key", torch.ones(10))
    tier.store("key", torch.ones(10))
    tier.close()
    tier.close()
    with pytest.raises(OffloadError, match="key"):
        tier.fetch("key", torch.empty(10))


def test_layers_fill_in_order(tmp_path: Path) -> None:
    with NvmeTier(tmp_path, rank=0) as nvme:
        cpu = CpuTier()
        tier = LayeredTier([(cpu, 100.0), (nvme, math.inf)])
        for key in ("a", "b", "c"):
            tier.put(key, torch.zeros(12))
        assert [tier.home(key).name for key in "abc"] == ["cpu", "cpu", "nvme"]
        tier.discard("a")
        tier.put("d", torch.zeros(12))
        assert tier.home("d") is cpu
    with pytest.raises(OffloadError, match=r"math\.inf"):
        LayeredTier([(cpu, 100.0)])


def test_pinning_needs_an_accelerator_and_has_a_budget(monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    real, asked = torch.zeros, []

    def zeros(*args: Any, pin_memory: bool = False, **kwargs: Any) -> torch.Tensor:
        asked.append(pin_memory)
        return real(*args, **kwargs)

    monkeypatch.setattr(torch, "zeros", zeros)
    budget = PinnedBudget(100)
    tier, other = CpuTier(budget), CpuTier(budget)
    tier.allocate("a", 20, torch.float32)
    other.allocate("b", 20, torch.float32)
    other.allocate("c", 20, torch.float32)
    assert asked == [True, False, False], "80 of 100 bytes are taken by the first"
    assert budget.taken == 80
    assert caplog.text.count("budget of 100 bytes of pinned memory is used up at b") == 1
    tier.close()
    assert budget.taken == 0
    other.allocate("d", 25, torch.float32)
    assert budget.taken == 100


def test_the_default_budget_is_divided_among_the_ranks_of_a_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    alone = PinnedBudget().limit
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert PinnedBudget().limit == alone // 4
    with open("/proc/meminfo") as file:
        total = int(file.readline().split()[1]) * 1024
    assert alone == pytest.approx(total / 4, rel=0.05)


def test_host_memory_that_a_device_still_reads_does_not_change(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stream has waited for the fetch, and the host not yet: the host has to, before it changes the memory."""
    from unishard.dist.streams import Copy
    from unishard.offload import memory

    late: list[str] = []

    class Late(Copy):
        def synchronize(self) -> None:
            late.append("waited")

    monkeypatch.setattr(memory, "start_copy", lambda target, source: Late(target.copy_(source), source))
    tier = CpuTier()
    tier.put("key", torch.ones(3))
    tier.wait(tier.fetch("key", torch.empty(3)))
    assert not late
    tier.resident("key")
    assert late == ["waited"]
    tier.wait(tier.fetch("key", torch.empty(3)))
    tier.store("key", torch.zeros(3))
    assert late == ["waited"] * 2


@pytest.mark.parametrize("seed", range(3))
def test_any_sequence_of_calls_gives_what_was_stored_last(tier: Tier, seed: int) -> None:
    numbers = random.Random(seed)
    expected: dict[str, torch.Tensor] = {}
    reading: list[tuple[Any, torch.Tensor]] = []
    writing: list[Any] = []
    for step in range(400):
        key = f"k{numbers.randrange(12)}"
        action = numbers.choice(["store", "store", "fetch", "fetch", "fetch", "discard", "wait"])
        if action == "store":
            if key not in expected:
                tier.allocate(key, numbers.choice([1, 777, 4096, 9000]), torch.float32)
                expected[key] = torch.zeros(tier.spec(key)[0])
            expected[key] = torch.full_like(expected[key], float(step))
            writing.append(tier.store(key, expected[key].clone()))
        elif action == "fetch" and key in expected:
            into = torch.full_like(expected[key], -1.0)
            reading.append((tier.fetch(key, into), expected[key]))
        elif action == "discard" and key in expected:
            tier.discard(key)
            del expected[key]
        elif action == "wait" and reading:
            ticket, value = reading.pop(numbers.randrange(len(reading)))
            assert torch.equal(tier.wait(ticket), value)
    for ticket, value in reading:
        assert torch.equal(tier.wait(ticket), value)
    for ticket in writing:
        tier.wait(ticket)
    assert set(tier.keys()) == set(expected)
