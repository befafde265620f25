"""Which layers drop something in training and are the identity in eval, and at what rate."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.modules.dropout import _DropoutNd

from dropsurgery.graph.leaves import (
    DROP_BLOCKS,
    DROP_PATHS,
    OWN_DROPS,
    PATCH_DROPOUTS,
    forward_owner,
)
from dropsurgery.layers.drop_path import DropPath

# Names under which projects keep a copy of stochastic depth, and those of its rate.
_COPIES = frozenset({"DropPath", "StochasticDepth", "DropPathLayer"})
_RATES = ("drop_prob", "p", "prob")
# The mark in node.meta by which RemoveDrops finds what insertions did; drop paths have their own.
INSERTED_DROP = "dropsurgery_inserted_drop"
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
    """Say whether a layer is DropBlock: timm's, torchvision's or ours."""
    return forward_owner(layer) in DROP_BLOCKS


def is_patch_dropout(layer: nn.Module) -> bool:
    """Say whether a layer is timm's PatchDropout, which drops tokens."""
    return forward_owner(layer) in PATCH_DROPOUTS


def is_drop(layer: nn.Module) -> bool:
    """Say whether a layer drops in training and returns its (first) input in eval."""
    owner = forward_owner(layer)
    if isinstance(layer, _DropoutNd) and owner.startswith("torch.nn.modules.dropout."):
        return True
    if owner in OWN_DROPS or owner in _TOKENS:
        return True
    return is_drop_path(layer) or is_drop_block(layer)


def is_classic(layer: nn.Module) -> bool:
    """Say whether a layer is dropout in its first form, whose eval is a factor."""
    return forward_owner(layer) == "dropsurgery.layers.classic_dropout.ClassicDropout"


def drops_by_place_or_content(layer: nn.Module) -> bool:
    """Say whether which units a layer drops depends on where they are or what they hold.

    No noise that is independent of both can stand in for it.
    """
    owner = forward_owner(layer).removeprefix("dropsurgery.layers.")
    chosen = ("cutout.Cutout", "weighted_channel_dropout.WeightedChannelDropout")
    return is_drop_block(layer) or is_patch_dropout(layer) or owner in chosen


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
    if isinstance(layer, DropPath):
        layer.peak = max(layer.peak, drop_prob)


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
