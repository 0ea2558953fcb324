"""`python -m unishard.kernels` covers every operation and stays short."""

from __future__ import annotations

import sys

import pytest
import torch

from unishard.kernels import table
from unishard.kernels.__main__ import main
from unishard.kernels.measure import cases, measure


def test_every_operation_is_measured():
    measured = {case.op for case in cases(8, torch.device("cpu"))}
    assert measured == set(table.OPERATIONS)


def test_bytes_count_each_read_and_write_once():
    by_label = {case.label: case.bytes for case in cases(1, torch.device("cpu"))}
    assert by_label["AdamW, fp32"] == 28
    assert by_label["AdamW, bf16 gradient, bf16 copy"] == 28
    assert by_label["sum of 4 bf16 pieces"] == 12


def test_a_measurement_ends_when_its_budget_does():
    case = next(iter(cases(1000, torch.device("cpu"))))
    result = measure(case, torch.device("cpu"), budget=0.0)
    assert result.gigabytes_per_second > 0
    assert result.speedup > 0


@pytest.mark.parametrize("forced", ["torch", ""])
def test_the_table_names_what_runs(forced, fresh_choice, capsys):
    if not forced:
        pytest.importorskip("unishard._native")
    fresh_choice.setenv(table.VARIABLE, forced)
    fresh_choice.setattr(sys, "argv", ["unishard.kernels", "--numel", "1000", "--threads", "1"])
    main()
    out = capsys.readouterr().out
    assert out.count(forced or "native") >= len(table.OPERATIONS)
    assert "1 thread" in out
    assert "AdamW, fp32" in out
