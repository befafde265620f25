"""Function calls that a training flag steers, and the layers that do the same by themselves."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from dropsurgery.graph.leaves import DROP_PATH_FUNCTIONS
from dropsurgery.layers.drop_path import DropPath
from dropsurgery.layers.functions import FollowTraining

# Functional dropouts and the module that does the same. torch.* are builtins without a signature.
DROPOUTS: dict[Callable[..., Any], type[nn.Module]] = {
    F.dropout: nn.Dropout,
    F.dropout1d: nn.Dropout1d,
    F.dropout2d: nn.Dropout2d,
    F.dropout3d: nn.Dropout3d,
    F.alpha_dropout: nn.AlphaDropout,
    F.feature_alpha_dropout: nn.FeatureAlphaDropout,
    torch.dropout: nn.Dropout,
    torch.alpha_dropout: nn.AlphaDropout,
    torch.feature_dropout: nn.Dropout2d,
    torch.feature_alpha_dropout: nn.FeatureAlphaDropout,
}
_BUILTIN_ARGUMENTS = ("input", "p", "train")


def bind(
    target: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, Any] | None:
    """Return a call's arguments by name, in order; None where the names cannot be known."""
    try:
        return dict(inspect.signature(target).bind(*args, **kwargs).arguments)
    except (ValueError, TypeError):
        if target not in DROPOUTS:
            return None
        return {**dict(zip(_BUILTIN_ARGUMENTS, args, strict=False)), **kwargs}


def follow(
    target: Callable[..., Any], flag: str, arguments: dict[str, Any]
) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    """Return the layer that follows the mode for `target(**arguments, flag=training)`.

    Returns:
        The layer and the positional and keyword arguments to call it with.
    """
    p = arguments.get("p", 0.5)
    if target in DROPOUTS and isinstance(p, int | float):
        layer_class = DROPOUTS[target]
        return (
            layer_class(float(p), bool(arguments.get("inplace", False))),
            (arguments["input"],),
            {},
        )
    name = f"{getattr(target, '__module__', '')}.{getattr(target, '__name__', '')}"
    rate = arguments.get("drop_prob", arguments.get("p", 0.0))
    scaled = arguments.get("scale_by_keep", True) is True
    if name in DROP_PATH_FUNCTIONS and isinstance(rate, int | float) and scaled:
        mode = arguments.get("mode", "row")
        return DropPath(float(rate), mode), (next(iter(arguments.values())),), {}
    first, *rest = arguments
    return (
        FollowTraining(target, flag),
        (arguments[first],),
        {key: arguments[key] for key in rest},
    )
