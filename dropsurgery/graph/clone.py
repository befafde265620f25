"""A structural clone: new module objects, the same tensors."""

from __future__ import annotations

import copy
import functools
import types
from collections import OrderedDict
from typing import Any

import torch
from torch import nn

_ATOMS = frozenset({bool, int, float, str, type(None), torch.Tensor, nn.Parameter, torch.Size})


def clone_structure(model: nn.Module) -> nn.Module:
    """Return a module tree of the same classes that shares every parameter and buffer.

    Each module of the clone is a new object with its own `training` flag, its own registries of
    parameters, buffers, submodules and hooks; the tensors in them are the model's own. A module
    object that stands at several paths is one object in the clone too. References to modules that
    hide in lists, dicts, partials and bound methods point into the clone.
    """
    clones: dict[int, nn.Module] = {}
    originals = list(model.modules())
    for module in originals:
        if isinstance(module, torch.jit.ScriptModule):
            clones[id(module)] = module  # its state lives in C++ and cannot be cloned cheaply
        else:
            clones[id(module)] = object.__new__(type(module))
    for module in originals:
        clone = clones[id(module)]
        if clone is not module:
            clone.__dict__.update(
                {
                    name: value if type(value) in _ATOMS else _remap(value, clones)
                    for name, value in module.__dict__.items()
                }
            )
    return clones[id(model)]


def _remap(value: Any, clones: dict[int, nn.Module]) -> Any:
    """Copy containers, and replace references to cloned modules inside them."""
    kind = type(value)
    if kind in _ATOMS:
        return value
    if kind in (dict, OrderedDict) and not value:
        return kind()
    if isinstance(value, nn.Module):
        return clones.get(id(value), value)
    if isinstance(value, types.MethodType) and id(value.__self__) in clones:
        return types.MethodType(value.__func__, clones[id(value.__self__)])
    if kind in (list, tuple, set):
        if all(type(item) in _ATOMS for item in value):
            return value if kind is tuple else value.copy()
        return kind(_remap(item, clones) for item in value)
    if isinstance(value, dict):
        copied = value.copy() if kind in (dict, OrderedDict) else copy.copy(value)
        for key, item in value.items():
            copied[key] = _remap(item, clones)
        return copied
    if kind is functools.partial:
        return functools.partial(
            _remap(value.func, clones),
            *(_remap(arg, clones) for arg in value.args),
            **{key: _remap(arg, clones) for key, arg in value.keywords.items()},
        )
    return value
