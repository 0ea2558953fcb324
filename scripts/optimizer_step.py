"""Time one AdamW step over a flat CPU tensor: unishard's kernel, torch's fused AdamW, DeepSpeed's CPUAdam if installed.

    python scripts/optimizer_step.py --numel 50000000 --threads 1 2

Two jobs: `plain` is fp32 throughout; `mixed` starts from a bf16 gradient that must be multiplied by a factor (unscaling
and clipping) and ends with a bf16 copy of the parameters. What torch and DeepSpeed lack in their step is done by their
fastest operations around it. The contestants take turns, and each round gives one ratio; printed are the median over
rounds and the quartiles, for wall time and for processor time, which other programs disturb less. OpenMP's threads spin
after their work, so processor time is comparable only under OMP_WAIT_POLICY=passive.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from unishard.kernels import AdamRule, Target, update
from unishard.kernels.table import active

# Parameters, both moments and the gradient are read, all but the gradient written; the copy is written.
BYTES = {"plain": 28, "mixed": 28}
RULE = AdamRule(lr=1e-3, weight_decay=0.01)
FACTOR = 0.5

Step = Callable[[], object]


def contestants(job: str, numel: int) -> dict[str, Step]:
    """What takes part in `job`, each with tensors of its own."""
    steps = {"unishard": ours(job, numel), "torch": torchs(job, numel)}
    deepspeeds = deepspeed(job, numel)
    return {**steps, "DeepSpeed": deepspeeds} if deepspeeds else steps


def ours(job: str, numel: int) -> Step:
    param, first, second = torch.randn(numel), torch.zeros(numel), torch.zeros(numel)
    grad = torch.randn(numel)
    if job == "plain":
        return lambda: update([Target(param, grad, (first, second))], RULE, step=7)
    target = Target(param, grad.bfloat16(), (first, second), torch.empty(numel, dtype=torch.bfloat16))
    return lambda: update([target], RULE, step=7, grad_scale=FACTOR)


def torchs(job: str, numel: int) -> Step:
    param = torch.nn.Parameter(torch.randn(numel))
    param.grad = torch.randn(numel)
    optimizer = torch.optim.AdamW([param], lr=RULE.lr, weight_decay=RULE.weight_decay, fused=True)
    if job == "plain":
        return optimizer.step
    short, copy = param.grad.bfloat16(), torch.empty(numel, dtype=torch.bfloat16)
    # The fused step divides by `grad_scale` on the way, which saves a pass.
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(1 / FACTOR), torch.tensor(0.0)  # pyright: ignore

    def step() -> None:
        assert param.grad is not None
        param.grad.copy_(short)
        optimizer.step()
        copy.copy_(param.detach())

    return step


def deepspeed(job: str, numel: int) -> Step | None:
    try:
        from deepspeed.ops.adam import DeepSpeedCPUAdam
    except ImportError:
        return None
    param = torch.nn.Parameter(torch.randn(numel))
    param.grad = torch.randn(numel)
    optimizer = DeepSpeedCPUAdam([param], lr=RULE.lr, weight_decay=RULE.weight_decay)
    if job == "plain":
        return optimizer.step
    short, copy = param.grad.bfloat16(), torch.empty(numel, dtype=torch.bfloat16)

    def step() -> None:
        assert param.grad is not None
        param.grad.copy_(short).mul_(FACTOR)
        optimizer.step()
        copy.copy_(param.detach())

    return step


def timed(step: Step) -> tuple[float, float]:
    wall, processor = time.perf_counter(), time.process_time()
    step()
    return time.perf_counter() - wall, time.process_time() - processor


def spread(values: list[float]) -> str:
    low, middle, high = statistics.quantiles(values, n=4)
    return f"{middle:5.2f} [{low:.2f}, {high:.2f}]"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--numel", type=int, default=50_000_000)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--job", choices=list(BYTES), nargs="+", default=list(BYTES))
    options = parser.parse_args()
    print(f"{options.numel:,} parameters, {options.rounds} rounds, unishard's kernel: {active('cpu')}")
    for job in options.job:
        steps = contestants(job, options.numel)
        for threads in options.threads:
            torch.set_num_threads(threads)
            for step in steps.values():
                step()
            rounds = [{name: timed(step) for name, step in steps.items()} for _ in range(options.rounds)]
            size = BYTES[job] * options.numel / 1e9
            for name in steps:
                speed = size / statistics.median(r[name][0] for r in rounds)
                wall = spread([r[name][0] / r["unishard"][0] for r in rounds])
                processor = spread([r[name][1] / r["unishard"][1] for r in rounds])
                print(
                    f"{job:6} {threads} threads  {name:10} {speed:6.1f} GB/s   "
                    f"time over unishard's: wall {wall}   processor {processor}"
                )


if __name__ == "__main__":
    main()
