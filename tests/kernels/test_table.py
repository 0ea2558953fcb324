"""Which implementation serves which tensors, and what is said when it is not the best one."""

from __future__ import annotations

import logging
import sys

import pytest
import torch

from unishard.errors import ConfigError
from unishard.kernels import AdamRule, Target, reference, squared_norm, table, update
from unishard.kernels.table import VARIABLE


def step() -> torch.Tensor:
    w, m, v = torch.ones(3), torch.zeros(3), torch.zeros(3)
    update([Target(w, torch.ones(3), (m, v))], AdamRule(lr=0.5))
    return w


def test_every_implementation_has_every_operation():
    for name, path in table._MODULES.items():
        if name == "triton":
            pytest.importorskip("triton")
        module = pytest.importorskip(path)
        for op in table.OPERATIONS:
            assert callable(getattr(module, op)), f"{name} lacks {op}"


def test_without_the_extension_torch_works_and_the_log_says_so_once(fresh_choice, caplog):
    fresh_choice.setitem(sys.modules, "unishard._native", None)
    with caplog.at_level(logging.WARNING, logger="unishard"):
        for _ in range(3):
            assert torch.allclose(step(), torch.full((3,), 0.5))
            squared_norm([torch.ones(2)])
    [record] = caplog.records
    assert record.name == "unishard"
    assert "unishard._native is not installed" in record.message
    assert "C++17 compiler" in record.message
    assert table.active("cpu") == "torch"


def test_an_extension_that_does_not_load_is_reported_with_its_reason(fresh_choice, caplog):
    class Broken:
        def find_spec(self, name, path=None, target=None):
            if name == "unishard._native":
                raise ImportError("undefined symbol: foo")

    fresh_choice.delitem(sys.modules, "unishard._native", raising=False)
    fresh_choice.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    step()
    assert "does not load (undefined symbol: foo)" in caplog.text


def test_the_compiled_kernels_serve_the_cpu(fresh_choice, caplog):
    pytest.importorskip("unishard._native")
    fresh_choice.delenv(VARIABLE, raising=False)
    assert table.active("cpu") == "native"
    assert not caplog.records


@pytest.mark.parametrize("device_type", ["meta", "mps", "xpu"])
def test_torch_serves_other_devices_without_a_word(device_type, fresh_choice, caplog):
    assert table.active(device_type) == "torch"
    assert not caplog.records


def test_cuda_tensors_go_to_triton(fresh_choice):
    pytest.importorskip("triton")
    assert table.active("cuda") == "triton"


def test_cuda_tensors_go_to_torch_without_triton(fresh_choice, caplog):
    fresh_choice.setattr("importlib.util.find_spec", lambda name: None)
    assert table.active("cuda") == "torch"
    assert "pip install triton" in caplog.text


def test_the_environment_decides(fresh_choice):
    fresh_choice.setenv(VARIABLE, "torch")
    assert table.implementation("adam", "cpu") is reference.adam


@pytest.mark.parametrize(
    ("value", "device_type", "message"),
    [
        ("fast", "cpu", "unknown; use one of native, triton, torch"),
        ("native", "cuda", "work on CPU tensors, and these tensors are on cuda"),
        ("triton", "cpu", "works on CUDA tensors"),
    ],
)
def test_an_impossible_choice_is_refused(value, device_type, message, fresh_choice):
    fresh_choice.delenv("TRITON_INTERPRET", raising=False)
    fresh_choice.setenv(VARIABLE, value)
    with pytest.raises(ConfigError, match=message):
        table.implementation("adam", device_type)


def test_a_forced_extension_that_is_absent_is_refused(fresh_choice):
    fresh_choice.setitem(sys.modules, "unishard._native", None)
    fresh_choice.setenv(VARIABLE, "native")
    with pytest.raises(ConfigError, match=f"{VARIABLE}=native: .* not installed"):
        step()


def test_fake_tensors_never_reach_an_address():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        w = torch.nn.Parameter(torch.empty(10))
        g, m, v = torch.empty(10), torch.empty(10), torch.empty(10)
        update([Target(w, g, (m, v))], AdamRule())
        assert squared_norm([g]).shape == ()
    with torch.device("meta"):
        squared_norm([torch.empty(3)])
