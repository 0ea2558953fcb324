"""The examples in the docstrings run, and the package loads its parts when first used."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
import subprocess
import sys

import pytest

import unishard.optim

MODULES = [module.name for module in pkgutil.iter_modules(unishard.optim.__path__, "unishard.optim.")]


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples(name: str) -> None:
    assert doctest.testmod(importlib.import_module(name)).failed == 0


def test_every_export_resolves() -> None:
    for name in unishard.optim.__all__:
        assert getattr(unishard.optim, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'Adm'"):
        _ = unishard.optim.Adm


def test_importing_the_package_loads_none_of_its_parts() -> None:
    code = "import sys, unishard.optim; print([m for m in sys.modules if m.startswith('unishard.optim.')])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
