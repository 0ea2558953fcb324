#!/usr/bin/env bash
# Create a virtual environment and install unishard into it: install.sh PYTHON VENV
set -euo pipefail
python=$1
venv=$2
cd "$(dirname "$0")/.."

if ! command -v "$python" > /dev/null; then
    echo "No '$python' on this machine. Install Python 3.10 or later, or run 'make PYTHON=/path/to/python ...'." >&2
    exit 1
fi
if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))'; then
    echo "$("$python" --version) is too old: unishard needs Python 3.10 or later ('make PYTHON=python3.12 ...')." >&2
    exit 1
fi
if [ ! -x "$venv/bin/python" ]; then
    if ! "$python" -c 'import ensurepip, venv' 2> /dev/null; then
        echo "This Python cannot make virtual environments. On Debian and Ubuntu: apt-get install python3-venv." >&2
        exit 1
    fi
    echo "==> creating $venv with $("$python" --version)"
    "$python" -m venv "$venv"
fi

pip=("$venv/bin/python" -m pip --disable-pip-version-check install -qq --constraint constraints.txt)
# PyTorch first and by its exact version: a range may resolve to a larger build than the one at hand.
torch=$(grep '^torch==' constraints.txt)
echo "==> installing $torch"
"${pip[@]}" "$torch"
echo "==> installing unishard and what its development needs"
"${pip[@]}" --editable '.[dev,hf,examples]'
echo "==> installed: $("$venv/bin/python" -c '
import importlib.util, sys, torch
kernels = "compiled CPU kernels" if importlib.util.find_spec("unishard._native") else "no compiled kernels (they need a C++17 compiler)"
print("Python", sys.version.split()[0], "torch", torch.__version__, "with", kernels)')"
