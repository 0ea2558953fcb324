#!/usr/bin/env bash
# What can be checked on one CUDA device: parity, memory, kernels, and a step beside plain PyTorch.
# Usage: scripts/gpu_check.sh [PYTHON], with a Python that has torch with CUDA, this package and its dev extra.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${1:-.venv/bin/python}
if ! "$python" -c 'import torch, sys; sys.exit(not torch.cuda.is_available())'; then
    echo "No CUDA device that '$python' can use. Install a torch with CUDA into it, or name another Python." >&2
    exit 1
fi
"$python" -c 'import torch; print("==>", torch.cuda.get_device_name(), "torch", torch.__version__)'
echo "==> parity, memory and kernels on one device"
"$python" -m pytest -q tests/gpu tests/kernels/test_triton.py
echo "==> the suite's own checks that need no device, with one present"
"$python" -m pytest -q tests/sharding/test_step.py -k "plain"
echo "==> a step beside plain PyTorch"
"$python" scripts/gpu_step.py
echo "==> kernels"
"$python" -m unishard.kernels
