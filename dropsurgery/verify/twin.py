"""The surgery that a candidate went through, done again on the reference."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from torch import fx, nn

from dropsurgery.graph.module import HISTORY
from dropsurgery.store import read_passes, replay

# What a file says is not to be trusted with more work than surgeries are.
_MOST_PASSES, _MOST_INPUTS = 64, 256
_PREFIX = "dropsurgery."


def told_by_file(metadata: Mapping[str, str]) -> dict[str, Any]:
    """Return the history of the network that a file was exported from, as its metadata have it."""
    try:
        trace = json.loads(metadata.get(f"{_PREFIX}trace", "{}"))
        passes = json.loads(metadata.get(f"{_PREFIX}passes", "[]"))
    except (ValueError, RecursionError):
        return {}
    if not isinstance(trace, dict) or not isinstance(passes, list):
        return {}
    return {**trace, "source": metadata.get(f"{_PREFIX}source", ""), "passes": passes}


def told_by_module(module: nn.Module) -> dict[str, Any]:
    """Return the history of a network that dropsurgery returned; nothing for another."""
    told = module.meta.get(HISTORY) if isinstance(module, fx.GraphModule) else None
    return json.loads(json.dumps(told)) if told else {}


def twin(reference: nn.Module, told: Mapping[str, Any]) -> fx.GraphModule | None:
    """Do to the reference what was done to the network that a candidate was made from.

    Values of a slim network are scaled otherwise than the original's, and layers are merged. Beside
    the twin each of them stands next to its like.

    Args:
        reference: the network, which may have gone through some of the passes already; it is not
            changed.
        told: the history of the candidate; nothing in it is trusted.

    Returns:
        The network after the passes, in eval mode; None where there are none to do, or they do not
        fit the reference.
    """
    passes, done = told.get("passes", []), told_by_module(reference).get("passes", [])
    if passes[: len(done)] != done or not 0 < len(passes) - len(done) <= _MOST_PASSES:
        return None
    inputs = told.get("inputs") or {}
    try:
        if len(inputs.get("names", ())) + int(inputs.get("star", 0)) > _MOST_INPUTS:
            return None
        return replay(reference, told, read_passes(passes[len(done) :], "the candidate"), where="")
    except Exception:  # whatever a damaged or a foreign history leads to
        return None
