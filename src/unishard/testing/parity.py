"""`assert_parity`: sharded training against one process, by post-clip gradients and by the whole update.

Errors are relative L2 over all parameters: Adam turns round-off in near-zero gradients into real updates, so single
elements mislead.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from unishard.sharding.group import WEIGHTS, ShardGroup
from unishard.testing.models import MODELS, Batch, ToyModel
from unishard.testing.tiers import LatePolicy, resting_late

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
BOUNDS = {"fp32": 2e-5, "bf16": 0.1, "fp16": 0.02}
"""Relative L2 after four steps. In 16 bits the reference computes in the same dtype, with fp32 masters."""
LEARNING_RATE = 1e-2
EPS = 1e-3
"""Adam's. A key's bias has no gradient but round-off (softmax does not see it), and a small eps makes steps of that."""


@dataclass(frozen=True)
class ParityCase:
    """One point of the matrix. `door` is "config" or "code"."""

    model: str
    preset: str
    door: str = "config"
    accumulation: int = 1
    clipping: float = 0.0
    dtype: str = "fp32"
    optimizer: str = "AdamW"
    steps: int = 4
    offload: str = ""
    """What rests on a tier: "optimizer", "gradient", "parameter", or several joined by "+"."""


@dataclass
class Run:
    """What a training run left: weights at the end, and post-clip gradients of every step, by parameter name."""

    weights: dict[str, Tensor]
    gradients: list[dict[str, Tensor]]


def batch_for(model: ToyModel, step: int, micro: int, rank: int) -> Batch:
    return model.example_batch(seed=1000 * step + 100 * micro + rank, batch_size=4)


def assert_all_parity(cases: Iterable[ParityCase]) -> None:
    """`assert_parity` of each; raises one `AssertionError` with all that differ."""
    failures = []
    for case in cases:
        try:
            assert_parity(case)
        except AssertionError as error:
            failures.append(str(error))
    if failures:
        raise AssertionError(f"{len(failures)} cases differ from one process:\n" + "\n".join(failures))


def assert_parity(case: ParityCase) -> None:
    """Train `case` on all ranks and alone, and raise `AssertionError` unless they agree within `BOUNDS`.

    Every rank but the first starts from other weights, which the first rank's must replace.
    """
    torch.manual_seed(42)
    initial = MODELS[case.model]()
    expected = train_alone(copy.deepcopy(initial), case)
    torch.manual_seed(42 + dist.get_rank())
    found = TRAINERS[case.door](MODELS[case.model](), case)
    before = {name: p.detach() for name, p in initial.named_parameters()}
    bound = BOUNDS[case.dtype]
    _compare(f"{case}: update", _minus(expected.weights, before), _minus(found.weights, before), bound)
    # Later steps start from weights that differ already; the first compares gradients alone.
    _compare(f"{case}: post-clip gradients", expected.gradients[0], found.gradients[0], bound)
    _compare(f"{case}: last gradients", expected.gradients[-1], found.gradients[-1], 10 * bound)


def _minus(a: dict[str, Tensor], b: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: a[name] - b[name] for name in a}


def _compare(what: str, expected: dict[str, Tensor], found: dict[str, Tensor], bound: float) -> None:
    if set(expected) != set(found):
        raise AssertionError(f"{what}: names differ: {sorted(set(expected) ^ set(found))}")
    error = norm(found[name].double() - value.double() for name, value in expected.items())
    size = norm(value.double() for value in expected.values())
    if not error <= bound * size:
        worst = max(expected, key=lambda name: float((found[name] - expected[name]).norm()))
        raise AssertionError(
            f"{what}: relative error {error / max(size, 1e-30):.2e} > {bound:.0e}, most in {worst}"
        )


def norm(tensors: Iterable[Tensor]) -> float:
    return sum(float(t.pow(2).sum()) for t in tensors) ** 0.5


def _new_optimizer(case: ParityCase, params: Iterable[Tensor]) -> torch.optim.Optimizer:
    if case.optimizer == "SGD":
        return torch.optim.SGD(params, lr=LEARNING_RATE, momentum=0.9)
    if case.optimizer == "torch.optim.NAdam":
        return torch.optim.NAdam(params, lr=LEARNING_RATE, eps=EPS)
    return torch.optim.AdamW(params, lr=LEARNING_RATE, weight_decay=0.1, eps=EPS)


def train_alone(model: ToyModel, case: ParityCase) -> Run:
    """One process over every rank's batches: compute in the case's dtype, fp32 masters and sums."""
    world, dtype = dist.get_world_size(), DTYPES[case.dtype]
    optimizer = _new_optimizer(case, model.parameters())
    run = Run({}, [])
    for step in range(case.steps):
        for micro in range(case.accumulation):
            for rank in range(world):
                compute = copy.deepcopy(model).to(dtype)
                for param in compute.parameters():
                    param.grad = None
                inputs, targets = batch_for(model, step, micro, rank)
                compute.loss(compute(_to(inputs, dtype)), targets).backward()
                _add_gradients(model, compute, 1.0 / (world * case.accumulation))
                _copy_buffers(compute, model)
        if case.clipping:
            nn.utils.clip_grad_norm_(model.parameters(), case.clipping)
        run.gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
        optimizer.step()
        optimizer.zero_grad()
    run.weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    return run


def _to(inputs: Tensor, dtype: torch.dtype) -> Tensor:
    return inputs.to(dtype) if inputs.is_floating_point() else inputs


@torch.no_grad()
def _add_gradients(model: nn.Module, compute: nn.Module, weight: float) -> None:
    for master, param in zip(model.parameters(), compute.parameters(), strict=True):
        if param.grad is not None:
            grad = param.grad.float() * weight
            master.grad = grad if master.grad is None else master.grad + grad


@torch.no_grad()
def _copy_buffers(source: nn.Module, target: nn.Module) -> None:
    for a, b in zip(source.buffers(), target.buffers(), strict=True):
        b.copy_(a)


def train_config_door(model: ToyModel, case: ParityCase) -> Run:
    """Through `initialize`, `backward`, `step`."""
    import unishard

    names = {id(p): name for name, p in model.named_parameters()}
    params: dict[str, float] = {"lr": LEARNING_RATE}
    own = {"SGD": {"momentum": 0.9}, "torch.optim.NAdam": {"eps": EPS}}
    params.update(own.get(case.optimizer, {"weight_decay": 0.1, "eps": EPS}))
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": case.accumulation,
        "sharding": case.preset,
        "optimizer": {"type": case.optimizer, "params": params},
    }
    if case.clipping:
        config["gradient_clipping"] = case.clipping
    if case.preset.startswith("HYBRID"):
        config["mesh"] = {"dp_replicate": 2, "dp_shard": dist.get_world_size() // 2}
    if case.dtype != "fp32":
        config[case.dtype] = {"enabled": True}
    if case.dtype == "fp16":
        config["fp16"]["initial_scale_power"] = 6
    with resting_late(case.offload) if case.offload else nullcontext() as tier:
        engine, optimizer, _, _ = unishard.initialize(model=model, config=config)
    run = Run({}, [])
    optimizer.before_update = lambda groups: run.gradients.append(whole_gradients(groups, names))
    for step in range(case.steps):
        for micro in range(case.accumulation):
            inputs, targets = batch_for(model, step, micro, dist.get_rank())
            engine.backward(model.loss(engine(inputs), targets))
            engine.step()
    run.weights = whole_weights(engine.schedule.groups, names)
    if tier is not None:
        busy = [g.name for g in engine.schedule.groups if g.resting is not None and not g.resting.idle]
        if busy or not tier.calls:
            raise AssertionError(f"{case}: {busy} are still in memory; {len(tier.calls)} calls of the tier")
    return run


def _whole(group: ShardGroup, shard: Tensor) -> list[Tensor]:
    axes = group.axes.shard
    full = torch.empty(group.buffer.layout.numel, dtype=shard.dtype)
    full.chunk(axes.size)[axes.rank].copy_(shard) if full.numel() else None
    axes.all_gather(full, "test").wait()
    return [view.clone() for view in group.buffer.whole_views(full)]


def whole_weights(groups: Iterable[ShardGroup], names: dict[int, str]) -> dict[str, Tensor]:
    """Master weights by name, gathered from flat shards."""
    found: dict[str, Tensor] = {}
    for group in groups:
        with group.in_memory(WEIGHTS, changed=False):
            values = _whole(group, group.buffer.shard)
        found |= {
            names[id(r.visible)]: value.detach() for r, value in zip(group.registrations, values, strict=True)
        }
    return found


def whole_gradients(groups: Iterable[ShardGroup], names: dict[int, str]) -> dict[str, Tensor]:
    """Reduced gradients by name; of parameters that some rank used."""
    from unishard.sharding.touched import agree_on_touched

    found: dict[str, Tensor] = {}
    for group in groups:
        if group.gradients.shard is None:
            continue
        used = agree_on_touched([group], group.axes)[0]
        with group.gradients.in_memory():
            values = _whole(group, group.gradients.shard)
        for index, value in enumerate(values):
            if index in used:
                found[names[id(group.registrations[index].visible)]] = value.float()
    return found


def train_code_door(model: ToyModel, case: ParityCase) -> Run:
    """Through `fully_shard` and a torch optimizer."""
    import unishard

    mesh = None
    if case.preset.startswith("HYBRID"):
        from unishard.dist.mesh import build_mesh

        mesh = build_mesh("cpu", dp_replicate=2)
    dtype = DTYPES[case.dtype]
    offload = LatePolicy(case.offload) if case.offload else None
    policy = unishard.MixedPrecisionPolicy(param_dtype=None if dtype == torch.float32 else dtype)
    # A unit's forward must run on all ranks, and tied weights belong to one unit: those models are one unit whole.
    units = [] if case.model in ("unused_branch", "tied", "tied_transformer") else model.shard_units()
    for module in [*units, model]:
        unishard.fully_shard(
            module, mesh=mesh, sharding=case.preset, mp_policy=policy, offload_policy=offload
        )
    optimizer = _new_optimizer(case, model.parameters())
    run = Run({}, [])
    for step in range(case.steps):
        for micro in range(case.accumulation):
            model.set_requires_gradient_sync(micro == case.accumulation - 1)  # pyright: ignore[reportCallIssue]
            inputs, targets = batch_for(model, step, micro, dist.get_rank())
            (model.loss(model(inputs), targets) / case.accumulation).backward()
        if case.clipping:
            unishard.clip_grad_norm_(model.parameters(), case.clipping)
        run.gradients.append({n: _full(p.grad) for n, p in model.named_parameters() if p.grad is not None})
        optimizer.step()
        optimizer.zero_grad()
    run.weights = {name: _full(p.detach()) for name, p in model.named_parameters()}
    if offload is not None and not offload.tier.calls:
        raise AssertionError(f"{case}: nothing went to the tier")
    return run


def _full(tensor: Any) -> Tensor:
    return tensor.full_tensor().detach().clone()


TRAINERS: dict[str, Callable[[ToyModel, ParityCase], Run]] = {
    "config": train_config_door,
    "code": train_code_door,
}
