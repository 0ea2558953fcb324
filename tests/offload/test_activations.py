"""Gradients with activations on a tier are the same bits as without."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from unishard.errors import OffloadError
from unishard.offload import CpuTier, NvmeTier, offload_activations
from unishard.sharding.ports import Ticket, Tier


class Block(nn.Module):
    """Projections that save the same input, views, dropout, an operation in place and a residual."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.dropout = nn.Dropout(0.2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.norm(x)
        q, k, v = (p(h).unflatten(-1, (4, -1)).transpose(1, 2) for p in (self.q, self.k, self.v))
        a = torch.softmax(q @ k.transpose(-1, -2), -1) @ v
        x = x + self.dropout(a.transpose(1, 2).flatten(-2))
        return x + self.down(torch.relu_(self.up(x)))


def model(depth: int = 3) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(Block(32) for _ in range(depth)))


def run(net: nn.Module, backward: Callable[[torch.Tensor], None] = torch.Tensor.backward) -> torch.Tensor:
    torch.manual_seed(1)
    x = torch.randn(2, 64, 32, requires_grad=True)
    backward(net(x).square().mean())
    assert x.grad is not None
    return torch.cat([x.grad.flatten(), *(p.grad.flatten() for p in net.parameters() if p.grad is not None)])


@pytest.fixture(params=["cpu", "nvme"])
def tier(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Tier]:
    made: Tier = CpuTier() if request.param == "cpu" else NvmeTier(tmp_path, rank=0, block=8192)
    yield made
    made.close()


@pytest.mark.parametrize("prefetch", [0, 1, 5])
@pytest.mark.parametrize("backward_inside", [True, False])
def test_gradients_are_the_same_bits(tier: Tier, prefetch: int, backward_inside: bool) -> None:
    net = model()
    expected = run(net)
    net.zero_grad()
    torch.manual_seed(1)
    x = torch.randn(2, 64, 32, requires_grad=True)
    with offload_activations(tier, min_bytes=1000, prefetch=prefetch) as store:
        loss = net(x).square().mean()
        if backward_inside:
            loss.backward()
    if not backward_inside:
        assert len(list(tier.keys())) > 20
        loss.backward()
    assert x.grad is not None
    grads = [x.grad.flatten(), *(p.grad.flatten() for p in net.parameters() if p.grad is not None)]
    assert torch.equal(torch.cat(grads), expected)
    assert store.offloaded_bytes > 3 * 2 * 64 * 32 * 4 * 8
    del loss
    store.settle()
    assert not list(tier.keys()), "what backward no longer needs is forgotten"


def test_micro_batches_and_a_graph_that_is_kept(tier: Tier) -> None:
    def twice(loss: torch.Tensor) -> None:
        loss.backward(retain_graph=True)
        loss.backward()

    net = model()
    run(net, twice)
    expected = run(net)
    net.zero_grad()
    with offload_activations(tier, min_bytes=1000):
        run(net, twice)
        assert torch.equal(run(net), expected)


def test_graphs_whose_backwards_come_in_any_order(tier: Tier) -> None:
    net = model()
    inputs = [torch.randn(2, 64, 32) for _ in range(3)]

    def grads(losses: list[torch.Tensor]) -> list[torch.Tensor]:
        found = []
        for index in (1, 0, 2):
            net.zero_grad()
            losses[index].backward()
            found += [p.grad.clone() for p in net.parameters() if p.grad is not None]
        return found

    net.eval()
    expected = grads([net(x).square().mean() for x in inputs])
    with offload_activations(tier, min_bytes=1000):
        losses = [net(x).square().mean() for x in inputs]
    assert all(map(torch.equal, grads(losses), expected))


def test_second_derivatives(tier: Tier) -> None:
    net = nn.Sequential(nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 1))
    x = torch.randn(64, 32, requires_grad=True)

    def second() -> torch.Tensor:
        [first] = torch.autograd.grad(net(x).sum(), x, create_graph=True)
        return torch.autograd.grad(first.square().sum(), x)[0]

    expected = second()
    with offload_activations(tier, min_bytes=1000):
        assert torch.equal(second(), expected)


def test_an_activation_saved_for_several_operations_travels_once() -> None:
    x = torch.randn(64, 32, requires_grad=True)
    h = x * 2
    projections = [nn.Linear(32, 32, bias=False) for _ in range(3)]
    with offload_activations(min_bytes=1000) as store:
        out = sum((p(h) for p in projections), torch.zeros(()))
    assert store.offloaded_bytes == h.numel() * 4
    out.sum().backward()
    assert x.grad is not None
    weights = [p.weight for p in projections]
    assert torch.allclose(x.grad, 2 * sum(weights, torch.zeros(())).sum(0).expand(64, 32), atol=1e-6)


def test_parameters_and_their_views_stay_where_they_are() -> None:
    linear = nn.Linear(64, 64)
    frozen = nn.Parameter(torch.randn(64, 64), requires_grad=False)
    x = torch.randn(4, 64, requires_grad=True)
    with offload_activations(min_bytes=2000) as store:
        (linear(x) @ frozen.t() @ linear.weight.view(64, 64)).sum().backward()
    assert store.offloaded_bytes == 0


@pytest.mark.parametrize(
    "layout",
    [
        lambda x: x.permute(2, 0, 1),
        lambda x: x.expand(3, 8, 16, 32),
        lambda x: x[:, ::2],
        lambda x: x[1:],
        lambda x: x.to(torch.bfloat16),
    ],
)
def test_layouts_survive(tier: Tier, layout: Callable[[torch.Tensor], torch.Tensor]) -> None:
    x = (torch.randn(8, 16, 32) * 2).requires_grad_()

    def strides_and_gradient() -> tuple[Any, torch.Tensor]:
        seen = []

        class Watch(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, tensor: torch.Tensor) -> torch.Tensor:
                ctx.save_for_backward(tensor)
                return tensor.float().square()

            @staticmethod
            def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
                [tensor] = ctx.saved_tensors
                seen.append((tensor.shape, tensor.stride(), tensor.dtype))
                return (grads[0] * 2 * tensor.float()).to(tensor.dtype)

        x.grad = None
        y: Any = Watch.apply(layout(x * 1))
        y.sum().backward()
        assert x.grad is not None
        return seen, x.grad

    expected = strides_and_gradient()
    with offload_activations(tier, min_bytes=1000):
        found = strides_and_gradient()
    assert found[0] == expected[0]
    assert torch.equal(found[1], expected[1])


class Recorder(CpuTier):
    """Writes down what is asked for and when it is waited for."""

    def __init__(self) -> None:
        super().__init__()
        self.log: list[tuple[str, str]] = []

    def fetch(self, key: str, into: torch.Tensor) -> Ticket:
        self.log.append(("fetch", key))
        return super().fetch(key, into)

    def wait(self, ticket: Ticket) -> torch.Tensor:
        self.log.append(("wait", ticket.key))
        return super().wait(ticket)


def test_backward_reads_ahead_in_reverse_order() -> None:
    net = nn.Sequential(*(nn.Sequential(nn.Linear(64, 64), nn.Tanh()) for _ in range(4)))
    tier = Recorder()
    with offload_activations(tier, min_bytes=1000, prefetch=2):
        loss = net(torch.randn(16, 64)).sum()
    keys = list(tier.keys())[::-1]
    tier.log.clear()
    loss.backward()
    assert [key for what, key in tier.log if what == "fetch"] == keys, "each once, last saved first"
    for ahead, key in enumerate(keys):
        waited = tier.log.index(("wait", key))
        fetched = {other for what, other in tier.log[:waited] if what == "fetch"}
        assert set(keys[: ahead + 3]) <= fetched, "two more are on their way before one is waited for"


def test_forward_holds_few_that_are_on_their_way() -> None:
    tier, alive = CpuTier(), []
    with offload_activations(tier, min_bytes=1000, in_flight=2) as store:
        x = torch.randn(64, 64, requires_grad=True)
        for _ in range(6):
            x = torch.tanh(x * 2)
            alive.append(len(store._storing))
        loss = x.sum()
    assert max(alive) == 2
    assert not store._storing
    loss.backward()


def test_an_activation_changed_on_its_way_is_an_error() -> None:
    x = torch.randn(64, 64, requires_grad=True)
    with pytest.raises(OffloadError, match=r"shape \(64, 64\) was changed in place .* raise min_bytes"):
        with offload_activations(min_bytes=1000):
            y = torch.tanh(x)
            y.add_(1)


def test_graphs_that_are_dropped_give_their_room_back(tier: Tier) -> None:
    net = model(1)
    with offload_activations(tier, min_bytes=1000) as store:
        for _ in range(3):
            loss = net(torch.randn(2, 64, 32)).sum()
            del loss
            gc.collect()
        store.settle()
    assert not list(tier.keys())


def test_a_disk_that_loses_an_activation_stops_backward(tmp_path: Path) -> None:
    with NvmeTier(tmp_path, rank=5) as nvme:
        with offload_activations(nvme, min_bytes=1000, in_flight=1):
            loss = model()(torch.randn(2, 64, 32)).sum()
        nvme.file.path.write_bytes(b"")
        with pytest.raises(OffloadError, match=r"rank 5: .*truncated"):
            loss.backward()
        del loss
