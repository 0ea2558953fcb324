"""The engine's door methods, each as a DeepSpeed user would call it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import unishard.deepspeed as deepspeed
from unishard.errors import CheckpointError, ShardingError, UnsupportedError

WIDTH = 8


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = Stack()
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.blocks(x))


def settings(stage: int = 2, **more: Any) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 2,
        "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
        "zero_optimization": {"stage": stage, "stage3_gather_16bit_weights_on_model_save": True},
        **more,
    }


def new_engine(stage: int = 2, **more: Any) -> Any:
    torch.manual_seed(0)
    net = Net()
    return deepspeed.initialize(model=net, model_parameters=net.parameters(), config=settings(stage, **more))[
        0
    ]


def batch(seed: int = 0) -> torch.Tensor:
    return torch.randn(2, WIDTH, generator=torch.Generator().manual_seed(seed))


def weights(engine: Any) -> list[torch.Tensor]:
    return list(engine.module_state_dict().values())


def _plain_backward(stage: int) -> float:
    reference, engine = (
        new_engine(stage, gradient_accumulation_steps=2),
        new_engine(stage, gradient_accumulation_steps=2),
    )
    for seed in range(2):
        reference.backward(reference(batch(seed)).square().mean())
        reference.step()
        engine(batch(seed)).square().mean().backward()
        engine.step()
    assert engine.was_step_applied()
    return max((a - b).abs().max().item() for a, b in zip(weights(reference), weights(engine), strict=True))


def test_loss_backward_divides_by_the_accumulation_steps(ranks):
    for stage in (1, 2, 3):
        assert max(ranks(_plain_backward, stage)) < 1e-6


def _boundary_by_hand() -> float:
    reference, engine = new_engine(gradient_accumulation_steps=3), new_engine(gradient_accumulation_steps=3)
    for seed in range(3):
        reference.backward(reference(batch(seed)).square().mean())
        reference.step()
        engine.set_gradient_accumulation_boundary(seed == 2)
        engine.backward(engine(batch(seed)).square().mean())
        assert engine.is_gradient_accumulation_boundary() == (seed == 2)
    engine.step()
    return max((a - b).abs().max().item() for a, b in zip(weights(reference), weights(engine), strict=True))


def test_one_step_after_all_micro_batches(ranks):
    assert max(ranks(_boundary_by_hand)) < 1e-7


def _unmanaged(stage: int) -> float:
    engine = new_engine(stage, managed_gradient_accumulation=False)
    reference = new_engine(stage)
    for seed in range(3):
        engine.backward(engine(batch(seed)).square().mean())
    engine.step()
    with reference.coalesce_grad_reduction():
        for seed in range(3):
            reference.backward(reference(batch(seed)).square().mean())
    reference.step()
    assert engine.global_steps == reference.global_steps == 1
    return max((a - b).abs().max().item() for a, b in zip(weights(reference), weights(engine), strict=True))


def test_unmanaged_accumulation_and_coalesced_reduction_add_up_alike(ranks):
    for stage in (1, 3):
        assert max(ranks(_unmanaged, stage)) < 1e-7


def _accessors(folder: str) -> dict[str, Any]:
    engine = new_engine(3, train_batch_size=8)
    assert isinstance(engine, deepspeed.DeepSpeedEngine)
    assert engine.config["zero_optimization"]["stage"] == 3  # the user's own dictionary
    assert engine.config.get("gradient_clipping") is None
    assert engine.gradient_clipping() == 1.0
    assert engine.steps_per_print() == float("inf")
    assert engine.get_batch_info() == (8, 2, 2)
    engine.set_train_batch_size(12)
    assert engine.get_batch_info() == (12, 2, 3)
    with pytest.raises(ValueError, match="not a multiple of micro-batch x ranks = 4"):
        engine.set_train_batch_size(7)
    engine.set_train_micro_batch_size(1)
    assert engine.get_batch_info() == (6, 1, 3)
    assert engine.zero_prefetch_bucket_size() == 5 * 10**7
    assert engine.zero_optimization_partition_weights()
    assert engine.get_mom() == [0.0]
    assert engine.communication_data_type is torch.float32
    assert type(engine.optimizer).__name__ == "DeepSpeedZeroOptimizer_Stage3"
    parts = engine.optimizer.fp32_partitioned_groups_flat
    assert sum(p.numel() for p in parts) <= sum(p.ds_numel for p in engine.module.parameters())
    assert engine.save_16bit_model(folder, "model.bin")
    whole = engine._zero3_consolidated_16bit_state_dict()
    assert (whole is None) == (engine.global_rank != 0)
    state = engine.module_state_dict(exclude_frozen_parameters=True)
    assert {n: tuple(v.shape) for n, v in state.items()} == {
        n: tuple(p.ds_shape) for n, p in engine.module.named_parameters()
    }
    engine.empty_partition_cache()
    with pytest.raises(UnsupportedError, match="curriculum"):
        engine.set_custom_curriculum_learning_schedule({})
    with engine.coalesce_grad_reduction(), pytest.raises(AssertionError, match="no_sync"):
        engine.step()
    engine.destroy()
    return {
        "bytes": sorted(torch.load(f"{folder}/model.bin", weights_only=True))
        if engine.global_rank == 0
        else []
    }


def test_accessors_and_methods(ranks, tmp_path):
    first, _ = ranks(_accessors, str(tmp_path))
    assert len(first["bytes"]) == 6


def _loaders() -> list[list[float]]:
    data = [(torch.full((WIDTH,), float(i)), i) for i in range(10)]
    torch.manual_seed(0)
    net = Net()
    engine, _, loader, _ = deepspeed.initialize(
        model=net,
        model_parameters=net.parameters(),
        training_data=data,
        config=settings(dataloader_drop_last=True),
    )
    assert len(loader) == 2
    seen = [target.tolist() for _, target in loader]
    assert engine.training_dataloader is loader
    ordered = engine.deepspeed_io(data, route="eval", collate_fn=lambda rows: [row[1] for row in rows])
    engine.set_data_post_process_func(lambda rows, state: rows[1] * 0)
    assert torch.equal(next(iter(loader)), torch.zeros(2, dtype=torch.int64))
    repeated = deepspeed.utils.RepeatingLoader(ordered)
    first = [next(repeated) for _ in range(len(ordered) + 1)]
    assert first[0] == first[-1]
    return [[x for rows in seen for x in rows], [x for rows in first[:-1] for x in rows]]


def test_loaders_split_samples_over_ranks(ranks):
    (train_0, eval_0), (train_1, eval_1) = ranks(_loaders)
    assert len({*train_0, *train_1}) == 8
    assert set(eval_0) | set(eval_1) == set(range(8))  # the last, short micro-batch is dropped


def _leaves() -> list[int]:
    torch.manual_seed(0)
    net = Net()
    found = deepspeed.utils.set_z3_leaf_modules(net, [Stack])
    assert found == [net.blocks] == deepspeed.utils.get_z3_leaf_modules(net)
    engine, *_ = deepspeed.initialize(model=net, model_parameters=net.parameters(), config=settings(3))
    whole = [unit.modules[0] for unit in engine.schedule.units]
    again = Net()
    leaf = settings(3)
    leaf["zero_optimization"]["leaf_module"] = {"names": ["blocks"]}
    named, *_ = deepspeed.initialize(model=again, model_parameters=again.parameters(), config=leaf)
    engine.backward(engine(batch()).square().mean())
    engine.step()
    assert net.blocks in whole
    return [len(engine.schedule.units), len(named.schedule.units), len(new_engine(3).schedule.units)]


def test_leaf_modules_are_gathered_as_one(ranks):
    assert ranks(_leaves) == [[2, 2, 3]] * 2


class Outside(nn.Module):
    """A block's forward uses a weight that another block owns."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(WIDTH, WIDTH)) for _ in range(3))
        deepspeed.zero.register_external_parameter(self.blocks[2], self.blocks[0][0].weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(self.blocks[1](self.blocks[0](x)), self.blocks[0][0].weight)


def _external() -> tuple[float, float]:
    torch.manual_seed(0)
    net = Outside()
    plain = Outside()
    plain.load_state_dict(net.state_dict())
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    loss = plain(batch()).square().mean()
    loss.backward()
    nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
    optimizer.step()
    engine, *_ = deepspeed.initialize(model=net, model_parameters=net.parameters(), config=settings(3))
    ours = engine(batch())
    engine.backward(ours.square().mean())
    engine.step()
    state = engine.module_state_dict()
    return max((state[n] - p).abs().max().item() for n, p in plain.named_parameters()), loss.item()


def test_external_parameters_are_gathered_with_their_users(ranks):
    assert max(difference for difference, _ in ranks(_external)) < 1e-6


def _zero_parameters() -> None:
    from unishard.deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

    plain = nn.Linear(3, 2)
    assert not hasattr(plain.weight, "ds_id")
    with deepspeed.zero.Init():
        layer = nn.Linear(3, 2)
        deepspeed.runtime.zero.partition_parameters.shutdown_init_context()
        ordinary = nn.Linear(3, 2)
        deepspeed.runtime.zero.partition_parameters.restore_init_context()
        other = nn.Linear(3, 2)
    assert not hasattr(ordinary.weight, "ds_id")
    assert hasattr(other.weight, "ds_id")
    weight: Any = layer.weight
    assert weight.ds_status is ZeroParamStatus.NOT_AVAILABLE
    assert (tuple(weight.ds_shape), weight.ds_numel, weight.numel()) == ((2, 3), 6, 0)
    assert weight.ds_id != layer.bias.ds_id
    weight.all_gather()
    assert weight.ds_status is ZeroParamStatus.AVAILABLE
    weight.data.fill_(3.0)
    weight.partition(has_been_updated=True)
    assert weight.ds_status is ZeroParamStatus.NOT_AVAILABLE
    with deepspeed.zero.GatheredParameters(layer.parameters()):
        assert torch.equal(weight.data, torch.full((2, 3), 3.0))
    weight.ds_persist = True  # what users set wins
    assert weight.ds_persist
    converted = nn.Linear(3, 2)
    deepspeed.zero.Init(module=converted, dtype=torch.bfloat16)
    assert converted.weight.ds_tensor.dtype is torch.bfloat16
    assert deepspeed.runtime.zero.utils.is_zero_param(converted.weight)


def test_zero_init_and_the_attributes_libraries_read(ranks):
    ranks(_zero_parameters)


def _refusals() -> None:
    with pytest.raises(deepspeed.DeepSpeedConfigError, match="did you mean 'stage'"):
        deepspeed.initialize(model=Net(), config={"train_batch_size": 2, "zero_optimization": {"stge": 1}})
    with pytest.raises(AssertionError, match="64 != 1 x 1 x 2"):
        deepspeed.DeepSpeedConfig(
            {"train_batch_size": 64, "train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1}
        )
    with pytest.raises(deepspeed.DeepSpeedConfigError, match="given twice"):
        deepspeed.initialize(
            args=type("Args", (), {"deepspeed_config": "x.json"}), model=Net(), config=settings()
        )
    with pytest.raises(UnsupportedError, match="remote_device='cpu'"):
        deepspeed.zero.Init(remote_device="cpu")
    with pytest.raises(ShardingError, match="no module of the model matches"):
        deepspeed.utils.set_z3_leaf_modules(Net(), [nn.Conv2d])


def test_mistakes_are_named(ranks):
    ranks(_refusals)


def _consolidated(folder: str) -> dict[str, float]:
    from unishard.deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    engine = new_engine(3, bf16={"enabled": True})
    engine.backward(engine(batch().bfloat16()).float().square().mean())
    engine.step()
    engine.save_checkpoint(folder, tag="here")
    state = get_fp32_state_dict_from_zero_checkpoint(folder)
    masters = {n: deepspeed.utils.safe_get_full_fp32_param(p) for n, p in engine.module.named_parameters()}
    assert {v.dtype for v in state.values()} == {torch.float32}
    return {n: (state[n] - value).abs().max().item() for n, value in masters.items() if value is not None}


def test_fp32_weights_out_of_a_checkpoint(ranks, tmp_path):
    differences, _ = ranks(_consolidated, str(tmp_path))
    assert len(differences) == 6
    assert not any(differences.values())


def _tags(folder: str) -> None:
    strict = new_engine(checkpoint={"tag_validation": "Fail"})
    mine = f"tag{strict.global_rank}"
    with pytest.raises(CheckpointError, match="rank 0 'tag0', rank 1 'tag1'"):
        strict.save_checkpoint(folder, tag=mine)
    new_engine(checkpoint={"tag_validation": "Ignore"}).save_checkpoint(folder, tag=mine)


def test_ranks_agree_on_the_tag_of_a_checkpoint(ranks, tmp_path):
    ranks(_tags, str(tmp_path))
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == {"tag0"}


def _by_hand() -> tuple[float, bool]:
    engine = new_engine(2, gradient_clipping=0.0)
    before = weights(engine)
    for param in engine.module.parameters():
        param.grad = torch.full_like(param, float(engine.global_rank))
    engine.step()
    moved = max((a - b - 0.05).abs().max().item() for a, b in zip(before, weights(engine), strict=True))
    idle = new_engine(2)
    with pytest.raises(AssertionError, match="no optimizer"):
        deepspeed.initialize(model=Net(), config={"train_batch_size": 2})[0].backward(torch.ones(()))
    return moved, idle.was_step_applied()


def test_gradients_put_on_parameters_by_hand_are_averaged_and_stepped(ranks):
    assert max(moved for moved, _ in ranks(_by_hand)) < 1e-6


def _called_in_parts(stage: int) -> float:
    engine, reference = new_engine(stage), new_engine(stage)
    net = engine.module
    with torch.no_grad():
        x = batch()
        expected = reference(x)
        difference = (net.head(net.blocks(x)) - expected).abs().max().item()
        assert stage < 3 or net.head.weight.numel() == 0
    engine.backward(net.head(net.blocks(batch())).square().mean())
    engine.step()
    reference.backward(reference(batch()).square().mean())
    reference.step()
    pairs = zip(weights(engine), weights(reference), strict=True)
    return max(difference, *((a - b).abs().max().item() for a, b in pairs))


def test_submodules_may_be_called_by_themselves(ranks):
    for stage in (2, 3):
        assert max(ranks(_called_in_parts, stage)) < 1e-6


def _half_precision_gradients(stage: int) -> tuple[float, float]:
    from unishard.deepspeed.utils import safe_get_full_grad, safe_get_local_grad, safe_set_full_grad

    scaled = new_engine(stage, fp16={"enabled": True, "loss_scale": 128.0}, gradient_clipping=0.0)
    plain = new_engine(stage, gradient_clipping=0.0)
    scaled.backward(scaled(batch().half()).float().square().mean())
    plain.backward(plain(batch()).square().mean())
    pairs = list(zip(scaled.module.parameters(), plain.module.parameters(), strict=True))
    difference = max((safe_get_full_grad(a) - safe_get_full_grad(b)).abs().max().item() for a, b in pairs)
    for param in scaled.module.parameters():
        safe_set_full_grad(param, torch.full_like(safe_get_full_grad(param), 0.25))
        part = safe_get_local_grad(param)
        assert part is not None
        assert part.numel() == 0 or (part == 0.25).all()
    before = {
        name: deepspeed.utils.safe_get_full_fp32_param(p) for name, p in scaled.module.named_parameters()
    }
    scaled.step()
    after = {
        name: deepspeed.utils.safe_get_full_fp32_param(p) for name, p in scaled.module.named_parameters()
    }
    return difference, max((before[n] - after[n] - 0.025).abs().max().item() for n in before)


def test_gradients_are_shown_and_written_without_the_loss_scale(ranks):
    for stage in (0, 1, 2, 3):
        for difference, step in ranks(_half_precision_gradients, stage):
            assert difference < 2e-3
            assert step < 1e-6
