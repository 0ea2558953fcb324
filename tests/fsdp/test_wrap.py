from __future__ import annotations

import functools

import pytest
import torch.distributed.fsdp.wrap as torch_wrap
from torch import nn

from unishard.errors import ShardingError, StateError
from unishard.fsdp import wrap
from unishard.testing.models import Block, TinyTransformer

BLOCKS = ["blocks.0", "blocks.1"]


def names(policy, skip=(), **kwargs):
    model = TinyTransformer()
    ignored = {model.get_submodule(name) for name in skip}
    chosen = wrap.choose_by_policy(model, policy, ignored, set(), **kwargs)
    return [name for name, module in model.named_modules() if module in chosen]


def torch_names(policy):
    """What torch's recursion wraps with a callable policy."""
    model = TinyTransformer()
    modules = dict(model.named_modules())
    seen = []

    class Stub(nn.Module):
        def __init__(self, module, **kwargs):
            super().__init__()
            seen.append(module)
            self.inner = module

    torch_wrap._recursive_wrap(model, policy, Stub, set(), set(), only_wrap_children=True)
    return [name for name, module in modules.items() if module in seen]


@pytest.mark.parametrize(
    "policy",
    [
        wrap.ModuleWrapPolicy({Block}),
        wrap.ModuleWrapPolicy([Block]),
        wrap.CustomPolicy(lambda m: isinstance(m, Block)),
        wrap.transformer_auto_wrap_policy(transformer_layer_cls={Block}),
        functools.partial(wrap.transformer_auto_wrap_policy, transformer_layer_cls={Block}),
        wrap.lambda_auto_wrap_policy(lambda_fn=lambda m: isinstance(m, Block)),
        functools.partial(wrap.lambda_auto_wrap_policy, lambda_fn=lambda m: isinstance(m, Block)),
        lambda module, recurse, nonwrapped_numel: recurse or isinstance(module, Block),
        torch_wrap.ModuleWrapPolicy({Block}),
        torch_wrap.CustomPolicy(lambda m: isinstance(m, Block)),
        functools.partial(torch_wrap.transformer_auto_wrap_policy, transformer_layer_cls={Block}),
        functools.partial(
            wrap._or_policy, policies=[wrap.ModuleWrapPolicy({Block}), wrap.ModuleWrapPolicy({nn.ReLU})]
        ),
        {Block},
    ],
)
def test_every_way_to_name_blocks(policy):
    assert names(policy) == BLOCKS
    assert names(policy, skip=["blocks.0"]) == ["blocks.1"]


@pytest.mark.parametrize("least", [1, 200, 600, 1500, 4000, 10**9])
def test_by_size_as_torch_does(least):
    ours = wrap.size_based_auto_wrap_policy(min_num_params=least)
    theirs = functools.partial(torch_wrap.size_based_auto_wrap_policy, min_num_params=least)
    assert names(ours) == torch_names(theirs) == torch_names(ours) == names(theirs)


@pytest.mark.parametrize("options", [{"force_leaf_modules": {Block}}, {"exclude_wrap_modules": {nn.Linear}}])
def test_by_size_with_exceptions_as_torch_does(options):
    ours = wrap.size_based_auto_wrap_policy(min_num_params=100, **options)
    theirs = functools.partial(torch_wrap.size_based_auto_wrap_policy, min_num_params=100, **options)
    assert names(ours) == torch_names(theirs) != names(wrap.size_based_auto_wrap_policy(min_num_params=100))


def test_always_as_torch_does():
    assert names(wrap.always_wrap_policy) == torch_names(torch_wrap.always_wrap_policy)


@pytest.mark.parametrize(
    "policy",
    [wrap.ModuleWrapPolicy({Block}), wrap.lambda_auto_wrap_policy(lambda_fn=lambda m: isinstance(m, Block))],
)
def test_full_precision_classes_are_chosen_too(policy):
    found = names(policy, islands=(nn.LayerNorm,))
    assert {*BLOCKS, "norm", "blocks.0.norm_mlp"} <= set(found)
    assert len(found) == 7


def test_wrap_inside_enable_wrap():
    class Wrapper(nn.Module):
        def __init__(self, module, **kwargs):
            super().__init__()
            self.inner, self.kwargs = module, kwargs

    layer = nn.Linear(1, 1)
    assert wrap.wrap(layer) is layer
    with wrap.enable_wrap(wrapper_cls=Wrapper, a=1, b=2):
        wrapped = wrap.wrap(layer, b=3)
        with pytest.raises(StateError, match="leave the outer block"):
            wrap.enable_wrap(wrapper_cls=Wrapper).__enter__()
    assert wrapped.inner is layer
    assert wrapped.kwargs == {"a": 1, "b": 3}
    assert wrap.wrap(layer) is layer


def test_refusals():
    with pytest.raises(ShardingError, match="non-empty set of module classes"):
        wrap.ModuleWrapPolicy([])
    with pytest.raises(ShardingError, match="transformer_layer_cls"):
        wrap.transformer_auto_wrap_policy()
    with pytest.raises(ShardingError, match="lambda_fn="):
        wrap.lambda_auto_wrap_policy()
    with pytest.raises(ShardingError, match=r"lambda_fn returned 3 for TinyTransformer"):
        names(wrap.CustomPolicy(lambda m: 3))
    with pytest.raises(
        ShardingError, match=r"auto_wrap_policy=3 is no policy; pass one of unishard.fsdp.wrap"
    ):
        names(3)
