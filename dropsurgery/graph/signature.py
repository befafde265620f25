"""What goes in and out of a network, as named tensors."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Iterator, Mapping
from inspect import Parameter
from typing import Any

import torch
from torch import fx, nn

from dropsurgery.errors import ArgumentTypeError


def signature(model: nn.Module) -> inspect.Signature:
    """Return the signature of `forward`; that of a graph module is told by its placeholders."""
    if not isinstance(model, fx.GraphModule):
        return inspect.signature(model.forward)
    parameters = []
    for node in model.graph.nodes:
        if node.op != "placeholder":
            continue
        name = str(node.target)
        kind = {0: Parameter.POSITIONAL_OR_KEYWORD, 1: Parameter.VAR_POSITIONAL}.get(
            len(name) - len(name.lstrip("*")), Parameter.VAR_KEYWORD
        )
        default = node.args[0] if node.args else Parameter.empty
        parameters.append(Parameter(name.lstrip("*"), kind, default=default))
    return inspect.Signature(parameters)


def named_inputs(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None = None
) -> dict[str, torch.Tensor]:
    """Return every tensor among the arguments of a call, named after the argument that holds it.

    A tensor argument `x` is "x"; tensors in a list argument `xs` are "xs_0", "xs_1"; extra
    positional arguments of `*rest` are "rest_0" and so on. None and Python numbers are no inputs.

    Raises:
        ArgumentTypeError: the arguments do not fit the signature of `forward`.
    """
    try:
        bound = signature(model).bind(*args, **(kwargs or {})).arguments
    except TypeError as error:
        raise ArgumentTypeError(
            f"the inputs do not fit {type(model).__name__}.forward: {error}",
            fix=f"{argument_list(model)}, as one tuple",
        ) from error
    found: dict[str, torch.Tensor] = {}
    for name, value in bound.items():
        for path, tensor in _walk(value, (name,)):
            if isinstance(tensor, torch.Tensor):
                found[_unique("_".join(path), found)] = tensor
    return found


def argument_list(model: nn.Module) -> str:
    """Return the arguments of `forward` as text, for messages."""
    parameters = signature(model).parameters.values()
    return f"forward takes ({', '.join(str(p).split(':')[0] for p in parameters)})"


def named_outputs(value: Any) -> dict[str, torch.Tensor]:
    """Flatten what a network returned into named tensors, in order.

    One tensor is "output"; the items of a tuple or list are "output_0", "output_1"; entries of a
    dict, a named tuple or a dataclass carry their own names; nested ones are joined by "_". None is
    left out. Python numbers become tensors.

    Raises:
        ArgumentTypeError: an output is something else than tensors, numbers and containers of them.
    """
    found: dict[str, torch.Tensor] = {}
    for path, item in _walk(value, ()):
        name = "_".join(path)
        if isinstance(item, bool | int | float | complex):
            item = torch.tensor(item)
        if not isinstance(item, torch.Tensor):
            raise ArgumentTypeError(
                f"an output of the network is a {type(item).__name__}, which is no tensor",
                where=f"output {name!r}" if name else None,
                fix="outputs are tensors, numbers, and tuples, lists, dicts or dataclasses of them",
            )
        if not name or name[0].isdigit():
            name = f"output_{name}".rstrip("_")
        found[_unique(name, found)] = item
    return found


def _walk(value: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yield (path, leaf) for every leaf but None, containers in their own order."""
    if value is None:
        return
    items: list[tuple[str, Any]]
    if isinstance(value, Mapping):
        items = [(_clean(str(key)), item) for key, item in value.items()]
    elif isinstance(value, tuple) and hasattr(value, "_fields"):
        items = list(zip(value._fields, value, strict=True))
    elif isinstance(value, list | tuple):
        items = [(str(index), item) for index, item in enumerate(value)]
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        items = [(field.name, getattr(value, field.name)) for field in dataclasses.fields(value)]
    else:
        yield path, value
        return
    for name, item in items:
        yield from _walk(item, (*path, name))


def _clean(name: str) -> str:
    return re.sub(r"\W", "_", name) or "_"


def _unique(name: str, taken: Mapping[str, object]) -> str:
    count, unique = 1, name
    while unique in taken:
        unique, count = f"{name}_{count}", count + 1
    return unique


def shapes(tensors: Mapping[str, torch.Tensor]) -> str:
    """Return "x float32 (1, 3, 224, 224), mask bool (1, 8)", for messages."""
    return ", ".join(
        f"{name} {str(t.dtype).removeprefix('torch.')} {tuple(t.shape)}"
        for name, t in tensors.items()
    )


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its class where it has none."""
    text = str(error).strip()
    return text.splitlines()[0].strip() if text else type(error).__name__
