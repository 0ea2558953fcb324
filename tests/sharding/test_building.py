"""Building, reading and loading models that are never whole: gather, init_sharded, meta, safetensors, auto_shard."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import torch.distributed as dist
from tests.sharding.step_harness import full, inputs_for
from tests.sharding.test_cost import shard
from tests.sharding.test_step import Stack
from torch import Tensor, nn

import unishard
from unishard import (
    RankError,
    ShardingError,
    StateError,
    auto_shard,
    describe,
    fully_shard,
    gather,
    init_sharded,
)
from unishard.sharding.single import full_shape, single_of
from unishard.sharding.unit import units_under

PRESETS = ("NO_SHARD", "ZERO1", "ZERO3")


def both_doors(preset: str) -> list[nn.Module]:
    torch.manual_seed(5)
    config = shard(Stack(), preset).module
    torch.manual_seed(5)
    code = Stack()
    for block in code.blocks:
        fully_shard(block, sharding=preset)
    return [config, fully_shard(code, sharding=preset)]


def case_gather_reads() -> None:
    torch.manual_seed(5)
    expected = dict(Stack().named_parameters())
    for preset in PRESETS:
        for model in both_doors(preset):
            with gather(model):
                for name, param in model.named_parameters():
                    assert type(param) is nn.Parameter, (preset, name)
                    assert torch.equal(param, expected[name]), (preset, name)
                with gather(list(model.parameters())[:1]):
                    pass
                assert model.get_parameter("first.weight").shape == (6, 6), "the inner context released it"


def case_gather_writes() -> None:
    for preset in PRESETS:
        for model in both_doors(preset):
            with gather(model, modifier_rank=1):
                model.get_parameter("blocks.1.up.weight").data.fill_(float(dist.get_rank()))
            with gather(model):
                assert (model.get_parameter("blocks.1.up.weight") == 1).all(), preset
            if preset != "ZERO3":
                continue
            with gather(model):
                model.get_parameter("blocks.1.up.weight").data.fill_(9.0)
            with gather(model):
                assert (model.get_parameter("blocks.1.up.weight") == 1).all(), (
                    f"{preset}: changes were to be dropped"
                )


def case_gather_outlasts_what_runs_inside() -> None:
    """A state dict, a load or a forward inside the block must not take the whole parameters away."""
    model = fully_shard(nn.Linear(3, 2))
    with unishard.gather(model, modifier_rank=0):
        whole = model.weight
        with torch.no_grad():
            whole.fill_(3.0)
        assert model.state_dict()["weight"].eq(3).all()
        assert model(torch.ones(1, 3)).shape == (1, 2)
        model.load_state_dict({"weight": torch.full((2, 3), 4.0), "bias": torch.zeros(2)})
        assert model.weight is whole
    assert model.weight is not whole
    assert model.weight.full_tensor().eq(4).all()


def case_gather_keeps_master_precision() -> None:
    from unishard.sharding.precision import MixedPrecision

    policy = MixedPrecision(param_dtype=torch.bfloat16, master_dtype=torch.float32)
    for preset in PRESETS:
        model = shard(Stack(), preset, policy).module
        group = next(units_under(model)).groups[0]
        before = group.buffer.shard.clone()
        with gather(model, modifier_rank=0):
            model.get_parameter("first.bias").data[0] = 2.0
        changed = (group.buffer.shard != before).sum()
        assert changed <= 1, "a 16-bit detour would round every weight"


def case_gather_refusals() -> None:
    model = shard(Stack(), "ZERO3").module
    with pytest.raises(ShardingError, match="modifier_rank=7 is not one of the 2"):
        with gather(model, modifier_rank=7):
            pass

    class Gathers(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
            with gather(model):
                return grad

    with pytest.raises(StateError, match="during forward or backward"):
        Gathers.apply(model(inputs_for(0, 0))).sum().backward()  # pyright: ignore


class Custom(nn.Module):
    """Initialises a child's weight after building it, ties two, and holds a non-persistent buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(8, 33)
        self.down = nn.Linear(33, 8)
        self.other = nn.Linear(8, 33)
        nn.init.constant_(self.up.weight, 0.5)
        self.down.weight.data.normal_(std=3.0)
        self.other.weight = self.up.weight
        self.own = nn.Parameter(torch.randn(5))
        self.register_buffer("seen", torch.rand(3), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(self.up(x) + self.other(x))) * self.own.sum()


def case_init_sharded() -> None:
    torch.manual_seed(11)
    plain = Custom()
    for door in ("config", "code"):
        torch.manual_seed(11 + dist.get_rank())
        with init_sharded():
            model = Custom()
        assert all(p.numel() == 0 for p in model.parameters())
        assert full_shape(model.down.weight) == (8, 33)
        assert model.other.weight is model.up.weight
        twin = nn.Linear(2, 2)
        assert twin.weight.numel() == 4, "the context is over"
        with gather(model):
            assert (model.up.weight == 0.5).all()
        model = shard(model, "ZERO3").module if door == "config" else fully_shard(model)
        with gather(model):
            for (name, param), other in zip(model.named_parameters(), plain.parameters(), strict=True):
                torch.testing.assert_close(param.detach(), other.detach(), msg=f"{door} {name}")
        x = torch.ones(2, 8)
        torch.testing.assert_close(model(x), plain(x))
        torch.testing.assert_close(model.seen, plain.seen)


def case_init_sharded_holds_one_module_at_a_time() -> None:
    whole: list[int] = []

    class Probe(nn.Linear):
        def __init__(self) -> None:
            super().__init__(64, 64)
            built.append(self)
            whole.append(sum(p.numel() for layer in built for p in layer.parameters()))

    built: list[nn.Module] = []
    with init_sharded():
        model = nn.Sequential(*(Probe() for _ in range(8)))
    # Reading `numel` inside the context finds a parameter whole, one at a time: the newest layer's own and one other.
    assert sum(p.numel() for p in model.parameters()) == 0
    assert len(whole) == 8
    held = [single_of(p).held_bytes for p in model.parameters()]  # pyright: ignore[reportOptionalMemberAccess]
    assert sum(held) <= 4 * 8 * (64 * 64 + 64) / dist.get_world_size() * 1.03


def case_meta_config() -> None:
    with torch.device("meta"):
        model = Stack()
    torch.manual_seed(dist.get_rank())
    sharded = shard(model, "ZERO3")
    loss = sharded.module(inputs_for(0, 0)).sum()
    values = [torch.empty_like(loss) for _ in range(2)]
    dist.all_gather(values, loss.detach())
    assert torch.isfinite(loss)
    assert torch.equal(values[0], values[1]), "ranks trained a patchwork"

    class NoReset(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3))

    with torch.device("meta"):
        stuck = nn.Sequential(NoReset(), NoReset())
    with pytest.raises(ShardingError, match=r"0 \(NoReset\), 1 \(NoReset\) .* param_init_fn"):
        shard(stuck, "ZERO3")


def case_meta_code() -> None:
    with torch.device("meta"):
        model = Stack()
    for block in model.blocks:
        fully_shard(block)
    fully_shard(model)
    with pytest.raises(StateError, match=r"meta device.*to_empty"):
        model(inputs_for(0, 0))
    model.to_empty(device="cpu")
    torch.manual_seed(3)
    for param in model.parameters():
        nn.init.constant_(param, 0.1)
    model(inputs_for(dist.get_rank(), 0)).sum().backward()
    for param in model.parameters():
        assert (full(param) == 0.1).all()
        assert param.grad is not None


def case_load_safetensors(folder: str) -> None:
    torch.manual_seed(21)
    stored = Custom()
    tensors = {k: v.clone() for k, v in stored.state_dict().items() if k != "other.weight"}
    file = Path(folder) / "model.safetensors"
    if dist.get_rank() == 0:
        safetensors.torch.save_file(tensors, file)
    dist.barrier()
    for preset in PRESETS:
        for door in ("config", "code", "plain"):
            model = Custom()
            if door == "config":
                model = shard(model, preset).module
            elif door == "code":
                model = fully_shard(model, sharding=preset)
            unishard.load_safetensors(model, file)
            with gather(model):
                for (name, param), other in zip(model.named_parameters(), stored.parameters(), strict=True):
                    assert torch.equal(param, other), (preset, door, name)
            model.seen.copy_(stored.seen)
            torch.testing.assert_close(model(torch.ones(2, 8)), stored(torch.ones(2, 8)))


def case_load_refusals(folder: str) -> None:
    file = Path(folder) / "bad.safetensors"
    if dist.get_rank() == 0:
        safetensors.torch.save_file({"first.weight": torch.ones(3, 3), "typo": torch.ones(1)}, file)
    dist.barrier()
    model = shard(Stack(), "ZERO3").module
    with pytest.raises(ShardingError) as caught:
        unishard.load_safetensors(model, file)
    for part in (
        "first.weight: stored (3, 3), the model has (6, 6)",
        "typo: unexpected",
        "last.bias: missing",
    ):
        assert part in str(caught.value)
    with pytest.raises((ShardingError, RankError), match="nowhere"):
        unishard.load_safetensors(model, Path(folder) / "nowhere")


def case_auto_shard() -> None:
    model = Stack()
    alone = copy.deepcopy(model)
    dist.broadcast_object_list([None])
    for p in alone.parameters():
        dist.broadcast(p.data, 0)
    assert "would be grouped as" in describe(model)
    assert "blocks.2" in describe(model)
    auto_shard(model)
    assert [u.name for u in units_under(model)] == ["Stack", "Block", "Block", "Block"]
    assert "ZERO3 over 1 x 2 ranks" in describe(model)
    x = inputs_for(0, 0)
    torch.testing.assert_close(model(x), alone(x))

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(2))
            self.parts[1][0].weight = self.parts[0][0].weight  # pyright: ignore

        def forward(self, x: Tensor) -> Tensor:
            return self.parts[1](self.parts[0](x))

    tied = auto_shard(Tied())
    tied(torch.ones(1, 4)).sum().backward()
    names = [[r.fqn for g in u.groups for r in g.registrations] for u in units_under(tied)]
    assert names == [["parts.0.0.weight"], ["parts.0.0.bias"], ["parts.1.0.bias"]]


CASES = {
    name.removeprefix("case_"): case for name, case in list(globals().items()) if name.startswith("case_")
}


@pytest.mark.parametrize("name", CASES)
def test_building(name: str, ranks: Callable[..., Any], tmp_path: Path) -> None:
    arguments = (str(tmp_path),) if "load" in name else ()
    ranks(CASES[name], *arguments, world_size=2)
