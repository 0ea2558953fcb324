"""What DeepSpeed's own tests of ZeRO ask of the door: who is whole when, what is refused, what internals show."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from torch import nn

from unishard.deepspeed.parts.autocast import get_comm_dtype, has_comm_dtype
from unishard.deepspeed.parts.optimizers import DeepSpeedCPUAdam
from unishard.deepspeed.parts.parameters import ZeroParamStatus
from unishard.deepspeed.parts.partitions import ZeRORuntimeException

deepspeed: Any = importlib.import_module("unishard.deepspeed")


class Scale(nn.Module):
    """Multiplies by its weight, and notes whether that was whole."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(3, 5))
        self.seen: Any = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen = self.weight.ds_status
        return self.weight * x


class Chain(nn.Module):
    """Three of them, no repeated block; notes who is whole after each."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = Scale(), Scale(), Scale()
        self.after: list[Any] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.after = []
        for layer in (self.first, self.second, self.third):
            x = layer(x)
            self.after.append(layer.weight.ds_status)
        return x


def engine_of(model: nn.Module, stage: int, zero: Any = None, **more: Any) -> Any:
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "optimizer": {"type": "Adam", "params": {"lr": 0.01}},
        "zero_optimization": {"stage": stage, **(zero or {})},
        **more,
    }
    return deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)[0]


ALONE = {"stage3_max_reuse_distance": 0, "stage3_prefetch_bucket_size": 0}


def _modules_one_by_one() -> None:
    model = Chain()
    engine = engine_of(model, 3, ALONE, bf16={"enabled": True})
    rank = torch.distributed.get_rank()
    for number, param in enumerate(model.parameters(), 1):
        param.ds_tensor.data = torch.full_like(param.ds_tensor.data, number * (1 + rank))
    for count in (1, 2):
        output = engine(torch.ones(3, 5))
        assert output.dtype == torch.float32  # inputs come as they are given, and bf16 times fp32 is fp32
        assert output.flatten().tolist() == [6.0] * 8 + [48.0] * 7
        assert model.second.seen is ZeroParamStatus.AVAILABLE
        assert model.after == [ZeroParamStatus.NOT_AVAILABLE] * 3
        engine.backward(output.sum())
        ((first, second, third),) = [p.values() for p in engine.optimizer.get_fp32_grad_partitions().values()]
        mine = [6.0] * 8 if rank == 0 else [24.0] * 7 + [0.0]
        assert first.tolist() == [count * value for value in mine]
        assert len(second) == len(third) == 8
        assert engine.optimizer.micro_step_id == count
    engine.optimizer.step()
    assert all(p.ds_status is ZeroParamStatus.NOT_AVAILABLE for p in model.parameters())
    groups, flat = engine.optimizer.fp16_groups, engine.optimizer.fp32_partitioned_groups_flat
    assert [group[0] for group in groups] == list(model.parameters())
    assert {int(engine.optimizer.optimizer.state[part]["step"]) for part in flat} == {1}


def _sums_of_gradients(stage: int, prescale: bool) -> None:
    torch.manual_seed(0)
    model = nn.Linear(2, 1, bias=False)
    before = model.weight.detach().clone()
    engine = engine_of(
        model,
        stage,
        gradient_allreduce_op="sum",
        prescale_gradients=prescale,
        gradient_clipping=0.0,
        optimizer={"type": "SGD", "params": {"lr": 1.0}},
    )
    engine.backward(engine(torch.tensor([[1.0, 2.0]])).sum())
    engine.step()
    torch.testing.assert_close(engine.module_state_dict()["weight"], before - torch.tensor([[2.0, 4.0]]))


class Half(nn.Module):
    """Uses one of its two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = nn.Linear(2, 2), nn.Linear(2, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.used(x)


def _unused_parameters_are_refused_on_request() -> None:
    engine = engine_of(Half(), 2, {"ignore_unused_parameters": False})
    engine.backward(engine(torch.ones(1, 2)).sum())
    with pytest.raises(AssertionError, match=r"ignore_unused_parameters .* unused\.weight, unused\.bias"):
        engine.step()
    model = Half()
    model.unused.requires_grad_(False)
    frozen = engine_of(model, 2, {"ignore_unused_parameters": False})
    frozen.backward(frozen(torch.ones(1, 2)).sum())
    frozen.step()
    assert frozen.global_steps == 1


def _no_sync_is_for_whole_gradients(stage: int) -> None:
    engine = engine_of(nn.Linear(2, 2), stage)
    with pytest.raises(AssertionError, match=f"ZeRO-{stage}"), engine.no_sync():
        pass
    with engine.coalesce_grad_reduction():
        engine.backward(engine(torch.ones(1, 2)).sum())
        assert not engine.optimizer.averaged_gradients
    engine.step()
    assert engine.optimizer.micro_step_id == 0
    with pytest.raises(AssertionError, match="scalar"):
        engine.scale(engine(torch.ones(1, 2)))
    assert not engine.optimizer.needs_scaler()


def _writes_that_would_be_lost_are_found() -> None:
    config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}}
    with deepspeed.zero.Init(config_dict_or_path=config):
        layer = nn.Linear(4, 2)

    def write() -> None:
        with deepspeed.zero.GatheredParameters([layer.weight, layer.bias]), torch.no_grad():
            if torch.distributed.get_rank() == 0:
                layer.weight.zero_()

    write()
    config["zero_optimization"] = {"stage": 3, "enable_sanity_checks": True}
    with deepspeed.zero.Init(config_dict_or_path=config):
        pass
    with pytest.raises(RuntimeError, match="rank 0 wrote"):
        write()
    with deepspeed.zero.GatheredParameters(layer.weight):
        assert layer.weight.abs().sum() > 0


def _offload_with_the_cpu_optimizer_only() -> None:
    model = nn.Linear(2, 2)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": 1, "offload_optimizer": {"device": "cpu"}},
        "zero_force_ds_cpu_optimizer": True,
    }
    with pytest.raises(ZeRORuntimeException, match="Adam"):
        deepspeed.initialize(model=model, optimizer=torch.optim.Adam(model.parameters()), config=config)
    deepspeed.initialize(model=model, optimizer=DeepSpeedCPUAdam(model.parameters()), config=config)


def _autocast_marks_parameters() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    deepspeed.utils.set_z3_leaf_modules(model, [nn.LayerNorm])
    engine_of(model, 3, torch_autocast={"enabled": True, "dtype": "bfloat16"})
    assert get_comm_dtype(model[0].weight) == torch.bfloat16
    assert get_comm_dtype(model[1].weight) == torch.float32
    assert not has_comm_dtype(model[1].bias)


def _leaves_are_listed() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    deepspeed.utils.set_z3_leaf_modules(model, [nn.LayerNorm])
    leaves = engine_of(model, 3).optimizer.leaf_parameters
    assert {module: len(params) for module, params in leaves.items()} == {model[1]: 2}


class Tail(nn.Module):
    """Has a parameter without elements."""

    def __init__(self) -> None:
        super().__init__()
        self.dense, self.empty = nn.Linear(4, 4), nn.Linear(4, 0, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.dense(x)
        return hidden.sum() + self.empty(hidden).sum()


def _parameters_without_elements_keep_their_shape() -> None:
    for shard_early in (False, True):
        with deepspeed.zero.Init(enabled=shard_early):
            model = Tail()
        engine = engine_of(model, 3)
        engine.backward(engine(torch.ones(1, 4)))
        engine.step()
        assert model.empty.weight.shape == (0, 4)
        assert not hasattr(model.empty.weight, "ds_id")
        assert hasattr(model.dense.weight, "ds_id")


def _what_is_built_without_memory_is_sharded_once_it_has_some() -> None:
    with deepspeed.zero.Init():
        layer = nn.utils.skip_init(nn.Linear, 6, 5)
        other = nn.utils.skip_init(nn.Linear, 6, 5)
    assert layer.weight.ds_tensor.numel() == other.weight.ds_tensor.numel() == 15
    engine_of(nn.Sequential(layer, other), 3)


def _adagrad_of_the_script_steps_as_in_torch(stage: int) -> None:
    torch.manual_seed(0)
    model, alone = nn.Linear(3, 3), nn.Linear(3, 3)
    alone.load_state_dict(model.state_dict())
    options = {"lr": 0.1, "initial_accumulator_value": 0.2}
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": stage},
    }
    adagrad = torch.optim.Adagrad(model.parameters(), **options)
    engine = deepspeed.initialize(model=model, optimizer=adagrad, config=config)[0]
    other = torch.optim.Adagrad(alone.parameters(), **options)
    for x in (torch.ones(1, 3), torch.arange(3.0).view(1, 3)):
        engine.backward(engine(x).square().sum())
        engine.step()
        other.zero_grad()
        alone(x).square().sum().backward()
        other.step()
    for name, value in engine.module_state_dict().items():
        torch.testing.assert_close(value, alone.state_dict()[name])


def _small_names() -> None:
    with deepspeed.zero.Init():
        first, second = nn.Linear(4, 2, bias=False), nn.Linear(3, 3, bias=False)
    handle = first.weight.all_gather_coalesced([first.weight, second.weight])
    handle.wait()
    assert first.weight.shape == (2, 4)
    first.weight.partition()
    handle.wait()
    assert first.weight.numel() == 0
    engine = engine_of(nn.Linear(2, 2), 1, {"compute_grad_norm": False}, gradient_clipping=0.0)
    engine.backward(engine(torch.ones(1, 2)).sum())
    engine.step()
    assert engine.get_global_grad_norm() is None
    assert not engine.optimizer.check_grad_overflow
    engine.offload_states()
    engine.reload_states()


def _checkpoints_leave_out_what_has_no_elements(folder: str) -> None:
    saved, loaded = engine_of(Tail(), 3), engine_of(Tail(), 3)
    saved.save_checkpoint(folder)
    loaded.load_checkpoint(folder)
    for name, value in saved.module_state_dict().items():
        assert torch.equal(value, loaded.module_state_dict()[name]), name


class Cells(nn.Module):
    """Blocks that are dictionaries: their parts are called, never they."""

    def __init__(self) -> None:
        super().__init__()
        self.cells = nn.ModuleList(
            nn.ModuleDict({"norm": nn.LayerNorm(4), "linear": nn.Linear(4, 4)}) for _ in range(2)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for cell in self.cells:
            x = cell["linear"](cell["norm"](x))  # pyright: ignore[reportIndexIssue]
        return x


def _lists_of_modules_are_gathered_with_what_calls_their_parts() -> None:
    for zero in ({}, ALONE):
        for leaf in (None, nn.ModuleList, Cells):
            model = Cells()
            if leaf is not None:
                deepspeed.utils.set_z3_leaf_modules(model, [leaf])
            engine = engine_of(model, 3, zero)
            engine.backward(engine(torch.ones(1, 4)).sum())
            engine.step()
            names = [unit.name for unit in engine.schedule.units[1:]]
            assert len(names) == (4 if zero is ALONE and leaf is None else 0), names


def test_lists_of_modules_are_gathered_with_what_calls_their_parts(ranks):
    ranks(_lists_of_modules_are_gathered_with_what_calls_their_parts)


def test_norms_that_stand_for_none():
    utils = importlib.import_module("unishard.deepspeed.runtime.utils")
    for bad in (-1.0, float("nan"), float("inf")):
        assert utils.get_global_norm([3.0, bad]) == float("inf")
        assert not torch.isfinite(utils.combine_grad_norm_groups([torch.tensor(3.0), torch.tensor(bad)]))


def test_a_group_of_one_rank_under_a_launcher_of_more_is_found():
    names = importlib.import_module("unishard.deepspeed.runtime.zero.partition_parameters")
    problem = names._contradicting_single_rank_pg_error
    assert "WORLD_SIZE=8" in problem(1, None, {"WORLD_SIZE": "8"})
    for size, group, launched in (
        (8, None, "8"),
        (1, object(), "8"),
        (1, None, "1"),
        (1, None, "x"),
        (1, None, None),
    ):
        assert problem(size, group, {"WORLD_SIZE": launched}) is None


def test_adagrad_of_the_script_steps_as_in_torch(ranks):
    for stage in (0, 3):
        ranks(_adagrad_of_the_script_steps_as_in_torch, stage)


def test_small_names(ranks):
    ranks(_small_names)


def test_checkpoints_leave_out_what_has_no_elements(ranks, tmp_path):
    ranks(_checkpoints_leave_out_what_has_no_elements, str(tmp_path))


def test_parameters_without_elements_keep_their_shape(ranks):
    ranks(_parameters_without_elements_keep_their_shape)


def test_what_is_built_without_memory_is_sharded_once_it_has_some(ranks):
    ranks(_what_is_built_without_memory_is_sharded_once_it_has_some)


def test_modules_one_by_one(ranks):
    ranks(_modules_one_by_one)


@pytest.mark.parametrize(("stage", "prescale"), [(0, True), (1, False), (3, False)])
def test_sums_of_gradients(ranks, stage, prescale):
    ranks(_sums_of_gradients, stage, prescale)


def test_unused_parameters_are_refused_on_request(ranks):
    ranks(_unused_parameters_are_refused_on_request)


def test_no_sync_is_for_whole_gradients(ranks):
    for stage in (2, 3):
        ranks(_no_sync_is_for_whole_gradients, stage)


def test_writes_that_would_be_lost_are_found(ranks):
    ranks(_writes_that_would_be_lost_are_found)


def test_offload_with_the_cpu_optimizer_only(ranks):
    ranks(_offload_with_the_cpu_optimizer_only)


def test_autocast_marks_parameters(ranks):
    ranks(_autocast_marks_parameters)


def test_leaves_are_listed(ranks):
    ranks(_leaves_are_listed)
