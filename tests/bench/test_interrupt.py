"""Ctrl-C or SIGTERM ends a run cleanly and keeps what was measured."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from unishard.bench.results import Results

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_what_was_measured_is_kept(tmp_path, sent):
    command = [sys.executable, "-m", "unishard.cli.main", "bench", "--size", "tiny", "--curve", "0"]
    command += [
        "--contestants",
        "ddp,unishard-zero2",
        "--rounds",
        "100000",
        "--steps",
        "1",
        "--out",
        str(tmp_path),
    ]
    log = tmp_path / "log"
    with log.open("w") as output:
        run = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            # A shell starts what it runs in the background deaf to Ctrl-C, and children inherit that.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        try:
            wait_for_rounds(run, tmp_path / "results.json", log)
            family = psutil.Process(run.pid).children(recursive=True)
            os.killpg(run.pid, sent) if sent == signal.SIGINT else run.terminate()
            assert run.wait(timeout=30) == 130, log.read_text()
        finally:
            if run.poll() is None:
                os.killpg(run.pid, signal.SIGKILL)
    results = Results.load(tmp_path / "results.json")
    assert results.interrupted
    assert all(entry.rounds and entry.error is None for entry in results.entries)
    assert "Traceback" not in log.read_text()
    assert "interrupted" in (tmp_path / "tables.md").read_text()
    _, alive = psutil.wait_procs(family, timeout=10)
    assert not alive, "processes of the run are left"


def wait_for_rounds(run: subprocess.Popen, path, log) -> None:
    deadline = time.monotonic() + 90
    while not (path.exists() and all(e.rounds for e in Results.load(path).entries)):
        assert run.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.2)
