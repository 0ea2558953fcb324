"""Every name of deepspeed that transformers and accelerate import or reach for exists here."""

from __future__ import annotations

import ast
import importlib
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

FILES = {
    "transformers": ("integrations/deepspeed.py", "trainer.py", "trainer_seq2seq.py", "modeling_utils.py"),
    "accelerate": (
        "accelerator.py", "state.py", "commands/launch.py", "utils/dataclasses.py", "utils/deepspeed.py",
        "utils/operations.py", "utils/other.py",
    ),
}  # fmt: skip
METHODS = [
    "backward",
    "step",
    "destroy",
    "compile",
    "module",
    "get_global_grad_norm",
    "set_gradient_accumulation_boundary",
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "save_checkpoint",
    "load_checkpoint",
    "save_16bit_model",
    "zero_optimization_stage",
    "zero_gather_16bit_weights_on_model_save",
    "_consolidated_16bit_state_dict",
    "_zero3_consolidated_16bit_state_dict",
    "zero_optimization_partition_weights",
    "is_gradient_accumulation_boundary",
]
"""What their loops call on engines."""


def _used(tree: ast.AST) -> Iterator[str]:
    """Dotted names below `deepspeed` that a module uses."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and not node.level and f"{node.module}.".startswith("deepspeed."):
            below = (node.module or "").partition(".")[2]
            yield from (f"{below}.{alias.name}".lstrip(".") for alias in node.names)
        elif isinstance(node, ast.Attribute):
            chain, inner = [node.attr], node.value
            while isinstance(inner, ast.Attribute):
                chain.append(inner.attr)
                inner = inner.value
            if isinstance(inner, ast.Name) and inner.id == "deepspeed":
                yield ".".join(reversed(chain))


def _exists(dotted: str) -> bool:
    found: object = importlib.import_module("unishard.deepspeed")
    for part in dotted.split("."):
        if isinstance(found, ModuleType) and not hasattr(found, part):
            return importlib.util.find_spec(f"{found.__name__}.{part}") is not None
        found = getattr(found, part)
    return True


@pytest.mark.parametrize("library", sorted(FILES))
def test_names_that_libraries_reach_for(library):
    spec = importlib.util.find_spec(library)
    if spec is None or spec.origin is None:
        pytest.skip(f"{library} is not installed")
    folder = Path(spec.origin).parent
    used = {name for file in FILES[library] for name in _used(ast.parse((folder / file).read_text()))}
    assert len(used) > 5, "nothing was looked at"
    assert [name for name in sorted(used) if not _exists(name)] == []


def test_methods_that_their_loops_call():
    engine = importlib.import_module("unishard.deepspeed").DeepSpeedEngine
    properties = {"module"}  # set by the constructor
    assert [name for name in METHODS if not hasattr(engine, name) and name not in properties] == []
