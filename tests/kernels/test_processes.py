"""Threads and forks: a child must not wait for threads that only its parent has."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest

pytest.importorskip("unishard.kernels.native", reason="the extension was not compiled")


def run(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


PRELUDE = """
    import os, torch
    from unishard.kernels import AdamRule, Target, squared_norm, update
    import unishard._native as native

    def step():
        # torch itself would wait forever for its threads in a child, were it to use more than one.
        torch.set_num_threads(1)
        w, g, m, v = (torch.full((500_000,), x) for x in (1.0, 2.0, 0.0, 0.0))
        torch.set_num_threads(3)
        update([Target(w, g, (m, v))], AdamRule(lr=0.5))
        norm = squared_norm([g]).item()
        torch.set_num_threads(1)
        assert torch.allclose(w, torch.full_like(w, 0.5)), w
        assert norm == 2e6

    def in_child(work):
        child = os.fork()
        if child == 0:
            status = 1
            try:
                work()
                status = 0
            finally:
                os._exit(status)
        assert os.waitpid(child, 0)[1] == 0
"""


def test_parent_child_and_grandchild_each_use_their_own_threads():
    out = run(
        PRELUDE
        + """
    step()
    print(native.team(), flush=True)

    def work():
        for _ in range(3):
            step()  # the first call starts threads, the others wake them
        print(native.team(), flush=True)
        in_child(step)
        step()

    in_child(work)
    step()
    print(native.team(), flush=True)
    """
    )
    assert out.split() == ["OpenMP", "own", "OpenMP"]


def test_several_python_threads_at_once():
    """The threads of a pool serve one caller; the others do their own work, and all results are right."""
    run(
        PRELUDE
        + """
    from concurrent.futures import ThreadPoolExecutor

    def work():
        with ThreadPoolExecutor(4) as pool:
            for done in [pool.submit(step) for _ in range(24)]:
                done.result()

    work()
    in_child(work)
    """
    )


def test_torch_may_be_imported_after_the_extension():
    assert run(
        """
            import unishard._native as native
            print(native.team())
            import torch
            print(native.team())
            """
    ).split() == ["own", "OpenMP"]


def test_a_rank_of_the_pool_can_use_the_kernels(ranks):
    assert ranks(_norm, world_size=2, timeout=60) == [4e6, 4e6]


def _norm() -> float:
    import torch

    from unishard.kernels import squared_norm

    torch.set_num_threads(2)
    return squared_norm([torch.full((1_000_000,), 2.0)]).item()
