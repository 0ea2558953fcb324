"""The rules that keep the package readable: layers, sizes, names, documented public names."""

from __future__ import annotations

import ast
import importlib
import inspect
import logging
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted((ROOT / "src").rglob("*.py"))
MAX_FILE_LINES = 500
MAX_FUNCTION_LINES = 70  # docstring not counted
VAGUE_NAMES = {"utils", "util", "helpers", "helper", "common", "misc"}


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield node


def code_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of a function from its `def`, without its docstring."""
    first = function.body[0]
    is_docstring = isinstance(first, ast.Expr) and isinstance(getattr(first.value, "value", None), str)
    documented = (first.end_lineno or 0) - first.lineno + 1 if is_docstring else 0
    return (function.end_lineno or 0) - function.lineno + 1 - documented


def lazy_public_names() -> list[str]:
    return list(importlib.import_module("unishard").__all__)


def test_import_contracts(monkeypatch, capsys):
    from importlinter.cli import lint_imports

    # The linter configures logging anew, which turns every logger off; undone with the monkeypatch.
    for name in [name for name in logging.root.manager.loggerDict if name.startswith("unishard")]:
        monkeypatch.setattr(logging.getLogger(name), "disabled", False)
    monkeypatch.chdir(ROOT)
    status = lint_imports(no_cache=True, no_logo=True)
    assert status == 0, capsys.readouterr().out


def test_no_file_is_too_long():
    lengths = {path.relative_to(ROOT): len(path.read_text().splitlines()) for path in SOURCES}
    too_long = {str(path): count for path, count in lengths.items() if count > MAX_FILE_LINES}
    assert not too_long, f"split these files (more than {MAX_FILE_LINES} lines): {too_long}"


def test_no_function_is_too_long():
    too_long = {
        f"{path.relative_to(ROOT)}:{function.lineno} {function.name}": code_lines(function)
        for path in SOURCES
        for function in functions(ast.parse(path.read_text()))
        if code_lines(function) > MAX_FUNCTION_LINES
    }
    assert not too_long, f"split these functions (more than {MAX_FUNCTION_LINES} lines): {too_long}"


def test_the_size_gate_counts_code_and_not_docstrings():
    source = 'def f():\n    """One\n\n    two.\n    """\n    a = 1\n    return a\n'
    [function] = functions(ast.parse(source))
    assert code_lines(function) == 3


def test_no_vague_names():
    parts = {part for path in SOURCES for part in path.relative_to(ROOT / "src").with_suffix("").parts}
    vague = {part for part in parts if part.strip("_") in VAGUE_NAMES}
    assert not vague, f"name these modules after what they do: {vague}"


def test_every_source_file_starts_with_a_docstring_and_future_annotations():
    lacking = []
    for path in SOURCES:
        text = path.read_text()
        tree = ast.parse(text)
        if not tree.body:
            continue  # an empty __init__.py
        wants_annotations = any(not isinstance(node, ast.Expr) for node in tree.body)
        if ast.get_docstring(tree) is None or (
            wants_annotations and "from __future__ import annotations" not in text
        ):
            lacking.append(str(path.relative_to(ROOT)))
    assert not lacking, f"no module docstring, or no `from __future__ import annotations`: {lacking}"


def test_public_names_are_documented():
    unishard = importlib.import_module("unishard")
    public = lazy_public_names()
    assert public, "unishard exports nothing"
    undocumented = []
    for name in public:
        value = getattr(unishard, name)
        needs_text = inspect.isclass(value) or inspect.isroutine(value) or inspect.ismodule(value)
        if needs_text and not inspect.getdoc(value):
            undocumented.append(name)
    assert not undocumented, f"give these a docstring: {undocumented}"


def test_public_names_are_listed_by_dir():
    unishard = importlib.import_module("unishard")
    assert set(lazy_public_names()) <= set(dir(unishard))


@pytest.mark.parametrize(
    "name",
    [
        "README.md",
        "CONTRIBUTING.md",
        "CHANGELOG.md",
        "docs/design.md",
        "docs/kernels.md",
        "docs/deepspeed.md",
        "docs/transformers.md",
        "docs/lightning.md",
    ],
)
def test_relative_links_in_the_documents_resolve(name):
    import re

    document = ROOT / name
    targets = re.findall(r"\]\((?!https?:|#|mailto:)([^)#\s]+)", document.read_text())
    missing = [target for target in targets if not (document.parent / target).exists()]
    assert not missing, f"{name} links to files that do not exist: {missing}"


def test_scripts_are_executable():
    scripts = [ROOT / ".ci" / "run", *sorted((ROOT / "scripts").glob("*.sh"))]
    assert not [str(path) for path in scripts if not os.access(path, os.X_OK)]
