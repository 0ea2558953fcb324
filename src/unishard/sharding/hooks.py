"""The only file that registers hooks: it turns module and autograd events into calls on units and schedules."""

from __future__ import annotations

import dataclasses
import sys
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import (
    _global_optimizer_post_hooks,
    _global_optimizer_pre_hooks,
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from torch.utils import _pytree as pytree

from unishard.errors import StateError
from unishard.sharding.group import ShardGroup
from unishard.sharding.parameter import is_dtensor
from unishard.sharding.precision import cast_floating
from unishard.sharding.schedule import Schedule, in_backward
from unishard.sharding.single import single_of
from unishard.sharding.unit import Phase, ShardUnit

StartSchedule = Callable[[ShardUnit], Schedule]
"""Builds the schedule when the outermost unit first runs, and stores it on every unit below."""


class UnitHooks:
    """All hooks of one unit. Everything runs outside compiled regions."""

    def __init__(self, unit: ShardUnit, start: StartSchedule) -> None:
        self.unit = unit
        self.start = start
        unit.hooks = self
        self._remaining: set[nn.Module] = set()
        self.handles: list[Any] = []
        for module in unit.modules:
            pre, post = ModuleHook(unit, self.pre_forward), ModuleHook(unit, self.post_forward)
            self.handles.append(module.register_forward_pre_hook(pre, prepend=True, with_kwargs=True))
            self.handles.append(module.register_forward_hook(post))
        for group in unit.groups:
            self.hook_gradients(group)

    # gradients ---------------------------------------------------------------------------------------------

    def hook_gradients(self, group: ShardGroup) -> None:
        """Listen to every trainable parameter; called again when users flip `requires_grad`."""
        for index, registration in enumerate(group.registrations):
            whole = registration.whole
            if whole.requires_grad and not _listening(whole):
                hook = GradientHook(self, group, index)
                self.handles.append(whole.register_post_accumulate_grad_hook(hook))

    def on_gradient(self, group: ShardGroup, index: int) -> None:
        """The hottest function of a step: once for each parameter."""
        unit = self.unit
        schedule = unit.schedule or self.start(unit)
        if not schedule.backward_active:
            schedule.begin_backward()
        grad = group.registrations[index].take_grad()
        if grad is None:
            return
        gradients = group.gradients
        gradients.collect(index, grad, unit.reduce_gradients)
        if len(gradients.arrived) >= len(group.trainable):
            self._on_complete(group)

    def _on_complete(self, group: ShardGroup) -> None:
        unit = self.unit
        if unit.reshard_after_backward and not unit.has_frozen:
            # Every use of every parameter has been differentiated: autograd accumulates a gradient only then. Before
            # the reduction, which waits for others with their gradients in memory.
            group.reshard()
            unit.phase = Phase.RESTING
        if unit.reduce_gradients:
            self.schedule.queue.ready(group)

    # forward -----------------------------------------------------------------------------------------------

    @property
    def schedule(self) -> Schedule:
        return self.unit.schedule or self.start(self.unit)

    def pre_forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        # What an exception or an early-stopped recomputation left in `_remaining` must not hide a new call.
        if in_backward():
            self._enter_recomputation()
        elif (module not in self._remaining or len(self.unit.modules) == 1) and self._begins():
            # Gathers write into memory that a functional transform (torch.func.jvp) would see as captured.
            with torch._C._DisableFuncTorch():
                self._enter()
            self._remaining = set(self.unit.modules)
        unit = self.unit
        if unit.policy.cast_forward_inputs and unit.policy.param_dtype is not None:
            args, kwargs = cast_floating((args, kwargs), unit.policy.param_dtype)
        if unit.has_frozen and torch.is_grad_enabled():
            self._watch_inputs((args, kwargs))
        return args, kwargs

    def _begins(self) -> bool:
        schedule = self.unit.schedule
        return schedule is None or schedule.root is not self.unit or schedule.enter_root()

    def _ends(self) -> bool:
        schedule = self.unit.schedule
        return schedule is None or schedule.root is not self.unit or in_backward() or schedule.leave_root()

    def _enter_recomputation(self) -> None:
        """Parameters stay until this unit's backward is over, and no order is recorded."""
        self.schedule.begin_backward()
        self.unit.phase = Phase.BACKWARD
        self.unit.unshard()
        self.unit.wait()
        self.rehook()

    def _enter(self) -> None:
        unit, schedule = self.unit, self.schedule
        schedule.enter_forward(unit)
        unit.phase = Phase.FORWARD
        unit.unshard()
        unit.wait()
        self.rehook()
        schedule.prefetch_forward(unit)

    def rehook(self) -> None:
        for group in self.unit.groups:
            for registration in group.registrations:
                whole = registration.whole
                if whole.requires_grad and not _listening_alone(whole) and not _listening_last(whole):
                    self.hook_gradients(group)

    def post_forward(self, module: nn.Module, args: Any, output: Any) -> Any:
        unit = self.unit
        if not self._ends():
            return cast_floating(output, unit.policy.output_dtype)
        self._remaining.discard(module)
        if not self._remaining and not in_backward():
            output = self._leave(output)
        elif torch.is_grad_enabled() and not in_backward():
            self._watch_outputs(output)
        return cast_floating(output, unit.policy.output_dtype)

    def _leave(self, output: Any) -> Any:
        unit, schedule = self.unit, self.schedule
        for other in schedule.unfinished(unit):
            # Some modules of a list did not run in this forward (a head that the loss calls piece by piece).
            output = other.hooks.leave_early(output)
        if torch.is_grad_enabled():
            self._watch_outputs(output)
        unit.phase = Phase.RESTING
        if unit.releases_after_forward:
            unit.reshard(after_forward=True)
        schedule.leave_forward(unit)
        return output

    def leave_early(self, output: Any) -> Any:
        """End this unit's forward although not all of its modules ran; `output` is the root's."""
        self._remaining.clear()
        output = self._leave(output)
        return cast_floating(output, self.unit.policy.output_dtype)

    @property
    def unfinished(self) -> bool:
        """Whether a forward through some of the unit's modules is under way."""
        return bool(self._remaining)

    def forget_forward(self) -> None:
        """No forward is under way."""
        self._remaining.clear()

    # backward ----------------------------------------------------------------------------------------------

    def _watch_outputs(self, output: Any) -> None:
        for leaf in _gradient_tensors(output):
            leaf.register_hook(self._pre_backward)

    def _pre_backward(self, grad: torch.Tensor) -> torch.Tensor:
        unit, schedule = self.unit, self.schedule
        schedule.begin_backward()
        if unit.phase is not Phase.BACKWARD:
            unit.phase = Phase.BACKWARD
            if unit.unshard_in_backward:
                unit.unshard()
                unit.wait()
            schedule.prefetch_backward(unit)
        return grad

    def _watch_inputs(self, inputs: Any) -> None:
        """Frozen parameters are needed until the gradients of the inputs are known; no gradient of theirs tells."""
        leaves = _gradient_tensors(inputs)
        if not leaves:
            return
        self.unit.open_calls += 1
        call = _OpenCall(self.unit, len(leaves))
        for leaf in leaves:
            leaf.register_hook(call.input_done)

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()
        self.handles.clear()


class _OpenCall:
    """One forward call whose backward is under way until every input has its gradient."""

    def __init__(self, unit: ShardUnit, inputs: int) -> None:
        self._unit = unit
        self._inputs = inputs

    def input_done(self, grad: torch.Tensor) -> torch.Tensor:
        self._inputs -= 1
        if self._inputs == 0:
            unit = self._unit
            unit.open_calls -= 1
            if unit.open_calls == 0 and unit.reshard_after_backward:
                unit.reshard()
                unit.phase = Phase.RESTING
        return grad


class ModuleHook:
    """A hook that a deep copy of its module does not inherit: the copy has no unit."""

    def __init__(self, unit: ShardUnit, call: Callable[..., Any]) -> None:
        self._unit = unit
        # Outside compiled regions. Touching torch._dynamo imports it, which costs more than all of unishard; a module
        # compiled before it is sharded has imported it already.
        self._call = torch._dynamo.disable(call) if "torch._dynamo" in sys.modules else call

    def __call__(self, *args: Any) -> Any:
        return self._call(*args)

    def __deepcopy__(self, memo: dict[int, Any]) -> Callable[..., None]:
        for group in self._unit.groups:
            if group.registrations[0].in_place and not group.shown_whole:
                raise StateError(
                    f"deepcopy of {self._unit.name!r}: parameter {group.registrations[0].fqn} is released between "
                    "steps and a copy of it would be empty; copy inside `with unishard.gather(module.parameters()):`"
                )
        return _nothing


def is_inert(hook: Any) -> bool:
    """Whether `hook` is what a deep copy holds in the place of one of ours."""
    return getattr(hook, "hook", hook) is _nothing


class StrayCallHooks:
    """A module below the root whose parameters the root holds, called by itself: `generate()` of a wrapped model.

    They are gathered for the call; without gradients they are released after it, otherwise after backward.
    """

    def __init__(self, unit: ShardUnit, module: nn.Module) -> None:
        self._unit = unit
        self._opened = False
        unit.hooks.handles += [
            module.register_forward_pre_hook(ModuleHook(unit, self._before), prepend=True),
            module.register_forward_hook(ModuleHook(unit, self._after)),
        ]

    def _before(self, *args: Any) -> None:
        unit = self._unit
        if all(group.shown_whole for group in unit.groups):
            return
        self._opened = True
        unit.unshard()
        unit.wait()
        unit.hooks.rehook()

    def _after(self, *args: Any) -> None:
        if self._opened:
            self._opened = False
            if not torch.is_grad_enabled():
                self._unit.reshard()


class _SingleHooks:
    """A module whose own parameters `init_sharded` released: they are whole while it runs, however it ends."""

    def __init__(self, module: nn.Module, params: list[nn.Parameter]) -> None:
        self._params = params
        self._open: list[ExitStack] = []
        self.handles = [
            module.register_forward_pre_hook(self._before, prepend=True),
            module.register_forward_hook(self._after, always_call=True),
        ]

    def _before(self, *args: Any) -> None:
        from unishard.sharding.gather import gather

        found = [(param, single_of(param)) for param in self._params]
        self._open.append(ExitStack())
        self._open[-1].enter_context(
            gather([p for p, single in found if single is not None and not single.open])
        )

    def _after(self, *args: Any) -> None:
        if self._open:
            self._open.pop().close()


@contextmanager
def gathering_singles(model: nn.Module) -> Iterator[None]:
    """Let a model that `init_sharded` released, and that nothing has sharded yet, run forward without gradients.

    Each module's own parameters are gathered for its call. All ranks run the same modules.
    """
    own = {
        module: [p for p in module.parameters(recurse=False) if single_of(p)] for module in model.modules()
    }
    hooks = [_SingleHooks(module, params) for module, params in own.items() if params]
    try:
        yield
    finally:
        for handle in (handle for hook in hooks for handle in hook.handles):
            handle.remove()


class StateDictHooks:
    """A state dict shows sharded parameters, and loading one may replace them."""

    def __init__(self, unit: ShardUnit, module: nn.Module) -> None:
        self._unit = unit
        show = ModuleHook(unit, self._show_sharded)
        module.register_state_dict_pre_hook(show)
        module.register_load_state_dict_pre_hook(show)
        module.register_load_state_dict_post_hook(ModuleHook(unit, self._loaded))

    def _show_sharded(self, *args: Any) -> None:
        for group in self._unit.groups:
            group.show_sharded()

    def _loaded(self, *args: Any) -> None:
        from unishard.sharding.dtensor import resync

        for group in self._unit.groups:
            resync(group)


def _note_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    for group in optimizer.param_groups:
        sharded = [p for p in group["params"] if is_dtensor(p)]
        if sharded:
            torch.autograd.graph.increment_version(sharded)


_watching = False


def watch_optimizers() -> None:
    """Let every optimizer step count as a write to the DTensors it holds; fused kernels do not count by themselves."""
    global _watching
    if not _watching:
        _watching = True
        register_optimizer_step_post_hook(_note_step)


def _begin_resting_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    from unishard.sharding.resting_state import begin_step

    begin_step(optimizer)


def _end_resting_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    from unishard.sharding.resting_state import end_step

    end_step(optimizer)


_watching_resting = False


def watch_resting_optimizers() -> None:
    """Let the state that optimizers keep of resting parameters rest too."""
    global _watching_resting
    if not _watching_resting:
        _watching_resting = True
        register_optimizer_step_pre_hook(_begin_resting_step)
        register_optimizer_step_post_hook(_end_resting_step)


def has_step_hooks(optimizer: torch.optim.Optimizer) -> bool:
    """Whether users hooked `optimizer.step()`, or all optimizers' steps: they expect gradients on parameters there."""
    own = (
        optimizer._optimizer_step_pre_hooks,
        optimizer._optimizer_step_post_hooks,
    )
    everywhere = (_global_optimizer_pre_hooks, _global_optimizer_post_hooks)
    ours = (_note_step, _begin_resting_step, _end_resting_step)
    others = [hook for hooks in everywhere for hook in hooks.values() if hook not in ours]
    return any(own) or bool(others)


class GradientHook:
    """Takes a parameter's fresh gradient the moment autograd has it.

    References are weak: torch's garbage collection does not look into these hooks, and a parameter whose hook holds it
    would stay in memory for ever. The module's own hooks keep both alive as long as the model is.
    """

    def __init__(self, hooks: UnitHooks, group: ShardGroup, index: int) -> None:
        self._hooks = weakref.ref(hooks)
        self._group = weakref.ref(group)
        self._index = index

    def __call__(self, param: torch.Tensor) -> None:
        hooks, group = self._hooks(), self._group()
        if hooks is not None and group is not None:
            hooks.on_gradient(group, self._index)

    def __deepcopy__(self, memo: dict[int, Any]) -> Callable[[torch.Tensor], None]:
        return _nothing


def _nothing(*args: Any) -> None:
    return None


def _post_accumulate_hooks(param: torch.Tensor) -> OrderedDict[int, Any]:
    return getattr(param, "_post_accumulate_grad_hooks", None) or OrderedDict()


def _listening(param: torch.Tensor) -> bool:
    return any(isinstance(hook, GradientHook) for hook in _post_accumulate_hooks(param).values())


def _listening_alone(param: torch.Tensor) -> bool:
    hooks = getattr(param, "_post_accumulate_grad_hooks", None)
    return hooks is not None and len(hooks) == 1 and type(next(iter(hooks.values()))) is GradientHook


def _listening_last(param: torch.Tensor) -> bool:
    """Whether we listen, and after all hooks of the user's, who expect to find the gradient in place."""
    hooks = _post_accumulate_hooks(param)
    if not hooks:
        return False
    last = next(reversed(hooks))
    if isinstance(hooks[last], GradientHook):
        return True
    for key, hook in list(hooks.items()):
        if isinstance(hook, GradientHook):
            # Autograd walks the plain dict underneath, which `move_to_end` leaves alone.
            hooks[key] = hooks.pop(key)
            return True
    return False


def _gradient_tensors(tree: Any) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []
    for leaf in pytree.tree_leaves(tree):
        if isinstance(leaf, torch.Tensor):
            found += [leaf] if leaf.requires_grad else []
        elif dataclasses.is_dataclass(leaf) and not isinstance(leaf, type):
            found += _gradient_tensors([getattr(leaf, f.name) for f in dataclasses.fields(leaf)])
    return found
