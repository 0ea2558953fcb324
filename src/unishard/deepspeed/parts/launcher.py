"""`launcher.runner`: hostfiles, which slots of them to use, and the start of a script on this machine."""

from __future__ import annotations

import argparse
import base64
import importlib
import json
import os
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from unishard.errors import UnsupportedError

DLTS_HOSTFILE = "/job/hostfile"
DEEPSPEED_ENVIRONMENT_NAME = os.environ.get("DS_ENV_FILE", ".deepspeed_env")
"""Where libraries leave variables for processes on other hosts."""
_LINE = re.compile(r"^(\S+)\s+slots=(\d+)\s*$")


# hosts and slots --------------------------------------------------------------------------------------------


def _parse_hostfile(hostfile_lines: Iterable[str]) -> dict[str, int]:
    """Host -> number of slots, from lines like `worker-1 slots=4`. Raises `ValueError` for others, and for none.

    >>> _parse_hostfile(["# two hosts", "a slots=2", "", "b slots=4"])
    {'a': 2, 'b': 4}
    """
    pool: dict[str, int] = {}
    for line in hostfile_lines:
        text = line.strip()
        if not text or text.startswith("#"):
            continue
        fits = _LINE.match(text)
        if fits is None:
            raise ValueError(f"hostfile: cannot read {text!r}; write one host a line, as: worker-1 slots=4")
        if fits[1] in pool:
            raise ValueError(f"hostfile: {fits[1]} occurs twice; keep one of its lines")
        pool[fits[1]] = int(fits[2])
    if not pool:
        raise ValueError("hostfile: there is no host in it; write one a line, as: worker-1 slots=4")
    return pool


def fetch_hostfile(hostfile_path: str | Path) -> dict[str, int]:
    """What a hostfile says; {} where there is no such file."""
    path = Path(hostfile_path)
    return _parse_hostfile(path.read_text().splitlines()) if path.is_file() else {}


def _selection(text: str, hosts: Mapping[str, Sequence[int]]) -> dict[str, list[int] | None]:
    """Host -> slots (`None`: all) of `host@host:0,2`. Raises `ValueError` for hosts and slots that are not there."""
    chosen: dict[str, list[int] | None] = {}
    for node in text.split("@"):
        host, colon, slots = node.strip().partition(":")
        if host not in hosts:
            raise ValueError(f"No host {host!r} among {', '.join(hosts) or 'none'}; correct {text!r}")
        if not colon:
            chosen[host] = None
            continue
        known = chosen.setdefault(host, []) or []
        for slot in slots.split(","):
            if not slot.strip().isdigit() or int(slot) not in hosts[host]:
                raise ValueError(f"No slot {slot!r} specified on host {host!r}; it has {list(hosts[host])}")
            known.append(int(slot))
        chosen[host] = known
    return chosen


def parse_resource_filter(
    host_info: Mapping[str, Sequence[int]], include_str: str = "", exclude_str: str = ""
) -> dict[str, list[int]]:
    """The slots of each host that a run uses: those included, or all but those excluded.

    Args:
        include_str, exclude_str: `host@host:slot,slot`; a host alone means all of its slots. One of the two.

    Raises:
        ValueError: both are given, or a host or a slot is not there.

    >>> parse_resource_filter({"a": [0, 1], "b": [0, 1]}, include_str="a@b:1")
    {'a': [0, 1], 'b': [1]}
    """
    if include_str and exclude_str:
        raise ValueError(f"include={include_str!r} and exclude={exclude_str!r} contradict; keep one")
    chosen = _selection(include_str or exclude_str, host_info) if include_str or exclude_str else {}
    found = {}
    for host, slots in host_info.items():
        picked = chosen.get(host, []) if host in chosen else ([] if include_str else None)
        if exclude_str:
            out = slots if host in chosen and picked is None else (picked or ())
            kept = [slot for slot in slots if slot not in out]
        else:
            kept = [slot for slot in slots if picked is None or slot in picked]
        if kept:
            found[host] = kept
    return found


def parse_inclusion_exclusion(
    resource_pool: Mapping[str, int], inclusion: str, exclusion: str
) -> dict[str, list[int]]:
    """As `parse_resource_filter`, from numbers of slots."""
    hosts = {host: list(range(slots)) for host, slots in resource_pool.items()}
    return parse_resource_filter(hosts, include_str=inclusion, exclude_str=exclusion)


def encode_world_info(world_info: Mapping[str, Any]) -> str:
    """Hosts and slots as text that survives a command line."""
    return base64.urlsafe_b64encode(json.dumps(world_info).encode()).decode()


# the command line -------------------------------------------------------------------------------------------


def parse_args(args: Sequence[str] | None = None) -> argparse.Namespace:
    """The options of the command `deepspeed`, the script, and the script's own arguments in `user_args`."""
    parser = argparse.ArgumentParser(prog="deepspeed", description="Start a training script.")
    parser.add_argument("-H", "--hostfile", default=DLTS_HOSTFILE, help="hosts and their slots")
    parser.add_argument("-i", "--include", default="", help="hosts and slots to use: host@host:0,2")
    parser.add_argument("-e", "--exclude", default="", help="hosts and slots to leave out")
    parser.add_argument("--num_nodes", type=int, default=-1, help="use the first hosts")
    parser.add_argument("--num_gpus", "--num_accelerators", type=int, default=-1, help="slots of each host")
    parser.add_argument("--master_port", type=int, default=0, help="of the rendezvous; default: a free one")
    parser.add_argument("--master_addr", default="", help="of the rendezvous between hosts")
    parser.add_argument("--launcher", default="pdsh", help="what starts processes on other hosts")
    parser.add_argument("--launcher_args", default="", help="options of that")
    parser.add_argument("--module", action="store_true", help="the script is a module")
    parser.add_argument("--no_python", action="store_true", help="the script is a program")
    parser.add_argument("--no_local_rank", action="store_true", help="do not pass --local_rank to the script")
    parser.add_argument("--no_ssh_check", action="store_true", help="accepted")
    parser.add_argument("--force_multi", action="store_true", help="treat one host as several")
    parser.add_argument("user_script", help="the training script")
    parser.add_argument("user_args", nargs=argparse.REMAINDER, help="its arguments")
    return parser.parse_args(args)


def _check(options: argparse.Namespace) -> None:
    selects = options.include or options.exclude
    if selects and (options.num_nodes >= 0 or options.num_gpus >= 0):
        raise ValueError("--num_nodes and --num_gpus contradict --include and --exclude; keep one kind")


def main(args: Sequence[str] | None = None) -> None:
    """Start a script on the slots of this machine, through torchrun, and leave with its exit code.

    Raises:
        UnsupportedError: several hosts are asked for.
    """
    # By their public names: libraries replace them there.
    runner = importlib.import_module("unishard.deepspeed.launcher.runner")
    options = parse_args(args)
    _check(options)
    pool = runner.fetch_hostfile(options.hostfile)
    accelerator = runner.get_accelerator()
    visible = next((name for name in accelerator.visible_devices_envs() if os.environ.get(name)), None)
    if not pool:
        if visible is not None and not options.include and not options.exclude:
            options.include = f"localhost:{os.environ.pop(visible)}"
        pool = {"localhost": accelerator.device_count()}
    active = runner.parse_inclusion_exclusion(pool, options.include, options.exclude)
    if options.num_nodes > 0:
        active = dict(list(active.items())[: options.num_nodes])
    if options.num_gpus > 0:
        active = {host: list(range(options.num_gpus)) for host in active}
    if len(active) != 1 or options.force_multi:
        raise UnsupportedError(
            f"deepspeed: hosts {', '.join(active) or 'none'}: this version starts one host; run "
            "`torchrun --nnodes ... --rdzv-endpoint ...` on each, or --include one of them"
        )
    os.execve(sys.executable, *_command(options, next(iter(active.values())), accelerator))


def _command(
    options: argparse.Namespace, slots: Sequence[int], accelerator: Any
) -> tuple[list[str], dict[str, str]]:
    """What to run, and in which environment."""
    from unishard.deepspeed.hook import child_environment

    environment = child_environment(dict(os.environ))
    for name in accelerator.visible_devices_envs():
        environment[name] = ",".join(map(str, slots))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(len(slots))]
    command += ["--master_port", str(options.master_port)] if options.master_port else ["--standalone"]
    script = [options.user_script]
    if options.no_python:
        command += ["--no-python"]
    elif options.no_local_rank:
        command += ["--module"] if options.module else []
    else:
        kind = "module" if options.module else "file"
        script = ["--module", "unishard.deepspeed.parts.local_rank", kind, options.user_script]
    return [*command, *script, *options.user_args], environment
