"""`fully_shard(offload_policy=)`: states rest on a tier, torch's optimizers step them, torch's functions are right."""

from __future__ import annotations

import copy
import gc
import io
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy as TorchPolicy

import unishard
from unishard.errors import OffloadError, RankError, ShardingError, StateError, UnsupportedError
from unishard.offload import CpuTier
from unishard.offload.policy import _KindsOfState
from unishard.sharding.placement import NO_SHARD, ZERO3
from unishard.sharding.policies import tiers_of
from unishard.sharding.ports import ON_DEVICE, Tiers
from unishard.sharding.resting import desk, is_absent
from unishard.sharding.unit import units_under
from unishard.testing.models import TinyTransformer
from unishard.testing.parity import ParityCase, assert_all_parity
from unishard.testing.tiers import LatePolicy

Ranks = Callable[..., Any]
EVERYTHING = "optimizer+parameter+gradient"


def cases(preset: str) -> Iterator[ParityCase]:
    replicated = ("optimizer", "optimizer+gradient")
    for offload in replicated if preset.startswith("ZERO1") else ("parameter", "gradient", EVERYTHING):
        for model, accumulation, clipping, dtype, optimizer in (
            ("transformer", 3, 0.1, "fp32", "AdamW"),
            ("partly_frozen", 3, 0.0, "fp32", "SGD"),
            ("transformer", 1, 0.1, "bf16", "AdamW"),
            ("unused_branch", 1, 0.0, "fp32", "AdamW"),
            ("tied", 1, 0.1, "fp32", "torch.optim.NAdam"),
        ):
            yield ParityCase(model, preset, "code", accumulation, clipping, dtype, optimizer, offload=offload)


def run_cases(preset: str) -> None:
    assert_all_parity(cases(preset))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("preset", "world_size"),
    [("ZERO3", 1), ("ZERO3", 2), ("ZERO3", 3), ("ZERO1", 2), ("SHARD_GRAD_OP", 2)],
)
def test_parity(preset: str, world_size: int, ranks: Ranks) -> None:
    ranks(run_cases, preset, world_size=world_size, timeout=120)


@pytest.mark.slow
def test_parity_with_replicas(ranks: Ranks) -> None:
    ranks(run_cases, "HYBRID_SHARD", world_size=4, timeout=120)


def sharded(policy: Any, model: Any = None, **more: Any) -> Any:
    if model is None:
        torch.manual_seed(0)
        model = TinyTransformer()
    for block in model.shard_units():
        unishard.fully_shard(block, offload_policy=policy, **more)
    return unishard.fully_shard(model, offload_policy=policy, **more)


def train(model: Any, optimizer: Any, steps: int = 3, micro: int = 1) -> list[float]:
    losses = []
    for step in range(steps):
        for part in range(micro):
            draw = torch.Generator().manual_seed(10 * step + part)
            loss = model(torch.randint(37, (2, 7), generator=draw)).float().pow(2).mean()
            loss.backward()
        losses.append(loss.item())
        unishard.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
    return losses


def adamw(model: Any, **options: Any) -> Any:
    return torch.optim.AdamW(model.parameters(), lr=1e-2, **options)


def resting_of(model: Any) -> list[Any]:
    return [group.resting for unit in units_under(model) for group in unit.groups]


class OnAccelerator(unishard.CPUOffloadPolicy):
    """What `CPUOffloadPolicy` does where the processor is an accelerator."""

    def open_tiers(self, device: torch.device) -> Tiers:
        return _KindsOfState.open_tiers(self, device)


def curve(policy: str, folder: str, options: dict[str, Any], **more: Any) -> list[float]:
    chosen = {
        "none": None,
        "cpu": unishard.CPUOffloadPolicy(pin_memory=False),
        "torch": TorchPolicy(),
        "accelerator": OnAccelerator(pin_memory=False),
        "optimizer": OnAccelerator(parameters=False, gradients=False),
        "nvme": unishard.NVMeOffloadPolicy(folder),
        "some": unishard.NVMeOffloadPolicy(folder, max_in_cpu=8000),
    }[policy]
    model = sharded(chosen, **more)
    losses = train(model, adamw(model, **options), micro=2)
    assert all(r is None or r.idle for r in resting_of(model))
    return losses


@pytest.mark.parametrize("policy", ["cpu", "torch", "accelerator", "optimizer", "nvme", "some"])
@pytest.mark.parametrize("options", [{}, {"foreach": True}, {"fused": True}], ids=str)
def test_every_policy_trains_to_the_bit(
    policy: str, options: dict[str, Any], tmp_path: Path, ranks: Ranks
) -> None:
    expected = ranks(curve, "none", str(tmp_path), options, world_size=2)
    assert ranks(curve, policy, str(tmp_path), options, world_size=2) == expected


def where_states_are() -> None:
    policy = LatePolicy(EVERYTHING)
    model = sharded(policy)
    optimizer = adamw(model)
    train(model, optimizer, 1)
    model(torch.randint(37, (2, 7))).pow(2).mean().backward()
    desk.clear()
    for unit in units_under(model):
        for group in unit.groups:
            kinds = [kind.split(".")[0][:9] for kind in group.resting.kinds]
            assert sorted(kinds) == ["optimizer", "optimizer", "shard"], kinds
            assert is_absent(group.buffer.shard)
            assert is_absent(group.gradients.shard)
            assert group.resting.idle
            assert group.gradients.resting.idle
    for param in model.parameters():
        assert param._local_tensor.isnan().all() or not param._local_tensor.numel()
        assert param.full_tensor().isfinite().all()
        assert optimizer.state[param]["exp_avg"].full_tensor().abs().sum() > 0
        assert param.grad.full_tensor().isfinite().all()
    before = len(list(policy.tier.keys()))
    desk.clear()
    del optimizer
    gc.collect()
    torch.optim.SGD(model.parameters(), lr=0.0).step()
    assert len(list(policy.tier.keys())) == before - 2 * len(resting_of(model))


def test_nothing_is_in_memory_between_steps(ranks: Ranks) -> None:
    ranks(where_states_are, world_size=2)


def how_often_states_travel() -> None:
    policy = LatePolicy(EVERYTHING)
    model = sharded(policy)
    optimizer = adamw(model)
    train(model, optimizer, 1)
    model(torch.randint(37, (2, 7))).pow(2).mean().backward()
    policy.tier.calls.clear()
    optimizer.step()
    calls = policy.tier.calls
    keys = {key for _, key in calls if "gradient" not in key}
    assert len(keys) == 3 * len(resting_of(model))
    for key in keys:
        # The root's parameters come first and last.
        most = 2 if key.startswith("Tiny") else 1
        assert calls.count(("fetch", key)) == most, key
        assert calls.count(("store", key)) == most, key


def test_a_step_reads_and_writes_every_group_once(ranks: Ranks) -> None:
    ranks(how_often_states_travel, world_size=1)


def operations() -> None:
    model, plain = sharded(LatePolicy(EVERYTHING)), sharded(None)
    with torch.no_grad():
        for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
            for param in (ours, theirs):
                param.mul_(0.5).add_(1)
                param.data.add_(1)
                param.unsqueeze(-1).mul_(2)
                param.to_local().add_(3)
        desk.clear()
        first, other = next(model.parameters()), list(model.parameters())[5]
        assert first.place.group is not other.place.group
        # A view outlives the use of other groups, and is written back when it goes.
        view = first.to_local()
        other.norm()
        desk.clear()
        view.add_(1)
        next(plain.parameters()).to_local().add_(1)
        del view
        other.norm()
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours.full_tensor(), theirs.full_tensor())
        assert torch.equal(ours.norm().full_tensor(), theirs.norm().full_tensor())
        assert torch.equal((ours * 2).sum().full_tensor(), (theirs * 2).sum().full_tensor())
    with unishard.gather(model, modifier_rank=0):
        next(model.parameters()).data.fill_(2.0)
    assert (next(model.parameters()).full_tensor() == 2).all()
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    with torch.serialization.safe_globals([]):
        stored = torch.load(buffer, weights_only=False)
    for name, value in model.state_dict().items():
        assert torch.equal(stored[name].full_tensor(), value.full_tensor()), name


def test_torch_operations_read_and_write_what_rests(ranks: Ranks) -> None:
    ranks(operations, world_size=2)


def gradients() -> None:
    models = sharded(LatePolicy(EVERYTHING)), sharded(None)
    for step in range(3):
        for model in models:
            draw = torch.Generator().manual_seed(step)
            model(torch.randint(37, (2, 7), generator=draw)).pow(2).mean().backward()
            if step == 1:
                # One starts anew, one becomes the user's own, the others go on.
                params = list(model.parameters())
                params[0].grad = None
                params[1].grad = params[1].grad * 2
        for ours, theirs in zip(models[0].parameters(), models[1].parameters(), strict=True):
            assert (ours.grad is None) == (theirs.grad is None)
            if ours.grad is not None:
                torch.testing.assert_close(ours.grad.full_tensor(), theirs.grad.full_tensor())
    model = models[0]
    old = list(model.parameters())[3].grad
    model.zero_grad()
    model(torch.randint(37, (2, 7))).pow(2).mean().backward()
    with pytest.raises(StateError, match=r"earlier backward.*clone"):
        old.norm()


def test_gradients_add_up_until_they_are_cleared(ranks: Ranks) -> None:
    ranks(gradients, world_size=2)


def views_of_gradients() -> None:
    model = sharded(LatePolicy(EVERYTHING))
    ids = torch.randint(37, (2, 7), generator=torch.Generator().manual_seed(0))

    def backward() -> None:
        model(ids).pow(2).mean().backward()

    def last_gradient() -> Any:
        return list(model.parameters())[-1].grad

    backward()
    once = last_gradient().full_tensor()
    lent = [last_gradient().to_local()]
    threading.Timer(0.1, lent.clear).start()  # as the thread of a collective does
    backward()
    torch.testing.assert_close(last_gradient().full_tensor(), once * 2)
    kept = last_gradient().to_local()
    with pytest.raises(StateError, match=r"somebody has a view.*clone"):
        backward()
    assert kept.isfinite().all()


def test_a_view_that_a_thread_still_holds_is_waited_for(ranks: Ranks) -> None:
    ranks(views_of_gradients, world_size=1)


def writes(folder: str, offload: str) -> list[float]:
    model = sharded(LatePolicy(offload) if offload else None)
    optimizer = adamw(model)
    train(model, optimizer, 2)
    state, optim = unishard.checkpoint.get_state_dict(model, optimizer)
    unishard.checkpoint.save({"model": state, "optim": optim}, folder)
    if offload:
        assert all(r.idle for r in resting_of(model))
        with pytest.raises(UnsupportedError, match="group by group"):
            unishard.checkpoint.async_save({"model": state}, folder + "-async")
    return train(model, optimizer, 2)


def continues(folder: str, offload: str) -> list[float]:
    torch.manual_seed(7)
    model = sharded(LatePolicy(offload) if offload else None, TinyTransformer())
    optimizer = adamw(model)
    state, optim = unishard.checkpoint.get_state_dict(model, optimizer)
    unishard.checkpoint.load({"model": state, "optim": optim}, folder)
    unishard.checkpoint.set_state_dict(model, optimizer, model_state_dict=state, optim_state_dict=optim)
    return train(model, optimizer, 2)


@pytest.mark.parametrize(("writer", "reader"), [(EVERYTHING, ""), ("", EVERYTHING), (EVERYTHING, EVERYTHING)])
def test_checkpoints_continue_under_any_policy(
    writer: str, reader: str, tmp_path: Path, ranks: Ranks
) -> None:
    folder = str(tmp_path / "step")
    expected = ranks(writes, folder, writer, world_size=2)
    assert ranks(continues, folder, reader, world_size=2) == expected
    assert ranks(continues, folder, reader, world_size=3)[0] == pytest.approx(expected[0], rel=1e-5)


def through_torch(folder: str) -> None:
    import torch.distributed.checkpoint as dcp

    model, other = sharded(LatePolicy(EVERYTHING)), sharded(LatePolicy(EVERYTHING))
    train(model, adamw(model), 1)
    dcp.save({"model": model.state_dict()}, checkpoint_id=folder)
    state = {"model": other.state_dict()}
    dcp.load(state, checkpoint_id=folder)
    for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(ours.full_tensor(), theirs.full_tensor())


def test_checkpoints_of_torch(tmp_path: Path, ranks: Ranks) -> None:
    ranks(through_torch, str(tmp_path), world_size=2)


def loads_whole() -> None:
    torch.manual_seed(3)
    wanted = TinyTransformer().state_dict()
    model = sharded(LatePolicy(EVERYTHING))
    options = unishard.checkpoint.StateDictOptions(full_state_dict=True)
    unishard.checkpoint.set_model_state_dict(model, copy.deepcopy(wanted), options=options)
    found = unishard.checkpoint.get_model_state_dict(model, options=options)
    for name, value in wanted.items():
        assert torch.equal(found[name], value), name
    other = sharded(None)
    other.load_state_dict(model.state_dict())
    model.load_state_dict(other.state_dict(), assign=True)
    for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert type(ours).__name__ == "Parameter" or ours.place.rests
        assert torch.equal(ours.full_tensor(), theirs.full_tensor())


def test_whole_state_dicts(ranks: Ranks) -> None:
    ranks(loads_whole, world_size=2)


def built_on_meta() -> list[float]:
    with torch.device("meta"):
        model = TinyTransformer()
    policy = LatePolicy(EVERYTHING)
    sharded(policy, model)
    optimizer = adamw(model)
    assert not list(policy.tier.keys())
    model.to_empty(device="cpu")
    assert len(list(policy.tier.keys())) == len(resting_of(model))
    reference = sharded(None)
    with torch.no_grad():
        for param, value in zip(model.parameters(), reference.parameters(), strict=True):
            param.copy_(value)
    found = train(model, optimizer)
    assert found == train(reference, adamw(reference))
    model.to("cpu")
    model.to_empty(device="cpu")
    with torch.no_grad():
        for param, value in zip(model.parameters(), reference.parameters(), strict=True):
            param.copy_(value)
            assert param.place.rests
            assert torch.equal(param.full_tensor(), value.full_tensor())
    train(model, optimizer, 1)
    with pytest.raises(UnsupportedError, match="convert the model before"):
        model.to(torch.bfloat16)
    with pytest.raises(UnsupportedError, match="rest on a tier"):
        copy.deepcopy(model)
    return found


def test_models_built_on_the_meta_device(ranks: Ranks) -> None:
    losses = ranks(built_on_meta, world_size=2)[0]
    assert losses[-1] < losses[0]


def refusals(path: str) -> None:
    block = nn.Linear(4, 4)
    with pytest.raises(ShardingError, match="parameters=False"):
        unishard.fully_shard(block, offload_policy=LatePolicy("parameter"), sharding="ZERO1")
    with pytest.raises(ShardingError, match="NVMeOffloadPolicy, CPUOffloadPolicy"):
        unishard.fully_shard(block, offload_policy="nvme")
    with pytest.raises((OffloadError, RankError), match="file"):
        unishard.fully_shard(block, offload_policy=unishard.NVMeOffloadPolicy(path))
    unishard.fully_shard(block)


def test_what_cannot_be_is_refused_and_leaves_the_module(tmp_path: Path, ranks: Ranks) -> None:
    (tmp_path / "file").write_text("")
    ranks(refusals, str(tmp_path / "file"), world_size=2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"parameters": False, "optimizer": False, "gradients": False}, "offloads nothing"),
        ({"queue_depth": 0}, "queue_depth=0"),
        ({"max_in_cpu": -1}, "max_in_cpu=-1"),
    ],
)
def test_policies_that_mean_nothing(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ShardingError, match=message):
        unishard.NVMeOffloadPolicy("/local", **options)


def fails(folder: str) -> None:
    policy = LatePolicy(EVERYTHING)
    model = sharded(policy)
    optimizer = adamw(model)
    train(model, optimizer, 1)
    policy.tier.failing = next(key for key in policy.tier.keys() if "optimizer" in key)  # noqa: SIM118
    with pytest.raises(OffloadError, match="failing as told"):
        train(model, optimizer, 1)


def test_a_failing_tier_is_an_error(tmp_path: Path, ranks: Ranks) -> None:
    ranks(fails, str(tmp_path), world_size=1)


def memory_of_views() -> int:
    """A loop over parameters keeps one group in memory, and one that a collective is still reading."""
    model = sharded(LatePolicy(EVERYTHING))
    most = 0
    for param in model.parameters():
        param.full_tensor()
        most = max(most, sum(not r.idle for r in resting_of(model)))
    assert dist.get_world_size() == 2
    return most


def test_reading_parameters_one_by_one_keeps_one_group(ranks: Ranks) -> None:
    assert max(ranks(memory_of_views, world_size=2)) <= 2


def test_host_memory_is_a_tier_for_accelerators_only() -> None:
    policy = unishard.CPUOffloadPolicy(pin_memory=False, gradients=False)
    assert policy.open_tiers(torch.device("cpu")) is ON_DEVICE
    tiers = policy.open_tiers(torch.device("meta"))
    assert tiers is unishard.CPUOffloadPolicy(pin_memory=False, gradients=False).open_tiers(
        torch.device("meta")
    )
    assert tiers.gradient is None
    assert isinstance(tiers.parameter, CpuTier)
    assert tiers.parameter is tiers.optimizer
    assert tiers.buffer(3, torch.float16).device.type == "meta"
    # Torch's policy is read as ours.
    found = tiers_of(TorchPolicy(pin_memory=False), torch.device("meta"), ZERO3)
    assert isinstance(found.gradient, CpuTier)
    with pytest.raises(ShardingError, match=r"with parameters that it holds whole.*parameters=False"):
        tiers_of(TorchPolicy(), torch.device("meta"), NO_SHARD)
    with pytest.raises(ShardingError, match=r"CPUOffloadPolicy\(parameters=False.*offloads nothing"):
        unishard.CPUOffloadPolicy(parameters=False, optimizer=False, gradients=False)
