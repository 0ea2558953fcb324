"""What a process of DeepSpeed does in the tests: `deepspeed_process.py FOLDER RESULTS`."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ["DS_ACCELERATOR"] = "cpu"

import deepspeed
import torch.distributed as dist
from tests.checkpoint.convert import runs

WRITTEN: dict[str, Any] = {
    **{f"{stage}-fp32": {} for stage in range(4)},
    **{f"{stage}-bf16": {} for stage in range(4)},
    "2-fp32-robin": {"zero": {"round_robin_gradients": True}},
    "3-fp32-subgroups": {"zero": {"sub_group_size": 300}},
    "1-bf16-fp32-gradients": {"data_types": {"grad_accum_dtype": "fp32"}},
}
CONTINUED = [(1, "fp32", "two"), (2, "bf16", "two"), (3, "fp32", "one")]
NATIVE = [(stage, *which) for stage in (1, 2, 3) for which in (("fp32", "two"), ("bf16", "two"))]


def start(stage: int, dtype: str, seed: int = 0, one: bool = False, **more: Any) -> Any:
    model = runs.build(seed)
    settings = runs.config(stage, dtype, **more)
    settings["optimizer"]["params"]["torch_adam"] = True
    settings["zero_force_ds_cpu_optimizer"] = False
    settings["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    return deepspeed.initialize(model=model, model_parameters=runs.groups(model, one), config=settings)[0]


def write(folder: Path, found: dict[str, list[float]]) -> None:
    for which, more in WRITTEN.items():
        stage, dtype = which.split("-")[:2]
        engine = start(int(stage), dtype, **more)
        runs.train(engine, runs.BEFORE)
        engine.save_checkpoint(folder / which, client_state={"note": [1, "two"]})
        found[which] = runs.train(engine, runs.AFTER)


def go_on(folder: Path, found: dict[str, list[float]]) -> None:
    for stage, dtype, groups in CONTINUED:
        # With several groups stage 3 advances torch's step counters once for each: DeepSpeed lets them share a tensor.
        engine = start(stage, dtype, seed=5, one=groups == "one", checkpoint={"load_universal": True})
        path, _ = engine.load_checkpoint(str(folder / f"{dtype}-{groups}"))
        assert path is not None
        assert engine.global_steps == runs.STEPS
        found[f"{stage}-{dtype}-{groups}"] = runs.train(engine, runs.AFTER)


def go_on_natively(folder: Path, found: dict[str, list[float]]) -> None:
    for stage, dtype, groups in NATIVE:
        engine = start(stage, dtype, seed=5, one=groups == "one")
        path, client_state = engine.load_checkpoint(str(folder / f"{max(stage, 2)}-{dtype}-{groups}"))
        assert path is not None
        assert client_state["note"] == [1, "two"]
        assert engine.global_steps == runs.STEPS
        found[f"native-{stage}-{dtype}-{groups}"] = runs.train(engine, runs.AFTER)


def main() -> None:
    folder, results = Path(sys.argv[1]), Path(sys.argv[2])
    deepspeed.init_distributed("gloo")
    found: dict[str, dict[str, list[float]]] = {"written": {}, "continued": {}}
    write(folder, found["written"])
    go_on(folder / "universal", found["continued"])
    go_on_natively(folder / "native", found["continued"])
    if dist.get_rank() == 0:
        results.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
