"""The drop-in: what `import deepspeed` and its metadata mean, when, and at what cost."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import unishard
from unishard.deepspeed.hook import ENVIRONMENT, child_environment


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True, text=True, timeout=60, env={**os.environ, **environment}, check=False,
    )  # fmt: skip


def test_install_makes_everything_resolve():
    done = run("""
        import importlib.metadata, importlib.util, json, pickle, sys
        import unishard.deepspeed
        unishard.deepspeed.install()
        unishard.deepspeed.install()
        found = importlib.util.find_spec("deepspeed")
        import deepspeed, deepspeed.runtime.zero.partition_parameters as pp
        from deepspeed.utils import logger, z3_leaf_module
        from deepspeed.runtime.lr_schedules import WarmupLR
        import deepspeed.runtime.lr_schedules
        assert deepspeed is unishard.deepspeed and deepspeed.zero.Init is pp.Init
        assert sys.modules["deepspeed.runtime.zero"] is sys.modules["unishard.deepspeed.runtime.zero"]
        assert pickle.loads(pickle.dumps(WarmupLR)) is WarmupLR
        assert callable(z3_leaf_module)
        assert importlib.util.find_spec("deepspeed.nowhere") is None
        print(json.dumps([found.origin, deepspeed.__file__, deepspeed.__version__, deepspeed.__spec__.name,
                          importlib.metadata.version("deepspeed"), importlib.metadata.metadata("deepspeed")["Name"]]))
    """)
    assert done.returncode == 0, done.stderr
    origin, file, version, name, distribution, title = json.loads(done.stdout)
    assert Path(origin).is_relative_to(Path(unishard.__file__).parent)
    assert file == origin
    assert version == distribution == "0.19.8+unishard"
    assert (name, title) == ("unishard.deepspeed", "deepspeed")


def test_uninstall_gives_the_name_back():
    done = run("""
        import sys, unishard.deepspeed as d
        sys.path[:] = [p for p in sys.path if "site-packages" not in p]
        d.install()
        import deepspeed
        d.uninstall()
        assert not d.installed() and "deepspeed" not in sys.modules
        try:
            import deepspeed
        except ImportError:
            print("gone")
    """)
    assert done.stdout == "gone\n", done.stderr


def test_install_refuses_after_the_real_package(tmp_path):
    (tmp_path / "deepspeed.py").write_text("__version__ = '9.9'\n")
    done = run(
        "import sys; sys.path.insert(0, sys.argv[1]) if len(sys.argv) > 1 else None\n"
        f"sys.path.insert(0, {str(tmp_path)!r})\nimport deepspeed, unishard.deepspeed\nunishard.deepspeed.install()"
    )
    assert done.returncode != 0
    assert "StateError: deepspeed 9.9 from" in done.stderr
    assert "before the first `import deepspeed`" in done.stderr


def test_nothing_changes_unless_asked(tmp_path):
    (tmp_path / "deepspeed.py").write_text("__version__ = '9.9'\n")
    done = run(
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "import unishard.deepspeed, deepspeed; print(deepspeed.__version__)"
    )
    assert done.stdout == "9.9\n", done.stderr


def test_child_processes_get_the_drop_in_and_keep_their_own_sitecustomize(tmp_path):
    (tmp_path / "sitecustomize.py").write_text("import builtins; builtins.own = 'kept'\n")
    environment = child_environment({**os.environ, "PYTHONPATH": str(tmp_path)})
    assert child_environment(environment)["PYTHONPATH"] == environment["PYTHONPATH"]
    code = (
        "import deepspeed, builtins, subprocess, sys; print(deepspeed.__version__, builtins.own, flush=True);"
    )
    code += "subprocess.run([sys.executable, '-c', 'import deepspeed; print(deepspeed.__version__)'])"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False
    )
    assert done.stdout == "0.19.8+unishard kept\n0.19.8+unishard\n", done.stderr
    off = {**environment, ENVIRONMENT: "0"}
    quiet = run("import builtins; print(builtins.own)", **off)
    assert quiet.stdout == "kept\n"


def test_importing_the_door_imports_nothing_heavy():
    done = run("import sys, unishard.deepspeed; print(sorted({name.split('.')[0] for name in sys.modules}))")
    loaded = set(json.loads(done.stdout.replace("'", '"')))
    assert not loaded & {"torch", "numpy", "pydantic", "transformers", "deepspeed"}


def test_run_passes_arguments_through_and_starts_ranks(tmp_path):
    script = tmp_path / "train.py"
    script.write_text(
        "import os, sys, deepspeed\n"
        "open(sys.argv[1] + os.environ['RANK'], 'w').write(' '.join([deepspeed.__version__, *sys.argv[2:]]))\n"
    )
    command = [sys.executable, "-m", "unishard.cli.main", "run", "-n", "2", "--as-deepspeed", str(script)]
    command += [str(tmp_path / "out"), "--lr", "3"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=90, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert [(tmp_path / f"out{rank}").read_text() for rank in (0, 1)] == ["0.19.8+unishard --lr 3"] * 2
