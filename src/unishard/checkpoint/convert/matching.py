"""Names for optimizer state that is stored by position."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from unishard.errors import CheckpointError

Shape = tuple[int, ...]


def members_of(
    groups: Sequence[Mapping[str, Any]],
    shapes: Mapping[int, Shape],
    parameters: Mapping[str, Shape],
    where: str,
    given: Sequence[Sequence[str]] | None = None,
    frozen: Collection[str] = (),
) -> list[list[str]]:
    """The parameter names of each group of `optimizer.state_dict()["param_groups"]`, in the order of its `params`.

    Names are taken from the groups where they hold them (`param_names`, or `params` that are names), else from `given`,
    else found by shape: of each shape, the optimizer's parameters must be as many as the model's, in one group.

    Args:
        shapes: of the state, by position; parameters that were never stepped have none.
        parameters: of the model, in its order, tied ones once.
        frozen: those of `given` that the state may leave out.

    Raises `CheckpointError` where shapes do not decide.

    >>> members_of([{"params": [0]}, {"params": [1]}], {0: (3, 2), 1: (3,)}, {"w": (3, 2), "b": (3,)}, "file")
    [['w'], ['b']]
    """
    if all(isinstance(p, str) for group in groups for p in group["params"]):
        return [list(group["params"]) for group in groups]
    if all(group.get("param_names") for group in groups):
        return [list(group["param_names"]) for group in groups]
    if given is not None:
        if [len(group["params"]) for group in groups] != [len(named) for named in given]:
            given = [[name for name in named if name not in frozen] for named in given]
        return _checked(groups, shapes, parameters, where, given)
    order = [position for group in groups for position in group["params"]]
    if len(groups) == 1 and len(order) == len(parameters):
        return _checked(groups, shapes, parameters, where, [list(parameters)])
    owner = {position: index for index, group in enumerate(groups) for position in group["params"]}
    names: dict[int, str] = {}
    for shape in set(shapes.values()):
        positions = [position for position in order if shapes.get(position) == shape]
        fitting = [name for name, other in parameters.items() if other == shape]
        if len(positions) != len(fitting) or len({owner[p] for p in positions}) > 1:
            raise CheckpointError(
                f"{where}: the optimizer state is stored by position, and shapes do not say which of "
                f"{', '.join(fitting)} the {len(positions)} parameters of shape {shape} are. Load it through the "
                "engine that will train on, or name them: --groups FILE, a JSON list of each group's parameter names"
            )
        names |= dict(zip(positions, fitting, strict=True))
    if set(order) - set(names):
        raise CheckpointError(
            f"{where}: {len(set(order) - set(names))} parameters of the optimizer have no state to be known by; name "
            "them: --groups FILE, a JSON list of the parameter names of each group"
        )
    return [[names[position] for position in group["params"]] for group in groups]


def _checked(
    groups: Sequence[Mapping[str, Any]],
    shapes: Mapping[int, Shape],
    parameters: Mapping[str, Shape],
    where: str,
    given: Sequence[Sequence[str]],
) -> list[list[str]]:
    counts = [len(group["params"]) for group in groups]
    if counts != [len(names) for names in given]:
        raise CheckpointError(
            f"{where}: the optimizer's groups have {counts} parameters, those named have {[len(n) for n in given]}"
        )
    for group, names in zip(groups, given, strict=True):
        for position, name in zip(group["params"], names, strict=True):
            found = shapes.get(position)
            if name not in parameters or (found is not None and found != parameters[name]):
                raise CheckpointError(
                    f"{where}: state {position} of the optimizer has the shape {found} and cannot be that of {name}, "
                    f"{parameters.get(name, 'which the model does not have')}"
                )
    return [list(names) for names in given]
