"""Kinds of state dict, beside PyTorch's FSDP1: the same keys, shapes and values, whatever is saved and loaded where."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.distributed.fsdp as theirs
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

import unishard.fsdp as ours
from unishard.errors import CheckpointError, RankError, ShardingError, StateError, UnsupportedError
from unishard.fsdp import FSDP, FullStateDictConfig, ShardedStateDictConfig, ShardingStrategy, StateDictType
from unishard.fsdp.wrap import ModuleWrapPolicy
from unishard.testing.models import Block, TinyTransformer, tied_transformer

FULL, SHARDED, LOCAL = (
    StateDictType.FULL_STATE_DICT,
    StateDictType.SHARDED_STATE_DICT,
    StateDictType.LOCAL_STATE_DICT,
)
THEIRS: Any = theirs.FullyShardedDataParallel


def build(which: Any = ours, seed: int = 0, base: Any = tied_transformer, **options: Any) -> Any:
    torch.manual_seed(seed)
    if which is theirs:
        options = {"device_id": torch.device("cpu"), "use_orig_params": True, **options}
    wrapper: Any = FSDP if which is ours else THEIRS
    policy: Any = ModuleWrapPolicy({Block}) if which is ours else theirs.wrap.ModuleWrapPolicy({Block})
    return wrapper(base(), auto_wrap_policy=policy, **options)


def trained(
    which: Any = ours, seed: int = 0, steps: int = 2, **options: Any
) -> tuple[Any, torch.optim.Optimizer]:
    model = build(which, seed, **options)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    train(model, optimizer, range(steps))
    return model, optimizer


def train(model: Any, optimizer: torch.optim.Optimizer, steps: range) -> list[float]:
    losses = []
    for step in steps:
        batch = model.example_batch(step, 2)  # the same on all ranks, so that their number does not matter
        loss = model.loss(model(batch.inputs), batch.targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def whole(value: Any) -> Any:
    """A sharded value of either library as a plain tensor."""
    if isinstance(value, DTensor):
        return value.full_tensor()
    if type(value).__name__ == "ShardedTensor":
        out = torch.empty(value.size()) if dist.get_rank() == 0 else None
        value.gather(0, out)
        out = out if out is not None else torch.empty(value.size())
        dist.broadcast(out, 0)
        return out
    return value


def close(a: Any, b: Any) -> None:
    torch.testing.assert_close(whole(a), whole(b), rtol=1e-5, atol=1e-6)


def states(which: Any, kind: StateDictType, model: Any, optimizer: Any, **config: Any) -> tuple[Any, Any]:
    """Model and optimizer state dicts of `kind`."""
    wrapper: Any = FSDP if which is ours else THEIRS
    name = kind.name.split("_")[0].capitalize()
    if which is theirs:
        config["offload_to_cpu"] = (
            False  # on a CPU, FSDP1's optimizer states are freed or overwritten with it
        )
    configs = [
        getattr(which, f"{name}StateDictConfig")(**config),
        getattr(which, f"{name}OptimStateDictConfig")(**config),
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        with wrapper.state_dict_type(model, getattr(which.StateDictType, kind.name), *configs):
            return model.state_dict(), wrapper.optim_state_dict(model, optimizer)


# beside PyTorch's --------------------------------------------------------------------------------------------


def case_the_same_as_theirs(kind: StateDictType, orig: bool, meshed: bool) -> None:
    mesh = {"device_mesh": init_device_mesh("cpu", (2,))} if meshed else {}
    mine, other = trained(use_orig_params=orig, **mesh), trained(theirs, use_orig_params=orig, **mesh)
    (state, optim), (their_state, their_optim) = states(ours, kind, *mine), states(theirs, kind, *other)
    assert list(state) == list(their_state)
    for name, value in their_state.items():
        assert state[name].shape == torch.Size(value.size())
        assert (type(state[name]) is Tensor) == (kind is FULL)
        close(state[name], value)
        if meshed and kind is SHARDED:
            assert state[name].placements == value.placements
            assert torch.equal(state[name].device_mesh.mesh, value.device_mesh.mesh)
    assert set(optim["state"]) == set(their_optim["state"])
    assert "head.weight" not in optim["state"]
    for name in sorted(optim["state"]):
        assert set(optim["state"][name]) == set(their_optim["state"][name])
        for key, value in sorted(optim["state"][name].items()):
            close(value, their_optim["state"][name][key])
    [group], [their_group] = optim["param_groups"], their_optim["param_groups"]
    assert sorted(group.pop("params")) == sorted(their_group.pop("params"))
    assert group == their_group


@pytest.mark.parametrize("orig", [True, False], ids=["orig_params", "flat_params"])
@pytest.mark.parametrize(("kind", "meshed"), [(FULL, False), (SHARDED, False), (SHARDED, True)])
def test_the_same_as_theirs(ranks, kind, orig, meshed):
    ranks(case_the_same_as_theirs, kind, orig, meshed)


def case_each_loads_the_others(kind: StateDictType) -> None:
    mesh = {"device_mesh": init_device_mesh("cpu", (2,))} if kind is SHARDED else {}
    for writer, reader in ((theirs, ours), (ours, theirs)):
        model, optimizer = trained(writer, **mesh)
        state, optim = states(writer, kind, model, optimizer)
        expected = train(model, optimizer, range(2, 5))
        twin, other = trained(reader, seed=9, steps=1, **mesh)
        wrapper: Any = FSDP if reader is ours else THEIRS
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            with wrapper.state_dict_type(twin, getattr(reader.StateDictType, kind.name)):
                twin.load_state_dict(state)
                other.load_state_dict(wrapper.optim_state_dict_to_load(twin, other, optim))
        assert train(twin, other, range(2, 5)) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("kind", [FULL, SHARDED])
def test_each_loads_the_others(ranks, kind):
    ranks(case_each_loads_the_others, kind)


def case_sharded_tensors() -> None:
    """What FSDP1 gives without a device mesh."""
    model, optimizer = trained(theirs)
    state, optim = states(theirs, SHARDED, model, optimizer)
    assert type(state["norm.bias"]).__name__ == "ShardedTensor"
    expected = train(model, optimizer, range(2, 5))
    twin, other = trained(seed=9, steps=1)
    with FSDP.state_dict_type(twin, SHARDED):
        twin.load_state_dict(state)
        FSDP.optim_state_dict_to_load(twin, other, optim, load_directly=True)
    assert train(twin, other, range(2, 5)) == pytest.approx(expected, rel=1e-5)


def test_sharded_tensors(ranks):
    ranks(case_sharded_tensors)


def case_older_names() -> None:
    mine, my_optimizer = trained()
    full = FSDP.full_optim_state_dict(mine, my_optimizer)
    _, their_full = states(theirs, FULL, *trained(theirs), rank0_only=True)
    first = dist.get_rank() == 0
    assert list(full) == list(their_full) == (["state", "param_groups"] if first else [])
    expected = train(mine, my_optimizer, range(2, 4))
    for given, how in (
        (
            their_full,
            lambda m, o, given: FSDP.scatter_full_optim_state_dict(given if first else None, m, optim=o),
        ),
        (full, lambda m, o, given: FSDP.scatter_full_optim_state_dict(given, m)),
        (FSDP.full_optim_state_dict(*trained(), rank0_only=False), shard_with_input),
        (
            FSDP.sharded_optim_state_dict(*trained()),
            lambda m, o, g: FSDP.flatten_sharded_optim_state_dict(g, m, o),
        ),
    ):
        model, _ = trained()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        optimizer.load_state_dict(how(model, optimizer, given))
        assert train(model, optimizer, range(2, 4)) == pytest.approx(expected, rel=1e-5)
    if first:
        plain = tied_transformer()
        optimizer = torch.optim.AdamW(plain.parameters())
        by_id = FSDP.rekey_optim_state_dict(full, ours.OptimStateKeyType.PARAM_ID, plain)
        theirs_by_id = THEIRS.rekey_optim_state_dict(full, theirs.OptimStateKeyType.PARAM_ID, plain)
        assert {k: v["exp_avg"].shape for k, v in by_id["state"].items()} == {
            k: v["exp_avg"].shape for k, v in theirs_by_id["state"].items()
        }
        assert by_id["param_groups"] == theirs_by_id["param_groups"]
        optimizer.load_state_dict(by_id)
        back = FSDP.rekey_optim_state_dict(
            optimizer.state_dict(), theirs.OptimStateKeyType.PARAM_NAME, plain, optim=optimizer
        )
        assert set(back["state"]) == set(full["state"])
        assert FSDP.rekey_optim_state_dict(back, "PARAM_NAME", plain) is back
        with pytest.raises(StateError, match="no parameter 'gone'"):
            FSDP.rekey_optim_state_dict({"state": {"gone": {}}, "param_groups": []}, "PARAM_ID", plain)


def shard_with_input(model: Any, optimizer: Any, given: Any) -> Any:
    params = list(model.parameters())
    return FSDP.shard_full_optim_state_dict(given, model, optim_input=[{"params": params}])


def test_older_names(ranks):
    ranks(case_older_names)


# files -------------------------------------------------------------------------------------------------------


def case_guide(folder: str) -> None:
    """The checkpoint code of guides to FSDP1, as it is typed."""
    from unishard.fsdp import FullyShardedDataParallel as FSDP

    model, _ = trained()
    path = f"{folder}/model.pt"
    save_policy = FullStateDictConfig(offload_to_cpu=True, rank0_only=True)
    with FSDP.state_dict_type(model, StateDictType.FULL_STATE_DICT, save_policy):
        state_dict = model.state_dict()
        if dist.get_rank() == 0:
            torch.save(state_dict, path)
    assert bool(state_dict) == (dist.get_rank() == 0)
    dist.barrier()
    other = build(seed=5)
    with FSDP.state_dict_type(other, StateDictType.FULL_STATE_DICT):
        state_dict = torch.load(path)
        other.load_state_dict(state_dict)
    equal(other.state_dict(), model.state_dict())
    save_policy = ShardedStateDictConfig(offload_to_cpu=True)
    with FSDP.state_dict_type(model, StateDictType.SHARDED_STATE_DICT, save_policy):
        state_dict = model.state_dict()
        torch.save(state_dict, f"{folder}/model_rank_{dist.get_rank()}.pt")
    stored = torch.load(f"{folder}/model_rank_{dist.get_rank()}.pt")
    assert all(
        v.to_local().untyped_storage().nbytes() <= 4 * (v.numel() // 2 + 12 * 12) for v in stored.values()
    )
    other = build(seed=5)
    with FSDP.state_dict_type(other, StateDictType.SHARDED_STATE_DICT):
        state_dict = torch.load(f"{folder}/model_rank_{dist.get_rank()}.pt")
        other.load_state_dict(state_dict)
    equal(other.state_dict(), model.state_dict())


def equal(a: dict[str, Any], b: dict[str, Any]) -> None:
    assert list(a) == list(b)
    for name in a:
        assert torch.equal(whole(a[name]), whole(b[name])), name


def test_guide(ranks, tmp_path):
    ranks(case_guide, str(tmp_path))


def case_a_file_a_rank(folder: str, kind: StateDictType, strategy: ShardingStrategy) -> None:
    options: dict[str, Any] = {
        "sharding_strategy": strategy,
        "mixed_precision": ours.MixedPrecision(torch.bfloat16),
    }
    if strategy is ShardingStrategy.HYBRID_SHARD:
        options["device_mesh"] = init_device_mesh("cpu", (2, 2), mesh_dim_names=("r", "s"))
    model, optimizer = trained(**options)
    path = f"{folder}/{dist.get_rank()}.pt"
    torch.save(states(ours, kind, model, optimizer), path)
    expected = train(model, optimizer, range(2, 4))
    twin, other = trained(seed=9, steps=1, **options)
    with FSDP.state_dict_type(twin, kind):
        state, optim = torch.load(path)
        assert all(v.dtype == torch.float32 for v in state.values()), "masters, not what modules compute with"
        twin.load_state_dict(state)
        FSDP.optim_state_dict_to_load(twin, other, optim, load_directly=True)
    assert train(twin, other, range(2, 4)) == expected


@pytest.mark.parametrize("kind", [FULL, SHARDED, LOCAL])
@pytest.mark.parametrize("strategy", [ShardingStrategy.FULL_SHARD, ShardingStrategy.NO_SHARD])
def test_a_file_a_rank(ranks, tmp_path, kind, strategy):
    ranks(case_a_file_a_rank, str(tmp_path), kind, strategy)


def test_a_file_a_rank_of_a_hybrid_mesh(ranks, tmp_path):
    ranks(case_a_file_a_rank, str(tmp_path), SHARDED, ShardingStrategy.HYBRID_SHARD, world_size=4)


def case_writes(folder: str) -> list[float]:
    model, optimizer = trained()
    state, optim = states(ours, SHARDED, model, optimizer)
    from unishard import checkpoint

    checkpoint.save({"model": state, "optim": optim}, f"{folder}/ours")
    dcp.save({"model": state, "optim": optim}, checkpoint_id=f"{folder}/torchs")
    return train(model, optimizer, range(2, 4))


def case_continues(folder: str, how: str) -> list[float]:
    from unishard import checkpoint

    model, optimizer = trained(seed=9, steps=1)
    with FSDP.state_dict_type(model, SHARDED):
        content = {"model": model.state_dict(), "optim": FSDP.optim_state_dict(model, optimizer)}
        if how == "ours":
            checkpoint.load(content, f"{folder}/torchs")
        else:
            dcp.load(content, checkpoint_id=f"{folder}/ours")
        model.load_state_dict(content["model"])
        FSDP.optim_state_dict_to_load(model, optimizer, content["optim"], load_directly=True)
    return train(model, optimizer, range(2, 4))


@pytest.mark.parametrize("how", ["ours", "torchs"])
def test_another_number_of_ranks(ranks, tmp_path, how):
    expected = ranks(case_writes, str(tmp_path))[0]
    for losses in ranks(case_continues, str(tmp_path), how, world_size=3):
        assert losses == pytest.approx(expected, rel=1e-5)


# settings and mistakes ---------------------------------------------------------------------------------------


def case_settings() -> None:
    model = build()
    assert FSDP.get_state_dict_type(model) == ours.StateDictSettings()
    before = FSDP.set_state_dict_type(
        model, theirs.StateDictType.SHARDED_STATE_DICT, theirs.ShardedStateDictConfig(True)
    )
    assert before.state_dict_type is FULL
    settings = FSDP.get_state_dict_type(model)
    assert settings.state_dict_config == ShardedStateDictConfig(offload_to_cpu=True)
    assert settings.optim_state_dict_config == ours.ShardedOptimStateDictConfig()
    with pytest.raises(ZeroDivisionError), FSDP.state_dict_type(model, LOCAL):
        assert type(model.state_dict()["norm.bias"]) is Tensor
        raise ZeroDivisionError
    assert FSDP.get_state_dict_type(model).state_dict_type is SHARDED, "also after an error"
    with pytest.raises(
        StateError, match=r"does not go with StateDictType.FULL_STATE_DICT; pass a FullStateDictConfig"
    ):
        FSDP.set_state_dict_type(model, FULL, ShardedStateDictConfig())
    with pytest.raises(StateError, match=r"is not one of StateDictType.FULL_STATE_DICT"):
        FSDP.set_state_dict_type(model, "WHOLE")
    with pytest.raises(UnsupportedError, match="_use_dtensor=False"):
        ShardedStateDictConfig(_use_dtensor=False)
    FSDP.set_state_dict_type(model.blocks[0], FULL)
    with pytest.raises(
        StateError, match=r"different state dict settings \(FULL_STATE_DICT, SHARDED_STATE_DICT\)"
    ):
        model.state_dict()
    with pytest.raises(ShardingError, match="no FSDP module in the Linear"):
        FSDP.get_state_dict_type(nn.Linear(1, 1))


def test_settings(ranks):
    ranks(case_settings)


def case_values() -> None:
    model, optimizer = trained()
    for kind in (FULL, SHARDED, LOCAL):
        state, optim = states(ours, kind, model, optimizer)
        assert state["head.weight"] is state["tokens.weight"], "tied weights stay tied"
        local = model.tokens.weight.to_local()
        shapes = {FULL: (37, 12), SHARDED: (37, 12), LOCAL: tuple(local.shape)}
        assert tuple(state["tokens.weight"].shape) == shapes[kind]
        assert tuple(optim["state"]["tokens.weight"]["exp_avg"].shape) == shapes[kind]
        kept = {name: whole(value).clone() for name, value in state.items()}
        moments = whole(optim["state"]["norm.bias"]["exp_avg"]).clone()
        train(model, optimizer, range(1))
        for name, value in kept.items():
            assert torch.equal(whole(state[name]), value), "training does not change what was taken before"
        assert torch.equal(whole(optim["state"]["norm.bias"]["exp_avg"]), moments)
        with FSDP.state_dict_type(model, kind):
            FSDP.optim_state_dict_to_load(model, optimizer, optim, load_directly=True)
        train(model, optimizer, range(1))
        assert torch.equal(whole(optim["state"]["norm.bias"]["exp_avg"]), moments), "nor what was loaded"
    model(model.example_batch(0, 2).inputs)  # leaves the outermost module whole
    with FSDP.state_dict_type(model, SHARDED):
        assert isinstance(model.state_dict()["norm.bias"], DTensor)
        assert isinstance(FSDP.optim_state_dict(model, optimizer)["state"]["norm.bias"]["exp_avg"], DTensor)
    holder = nn.ModuleDict({"model": model})
    with FSDP.state_dict_type(holder, FULL, FullStateDictConfig(rank0_only=True)):
        state = holder.state_dict()
    assert list(state) == (
        [f"model.{name}" for name in tied_transformer().state_dict()] if dist.get_rank() == 0 else []
    )


def test_values(ranks):
    ranks(case_values)


def case_only_the_first_rank_has_it() -> None:
    model, optimizer = trained()
    policies = FullStateDictConfig(rank0_only=True), ours.FullOptimStateDictConfig(rank0_only=True)
    with FSDP.state_dict_type(model, FULL, *policies):
        state, optim = model.state_dict(), FSDP.optim_state_dict(model, optimizer)
    assert bool(state) == bool(optim) == (dist.get_rank() == 0)
    expected = train(model, optimizer, range(2, 4))
    twin, other = trained(seed=9, steps=1)
    with FSDP.state_dict_type(twin, FULL, *policies):
        assert str(twin.load_state_dict(state)) == "<All keys matched successfully>"
        other.load_state_dict(FSDP.optim_state_dict_to_load(twin, other, optim))
        with pytest.raises(CheckpointError, match="optimizer state dict is empty"):
            FSDP.optim_state_dict_to_load(twin, other, {})
        changed = {**state, "norm.bias": torch.zeros(3)} if state else {}
        with pytest.raises(RuntimeError, match=r"size mismatch for .*norm.bias"):
            twin.load_state_dict(changed)
    assert train(twin, other, range(2, 4)) == expected


def test_only_the_first_rank_has_it(ranks):
    ranks(case_only_the_first_rank_has_it, world_size=3)


def case_mistakes(folder: str) -> None:
    model, optimizer = trained()
    state, optim = states(ours, SHARDED, model, optimizer)
    local, _ = states(ours, LOCAL, model, optimizer)
    alone = init_device_mesh("cpu", (2, 1), mesh_dim_names=("r", "s"))
    twin = build(device_mesh=alone, sharding_strategy=ShardingStrategy.HYBRID_SHARD)
    with (
        FSDP.state_dict_type(twin, SHARDED),
        pytest.raises(CheckpointError, match=r"tokens.weight: .* sharded over"),
    ):
        twin.load_state_dict(state)
    with (
        FSDP.state_dict_type(twin, LOCAL),
        pytest.raises(CheckpointError, match=r"positions.weight: this rank holds"),
    ):
        twin.load_state_dict({"positions.weight": local["positions.weight"]}, strict=False)
    before = model.state_dict()
    with (
        FSDP.state_dict_type(model, LOCAL),
        pytest.raises((CheckpointError, RankError), match=r"norm.bias: this rank"),
    ):
        broken = {**local, "norm.bias": torch.zeros(99)} if dist.get_rank() == 1 else local
        model.load_state_dict({name: value + 1 for name, value in broken.items()})
    equal(model.state_dict(), before)
    one = next(iter(optim["state"]))
    wrong = {"state": {"gone": optim["state"][one]}, "param_groups": [{"params": ["gone"], "lr": 1.0}]}
    with pytest.raises(CheckpointError, match="state of gone: unexpected") as caught:
        FSDP.optim_state_dict_to_load(model, optimizer, wrong)
    assert "group 0, norm.bias: missing in the state dict" in str(caught.value)
    assert "group 0, gone: missing here" in str(caught.value)
    stranger = torch.optim.SGD([nn.Parameter(torch.ones(3, 3))], lr=1.0)
    with pytest.raises(StateError, match=r"shape \(3, 3\) that is not the FullyShardedDataParallel's"):
        FSDP.optim_state_dict(model, stranger)
    with pytest.raises(UnsupportedError, match="is_named_optimizer"):
        FSDP.optim_state_dict_to_load(model, optimizer, optim, is_named_optimizer=True)
    FSDP.optim_state_dict(model, optimizer, group=dist.group.WORLD)
    other = [dist.new_group([rank]) for rank in range(2)][dist.get_rank()]
    with pytest.raises(
        ShardingError, match=r"group=\[\d\] are not the ranks that the model is sharded over, \[0, 1\]"
    ):
        FSDP.optim_state_dict(model, optimizer, group=other)


def test_mistakes(ranks, tmp_path):
    ranks(case_mistakes, str(tmp_path))


class Odd(torch.optim.Optimizer):
    """Keeps state of another shape than the parameter's, and state of this rank's part as a plain tensor."""

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is None:
                    continue
                state = self.state[param]
                local = param.grad.to_local() if isinstance(param, DTensor) else param.grad
                state["steps"] = state.get("steps", 0) + 1
                state["plain"] = state.get("plain", 0) + local.detach()
                if param.dim() == 2:
                    state["rows"] = state.get("rows", 0) + param.grad.detach().abs().sum(-1)
                    param.data.sub_(param.grad * state["rows"][:, None])
                into = param.to_local() if isinstance(param, DTensor) else param
                into.data.sub_(state["plain"] * group["lr"])


def case_other_optimizers() -> None:
    """State of other shapes than the parameter's, groups, parameters that are ignored, frozen or without state."""
    torch.manual_seed(0)
    base = TinyTransformer()
    base.positions.requires_grad_(False)
    model: Any = FSDP(base, auto_wrap_policy=ModuleWrapPolicy({Block}), ignored_states=[base.head.weight])

    def fresh() -> torch.optim.Optimizer:
        params = list(model.parameters())
        return Odd([{"params": params[3:]}, {"params": params[:3], "lr": 0.5}], {"lr": 0.1})

    optimizer = fresh()
    train(model, optimizer, range(2))
    held = {name: whole(p).detach().clone() for name, p in model.named_parameters()}
    full = FSDP.optim_state_dict(model, optimizer)
    assert full["state"]["blocks.0.up.weight"]["rows"].shape == (48,)
    assert full["state"]["blocks.0.up.weight"]["plain"].shape == (48, 12)
    assert full["state"]["blocks.0.up.weight"]["steps"] == 2
    assert "positions.weight" not in full["state"]
    assert "head.weight" in full["state"]
    assert [group["lr"] for group in full["param_groups"]] == [0.1, 0.5]
    expected = train(model, optimizer, range(2, 3))
    model.load_state_dict(held)
    other = fresh()
    with pytest.raises(UnsupportedError, match=r"rows of shape .*take one step before loading"):
        FSDP.optim_state_dict_to_load(model, other, full)
    train(model, other, range(1))
    model.load_state_dict(held)
    FSDP.optim_state_dict_to_load(model, other, full, load_directly=True)
    assert train(model, other, range(2, 3)) == expected


def test_other_optimizers(ranks):
    ranks(case_other_optimizers)
