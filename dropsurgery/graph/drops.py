"""Which layers drop something in training and are the identity in eval, and at what rate."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.modules.dropout import _DropoutNd

from dropsurgery.graph.leaves import DROP_BLOCKS, DROP_PATHS, PATCH_DROPOUTS, forward_owner
from dropsurgery.layers.dropout import GaussianDropout

# Names under which projects keep a copy of stochastic depth, and those of its rate.
_COPIES = frozenset({"DropPath", "StochasticDepth", "DropPathLayer"})
_RATES = ("drop_prob", "p", "prob")
_TOKENS = frozenset({"timm.layers.patch_dropout.PatchDropout"})


def is_drop_path(layer: nn.Module) -> bool:
    """Say whether a layer is stochastic depth: timm's, torchvision's, ours, or a project's copy.

    A copy is known by its name, by holding nothing but a rate, and by returning its input in eval.
    A subclass with a forward of its own is not what it inherits from.
    """
    owner = forward_owner(layer)
    if owner in DROP_PATHS:
        return True
    copy = owner.rpartition(".")[2] in _COPIES and rate_name(layer) is not None
    holds_nothing = not (layer._modules or layer._parameters or layer._buffers)
    return copy and holds_nothing and _is_identity_in_eval(layer)


def is_drop_block(layer: nn.Module) -> bool:
    """Say whether a layer is timm's or torchvision's DropBlock."""
    return forward_owner(layer) in DROP_BLOCKS


def is_patch_dropout(layer: nn.Module) -> bool:
    """Say whether a layer is timm's PatchDropout, which drops tokens."""
    return forward_owner(layer) in PATCH_DROPOUTS


def is_drop(layer: nn.Module) -> bool:
    """Say whether a layer drops in training and returns its input in eval."""
    if isinstance(layer, _DropoutNd | GaussianDropout):
        home = forward_owner(layer)
        return home.startswith(("torch.nn.modules.dropout.", "dropsurgery."))
    return is_drop_path(layer) or is_drop_block(layer) or forward_owner(layer) in _TOKENS


def rate_name(layer: nn.Module) -> str | None:
    """Return the attribute that holds a drop layer's probability, or None."""
    return next((n for n in _RATES if isinstance(getattr(layer, n, None), int | float)), None)


def rate(layer: nn.Module) -> float:
    """Return a drop layer's probability of dropping, in [0, 1]; 0 where it has none."""
    name = rate_name(layer)
    return 0.0 if name is None else float(getattr(layer, name))


def set_rate(layer: nn.Module, drop_prob: float) -> None:
    """Set a drop layer's probability of dropping, in [0, 1]."""
    name = rate_name(layer)
    assert name is not None
    setattr(layer, name, drop_prob)


def _is_identity_in_eval(layer: nn.Module) -> bool:
    probe = object.__new__(type(layer))
    probe.__dict__.update(layer.__dict__, training=False)
    x = torch.ones(2, 3)
    try:
        with torch.no_grad():
            y = probe.forward(x)
    except Exception:  # a forward that is not ours may raise anything
        return False
    return isinstance(y, torch.Tensor) and torch.equal(x, y)
