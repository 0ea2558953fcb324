"""What DeepSpeed's own users lean on beyond training: names, states and counts that its unit tests look at."""

from __future__ import annotations

import argparse
import importlib
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from unishard.deepspeed.parts import schedules
from unishard.deepspeed.parts.accelerator import CPU_Accelerator
from unishard.deepspeed.parts.config_models import DeepSpeedFP16Config
from unishard.deepspeed.parts.config_object import DeepSpeedConfig
from unishard.deepspeed.parts.configuration import DeepSpeedConfigError, with_defaults
from unishard.deepspeed.parts.numerics import count_used_parameters_in_backward
from unishard.deepspeed.parts.optimizers import DeepSpeedCPUAdam, FusedAdam
from unishard.deepspeed.parts.universal import main as to_universal

deepspeed: Any = importlib.import_module("unishard.deepspeed")

WIDTH = 6


def net() -> Any:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, 1))


def engine_of(model: nn.Module, stage: int = 0, **more: Any) -> Any:
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 2,
        "optimizer": {"type": "Adam", "params": {"lr": 0.01}},
        "zero_optimization": {"stage": stage},
        **more,
    }
    return deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)[0]


def train(engine: Any, steps: int = 1) -> None:
    for seed in range(steps):
        x = torch.randn(2, WIDTH, generator=torch.Generator().manual_seed(seed))
        engine.backward(engine(x).square().mean())
        engine.step()


# on one process ---------------------------------------------------------------------------------------------


def test_old_offload_flags_become_sections():
    section = with_defaults(
        {"zero_optimization": {"stage": 3, "cpu_offload": True, "cpu_offload_param": False}}
    )
    assert section["zero_optimization"] == {
        "stage": 3,
        "cpu_offload_param": False,
        "offload_optimizer": {"device": "cpu"},
    }
    assert with_defaults({"zero_optimization": {"max_live_parameters": 7}})["zero_optimization"] == {
        "stage3_max_live_parameters": 7
    }
    assert deepspeed.ops.__compatible_ops__[deepspeed.ops.aio.AsyncIOBuilder.NAME]
    with pytest.raises(NotImplementedError, match="nvme"):
        deepspeed.ops.aio.AsyncIOBuilder().load()
    assert with_defaults({"zero_allow_untested_optimizer": 1})["zero_allow_untested_optimizer"] is True


def test_batch_sizes_are_settled_again_after_assignment():
    config = DeepSpeedConfig({"train_batch_size": 4})
    config.train_batch_size, config.train_micro_batch_size_per_gpu = 32, 8
    config.gradient_accumulation_steps = None
    config._configure_train_batch_size()
    assert config.gradient_accumulation_steps == 4
    config.train_batch_size = 33
    with pytest.raises(AssertionError, match="train_batch_size=33"):
        config._configure_train_batch_size()


def test_a_loss_scale_that_is_not_finite_is_refused():
    for value in (float("inf"), float("nan")):
        with pytest.raises(ValueError, match="finite"):
            DeepSpeedFP16Config(loss_scale=value)


def test_two_names_of_one_value_are_refused():
    from unishard.deepspeed.parts.zero_config import DeepSpeedZeroConfig

    with pytest.raises(DeepSpeedConfigError, match="keep offload_optimizer"):
        DeepSpeedZeroConfig(cpu_offload=True, offload_optimizer={"device": "cpu"})


def test_the_number_of_cpu_devices_is_the_launchers(monkeypatch):
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    monkeypatch.setenv("LOCAL_SIZE", "7")
    assert CPU_Accelerator().device_count() == 7
    native = bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
    assert (torch.half in CPU_Accelerator().supported_dtypes()) == native


def weight() -> nn.Parameter:
    return nn.Parameter(torch.zeros(1))


@pytest.mark.parametrize(
    ("kind", "options", "expected"),
    [
        (schedules.WarmupLR, {"warmup_num_steps": 4, "warmup_max_lr": 1.0, "warmup_type": "linear"}, 0.5),
        (schedules.LRRangeTest, {"lr_range_test_min_lr": 1.0, "lr_range_test_step_size": 4}, 1.75),
        (schedules.OneCycle, {"cycle_min_lr": 0.0, "cycle_max_lr": 1.0, "cycle_first_step_size": 4}, 0.75),
    ],
)
def test_step_n_says_that_update_n_is_over(kind, options, expected):
    counted, named = kind(torch.optim.SGD([weight()], lr=1.0), **options), None
    for _ in range(3):
        counted.step()
    rate = torch.tensor([1.0], dtype=torch.float64)
    optimizer = torch.optim.SGD([weight()], lr=rate)
    named = kind(optimizer, **options)
    named.step(2)
    assert optimizer.param_groups[0]["lr"] is rate
    assert named.last_batch_iteration == counted.last_batch_iteration == 2
    # WarmupLR's first two updates have the same rate, so three over means twice up.
    wanted = expected if kind is not schedules.WarmupLR else counted.get_lr()[0]
    assert named.get_lr() == counted.get_lr() == pytest.approx([wanted])


def test_cosine_tells_its_ratio_and_an_unknown_warm_up_is_logarithmic(caplog):
    schedule = schedules.WarmupCosineLR(
        torch.optim.SGD([weight()], lr=2.0), total_num_steps=20, warmup_num_steps=10, warmup_type="cubic"
    )
    assert schedule.warmup_type == "log"
    assert "cubic" in caplog.text
    schedule.step(4)
    assert schedule.get_lr() == [2.0 * schedule.get_lr_ratio()]


def test_command_line_flags_of_schedules():
    parser = schedules.add_tuning_arguments(argparse.ArgumentParser())
    assert parser.parse_args(["--lr_range_test_staircase"]).lr_range_test_staircase is True
    section, _ = schedules.get_config_from_args(parser.parse_args(["--lr_schedule", "OneCycle"]))
    schedules.OneCycle(torch.optim.Adam([weight()]), **section["params"])
    rate, problem = schedules.get_lr_from_config({"type": "WarmupCosineLR", "params": {}})
    assert rate is None
    assert "WarmupCosineLR" in problem


def test_parts_of_a_model_step_in_turn_and_step_back():
    torch.manual_seed(0)
    one, other = weight(), weight()
    optimizer = DeepSpeedCPUAdam([one], lr=0.1, weight_decay=0.1)
    before: list[torch.Tensor] = []
    for grad in (0.5, -2.0, 1.0):
        for key, param in enumerate((one, other)):
            optimizer.param_groups[0]["params"] = [param]
            param.grad = torch.full((1,), grad)
            before = [param.detach().clone(), *(s.clone() for s in optimizer.state.get(key, {}).values())]
            optimizer.step_subgroup(key)
    assert torch.equal(one, other)
    optimizer.rollback_subgroup(1)
    assert optimizer.state[1]["step"] == 2
    for found, wanted in zip((other.detach(), *optimizer.state[1].values()), before, strict=True):
        torch.testing.assert_close(found, wanted)
    with pytest.raises(RuntimeError, match="sub_group_id 7"):
        optimizer.rollback_subgroup(7)


@pytest.mark.parametrize(
    ("options", "dtype"), [({}, torch.float32), ({"fp32_optimizer_states": False}, torch.bfloat16)]
)
def test_half_precision_parameters_are_updated_in_fp32(options, dtype):
    torch.manual_seed(0)
    start = torch.randn(64).bfloat16()
    narrow, wide = nn.Parameter(start.clone()), nn.Parameter(start.float())
    ours = DeepSpeedCPUAdam([narrow, weight()], lr=1e-2, **options)
    torchs = torch.optim.AdamW([wide], lr=1e-2, weight_decay=0.0)
    torch.optim.Adam([weight()])  # the first of its class: from now on torch's own step runs hooks, too
    calls: list[int] = []
    ours.register_step_pre_hook(lambda *_: calls.append(1))
    for _ in range(3):
        grad = torch.randn(64)
        narrow.grad, wide.grad = grad.bfloat16(), grad.bfloat16().float()
        ours.step()
        torchs.step()
    assert len(calls) == 3
    assert ours.state[narrow]["exp_avg"].dtype is dtype
    assert narrow.grad is not None
    torch.testing.assert_close(narrow.float(), wide, rtol=0.02, atol=0.01)
    if options:
        with pytest.raises(DeepSpeedConfigError, match="under an engine states are fp32"):
            deepspeed.initialize(model=nn.Linear(1, 1), optimizer=ours, config={"train_batch_size": 1})


def test_used_parameters_are_counted_in_backward_only(monkeypatch):
    used, other = weight(), weight()
    found = []
    used.register_hook(lambda grad: found.append(count_used_parameters_in_backward([used, other])))
    (used * 2).sum().backward()
    assert found == [1]
    with pytest.raises(RuntimeError, match="during backward"):
        count_used_parameters_in_backward([used])
    monkeypatch.delattr(torch._C, "_will_engine_execute_node")
    assert count_used_parameters_in_backward([used, other, weight().detach(), None]) == 2


def test_small_functions_of_utils(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match="numactl"):
        deepspeed.utils.numa.get_numactl_cmd("0-3", 2, 0)
    deepspeed.utils.debug.printflock("seen")
    assert capsys.readouterr().out == "seen\n"
    for rank in (10, 2):
        (tmp_path / f"zero_{rank}_optim_states.pt").touch()
    files = deepspeed.utils.zero_to_fp32.get_optim_files(tmp_path)
    assert [name.rpartition("/")[2] for name in files] == [
        "zero_2_optim_states.pt",
        "zero_10_optim_states.pt",
    ]
    with pytest.raises(FileNotFoundError, match="_model_states"):
        deepspeed.utils.zero_to_fp32.get_model_state_files(tmp_path)
    for every in (0, 1.5):
        with pytest.raises(ValueError, match="steps_per_output"):
            deepspeed.utils.timer.ThroughputTimer(steps_per_output=every)
    timer = deepspeed.utils.timer.ThroughputTimer(steps_per_output=3)
    timer.global_step_count = 6
    assert timer._is_report_boundary()
    scale = deepspeed.checkpointing.checkpoint(torch.mul, torch.ones(1), other=torch.full((1,), 3.0))
    assert scale.item() == 3.0
    with pytest.raises(AssertionError, match="number of layers"):
        deepspeed.checkpointing.configure(contiguous_checkpointing=True)
    assert deepspeed.checkpointing.PARTITION_ACTIVATIONS is False
    split = deepspeed.runtime.utils.partition_balanced([1, 1, 1, 1, 0, 1], 4)
    assert split == [0, 1, 2, 3, 6]
    with pytest.raises(AssertionError, match="not divisible by 3"):
        deepspeed.utils.groups._ensure_divisibility(8, 3)
    params = {"lr": 1e-3, "max_grad_norm": 1.0}
    DeepSpeedConfig({"train_batch_size": 1, "optimizer": {"type": "Adam", "params": params}})


# on ranks ---------------------------------------------------------------------------------------------------


def _fp32_optimizer_passes_for_the_torch_one() -> None:
    assert isinstance(engine_of(net()).optimizer, FusedAdam)
    model = net()
    mine = torch.optim.SGD(model.parameters(), lr=0.1)
    config = {"train_micro_batch_size_per_gpu": 2}
    found = deepspeed.initialize(model=model, optimizer=mine, config=config)[1]
    assert found == mine
    assert isinstance(found, torch.optim.SGD)
    assert not isinstance(found, torch.optim.Adam)
    assert found != torch.optim.SGD([weight()], lr=0.1)


def _a_model_may_be_initialized_again(stage: int, folder: str) -> None:
    model = net()
    first = engine_of(model, stage)
    train(first, 2)
    first.save_checkpoint(folder)
    kept = {name: value.clone() for name, value in first.module_state_dict().items()}
    second = engine_of(model, stage)
    for name, value in second.module_state_dict().items():
        assert torch.equal(value, kept[name]), name
    second.load_checkpoint(folder)
    train(second)
    assert second.global_steps == 3


def _what_is_taken_out_of_gathered_parameters_stays() -> None:
    model = net()
    engine = engine_of(model, 3)
    params = list(model.parameters())
    for _ in range(2):
        with deepspeed.zero.GatheredParameters(params):
            state = model.state_dict()
            copies = {name: value.clone() for name, value in state.items()}
        assert not model[0].weight.numel()
        train(engine)
        for name, value in state.items():
            assert torch.equal(value, copies[name]), name
        with deepspeed.zero.GatheredParameters(params):
            assert not torch.equal(model[0].weight, copies["0.weight"])


def _a_constructor_may_gather_what_it_built() -> None:
    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(4, 3, bias=False)
            with deepspeed.zero.GatheredParameters(self.inner.weight, modifier_rank=0):
                self.inner.weight.data.fill_(5.0)

    with deepspeed.zero.Init():
        holder = Holder()
    with deepspeed.zero.GatheredParameters(holder.inner.weight):
        assert torch.equal(holder.inner.weight, torch.full((3, 4), 5.0))
    with deepspeed.zero.Init():
        engine_of(nn.Linear(4, 2), 3)
        later = nn.Linear(4, 2)
    assert hasattr(later.weight, "ds_id")
    holder.inner.weight.all_gather()
    holder.inner.weight.partition(free_data=False)
    assert holder.inner.weight.numel() == 12
    assert holder.inner.weight.ds_status.name == "NOT_AVAILABLE"
    holder.inner.weight.all_gather_coalesced([holder.inner.weight]).wait()
    assert torch.equal(holder.inner.weight, torch.full((3, 4), 5.0))
    holder.inner.weight.partition()


def _gradients_and_frozen_parameters(stage: int) -> None:
    model = net()
    model[0].weight.requires_grad_(False)
    engine = engine_of(model, stage)
    assert deepspeed.utils.safe_get_full_fp32_param(model[0].weight) is None
    x = torch.ones(2, WIDTH)
    if stage < 2:
        with engine.no_sync():
            engine.backward(engine(x).sum())
            own = deepspeed.utils.safe_get_full_grad(model[2].bias)
        torch.testing.assert_close(own, torch.full((1,), 2.0))
        with engine.no_sync(), pytest.raises(AssertionError, match="inside no_sync"), engine.no_sync():
            pass
        engine.zero_grad()
    engine.backward(engine(x).sum())
    if stage:
        (parts,) = engine.optimizer.averaged_gradients.values()
        assert len(parts) == 3
        norm = torch.stack(engine.optimizer._get_norm_groups())
        assert torch.isfinite(norm).all()
    engine.step()
    moment = deepspeed.utils.safe_get_local_optimizer_state(model[2].bias, "exp_avg")
    assert moment is not None
    assert engine.tput_timer.micro_step_count == 1
    assert engine.tput_timer.global_step_count == 1


class Counting(torch.optim.SGD):
    """Keeps one number of shape (1,) for each parameter."""

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    self.state[param].setdefault("count", torch.zeros(1)).add_(1)
                    self.state[param]["plain"] = self.state[param].get("plain", 0) + 1
        return super().step(closure)


def _state_of_one_element_comes_back(folder: str) -> None:
    def made() -> Any:
        model = net()
        optimizer = Counting(model.parameters(), lr=0.1)
        config = {
            "train_micro_batch_size_per_gpu": 2,
            "zero_optimization": {"stage": 1},
            "zero_allow_untested_optimizer": True,
        }
        return deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]

    saved, loaded = made(), made()
    train(saved, 3)
    saved.save_checkpoint(folder)
    loaded.load_checkpoint(folder)
    for found in loaded.optimizer.optimizer.state.values():
        assert torch.equal(found["count"], torch.tensor([3.0]))
        assert found["plain"] == 3


def _universal(folder: str) -> None:
    engine = engine_of(net(), 1)
    train(engine, 2)
    engine.save_checkpoint(folder, tag="two")
    if torch.distributed.get_rank() == 0:
        to_universal(SimpleNamespace(input_folder=f"{folder}/two", output_folder=f"{folder}/two_universal"))
    torch.distributed.barrier()
    other = engine_of(net(), 3, checkpoint={"load_universal": True})
    other.load_checkpoint(folder, tag="two_universal")
    for name, value in engine.module_state_dict().items():
        assert torch.equal(value, other.module_state_dict()[name]), name
    with open(f"{folder}/latest", encoding="utf-8") as latest:
        assert latest.read() == "two"


def test_the_fp32_optimizer_passes_for_the_torch_one(ranks):
    ranks(_fp32_optimizer_passes_for_the_torch_one)


def test_a_model_may_be_initialized_again(ranks, tmp_path):
    for stage in (1, 3):
        ranks(_a_model_may_be_initialized_again, stage, str(tmp_path / str(stage)))


def test_what_is_taken_out_of_gathered_parameters_stays(ranks):
    ranks(_what_is_taken_out_of_gathered_parameters_stays)


def test_a_constructor_may_gather_what_it_built(ranks):
    ranks(_a_constructor_may_gather_what_it_built)


def test_gradients_and_frozen_parameters(ranks):
    for stage in (0, 1, 3):
        ranks(_gradients_and_frozen_parameters, stage)


def test_state_of_one_element_comes_back(ranks, tmp_path):
    ranks(_state_of_one_element_comes_back, str(tmp_path))


def test_universal_checkpoints(ranks, tmp_path):
    ranks(_universal, str(tmp_path))


def _states_on_disk_are_read_and_written(folder: str) -> None:
    model = net()
    offload = {"stage": 3, "offload_optimizer": {"device": "nvme", "nvme_path": folder}}
    engine = engine_of(model, zero_optimization=offload)
    train(engine)
    utils, param = deepspeed.utils, model[0].weight
    wanted = torch.arange(float(WIDTH * WIDTH)).view(WIDTH, WIDTH)
    utils.safe_set_full_fp32_param(param, wanted)
    utils.safe_set_full_optimizer_state(param, wanted * 2, "exp_avg")
    assert torch.equal(utils.safe_get_full_fp32_param(param), wanted)
    assert torch.equal(utils.safe_get_full_optimizer_state(param, "exp_avg"), wanted * 2)
    local = utils.safe_get_local_fp32_param(param)
    utils.safe_set_local_fp32_param(param, local + 1)
    assert torch.equal(utils.safe_get_full_fp32_param(param), wanted + 1)
    with deepspeed.zero.GatheredParameters(param):
        assert torch.equal(param, wanted + 1)


def test_states_on_disk_are_read_and_written(ranks, tmp_path):
    ranks(_states_on_disk_are_read_and_written, str(tmp_path))


def _bf16_steps_that_overflow_are_skipped_on_request() -> None:
    model = net()
    engine = engine_of(model, 2, bf16={"enabled": True, "check_grad_overflow": True})
    before = {name: value.clone() for name, value in engine.module_state_dict().items()}
    engine(torch.full((2, WIDTH), float("inf"), dtype=torch.bfloat16)).sum().backward()
    engine.step()
    assert engine.skipped_steps == 1
    for name, value in engine.module_state_dict().items():
        assert torch.equal(value, before[name]), name


def test_bf16_steps_that_overflow_are_skipped_on_request(ranks):
    ranks(_bf16_steps_that_overflow_are_skipped_on_request)
