"""`self.training` while it is traced, and code that asks for it."""

from __future__ import annotations

import dis
import types
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from dropsurgery.graph.tracer import ModeTracer


class ModeFlag:
    """Stands for one module's `training` while it is traced."""

    __slots__ = ("module", "tracer")

    def __init__(self, module: nn.Module, tracer: ModeTracer) -> None:
        self.module = module
        self.tracer = tracer

    def __bool__(self) -> bool:
        return self.tracer.branch(self)

    __index__ = __int__ = __bool__

    def __float__(self) -> float:
        return float(bool(self))

    def __eq__(self, other: object) -> bool:
        return bool(self) == other

    def __hash__(self) -> int:
        return hash(bool(self))

    def __mul__(self, other: Any) -> Any:
        return bool(self) * other

    __rmul__ = __mul__

    def __and__(self, other: Any) -> Any:
        return bool(self) & other

    __rand__ = __and__

    def __or__(self, other: Any) -> Any:
        return bool(self) | other

    __ror__ = __or__


@lru_cache(maxsize=1024)
def _codes(cls: type) -> tuple[types.CodeType, ...]:
    """Return the code of every method that a module class adds to `nn.Module`."""
    return tuple(
        value.__code__
        for base in cls.__mro__
        if not base.__module__.startswith("torch.nn.")
        for value in vars(base).values()
        if isinstance(value, types.FunctionType)
    )


def reads_training(cls: type) -> bool:
    """Say whether a method of a module class reads an attribute named `training`."""
    return any("training" in code.co_names for code in _codes(cls))


@lru_cache(maxsize=1024)
def _asks_by_identity(cls: type) -> bool:
    """Say whether a method compares `training` with `is`, which nothing can stand in for."""
    for code in _codes(cls):
        if "training" in code.co_names:
            found = [(i.opname, i.argval) for i in dis.get_instructions(code)]
            for index, (name, value) in enumerate(found):
                near = [opname for opname, _ in found[index + 1 : index + 3]]
                if name == "LOAD_ATTR" and value == "training" and "IS_OP" in near:
                    return True
    return False


def asks_by_identity(model: nn.Module) -> bool:
    """Say whether a module of the model asks `self.training is True`."""
    classes: set[type] = {type(module) for module in model.modules()}
    return any(_asks_by_identity(cls) for cls in classes)
