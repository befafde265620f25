"""Which modules stay whole in a traced graph, and which functions."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from dropsurgery.errors import ArgumentError, ArgumentTypeError

# Layers of other libraries that read their own `training` flag, by qualified name, so that nothing
# needs to be imported to recognise them.
DROP_PATHS = frozenset(
    {
        "timm.layers.drop.DropPath",
        "torchvision.ops.stochastic_depth.StochasticDepth",
        "dropsurgery.layers.drop_path.DropPath",
    }
)
FROZEN_BATCHNORMS = frozenset({"torchvision.ops.misc.FrozenBatchNorm2d"})
DROP_BLOCKS = frozenset(
    {
        "timm.layers.drop.DropBlock2d",
        "torchvision.ops.drop_block.DropBlock2d",
        "torchvision.ops.drop_block.DropBlock3d",
        "dropsurgery.layers.drop_block.DropBlock2d",
        "dropsurgery.layers.drop_block.DropBlock3d",
    }
)
# dropsurgery's own layers that return their (first) input in eval; `ClassicDropout` does not.
OWN_DROPS = frozenset(
    f"dropsurgery.layers.{name}"
    for name in (
        "cutout.Cutout",
        "drop_connect.DropConnect",
        "dropout.GaussianDropout",
        "seeded_dropout.Dropout",
        "seeded_dropout.Dropout1d",
        "seeded_dropout.Dropout2d",
        "seeded_dropout.Dropout3d",
        "uniform_dropout.UniformDropout",
        "weighted_channel_dropout.WeightedChannelDropout",
    )
)
PATCH_DROPOUTS = frozenset(
    {
        "timm.layers.patch_dropout.PatchDropout",
        "timm.layers.patch_dropout.PatchDropoutWithIndices",
    }
)


@lru_cache(maxsize=1024)
def qualified_names(cls: type) -> frozenset[str]:
    """Return the qualified names of a class and of its bases."""
    return frozenset(f"{base.__module__}.{base.__qualname__}" for base in cls.__mro__)


def is_one_of(module: nn.Module, names: frozenset[str]) -> bool:
    """Say whether a module's class, or a base of it, has one of these qualified names."""
    return not names.isdisjoint(qualified_names(type(module)))  # type: ignore[arg-type]


def forward_owner(module: nn.Module) -> str:
    """Return the qualified name of the class that defines the forward which `module` runs.

    A subclass that adds nothing to a known layer is that layer; one with a forward of its own, or
    an object whose forward was replaced, is not.
    """
    if "forward" in module.__dict__:
        return "an object with a forward of its own"
    owner = next(cls for cls in type(module).__mro__ if "forward" in cls.__dict__)
    return f"{owner.__module__}.{owner.__qualname__}"


def has_hooks(module: nn.Module) -> bool:
    """Say whether something runs around the module's forward, which taking it out would lose."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


class Leaves:
    """The rule by which a module stays whole.

    Whole are: everything in torch.nn except `Sequential`; every BatchNorm, whatever it adds; drop
    layers, which must follow `train()` and `eval()` by themselves; modules with forward hooks;
    dropsurgery's own layers; the modules that timm registers as not traceable; and what the caller
    names.

    Args:
        extra: module classes, module objects or dotted paths.
        model: the model that objects and paths belong to.
        sized: the inputs' sizes are known, so that the modules of timm's that branch on sizes may
            be traced through. Those that cannot stay whole all the same.
    """

    def __init__(self, extra: Iterable[Any], model: nn.Module, *, sized: bool = False) -> None:
        self.reluctant: tuple[type, ...] = (*_timm_notrace_modules(),) if sized else ()
        self.classes: tuple[type, ...] = () if sized else (*_timm_notrace_modules(),)
        # Paths of the modules that the caller named, by class, object or path.
        self.paths: set[str] = set()
        paths = {id(module): path for path, module in model.named_modules()}
        known = set(dict(model.named_modules(remove_duplicate=False)))
        if isinstance(extra, str | type | nn.Module):
            extra = (extra,)
        if not isinstance(extra, Iterable):
            raise ArgumentTypeError(f"leaf_modules is a sequence of modules, got {extra!r}")
        for item in extra:
            if isinstance(item, type) and issubclass(item, nn.Module):
                self.paths |= {p for p, m in model.named_modules() if isinstance(m, item) and p}
            elif isinstance(item, nn.Module) and id(item) in paths:
                self.paths.add(paths[id(item)])
            elif isinstance(item, str):
                if item not in known:
                    raise ArgumentError(
                        f"leaf_modules names '{item}', and the model has no such module",
                        fix="a path from model.named_modules()",
                    )
                self.paths.add(item)
            else:
                raise ArgumentTypeError(
                    f"leaf_modules takes classes, paths and modules of the model, got {item!r}"
                )

    def is_reluctant(self, module: nn.Module) -> bool:
        """Say whether a module is traced through if that can be, and else kept whole."""
        return isinstance(module, self.reluctant)

    def __call__(self, module: nn.Module, path: str) -> bool:
        """Say whether `module`, at `path`, stays whole."""
        if path in self.paths or isinstance(module, (*self.classes, _NormBase)):
            return True
        if path and has_hooks(module):
            # A graph has no call of a module that is traced through, so its hooks would not run.
            return True
        if self.is_reluctant(module) and not any(True for _ in module.children()):
            return True  # nothing hides in it
        home = type(module).__module__
        if home.startswith(("torch.nn.", "torch.ao.nn.", "dropsurgery.layers.")):
            return not isinstance(module, nn.Sequential)
        return isinstance(module, torch.jit.ScriptModule) or is_one_of(
            module, DROP_PATHS | DROP_BLOCKS | PATCH_DROPOUTS | FROZEN_BATCHNORMS
        )


# timm keeps these whole because fx's dead-code elimination would drop their in-place ops. Graphs
# here never go through it, and a block that stays whole hides its residual add.
_TRACED_ALL_THE_SAME = frozenset({"timm.models.nfnet.NormFreeBlock"})


def _timm_notrace_modules() -> Iterable[type]:
    timm_layers = sys.modules.get("timm.layers")
    found = timm_layers.get_notrace_modules() if timm_layers is not None else ()
    return [cls for cls in found if _TRACED_ALL_THE_SAME.isdisjoint(qualified_names(cls))]


def is_timm_whole(module: nn.Module) -> bool:
    """Say whether a module is one that timm registers as not traceable."""
    return isinstance(module, tuple(_timm_notrace_modules()))


# Stochastic depth as functions of (input, p, …, training), and where projects find them.
DROP_PATH_FUNCTIONS = frozenset(
    {"timm.layers.drop.drop_path", "torchvision.ops.stochastic_depth.stochastic_depth"}
)
_HOMES = ("timm.layers", "timm.layers.drop", "torchvision.ops", "torchvision.ops.stochastic_depth")


def whole_functions() -> tuple[Callable[..., Any], ...]:
    """Return the Python functions that must not be traced through.

    These are timm's registered ones, and stochastic depth.
    """
    timm_layers = sys.modules.get("timm.layers")
    functions = list(timm_layers.get_notrace_functions()) if timm_layers is not None else []
    for name in DROP_PATH_FUNCTIONS:
        home, _, attribute = name.rpartition(".")
        if home in sys.modules:
            functions.append(getattr(sys.modules[home], attribute))
    return tuple(function for function in functions if callable(function))


def function_homes() -> list[types.ModuleType]:
    """Return the Python modules as whose attributes such functions are called."""
    return [sys.modules[name] for name in _HOMES if name in sys.modules]
