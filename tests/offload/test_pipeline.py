"""The swapped step: right values and right order under delays, and what is where after an error."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from unishard.errors import OffloadError
from unishard.offload import CpuTier, NvmeTier, Swapped, SwappedStep, aligned_empty
from unishard.offload.base import BaseTier, Entry, Transfer
from unishard.offload.memory import MemoryEntry

GROUPS, NUMEL = 6, 1000


class _LateTransfer(Transfer):
    """Nothing moves before its time: a buffer used too early is seen, and one reused too early is overwritten."""

    def __init__(self, tier: SlowTier, key: str, tensor: torch.Tensor, *, writes: bool) -> None:
        super().__init__(key, tensor, writes=writes)
        self._tier = tier
        self._moved = threading.Event()
        self._thread = threading.Thread(target=self._move)
        self._thread.start()

    def _move(self) -> None:
        direction = "write" if self.writes else "read"
        self._tier.log.append((f"{direction} begins", self.key))
        time.sleep(self._tier.delay(direction, self.key))
        resting = self._tier._entries[self.key].memory
        target, source = (resting, self.tensor) if self.writes else (self.tensor, resting)
        if (direction, self.key) not in self._tier.faults:
            target.copy_(source)
        self._tier.log.append((f"{direction} ends", self.key))
        self._moved.set()

    def done(self) -> bool:
        return self._moved.is_set()

    def finish(self) -> None:
        self._thread.join()
        direction = "write" if self.writes else "read"
        if (direction, self.key) in self._tier.faults:
            raise OffloadError(f"no luck with the {direction} of {self.key}")


class SlowTier(BaseTier[MemoryEntry]):
    """A disk whose every transfer takes a time that a test chooses, and fails where it says."""

    name = "slow"

    def __init__(self, delay: Callable[[str, str], float] = lambda direction, key: 0.002) -> None:
        super().__init__()
        self.delay = delay
        self.log: list[tuple[str, str]] = []
        self.faults: set[tuple[str, str]] = set()

    def _reserve(self, key: str, numel: int, dtype: torch.dtype) -> MemoryEntry:
        return MemoryEntry(numel, dtype, memory=torch.zeros(numel, dtype=dtype))

    def _start(self, key: str, entry: Entry, tensor: torch.Tensor, *, writes: bool) -> Transfer:
        return _LateTransfer(self, key, tensor, writes=writes)

    def _release(self, key: str, entry: Entry) -> None:
        return None

    def _memory(self, entry: Entry) -> torch.Tensor | None:
        return None

    def _shut(self) -> None:
        return None

    def value(self, key: str) -> float:
        memory = self._entries[key].memory
        assert (memory == memory[0]).all(), f"{key} is mixed: {memory.unique()}"
        return memory[0].item()


def fill(tier: Any) -> list[list[Swapped]]:
    groups = []
    for index in range(GROUPS):
        # Groups of different sizes: the same buffer is cut differently each time.
        for key, numel in ((f"master{index}", NUMEL + 100 * index), (f"moment{index}", NUMEL)):
            tier.put(key, torch.full((numel,), float(index)))
        groups.append([Swapped(tier, f"master{index}"), Swapped(tier, f"moment{index}")])
    return groups


def add_ten(index: int, tensors: list[torch.Tensor]) -> None:
    for tensor in tensors:
        assert (tensor == tensor[0]).all(), "a read was not waited for, or its buffer was reused"
        tensor.add_(10)


def delays(pattern: str) -> Callable[[str, str], float]:
    numbers = itertools.count()
    return {
        "slow reads": lambda direction, key: 0.005 if direction == "read" else 0.001,
        "slow writes": lambda direction, key: 0.005 if direction == "write" else 0.001,
        "mixed": lambda direction, key: (0.0, 0.005, 0.001, 0.003, 0.002)[next(numbers) % 5],
    }[pattern]


@pytest.mark.parametrize("pattern", ["slow reads", "slow writes", "mixed"])
@pytest.mark.parametrize("buffer_count", [1, 2, 3, 5])
@pytest.mark.parametrize("overlap", [True, False])
def test_every_group_is_updated_once_whatever_is_late(pattern: str, buffer_count: int, overlap: bool) -> None:
    tier = SlowTier(delays(pattern))
    groups = fill(tier)
    step = SwappedStep(groups, buffer_count=buffer_count, overlap_reads=overlap, overlap_writes=overlap)
    order: list[int] = []

    def update(index: int, tensors: list[torch.Tensor]) -> None:
        order.append(index)
        time.sleep(0.001)
        add_ten(index, tensors)

    for run in (1, 2):
        step.run(update)
        for index in range(GROUPS):
            assert tier.value(f"master{index}") == index + 10 * run
            assert tier.value(f"moment{index}") == index + 10 * run
    assert order == [*range(GROUPS), *range(GROUPS)]
    assert step.buffer_bytes <= buffer_count * 2 * 8192


def busy_together(log: list[tuple[str, str]], a: str, b: str) -> bool:
    """Whether at some time a transfer `a` and a transfer `b`, such as ("read", "update"), were both under way."""
    under_way: dict[str, int] = {a: 0, b: 0}
    for event, _ in log:
        kind, what = event.split()
        if kind in under_way:
            under_way[kind] += 1 if what == "begins" else -1
        if under_way[a] and under_way[b]:
            return True
    return False


@pytest.mark.parametrize(
    ("options", "kinds"),
    [
        ({"buffer_count": 3}, {"read", "write"}),
        ({"overlap_reads": False}, {"write"}),
        ({"overlap_writes": False}, {"read"}),
    ],
)
def test_transfers_run_during_the_update(options: dict[str, Any], kinds: set[str]) -> None:
    """A transfer and the update that it should run beside wait for each other: apart, they would wait long."""
    began = [threading.Event() for _ in range(GROUPS)]
    read_began = [threading.Event() for _ in range(GROUPS)]
    beside: list[bool] = []

    def until_the_update(direction: str, key: str) -> float:
        group = int(key[-1])
        update = group + (1 if direction == "write" else -1)
        if direction == "read":
            read_began[group].set()
        if filled and direction in kinds and 0 <= update < GROUPS:
            beside.append(began[update].wait(5))
        return 0.0

    filled = False
    tier = SlowTier(until_the_update)
    groups = fill(tier)
    filled = True

    def update(index: int, tensors: list[torch.Tensor]) -> None:
        began[index].set()
        if "read" in kinds and index + 1 < GROUPS:
            beside.append(read_began[index + 1].wait(5))
        add_ten(index, tensors)

    SwappedStep(groups, **options).run(update)
    assert all(beside)
    assert len(beside) == (GROUPS - 1) * (2 * len(kinds) + ("read" in kinds))


@pytest.mark.parametrize(
    ("options", "apart"),
    [
        ({"buffer_count": 1}, {"read", "write"}),
        ({"overlap_reads": False, "overlap_writes": False}, {"read", "write"}),
        ({"overlap_reads": False}, {"read"}),
        ({"overlap_writes": False}, {"write"}),
    ],
)
def test_what_may_not_overlap_does_not(options: dict[str, Any], apart: set[str]) -> None:
    tier = SlowTier(lambda direction, key: 0.005)
    groups = fill(tier)
    tier.log.clear()

    def update(index: int, tensors: list[torch.Tensor]) -> None:
        tier.log.append(("update begins", str(index)))
        time.sleep(0.004)
        add_ten(index, tensors)
        tier.log.append(("update ends", str(index)))

    times = SwappedStep(groups, **options).run(update)
    assert not [other for other in apart if busy_together(tier.log, "update", other)]
    assert times.updating >= 0.004 * GROUPS
    assert times.reading > 0
    assert times.writing > 0


class Bug(Exception):
    pass


@pytest.mark.parametrize("stage", ["read", "update", "write"])
@pytest.mark.parametrize("buffer_count", [1, 3, 4])
@pytest.mark.parametrize("at", [0, 3, GROUPS - 1])
def test_an_error_surfaces_and_leaves_whole_groups(stage: str, buffer_count: int, at: int) -> None:
    tier = SlowTier(delays("mixed"))
    groups = fill(tier)
    tier.faults = {(stage, f"moment{at}")}

    def update(index: int, tensors: list[torch.Tensor]) -> None:
        add_ten(index, tensors)
        if stage == "update" and index == at:
            raise Bug

    step = SwappedStep(groups, buffer_count=buffer_count)
    with pytest.raises(
        Bug if stage == "update" else OffloadError, match=f"moment{at}" if stage != "update" else None
    ):
        step.run(update)
    assert not tier._under_way, "nothing may write into a buffer any more"
    for index in range(at):
        assert tier.value(f"master{index}") == index + 10
        assert tier.value(f"moment{index}") == index + 10
    if stage != "write":
        assert tier.value(f"master{at}") == at
    for index in range(at + buffer_count, GROUPS):
        assert tier.value(f"master{index}") == index
    # The step is usable again, on the same buffers.
    tier.faults = set()
    if stage != "write":
        before = [tier.value(f"master{index}") for index in range(GROUPS)]
        step.run(add_ten)
        assert [tier.value(f"master{index}") for index in range(GROUPS)] == [b + 10 for b in before]
    assert step.buffer_bytes <= buffer_count * 2 * 8192


def test_an_error_in_a_store_waits_for_no_later_group() -> None:
    """The first error is raised, also where later stages fail too."""
    tier = SlowTier()
    groups = fill(tier)
    tier.faults = {("write", "master1"), ("read", "master5")}
    with pytest.raises(OffloadError, match="write of master1"):
        SwappedStep(groups, buffer_count=3).run(add_ten)


@pytest.fixture
def nvme(tmp_path: Path) -> Iterator[NvmeTier]:
    with NvmeTier(tmp_path, rank=0, block=65536) as tier:
        yield tier


def test_members_that_are_only_read_or_only_written_or_rest_in_memory(nvme: NvmeTier) -> None:
    cpu = CpuTier()
    groups = []
    for index in range(4):
        nvme.put(f"master{index}", torch.full((20_000,), float(index)))
        nvme.put(f"grad{index}", torch.full((20_000,), 2.0))
        nvme.allocate(f"half{index}", 20_000, torch.bfloat16)
        cpu.put(f"moment{index}", torch.full((20_000,), 5.0))
        groups.append(
            [
                Swapped(nvme, f"master{index}"),
                Swapped(nvme, f"grad{index}", writes=False),
                Swapped(nvme, f"half{index}", reads=False),
                Swapped(cpu, f"moment{index}"),
            ]
        )

    def update(index: int, tensors: list[torch.Tensor]) -> None:
        master, grad, half, moment = tensors
        master.add_(grad)
        grad.zero_()
        half.copy_(master)
        moment.mul_(2)

    step = SwappedStep(groups)
    step.run(update)
    assert step.buffer_bytes == 3 * (2 * 81920 + 40960), "what rests in memory needs no buffer"
    for index in range(4):
        for key, expected in (("master", index + 2), ("grad", 2), ("half", index + 2)):
            numel, dtype = nvme.spec(f"{key}{index}")
            found = nvme.wait(nvme.fetch(f"{key}{index}", aligned_empty(numel, dtype)))
            assert (found == expected).all(), key
        resting = cpu.resident(f"moment{index}")
        assert resting is not None
        assert (resting == 10).all()


def test_adam_on_a_disk_is_adam_in_memory(nvme: NvmeTier) -> None:
    from unishard.kernels import AdamRule, Target, update

    generator = torch.Generator().manual_seed(0)
    names, rule = ("master", "exp_avg", "exp_avg_sq"), AdamRule(lr=1e-2, weight_decay=0.1)
    sizes = [30_000, 12_345, 40_001]
    masters = [torch.randn(size, generator=generator) for size in sizes]
    moments = [(torch.zeros(size), torch.zeros(size)) for size in sizes]
    groups = []
    for index, master in enumerate(masters):
        nvme.put(f"master{index}", master)
        for name in names[1:]:
            nvme.allocate(f"{name}{index}", master.numel(), torch.float32)
        groups.append([Swapped(nvme, f"{name}{index}") for name in names])
    step = SwappedStep(groups)
    for number in range(1, 5):
        grads = [torch.randn(size, generator=generator) for size in sizes]

        def on_disk(
            index: int, tensors: list[torch.Tensor], grads: Any = grads, number: int = number
        ) -> None:
            update([Target(tensors[0], grads[index], (tensors[1], tensors[2]))], rule, step=number)

        step.run(on_disk)
        for master, grad, moment in zip(masters, grads, moments, strict=True):
            update([Target(master, grad, moment)], rule, step=number)
    for index, master in enumerate(masters):
        found = nvme.wait(nvme.fetch(f"master{index}", torch.empty_like(master)))
        assert torch.equal(found, master)


def test_refusals(nvme: NvmeTier) -> None:
    nvme.put("a", torch.zeros(3))
    with pytest.raises(OffloadError, match="buffer_count=0"):
        SwappedStep([[Swapped(nvme, "a")]], buffer_count=0)
    with pytest.raises(OffloadError, match=r"\['a'\] are in several groups"):
        SwappedStep([[Swapped(nvme, "a")], [Swapped(nvme, "a")]])
    assert SwappedStep([]).run(add_ten).updating == 0
