"""`launcher`, `autotuning`, `elasticity`: names; the mechanisms are not part of this version."""

from __future__ import annotations

from unishard.deepspeed.entries import Names, absent, constants, part
from unishard.deepspeed.surface.reasons import LAUNCHER, TUNING

_RUNNERS = (
    "IMPIRunner",
    "MPICHRunner",
    "MVAPICHRunner",
    "MultiNodeRunner",
    "OpenMPIRunner",
    "PDSHRunner",
    "SlurmRunner",
)

LAUNCHING: dict[str, Names] = {
    "launcher": {},
    "launcher.runner": {
        **part("launcher", "main", note="one host; on several, run torchrun on each"),
        **part("launcher", "parse_args", "fetch_hostfile", "parse_resource_filter", "parse_inclusion_exclusion"),
        **part("launcher", "encode_world_info", "_parse_hostfile", "DLTS_HOSTFILE", "DEEPSPEED_ENVIRONMENT_NAME"),
        **part("accelerator", "get_accelerator"),
        **absent(TUNING, "run_autotuning"),
    },
    "launcher.launch": absent(LAUNCHER, "main", "parse_args", "terminate_process_tree"),
    "launcher.multinode_runner": absent(LAUNCHER, *_RUNNERS),
    "launcher.constants": constants(
        PDSH_LAUNCHER="pdsh", OPENMPI_LAUNCHER="openmpi", MPICH_LAUNCHER="mpich", IMPI_LAUNCHER="impi",
        SLURM_LAUNCHER="slurm", MVAPICH_LAUNCHER="mvapich", PDSH_MAX_FAN_OUT=1024,
    ),
    "autotuning": absent(TUNING, "Autotuner"),
    "autotuning.autotuner": absent(TUNING, "Autotuner"),
    "autotuning.config": {**part("config_models", "DeepSpeedAutotuningConfig")},
    "autotuning.scheduler": absent(TUNING, "ResourceManager", "Node", "Reservation"),
    "autotuning.tuner": absent(TUNING, "GridSearchTuner", "RandomTuner", "ModelBasedTuner"),
    "autotuning.utils": absent(TUNING, "search_error"),
    "autotuning.constants": constants(AUTOTUNING="autotuning"),
}  # fmt: skip
