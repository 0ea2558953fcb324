from __future__ import annotations

import copy
import logging
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecision as TorchMixedPrecision
from torch.distributed.fsdp import ShardingStrategy as TorchStrategy
from torch.distributed.tensor import DTensor

from unishard.errors import ShardingError, StateError, UnsupportedError
from unishard.fsdp import FSDP, MixedPrecision, ShardingStrategy
from unishard.fsdp.wrap import CustomPolicy, ModuleWrapPolicy, always_wrap_policy
from unishard.sharding.unit import units_under
from unishard.testing.models import Block, TiedModel, TinyTransformer, WithBuffers, tied_transformer

BLOCKS = ModuleWrapPolicy({Block})


def wrapped(build: Any = TinyTransformer, policy: Any = BLOCKS, **options: Any) -> Any:
    """Ranks start apart; rank 0's weights must count."""
    torch.manual_seed(dist.get_rank())
    return FSDP(build(), auto_wrap_policy=policy, **options)


def alone(build: Any = TinyTransformer) -> Any:
    torch.manual_seed(0)
    return build()


def backward(model: Any, seed: int = 0) -> None:
    batch = model.example_batch(seed, 2)
    model.loss(model(batch.inputs), batch.targets).backward()


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return list(a) == list(b) and all(torch.equal(a[k], b[k]) for k in a)


# names, attributes, state dicts ------------------------------------------------------------------------------


def case_names_and_attributes() -> None:
    model, reference = wrapped(), alone()
    assert "2 x FullyShardedDataParallel(" in repr(model)
    names = [name for name, _ in reference.named_parameters()]
    assert [name for name, _ in model.named_parameters()] == names
    assert all(
        isinstance(p, DTensor) and p.shape == reference.get_parameter(n).shape
        for n, p in model.named_parameters()
    )
    assert model.vocabulary == 37
    assert isinstance(model.module, TinyTransformer)
    assert isinstance(model.blocks[0], FSDP)
    assert model.get_submodule("blocks.0.up") is model.module.blocks[0].module.up
    assert FSDP.fsdp_modules(model) == [model, *model.blocks]
    assert FSDP.fsdp_modules(model, root_only=True) == [model]
    assert [m.check_is_root() for m in FSDP.fsdp_modules(model)] == [True, False, False]
    assert (model.rank, model.world_size) == (dist.get_rank(), dist.get_world_size())
    assert model.sharding_strategy is ShardingStrategy.FULL_SHARD
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = model.no_such_name
    sequential: Any = FSDP(nn.Sequential(nn.Linear(2, 2), nn.ReLU()))
    assert isinstance(sequential[1], nn.ReLU)


def test_names_and_attributes(ranks):
    ranks(case_names_and_attributes)


def case_state_dict(strategy: ShardingStrategy) -> None:
    model, reference = wrapped(sharding_strategy=strategy), alone()
    saved = model.state_dict()
    assert all(type(v) is Tensor for v in saved.values())
    assert same(saved, reference.state_dict())
    reference.load_state_dict(saved)
    changed = {name: value + 1 for name, value in saved.items()}
    model(model.example_batch(0, 2).inputs)  # a root stays whole after forward; loading must not mind
    assert str(model.load_state_dict(changed)) == "<All keys matched successfully>"
    assert same(model.state_dict(), changed)
    reference.load_state_dict(changed)
    ids = model.example_batch(0, 2).inputs
    torch.testing.assert_close(model(ids), reference(ids))
    snapshot = {name: value.clone() for name, value in changed.items()}
    held = model.state_dict()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    backward(model)
    optimizer.step()
    assert same(held, snapshot), "training must not change a state dict that was taken before"
    holder = nn.ModuleDict({"model": model})
    assert list(holder.state_dict()) == [f"model.{name}" for name in saved]
    holder.load_state_dict({f"model.{name}": value for name, value in saved.items()})
    assert same(model.state_dict(), saved)


@pytest.mark.parametrize("strategy", [ShardingStrategy.FULL_SHARD, ShardingStrategy.NO_SHARD])
def test_state_dict_round_trip(ranks, strategy):
    ranks(case_state_dict, strategy)


def case_state_dict_mistakes() -> None:
    model = wrapped()
    saved = model.state_dict()
    up = saved.pop("blocks.0.up.weight")
    saved["blocks.0.extra"] = up
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "blocks.0.up.weight"') as caught:
        model.load_state_dict(saved)
    assert 'Unexpected key(s) in state_dict: "blocks.0.extra"' in str(caught.value)
    report = model.load_state_dict(saved, strict=False)
    assert (report.missing_keys, report.unexpected_keys) == (["blocks.0.up.weight"], ["blocks.0.extra"])
    with pytest.raises(RuntimeError, match="size mismatch"):
        model.load_state_dict({"head.weight": torch.zeros(2, 2)}, strict=False)


def test_state_dict_mistakes(ranks):
    ranks(case_state_dict_mistakes)


def case_torch_state_dict_helpers() -> None:
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

    model = wrapped()
    optimizer = torch.optim.AdamW(model.parameters())
    backward(model)
    optimizer.step()
    state, optim = get_state_dict(model, optimizer, options=StateDictOptions(full_state_dict=True))
    assert list(state) == [name for name, _ in model.named_parameters()]
    assert set(optim["state"]) == set(state)
    twin = wrapped()
    other = torch.optim.AdamW(twin.parameters())
    set_state_dict(
        twin,
        other,
        model_state_dict=state,
        optim_state_dict=optim,
        options=StateDictOptions(full_state_dict=True),
    )
    assert same(twin.state_dict(), model.state_dict())
    for a, b in zip(optimizer.state.values(), other.state.values(), strict=True):
        assert torch.equal(a["exp_avg"].full_tensor(), b["exp_avg"].full_tensor())


def test_torch_state_dict_helpers(ranks):
    ranks(case_torch_state_dict_helpers)


# modules and parameters --------------------------------------------------------------------------------------


def messages(level: int = logging.INFO) -> tuple[list[str], logging.Handler]:
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # pyright: ignore[reportAttributeAccessIssue]
    logging.getLogger("unishard").addHandler(handler)
    logging.getLogger("unishard").setLevel(level)
    return lines, handler


def case_tied() -> list[str]:
    lines, handler = messages()
    model = wrapped(TiedModel, ModuleWrapPolicy({nn.Linear}))
    logging.getLogger("unishard").removeHandler(handler)
    backward(model)
    saved = wrapped(tied_transformer).state_dict()
    assert saved["head.weight"] is saved["tokens.weight"], "tied weights stay tied in a state dict"
    return [line for line in lines if "tied" in line]


def test_a_tied_parameter_goes_to_the_outermost_common_unit(ranks):
    for lines in ranks(case_tied):
        assert len(lines) == 1
        assert "encode.weight" in lines[0]
        assert "decode.weight" in lines[0]


def case_tied_by_hand() -> None:
    model: Any = TiedModel()
    model.encode = FSDP(model.encode)
    with pytest.raises(ShardingError, match=r"decode.weight is tied to weight.*auto_wrap_policy"):
        FSDP(model)


def test_tied_across_modules_wrapped_by_hand(ranks):
    ranks(case_tied_by_hand)


def case_by_hand() -> None:
    half = MixedPrecision(torch.bfloat16)
    model = TinyTransformer()
    for index, block in enumerate(model.blocks):
        model.blocks[index] = FSDP(block, mixed_precision=half)
        block(torch.zeros(1, 2, 12))  # alone it is a root, which casts its inputs
    outer: Any = FSDP(model, mixed_precision=half)
    assert len(FSDP.fsdp_modules(outer)) == 3
    casts = [unit.policy.cast_forward_inputs for unit in units_under(outer)]
    assert casts == [True, False, False]
    backward(outer)
    with pytest.raises(ShardingError, match="is wrapped already; wrap by hand or by policy"):
        FSDP(model, auto_wrap_policy=BLOCKS)


def test_wrapping_by_hand(ranks):
    ranks(case_by_hand)


def case_entered_another_way() -> None:
    """`model.module(...)` and methods that end in forward gather as well."""

    class Generator(TinyTransformer.__mro__[1]):  # pyright: ignore[reportGeneralTypeIssues]
        def __init__(self) -> None:
            super().__init__()
            self.inner = TinyTransformer()

        def forward(self, inputs: Tensor) -> Tensor:
            return self.inner(inputs)

        def example_batch(self, seed: int, batch_size: int) -> Any:
            return self.inner.example_batch(seed, batch_size)

        def generate(self, ids: Tensor) -> Tensor:
            for _ in range(2):
                ids = torch.cat([ids, self(ids)[:, -1:].argmax(-1)], 1)
            return ids

    model, reference = wrapped(Generator), alone(Generator)
    ids = model.example_batch(0, 2).inputs[:, :3]
    torch.testing.assert_close(model.module(ids), reference(ids))
    with torch.inference_mode():
        assert torch.equal(model.generate(ids), reference.generate(ids))


def test_entered_another_way(ranks):
    ranks(case_entered_another_way)


def case_every_module() -> None:
    model, reference = wrapped(policy=always_wrap_policy), alone()
    assert not isinstance(model.blocks, FSDP), "a container has no forward to gather in"
    assert isinstance(model.blocks[0].up, FSDP)
    ids = model.example_batch(0, 2).inputs
    torch.testing.assert_close(model(ids), reference(ids))


def test_every_module(ranks):
    ranks(case_every_module)


def case_copies_and_checkpointing() -> None:
    from functools import partial

    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
        CheckpointImpl,
        apply_activation_checkpointing,
        checkpoint_wrapper,
    )

    model = wrapped()
    backward(model)
    expected = {name: p.grad.full_tensor() for name, p in model.named_parameters()}
    twin = copy.deepcopy(model)
    assert type(twin) is FSDP
    assert twin.head.weight is not model.head.weight
    apply_activation_checkpointing(
        twin,
        checkpoint_wrapper_fn=partial(checkpoint_wrapper, checkpoint_impl=CheckpointImpl.NO_REENTRANT),
        check_fn=lambda m: isinstance(m, Block),
    )
    twin.zero_grad()
    backward(twin)
    found = {name: p.grad.full_tensor() for name, p in twin.named_parameters()}
    for value, other in zip(expected.values(), found.values(), strict=True):
        torch.testing.assert_close(value, other)
    assert same(twin.state_dict(), model.state_dict())
    twin.load_state_dict(model.state_dict())
    with FSDP.summon_full_params(twin):
        assert type(twin.blocks[0].module.up.weight) is nn.Parameter


def test_copies_and_activation_checkpointing(ranks):
    ranks(case_copies_and_checkpointing)


def case_ignored() -> None:
    for how in ("ignored_modules", "ignored_states"):
        model = TinyTransformer()
        outer: Any = FSDP(model, auto_wrap_policy=BLOCKS, **{how: [model.blocks[0]]})
        assert [isinstance(block, FSDP) for block in model.blocks] == [False, True]
        assert type(model.get_parameter("blocks.0.up.weight")) is nn.Parameter
        backward(outer)
        assert model.get_parameter("blocks.0.up.weight").grad is not None
        assert list(outer.state_dict()) == list(TinyTransformer().state_dict())
    model = TinyTransformer()
    FSDP(model, ignored_states=[model.head.weight])
    assert type(model.head.weight) is nn.Parameter


def test_ignored_modules_and_states(ranks):
    ranks(case_ignored)


def case_meta() -> None:
    with torch.device("meta"):
        model = TinyTransformer()
    made: list[str] = []

    def init(module: nn.Module) -> None:
        made.append(type(module).__name__)
        for name, param in list(module.named_parameters(recurse=False)):
            # Another Parameter object, as some initialisers make.
            setattr(module, name, nn.Parameter(torch.full_like(param, dist.get_rank() + 2.0)))

    outer = FSDP(model, param_init_fn=init, auto_wrap_policy=BLOCKS, sync_module_states=True)
    assert made.count("Embedding") == 2
    assert all(v.eq(2).all() for v in outer.state_dict().values())
    with torch.device("meta"):
        plain = FSDP(nn.Sequential(nn.Linear(3, 3)))
    assert plain(torch.ones(1, 3)).isfinite().all()
    with torch.device("meta"):
        stuck = nn.Sequential(nn.PReLU())
    stuck[0].reset_parameters = None  # pyright: ignore
    with pytest.raises(ShardingError, match=r"cannot materialize.*0 \(PReLU\).*param_init_fn="):
        FSDP(stuck)


def test_meta_models_are_filled(ranks):
    ranks(case_meta)


def case_only_rank_0_has_weights() -> None:
    """The usual way to load a large checkpoint once a node."""
    first = dist.get_rank() == 0
    with torch.device("cpu" if first else "meta"):
        model = WithBuffers()
    reference = {name: value.clone() for name, value in model.state_dict().items()}
    outer = FSDP(
        model,
        sync_module_states=True,
        param_init_fn=None if first else lambda m: m.to_empty(device="cpu", recurse=False),
    )
    outer(model.example_batch(0, 4).inputs)
    saved = outer.state_dict()
    if first:
        assert torch.equal(saved["body.weight"], reference["body.weight"])
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, {n: b.clone() for n, b in outer.named_buffers()})
    assert all(same(values[0], other) for other in values), "non-persistent buffers too"


def test_only_rank_0_has_weights(ranks):
    ranks(case_only_rank_0_has_weights)


# dtypes ------------------------------------------------------------------------------------------------------


class Norms(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.norm = nn.BatchNorm1d(8)
        self.register_buffer("shift", torch.full((8,), 0.1))
        self.seen: dict[str, torch.dtype] = {}

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        self.seen = {"hidden": hidden.dtype}
        self.norm.module.register_forward_pre_hook(lambda m, a: self.seen.update(norm=a[0].dtype))  # pyright: ignore
        return self.norm(hidden) + self.shift


def case_mixed_precision(cls: Any) -> None:
    torch.manual_seed(0)
    plain = Norms()
    policy = cls(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, buffer_dtype=torch.bfloat16)
    model: Any = FSDP(
        copy.deepcopy(plain), mixed_precision=policy, auto_wrap_policy=ModuleWrapPolicy({nn.Linear})
    )
    assert isinstance(model.norm, FSDP)
    out = model(torch.randn(4, 6))
    assert model.seen == {"hidden": torch.bfloat16, "norm": torch.float32}
    assert out.dtype == torch.bfloat16, "outputs stay as computed"
    assert (model.shift.dtype, model.norm.running_mean.dtype) == (torch.bfloat16, torch.float32)
    out.float().square().sum().backward()
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in model.parameters())
    saved = model.state_dict()
    assert torch.equal(saved["first.weight"], plain.first.weight), "state dicts keep full precision"
    assert {v.dtype for k, v in saved.items() if k != "norm.num_batches_tracked"} == {torch.float32}
    units = list(units_under(model))
    assert [group.precision.reduce for unit in units for group in unit.groups] == [torch.float32] * 2


@pytest.mark.parametrize("cls", [MixedPrecision, TorchMixedPrecision])
def test_mixed_precision(ranks, cls):
    ranks(case_mixed_precision, cls)


def case_gradient_dtypes() -> None:
    model = wrapped(mixed_precision=MixedPrecision(torch.bfloat16))
    assert {g.precision.reduce for u in units_under(model) for g in u.groups} == {torch.bfloat16}
    low = wrapped(mixed_precision=MixedPrecision(torch.bfloat16, keep_low_precision_grads=True))
    for outer, dtype in ((model, torch.float32), (low, torch.bfloat16)):
        for seed in range(2):
            backward(outer, seed)
        assert {p.grad.dtype for p in outer.parameters()} == {dtype}
        assert {p.dtype for p in outer.parameters()} == {torch.float32}


def test_gradient_dtypes(ranks):
    ranks(case_gradient_dtypes)


def case_grad_scaler() -> None:
    """An overflow on one rank skips the step on all."""
    model = wrapped(mixed_precision=MixedPrecision(torch.float16, torch.float16, torch.float16))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)  # pyright: ignore[reportPrivateImportUsage]
    batch = model.example_batch(dist.get_rank(), 2)
    for step in range(3):
        before = model.state_dict()
        loss = model.loss(model(batch.inputs), batch.targets)
        scaler.scale(loss * float("inf") if step == 1 and dist.get_rank() == 0 else loss).backward()
        scaler.unscale_(optimizer)
        norm = model.clip_grad_norm_(1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        assert same(before, model.state_dict()) == (step == 1)
        assert bool(norm.isfinite()) == (step != 1)
    assert scaler.get_scale() == 32.0


def test_grad_scaler(ranks):
    ranks(case_grad_scaler)


def case_low_precision_masters() -> list[str]:
    lines, handler = messages(logging.WARNING)
    wrapped(lambda: TinyTransformer().bfloat16())
    logging.getLogger("unishard").removeHandler(handler)
    return lines


def test_sixteen_bit_weights_are_warned_of(ranks):
    [line] = ranks(case_low_precision_masters, world_size=1)[0]
    assert "tokens.weight is 16-bit" in line
    assert "MixedPrecision(param_dtype=torch.bfloat16)" in line


# strategies and meshes ---------------------------------------------------------------------------------------


def case_custom_overrides() -> list[str]:
    first: list[nn.Module] = []

    def choose(module: nn.Module) -> bool | dict[str, Any]:
        if isinstance(module, Block) and not first:
            first.append(module)
            return {"sharding_strategy": TorchStrategy.SHARD_GRAD_OP}
        return isinstance(module, Block)

    model = wrapped(policy=CustomPolicy(choose))
    backward(model)
    return [unit.sharding.name for unit in units_under(model)]


def test_custom_policy_overrides(ranks):
    assert ranks(case_custom_overrides) == [["ZERO3", "SHARD_GRAD_OP", "ZERO3"]] * 2


def case_meshes() -> None:
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp_replicate", "dp_shard"))
    groups = (mesh.get_group("dp_shard"), mesh.get_group("dp_replicate"))
    reference = alone()
    for option in ({"device_mesh": mesh}, {"process_group": groups}):
        model = wrapped(sharding_strategy=TorchStrategy.HYBRID_SHARD, **option)
        assert model.head.weight.placements[0].is_replicate()
        assert (model.world_size, model.rank) == (2, dist.get_rank() % 2)
        assert same(model.state_dict(), reference.state_dict())
        backward(model)
    tensor_parallel = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    one = wrapped(device_mesh=tensor_parallel["dp"])
    assert one.world_size == 2
    assert wrapped(process_group=groups[0]).world_size == 2
    with pytest.raises(ShardingError, match=r"HYBRID_SHARD needs two groups"):
        wrapped(sharding_strategy=ShardingStrategy.HYBRID_SHARD, process_group=groups[0])
    with pytest.raises(ShardingError, match=r"takes a 1-D device_mesh.*HYBRID_SHARD"):
        wrapped(device_mesh=mesh)
    with pytest.raises(ShardingError, match=r"takes a 2-D device_mesh \(dp_replicate, dp_shard\)"):
        wrapped(sharding_strategy=ShardingStrategy.HYBRID_SHARD, device_mesh=tensor_parallel["dp"])


def test_meshes_and_groups(ranks):
    ranks(case_meshes, world_size=4)


def case_tensor_parallel_first() -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))
    reference = copy.deepcopy(model)
    plan: Any = {"0": ColwiseParallel(), "2": RowwiseParallel()}
    outer: Any = FSDP(parallelize_module(model, mesh["tp"], plan), device_mesh=mesh["dp"])
    assert same(outer.state_dict(), reference.state_dict())
    changed = {name: value * 2 for name, value in reference.state_dict().items()}
    outer.load_state_dict(changed)
    assert same(outer.state_dict(), changed)
    reference.load_state_dict(changed)
    x = torch.randn(3, 6, generator=torch.Generator().manual_seed(5))
    torch.testing.assert_close(outer(x), reference(x))
    outer(x).square().sum().backward()
    reference(x).square().sum().backward()
    norm = outer.clip_grad_norm_(1e9)
    torch.testing.assert_close(norm, nn.utils.clip_grad_norm_(reference.parameters(), 1e9))


def test_tensor_parallelism_first(ranks):
    ranks(case_tensor_parallel_first, world_size=4)


def case_inner_calls() -> None:
    model = wrapped()
    for call in (lambda m: m.no_sync().__enter__(), lambda m: m.clip_grad_norm_(1.0)):
        with pytest.raises(
            StateError, match="of a FSDPBlock inside another FSDP module; call it on the outermost"
        ):
            call(model.blocks[0])


def test_calls_that_belong_to_the_outermost(ranks):
    ranks(case_inner_calls)


def case_one_rank_fails() -> None:
    """A mistake on one rank is an error on all, not a hang."""
    with torch.device("meta" if dist.get_rank() else "cpu"):
        model = nn.Sequential(nn.PReLU())
    model[0].reset_parameters = None  # pyright: ignore
    kind = ShardingError if dist.get_rank() else RuntimeError
    with pytest.raises(kind, match="cannot materialize"):
        FSDP(model)
    with pytest.raises(UnsupportedError, match="one module"):
        FSDP(
            model,
            auto_wrap_policy=CustomPolicy(lambda m: {"device_id": 0} if isinstance(m, nn.PReLU) else False),
        )


def test_one_rank_fails(ranks):
    ranks(case_one_rank_fails)
