"""The table of names: everything in it resolves, refuses, or is the peer's, and signatures are the peer's."""

from __future__ import annotations

import importlib
import inspect
import json
import subprocess
import sys

import pytest
from pydantic import BaseModel

import unishard.deepspeed as deepspeed
from unishard.deepspeed.__main__ import lines
from unishard.deepspeed.surface import SURFACE
from unishard.errors import UnsupportedError
from unishard.optim.sharded import ShardedOptimizer

GONE = {
    # In earlier releases, and still imported by scripts.
    "runtime.fp16.onebit", "runtime.fp16.onebit.adam", "runtime.fp16.onebit.lamb", "runtime.fp16.onebit.zoadam",
}  # fmt: skip
DUMP = """
import importlib, inspect, json, sys
wanted, found = json.load(sys.stdin), {}
for path, names in wanted.items():
    try:
        module = importlib.import_module(("deepspeed." + path).rstrip("."))
    except Exception as error:
        found[path] = repr(error)
        continue
    found[path] = {}
    for name in names:
        value = getattr(module, name, None)
        if value is None and not hasattr(module, name):
            continue
        try:
            parameters = list(inspect.signature(value).parameters) if callable(value) else None
        except (TypeError, ValueError):
            parameters = None
        found[path][name] = parameters
print("\\n" + json.dumps(found))
"""


def module(path: str):
    return importlib.import_module(f"unishard.deepspeed.{path}".rstrip("."))


@pytest.mark.parametrize("path", SURFACE)
def test_every_name_resolves(path):
    found = module(path)
    for name, entry in SURFACE[path].items():
        value = getattr(found, name)
        assert entry.status != "absent" or callable(value), name
    assert set(SURFACE[path]) <= set(dir(found))


@pytest.mark.parametrize(
    "path", [path for path, names in SURFACE.items() if any(e.status == "absent" for e in names.values())]
)
def test_absent_names_refuse_at_first_use_and_say_what_instead(path):
    for name, entry in SURFACE[path].items():
        if entry.status == "absent":
            assert entry.note
            with pytest.raises(UnsupportedError, match=f"{name} is not available in unishard: "):
                getattr(module(path), name)(1)


def test_absent_classes_are_classes():
    from unishard.deepspeed.moe.layer import MoE

    assert isinstance(MoE, type)
    assert not isinstance(object(), MoE)


def test_unknown_names_are_attribute_errors_with_a_hint():
    with pytest.raises(AttributeError, match="did you mean 'initialize'"):
        deepspeed.initialise  # noqa: B018
    with pytest.raises(ImportError):
        importlib.import_module("unishard.deepspeed.nowhere")


def test_the_table_names_all_three_kinds():
    table = "\n".join(lines())
    assert "supported  initialize, add_config_arguments" in table
    assert "partial    init_inference" in table
    assert "absent     PipelineModule" in table


@pytest.fixture(scope="module")
def peer():
    pytest.importorskip("deepspeed")
    done = subprocess.run(
        [sys.executable, "-c", DUMP],
        input=json.dumps({path: list(names) for path, names in SURFACE.items()}),
        capture_output=True, text=True, timeout=120, env={"PATH": "/usr/bin:/bin", "DS_ACCELERATOR": "cpu"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_names_are_the_peers(peer):
    invented = {
        path: sorted(set(SURFACE[path]) - set(names)) if isinstance(names, dict) else names
        for path, names in peer.items()
        if path not in GONE
    }
    assert not {path: names for path, names in invented.items() if names}


def test_signatures_take_what_the_peers_take(peer):
    lacking = {}
    for path, names in peer.items():
        for name, parameters in names.items() if isinstance(names, dict) else ():
            if SURFACE[path][name].status == "absent" or parameters is None:
                continue
            value = getattr(module(path), name)
            if isinstance(value, type) and issubclass(value, (BaseModel, Exception, ShardedOptimizer)):
                continue  # parsed by keyword, or made by the engine only
            try:
                own = inspect.signature(value).parameters
            except ValueError:
                continue
            if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in own.values()):
                continue
            missing = [p for p in parameters if p not in own and p not in ("self", "args", "kwargs")]
            if missing:
                lacking[f"{path}.{name}"] = missing
    assert not lacking
