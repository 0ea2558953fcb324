"""Swap files that change behind the tier's back, and disks without room: an error that says so, never a value."""

from __future__ import annotations

import errno
import fcntl
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from unishard.errors import OffloadError
from unishard.offload import NvmeTier, aligned_empty
from unishard.offload.swap_file import SwapFile, default_run
from unishard.offload.transfers import (
    NativeTransfers,
    PythonTransfers,
    _native_is_there,
    best_transfers,
)

BLOCK = 65536
NUMEL = 100_001

ENGINES: dict[str, Callable[[], Any]] = {
    "native": lambda: NativeTransfers(BLOCK, 4),
    "python": lambda: PythonTransfers(BLOCK, 4),
}


@pytest.fixture(params=ENGINES)
def tier(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[NvmeTier]:
    if request.param == "native":
        pytest.importorskip("unishard._native")
    with NvmeTier(tmp_path, rank=7, run="night", transfers=ENGINES[request.param]()) as made:
        yield made


def stored(tier: NvmeTier, *keys: str) -> None:
    for key in keys or ("a", "b"):
        tier.put(key, torch.arange(NUMEL, dtype=torch.float32) + len(key))


def fetch(tier: NvmeTier, key: str) -> torch.Tensor:
    return tier.wait(tier.fetch(key, aligned_empty(NUMEL, torch.float32)))


def expect_loss(tier: NvmeTier, key: str, reason: str) -> None:
    with pytest.raises(OffloadError, match=reason) as caught:
        fetch(tier, key)
    for part in ("rank 7", key, str(tier.file.path), "resume from the last checkpoint"):
        assert part in str(caught.value)


# faults ----------------------------------------------------------------------------------------------------


def test_deleted(tier: NvmeTier) -> None:
    stored(tier)
    tier.file.path.unlink()
    expect_loss(tier, "a", "was deleted")
    with pytest.raises(OffloadError, match="was deleted"):
        tier.store("a", torch.zeros(NUMEL))


def test_truncated(tier: NvmeTier) -> None:
    stored(tier)
    os.truncate(tier.file.path, 100_000)
    expect_loss(tier, "b", "was truncated to 100000 bytes")


def test_truncated_and_grown_again(tier: NvmeTier) -> None:
    stored(tier)
    size = tier.file.path.stat().st_size
    os.truncate(tier.file.path, BLOCK)
    os.truncate(tier.file.path, size)
    expect_loss(tier, "a", f"does not hold at byte {BLOCK} .*version 1, checksum")


def test_a_read_that_finds_the_end(tier: NvmeTier, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file is cut after the check and before the read."""
    stored(tier)
    os.truncate(tier.file.path, BLOCK)
    monkeypatch.setattr(tier.file, "check", lambda key: None)
    expect_loss(tier, "a", f"ends before byte {BLOCK}")


@pytest.mark.parametrize("position", [0, 300_000, 400_003])
def test_one_overwritten_byte(tier: NvmeTier, position: int) -> None:
    stored(tier, "a")
    with open(tier.file.path, "r+b") as file:
        file.seek(position)
        old = file.read(1)
        file.seek(position)
        file.write(bytes([old[0] ^ 1]))
    expect_loss(tier, "a", "does not hold at byte")
    stored(tier, "a")
    assert fetch(tier, "a")[1] == 2, "storing again mends it"


def test_the_version_before_is_not_taken_for_the_last(tier: NvmeTier) -> None:
    """A write that the disk acknowledged and lost."""
    stored(tier, "a")
    before = tier.file.path.read_bytes()
    tier.put("a", torch.zeros(NUMEL))
    with open(tier.file.path, "r+b") as file:
        file.write(before)
    expect_loss(tier, "a", "version 2, checksum")


def test_a_write_that_fails_leaves_the_key_unusable_until_stored_again(tier: NvmeTier) -> None:
    stored(tier)
    writable = os.dup(tier.file.descriptor)
    read_only = os.open(tier.file.path, os.O_RDONLY)
    os.dup2(read_only, tier.file.descriptor)
    ticket = tier.store("a", torch.zeros(NUMEL))
    for _ in range(2):
        with pytest.raises(OffloadError, match=r"rank 7: .* cannot be written at byte \d+ for a: Bad file"):
            tier.wait(ticket)
    with pytest.raises(OffloadError, match="cannot be written"):
        fetch(tier, "a")
    os.dup2(writable, tier.file.descriptor)
    fcntl.fcntl(tier.file.descriptor, fcntl.F_SETFL, fcntl.fcntl(writable, fcntl.F_GETFL))
    assert fetch(tier, "b")[0] == 1, "other keys are not touched"
    stored(tier, "a")
    assert fetch(tier, "a")[1] == 2
    os.close(writable)
    os.close(read_only)


def test_a_full_disk_raises_before_anything_is_lost(tier: NvmeTier) -> None:
    """The limit on file sizes stands for the disk's: the system refuses to set room aside."""
    stored(tier)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2_000_000, hard))
    try:
        with pytest.raises(OffloadError, match=r"rank 7: .* for c: .*\d+ bytes are free there; free some"):
            tier.allocate("c", 1_000_000, torch.float32)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tier.keys()) == ["a", "b"]
    assert fetch(tier, "a")[0] == 1
    assert fetch(tier, "b")[0] == 1


def test_no_space_left_says_how_much_is_free(tier: NvmeTier, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    with pytest.raises(OffloadError, match=r"No space left on device.*offload less, or point nvme_path"):
        tier.allocate("c", 1000, torch.float32)
    assert list(tier.keys()) == []


# runs ------------------------------------------------------------------------------------------------------

HOLDER = """
import sys, torch
from unishard.offload import NvmeTier
tier = NvmeTier(sys.argv[1], rank=0, run="night")
tier.put("a", torch.ones(10000))
print(tier.file.path, flush=True)
sys.stdin.read()
if sys.argv[2] == "forget": del tier
"""


def start_holder(folder: Path, ending: str = "") -> tuple[subprocess.Popen[str], Path]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(folder), ending],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    return process, Path(process.stdout.readline().strip())


def test_a_killed_run_is_cleaned_up_and_a_living_one_left_alone(tmp_path: Path) -> None:
    process, held = start_holder(tmp_path)
    try:
        with NvmeTier(tmp_path, rank=0, run="night") as mine:
            assert held.exists(), "a living run's file, under the same name and rank"
            assert mine.file.path != held
            assert mine.file.path.parent == held.parent
            stored(mine)
            process.send_signal(signal.SIGKILL)
            process.wait()
            assert held.exists()
            with NvmeTier(tmp_path, rank=1, run="morning") as next_one:
                assert not held.exists(), "the dead run's file is removed"
                assert mine.file.path.exists()
                stored(next_one)
                assert fetch(mine, "a")[0] == 1
    finally:
        process.kill()
        process.communicate()
    assert [path.name for path in tmp_path.glob("*/*")] == [".lock"], "nothing else is left"


@pytest.mark.parametrize("ending", ["forget", "exit"])
def test_a_process_that_ends_leaves_no_file(tmp_path: Path, ending: str) -> None:
    process, held = start_holder(tmp_path, ending)
    assert held.exists()
    process.communicate("")
    assert process.returncode == 0
    assert not held.exists()


def test_a_forked_child_does_not_remove_its_parents_file(tmp_path: Path) -> None:
    with NvmeTier(tmp_path, rank=0) as tier:
        stored(tier, "a")
        child = os.fork()
        if child == 0:
            try:
                fetch(tier, "a")
            except OffloadError as error:
                tier._cleanup()
                os._exit(0 if "forked from it" in str(error) else 1)
            os._exit(2)
        assert os.waitpid(child, 0)[1] == 0
        assert tier.file.path.exists()
        assert fetch(tier, "a")[0] == 1


def test_names_of_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("TORCHELASTIC_RUN_ID", "SLURM_JOB_ID", "MASTER_PORT"):
        monkeypatch.delenv(variable, raising=False)
    assert default_run() == f"pid{os.getpid()}"
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "../up and away")
    assert default_run() == "-up-and-away"
    with pytest.raises(OffloadError, match=r"run='\.\./x'"):
        SwapFile(tmp_path, "../x", 0)


def test_a_path_that_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OffloadError, match=r"rank 2: .*nvme_path has to be a folder"):
        NvmeTier(tmp_path / "file", rank=2)


@pytest.mark.parametrize("options", [{"block": 1000}, {"depth": 0}])
def test_refused_sizes(tmp_path: Path, options: dict[str, Any]) -> None:
    with pytest.raises(OffloadError, match="multiple of 4096"):
        NvmeTier(tmp_path, rank=0, **options)


# engines ---------------------------------------------------------------------------------------------------


def refuse_direct(monkeypatch: pytest.MonkeyPatch) -> None:
    real = fcntl.fcntl

    def without_direct(descriptor: int, command: int, argument: int = 0) -> int:
        if command == fcntl.F_SETFL and argument & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(descriptor, command, argument)

    monkeypatch.setattr(fcntl, "fcntl", without_direct)


@pytest.mark.parametrize("engine", ENGINES)
def test_without_direct_transfers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any, engine: str
) -> None:
    if engine == "native":
        pytest.importorskip("unishard._native")
    refuse_direct(monkeypatch)
    for _ in range(2):
        with NvmeTier(tmp_path, rank=0, transfers=ENGINES[engine]()) as tier:
            assert tier.file.alignment == 1
            stored(tier)
            assert torch.equal(fetch(tier, "a"), torch.arange(NUMEL, dtype=torch.float32) + 1)
    assert caplog.text.count("refuses O_DIRECT") == 1


def test_without_the_extension(monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    _native_is_there.cache_clear()
    monkeypatch.setitem(sys.modules, "unishard._native", None)
    monkeypatch.delattr("unishard._native", raising=False)
    try:
        assert isinstance(best_transfers(BLOCK, 1), PythonTransfers)
        assert isinstance(best_transfers(BLOCK, 1), PythonTransfers)
        assert caplog.text.count("transfers run on Python threads") == 1
    finally:
        _native_is_there.cache_clear()


def test_checksums_see_every_single_bit_and_the_length() -> None:
    native: Any = pytest.importorskip("unishard._native")
    data = torch.arange(203, dtype=torch.uint8)

    def checksum(length: int = 203) -> int:
        return native.checksum(data.data_ptr(), length)

    seen = {checksum(), *(checksum(length) for length in range(203))}
    assert len(seen) == 204
    for position in range(203):
        for bit in range(8):
            data[position] ^= 1 << bit
            seen.add(checksum())
            data[position] ^= 1 << bit
    assert len(seen) == 204 + 203 * 8
    data[[3, 19, 120, 200]] = data[[200, 3, 19, 120]]
    assert checksum() not in seen


@pytest.mark.parametrize("content", ["zeros", "random"])
def test_checksums_see_every_pair_of_bits(content: str) -> None:
    """Two flips, at most one lane apart, never cancel: sums and plain products miss pairs of high bits."""
    native: Any = pytest.importorskip("unishard._native")
    words = torch.zeros(24, dtype=torch.int64)
    if content == "random":
        words.random_(generator=torch.Generator().manual_seed(0))
    flips = [(word, bit) for word in (0, 1, 8, 9) for bit in range(64)]
    seen = set()
    for index, first in enumerate(flips):
        for second in flips[index + 1 :]:
            changed = words.clone()
            for word, bit in (first, second):
                changed[word] ^= (1 << bit) - (1 << 64 if bit == 63 else 0)
            seen.add(native.checksum(changed.data_ptr(), 192))
    assert len(seen) == len(flips) * (len(flips) - 1) // 2


def test_room_is_used_again_by_keys_of_other_sizes(tier: NvmeTier) -> None:
    for number in range(30):
        keys = [f"activation{number}.{i}" for i in range(4)]
        for index, key in enumerate(keys):
            tier.put(key, torch.full((10_000 + 1500 * ((number + index) % 7),), float(number)))
        for index, key in enumerate(keys):
            numel, dtype = tier.spec(key)
            assert (tier.wait(tier.fetch(key, torch.empty(numel, dtype=dtype))) == number).all(), index
            tier.discard(key)
    assert tier.file.path.stat().st_size < 4 * 81_920, "no larger than what was held at once"


@pytest.mark.parametrize("engine", [NativeTransfers, PythonTransfers])
def test_large_blocks_of_memory_that_is_not_aligned(tmp_path: Path, engine: Any) -> None:
    if engine is NativeTransfers:
        pytest.importorskip("unishard._native")
    value = torch.arange(3_300_000 // 4, dtype=torch.int32)
    memory = torch.empty(value.numel() + 1, dtype=torch.int32)
    memory[1:] = value
    with NvmeTier(tmp_path, rank=0, transfers=engine(8 << 20, 2)) as tier:
        tier.put("key", memory[1:])
        memory[1:] = 0
        for into in (memory[1:], aligned_empty(value.numel(), value.dtype)):
            assert torch.equal(tier.wait(tier.fetch("key", into)), value)


def test_a_file_system_without_preallocation(tier: NvmeTier, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any) -> None:
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    stored(tier)
    assert fetch(tier, "a")[1] == 2
    assert tier.file.path.stat().st_blocks * 512 >= 2 * NUMEL * 4
