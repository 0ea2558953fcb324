from __future__ import annotations

import copy

import pytest
import torch

from unishard.testing.models import MODELS, NonContiguous, UnusedBranch, tied_transformer


def build(name: str, seed: int = 0):
    torch.manual_seed(seed)
    return MODELS[name]()


@pytest.mark.parametrize("name", MODELS)
def test_a_batch_depends_on_its_seed_only(name):
    model = build(name)
    torch.manual_seed(5)
    first = model.example_batch(seed=1, batch_size=4)
    torch.manual_seed(6)
    again = model.example_batch(seed=1, batch_size=4)
    assert torch.equal(first.inputs, again.inputs)
    assert torch.equal(first.targets, again.targets)
    assert not torch.equal(first.inputs, model.example_batch(seed=2, batch_size=4).inputs)
    assert len(first.inputs) == len(first.targets) == 4


@pytest.mark.parametrize("name", MODELS)
def test_the_mean_of_two_batches_losses_is_the_loss_of_both_together(name):
    model = build(name)
    whole = copy.deepcopy(model)
    batches = [model.example_batch(seed, 4) for seed in (0, 1)]
    for inputs, targets in batches:
        (model.loss(model(inputs), targets) / 2).backward()
    inputs, targets = (torch.cat(parts) for parts in zip(*batches, strict=True))
    whole.loss(whole(inputs), targets).backward()
    for (key, parameter), reference in zip(model.named_parameters(), whole.parameters(), strict=True):
        assert (parameter.grad is None) == (reference.grad is None), key
        if parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, reference.grad)


@pytest.mark.parametrize("name", MODELS)
def test_shard_units_are_submodules_listed_once(name):
    model = build(name)
    units = model.shard_units()
    assert set(units) <= set(model.modules()) - {model}
    assert len(set(units)) == len(units)


def test_each_model_has_the_property_it_is_named_for():
    tied = tied_transformer()
    assert tied.head.weight is tied.tokens.weight
    assert not all(p.is_contiguous() for p in NonContiguous().parameters())
    frozen = [p.requires_grad for p in build("partly_frozen").parameters()]
    assert any(frozen)
    assert not all(frozen)
    assert min(p.numel() for p in build("tiny_shapes").parameters()) == 1
    with_buffers = build("with_buffers")
    assert "sign" not in with_buffers.state_dict()
    assert "sign" in dict(with_buffers.named_buffers())


@pytest.mark.parametrize(("seed", "used"), [(0, (True, False)), (1, (False, True)), (2, (False, False))])
def test_the_seed_chooses_the_branch(seed, used):
    model = UnusedBranch()
    inputs, targets = model.example_batch(seed, 4)
    model.loss(model(inputs), targets).backward()
    assert (model.first.weight.grad is not None, model.second.weight.grad is not None) == used
