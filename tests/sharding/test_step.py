"""The life of a step, in every shape that breaks naive sharding: weights must equal one process's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from tests.sharding.step_harness import check_parity
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class Block(nn.Module):
    def __init__(self, width: int = 6, hidden: int = 11) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(self.norm(x))))


class Stack(nn.Module):
    """Blocks between two layers; `mode` says how blocks are called."""

    def __init__(self, mode: str = "plain", depth: int = 3) -> None:
        super().__init__()
        self.mode = mode
        self.first = nn.Linear(6, 6)
        self.blocks = nn.ModuleList(Block() for _ in range(depth))
        self.last = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        blocks = list(self.blocks)
        if self.mode == "changing order" and len(x) % 2:
            blocks.reverse()
        for block in blocks:
            if self.mode == "checkpoint":
                x = checkpoint(block, x, use_reentrant=False)
            elif self.mode == "reentrant":
                x = checkpoint(block, x, use_reentrant=True)
            else:
                x = block(x)
        return self.last(x)


UNITS = ["blocks.0", "blocks.1", "blocks.2"]


def squared(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).pow(2).mean()


def plain() -> nn.Module:
    return Stack()


def case_plain() -> None:
    check_parity(plain, squared, UNITS)


def case_nested_units() -> None:
    check_parity(plain, squared, ["blocks.0.up", *UNITS, "first"])


def case_everything_in_the_root() -> None:
    check_parity(plain, squared, [])


def case_checkpoint() -> None:
    check_parity(lambda: Stack("checkpoint"), squared, UNITS)


def case_checkpoint_reentrant() -> None:
    check_parity(lambda: Stack("reentrant"), squared, UNITS)


def case_changing_order() -> None:
    check_parity(lambda: Stack("changing order"), squared, UNITS, steps=4)


def case_several_forwards_one_backward() -> None:
    check_parity(plain, lambda m, x: squared(m, x) + squared(m, -x), UNITS)


def case_two_graphs_two_backwards() -> None:
    def micro(model: nn.Module, x: Tensor) -> None:
        first, second = squared(model, x), squared(model, x * 2)
        first.backward()
        second.backward()

    check_parity(plain, micro, UNITS)


def case_retained_graph() -> None:
    def micro(model: nn.Module, x: Tensor) -> None:
        loss = squared(model, x)
        loss.backward(retain_graph=True)
        loss.backward()

    check_parity(plain, micro, UNITS)


def lora() -> nn.Module:
    model = Stack()
    for block in model.blocks:
        for param in block.parameters():
            param.requires_grad_(False)
        block.down.weight.requires_grad_(True)
    return model


def case_partly_frozen() -> None:
    check_parity(lora, squared, UNITS)


def case_partly_frozen_checkpointed() -> None:
    def build() -> nn.Module:
        model = lora()
        model.mode = "checkpoint"  # pyright: ignore[reportAttributeAccessIssue]
        return model

    check_parity(build, squared, UNITS)


def case_frozen_block_called_twice_in_parallel() -> None:
    def build() -> nn.Module:
        model = Stack()
        model.blocks[1].requires_grad_(False)
        return model

    def micro(model: nn.Module, x: Tensor) -> Tensor:
        hidden = model.first(x)  # pyright: ignore[reportCallIssue]
        block = model.blocks[1]  # pyright: ignore[reportIndexIssue]
        return (model.last(block(hidden) * block(-hidden))).pow(2).mean()  # pyright: ignore[reportCallIssue]

    # `first` and `last` are called without the root's forward, so they need units of their own.
    check_parity(build, micro, [*UNITS, "first", "last"])


def case_requires_grad_flips() -> None:
    def micro(model: Any, x: Tensor) -> Tensor:
        frozen = len(x) % 2 == 1
        for name, param in model.named_parameters():
            if "blocks.1" in name:
                param.requires_grad_(not frozen)
        return squared(model, x)

    check_parity(plain, micro, UNITS, steps=4)


def case_eval_between_steps() -> None:
    def micro(model: nn.Module, x: Tensor) -> Tensor:
        model.eval()
        with torch.no_grad():
            model(x * 3)
        with torch.inference_mode():
            model(x * 3)
        model.train()
        return squared(model, x)

    check_parity(plain, micro, UNITS)


def case_recovers_from_exceptions() -> None:
    def micro(model: nn.Module, x: Tensor) -> Tensor:
        with pytest.raises(RuntimeError):
            model(x[:, :3])

        class Stop(RuntimeError):
            pass

        def stop(grad: Tensor) -> Tensor:
            raise Stop

        hidden = model(x)
        hidden.register_hook(stop)
        with pytest.raises(Stop):
            hidden.sum().backward()
        return squared(model, x)

    check_parity(plain, micro, UNITS)


@dataclass
class Output:
    hidden: Tensor
    extra: str


class ReturnsDataclass(Block):
    def forward(self, x: Tensor) -> Any:
        return Output(super().forward(x), "not a tensor")


def case_outputs_in_a_dataclass() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(6, 6)
            self.block = ReturnsDataclass()

        def forward(self, x: Tensor) -> Tensor:
            return self.block(self.first(x)).hidden

    check_parity(Model, squared, ["block"])


def case_keyword_inputs_and_nested_outputs() -> None:
    class Inner(Block):
        def forward(self, *, batch: dict[str, Tensor], flag: bool) -> Any:
            return {"out": [super().forward(batch["x"]) * (2 if flag else 1), None, 3]}

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(6, 6)
            self.block = Inner()

        def forward(self, x: Tensor) -> Tensor:
            return self.block(batch={"x": self.first(x)}, flag=True)["out"][0]

    check_parity(Model, squared, ["block"])


class Conditional(nn.Module):
    """Which branch runs depends on the data: ranks disagree. The unit that holds both runs on all."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.a = nn.Linear(6, 6)
        self.b = nn.Linear(6, 6)
        self.never = nn.Parameter(torch.ones(5))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.a(x) if float(x.detach()[0, 0]) > 0 else self.b(x)


def case_unused_on_some_ranks() -> None:
    check_parity(Conditional, squared, [], steps=5)


class TwoExperts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Conditional() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x


def case_unused_on_some_ranks_in_blocks() -> None:
    check_parity(TwoExperts, squared, ["layers.0", "layers.1", "layers.2"], steps=5)


def case_tensor_hooks_scale_gradients() -> None:
    def micro(model: Any, x: Tensor) -> Tensor:
        block = model.blocks[1]
        if not hasattr(block, "hooked"):
            block.hooked = block.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
        return squared(model, x)

    check_parity(plain, micro, UNITS)


def case_ordinary_dtype_mix() -> None:
    class Mixed(Stack):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(6, dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            return super().forward((x * self.scale).float())

    check_parity(Mixed, squared, UNITS)


def case_tied_inside_the_root() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Linear(6, 7, bias=False)
            self.block = Block(7)
            self.head = nn.Linear(6, 7, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.block(self.embed(x)) @ self.head.weight

    check_parity(Tied, squared, ["block"])


CASES = {
    name.removeprefix("case_"): case for name, case in list(globals().items()) if name.startswith("case_")
}


@pytest.mark.parametrize("name", CASES)
def test_step_equals_one_process(name: str, ranks: Callable[..., Any]) -> None:
    ranks(CASES[name], world_size=2)


@pytest.mark.parametrize("name", ["plain", "unused_on_some_ranks_in_blocks", "tied_inside_the_root"])
@pytest.mark.parametrize("world_size", [1, 3])
def test_other_world_sizes(name: str, world_size: int, ranks: Callable[..., Any]) -> None:
    ranks(CASES[name], world_size=world_size)
