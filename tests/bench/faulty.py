"""Contestants that fail, by a module that rank processes can import."""

from __future__ import annotations

import os

import torch.distributed as dist

from unishard.bench.contestant import Contestant
from unishard.bench.plan import Plan


def build_raising(plan: Plan):
    raise ValueError("no such stage")


def build_dying(plan: Plan):
    if dist.get_rank() == 1:
        os._exit(3)
    dist.barrier()


RAISING = Contestant("raising", "raising", "zero3", "raises on every rank", build_raising)
DYING = Contestant("dying", "dying", "zero3", "one rank dies", build_dying)
