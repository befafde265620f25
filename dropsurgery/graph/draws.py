"""Raw random draws: in a graph, and in the code of modules that stay whole in it."""

from __future__ import annotations

import ast
import dis
import inspect
import textwrap
import types
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F

from dropsurgery.graph.calls import DROPOUTS
from dropsurgery.graph.leaves import DROP_PATH_FUNCTIONS

# What draws whenever it is called.
_DRAWING: frozenset[Callable[..., Any]] = frozenset(
    {torch.bernoulli, torch.multinomial, torch.normal, torch.poisson, torch.rand, torch.rand_like,
     torch.randint, torch.randint_like, torch.randn, torch.randn_like, torch.randperm,
     F.gumbel_softmax, F.fractional_max_pool2d, F.fractional_max_pool3d}
)  # fmt: skip
# What draws where a flag or a rate says so.
_STEERED: frozenset[Callable[..., Any]] = frozenset(
    {F.rrelu, F.multi_head_attention_forward, F.scaled_dot_product_attention, *DROPOUTS}
)
_METHODS = frozenset(
    {"bernoulli", "bernoulli_", "cauchy_", "exponential_", "geometric_", "log_normal_",
     "multinomial", "normal_", "random_", "rsample", "uniform_"}
)  # fmt: skip
# Generators that no graph can hold: what they draw while a network is traced stays for good.
_PYTHON_HOMES = ("random", "numpy.random")


def drawing_call(node: fx.Node) -> str | None:
    """Return the name of the function or method with which a node draws random numbers, or None."""
    if node.op == "call_method" and node.target in _METHODS:
        return str(node.target)
    if node.op == "call_function" and node.target in _DRAWING:
        return str(getattr(node.target, "__name__", node.target))
    return None


def draws_with_a_flag(function: Callable[..., Any]) -> bool:
    """Say whether a function draws where its `training` flag, or its rate, tells it to."""
    return function in _STEERED or _qualified(function) in DROP_PATH_FUNCTIONS


def draws_in_code(module: nn.Module) -> tuple[str, ...]:
    """Return the names of the random functions that a module's forward and its hooks use.

    Followed are the module's own methods and the Python functions that they name, not other
    modules that it calls.
    """
    found = list(_draws_in_class(type(module)))  # type: ignore[arg-type]
    hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
    for hook in [*hooks, module.__dict__.get("forward")]:
        function = getattr(hook, "__func__", hook)
        if isinstance(function, types.FunctionType):
            found += _draws_in(function, type(module), set())
    return tuple(dict.fromkeys(found))


def python_draws(module: nn.Module) -> tuple[str, ...]:
    """Return those of `draws_in_code` that come from Python's or numpy's generator."""
    return tuple(name for name in draws_in_code(module) if name.startswith(_PYTHON_HOMES))


@lru_cache(maxsize=4096)
def _draws_in_class(cls: type[nn.Module]) -> tuple[str, ...]:
    forward = cls.forward
    if cls.__module__.startswith("torch.") or not isinstance(forward, types.FunctionType):
        return ()
    return tuple(dict.fromkeys(_draws_in(forward, cls, set())))


def _draws_in(
    function: types.FunctionType, cls: type[nn.Module], seen: set[types.CodeType]
) -> Iterator[str]:
    """Yield the random functions that a function names, and those that it calls."""
    if function.__code__ in seen or function.__module__.startswith("torch."):
        return
    seen.add(function.__code__)
    for value, attribute in _named_values(function, cls):
        if value is F.scaled_dot_product_attention and not _attends_with_dropout(function):
            continue
        if _is_random(value):
            yield _qualified(value)
        elif value is None and attribute in _METHODS:
            yield attribute
        elif isinstance(value, types.FunctionType):
            yield from _draws_in(value, cls, seen)


def _named_values(
    function: types.FunctionType, cls: type[nn.Module]
) -> Iterator[tuple[Any, str | None]]:
    """Yield what each name or dotted name in a function stands for, None where it is not known.

    `self.x` stands for what the class has under that name.
    """
    value: Any = None
    attribute: str | None = None
    cells = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
    for instruction in dis.get_instructions(function):
        name = str(instruction.argval)
        if instruction.opname in ("LOAD_ATTR", "LOAD_METHOD"):
            attribute = name
            value = None if value is None else getattr(value, name, None)
            continue
        yield value, attribute
        value = attribute = None
        if instruction.opname == "LOAD_GLOBAL":
            value = function.__globals__.get(name)
        elif instruction.opname == "LOAD_DEREF" and name in cells:
            value = _content(cells[name])
        elif instruction.opname.startswith("LOAD_FAST") and name == "self":
            value = cls
    yield value, attribute


def _attends_with_dropout(function: types.FunctionType) -> bool:
    """Say whether a function gives an attention a `dropout_p`; where its source is lost, it may."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError):
        return True
    position = 4  # of dropout_p
    return any(
        len(call.args) > position or any(word.arg in ("dropout_p", None) for word in call.keywords)
        for call in ast.walk(tree)
        if isinstance(call, ast.Call)
        and ast.unparse(call.func).endswith("scaled_dot_product_attention")
    )


def _content(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not assigned yet
        return None


def _is_random(value: Any) -> bool:
    try:
        known = value in _DRAWING or value in _STEERED
    except TypeError:  # not hashable, so no function
        return False
    home = getattr(getattr(value, "__self__", None), "__class__", type(None)).__module__
    name = _qualified(value)
    drawn = callable(value) and (home == "random" or home.startswith("numpy.random"))
    return known or drawn or name in DROP_PATH_FUNCTIONS


def _qualified(function: Any) -> str:
    home = (
        getattr(function, "__module__", None)
        or type(getattr(function, "__self__", None)).__module__
    )
    return f"{home}.{getattr(function, '__name__', '')}"
