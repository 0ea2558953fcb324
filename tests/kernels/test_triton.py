"""The Triton kernels without a GPU: under the interpreter, and compiled for two generations of NVIDIA machines."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

CASES = Path(__file__).with_name("interpreted_triton.py")

POINTERS = {"param": "*fp32", "grad": "*bf16", "first": "*fp32", "second": "*bf16", "copy": "*bf16"}
POINTERS |= {"momentum": "*fp32", "total": "*fp32", "buffer": "*fp32"}


@pytest.mark.slow
def test_they_equal_the_reference_under_the_interpreter():
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(CASES)],
        cwd=Path(__file__).resolve().parents[2],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]


def compiled(kernel, pointers: dict[str, str], constants: dict[str, object], generation: int) -> str:
    """The assembly of `kernel`; arguments that are neither pointers, constants nor counts are floats."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    signature = {}
    for name in kernel.arg_names:
        if name in constants:
            signature[name] = "constexpr"
        else:
            signature[name] = pointers.get(name, "i32" if name in ("numel", "count") else "fp32")
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
    result = compile(source, target=GPUTarget("cuda", generation, 32), options={"enable_fp_fusion": False})
    assert result.asm["cubin"]
    return result.asm["ptx"]


@pytest.mark.parametrize("generation", [80, 90])
def test_they_compile_for_gpus_and_round_as_the_cpu_does(generation):
    from unishard.kernels.triton import flat, steps

    step = {"HAS_COPY": True, "BLOCK": 1024}
    l2 = {**step, "HAS_L2": True}
    sgd = {**l2, "HAS_BUFFER": True, "FIRST": False, "NESTEROV": True}
    adam = compiled(steps.adam_kernel, POINTERS, l2, generation)
    assert "fma.rn.f32" not in adam
    assert "div.full" not in adam
    assert "approx" not in adam
    compiled(steps.lion_kernel, {**POINTERS, "momentum": "*bf16"}, step, generation)
    compiled(steps.adagrad_kernel, POINTERS, l2, generation)
    # The optimizer's coefficient and its buffer are named apart: `momentum` is a float here.
    compiled(steps.sgd_kernel, {**POINTERS, "momentum": "fp32"}, sgd, generation)
    compiled(flat.squares_kernel, {"tensor": "*bf16", "sums": "*fp64"}, {"BLOCK": 1024}, generation)
    pointers = {"out": "*fp32", "addresses": "*i64", "like": "*bf16"}
    compiled(flat.sum_kernel, pointers, {"HAS_BETA": True, "ALIGNED": True, "BLOCK": 1024}, generation)
    compiled(
        flat.convert_kernel, {"out": "*fp16", "tensor": "*fp32"}, {"SCALED": True, "BLOCK": 1024}, generation
    )
