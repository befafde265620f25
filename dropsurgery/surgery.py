"""The verbs: presets over passes."""

from __future__ import annotations

import logging
from collections.abc import Collection
from typing import Any

from torch import fx, nn

from dropsurgery import survival
from dropsurgery.layers.drop_path import Mode
from dropsurgery.passes.bake_parametrizations import BakeParametrizations
from dropsurgery.passes.base import Pass, apply
from dropsurgery.passes.drop_path import InsertDropPath, Unit, Where
from dropsurgery.passes.dropout import ConvertDropout
from dropsurgery.passes.fold_affine import FoldAffine
from dropsurgery.passes.inference import DropUnused, KeepEval
from dropsurgery.passes.merge_branches import MergeLinearBranches
from dropsurgery.passes.remove_no_ops import RemoveNoOps

logger = logging.getLogger("dropsurgery")


# What `slim` is made of; `apply(model, *SLIM)` also tells what was done.
SLIM: tuple[Pass, ...] = (
    KeepEval(),
    BakeParametrizations(),
    ConvertDropout("identity", always_on=False),
    RemoveNoOps(),
    MergeLinearBranches(),
    FoldAffine(),
    DropUnused(),
)


def retrofit(
    model: nn.Module,
    final_survival: float = 0.8,
    *,
    rule: str = "linear",
    mode: Mode = "row",
    unit: Unit = "block",
    where: Where = None,
    include: Collection[str] = (),
    example_inputs: Any = None,
) -> fx.GraphModule:
    """Give a network stochastic depth: drop path on every residual branch.

    The result has the state-dict keys of `model`, and its eval output is bit-identical. It shares
    the model's parameters and buffers, so that fine-tuning it trains `model` too; retrofit
    `copy.deepcopy(model)` to keep them apart.

    Args:
        model: any `nn.Module`, or a GraphModule that dropsurgery returned. It is not changed.
        final_survival: survival probability p_L of the last block, in [0, 1] (for "constant": of
            every block).
        rule: "linear" (the paper's), "linspace", "efficientnet" or "constant"; see `ds.survival`.
        mode: what is done with what is dropped: "row" masks samples, which saves no time; "subset"
            computes a branch for the surviving samples only, "batch" only where it survives for
            the whole mini-batch. See `InsertDropPath`, and `expected_compute` for what they save.
        unit: what the rule counts: "block", "add" or "position"; see `InsertDropPath`.
        where: which sites get it, as a module-path pattern (`"layer4.*"`), a tuple of them or a
            callable that takes a `Site`; every site without. The rule counts all sites either way.
        include: what else counts as a site: "linear", "nested"; see `find_residuals`.
        example_inputs: positional inputs; where given, shapes are known and more can be proved
            (which axis of a branch's inputs is the batch, which mode "subset" must know).

    Returns:
        The retrofitted network, in the mode that `model` is in. A network without residual adds
        comes back as it is, with a logged warning.

    Raises:
        ArgumentError: an unknown rule, mode, unit or `include`, or a probability outside [0, 1].
        PassError: `where` matches no site; or the training forward cannot be traced.
        TraceError: the network cannot be turned into a graph.
    """
    insertion = InsertDropPath(
        survival.by_name(rule, final_survival),
        mode=mode,
        unit=unit,
        where=where,
        include=tuple({include} if isinstance(include, str) else include),
    )
    result = apply(model, insertion, example_inputs=example_inputs)
    if not result.changes:
        logger.warning(
            "retrofit changed nothing: %s has no residual adds (see ds.find_residuals)",
            type(model).__name__,
        )
    return result.module


def slim(model: nn.Module, *, example_inputs: Any = None) -> fx.GraphModule:
    """Return the inference graph of a network: drops gone, branches merged, BatchNorms folded.

    What is done, in this order: computed weights become parameters (`BakeParametrizations`), drops
    go, what computes nothing new goes (`RemoveNoOps`), linear branches and chains become one layer
    (`MergeLinearBranches`), BatchNorms go into the layers before them; `slim_report` counts it.

    The result is in eval mode, whatever mode `model` is in, and computes what `model` computes in
    eval: exactly but for the rounding of the folded weights, which is done in float64 and rounded
    once by each pass that writes a layer. (A merged layer has the BatchNorms of its branches and
    behind it in it; only a map that reaches it later, through an activation or a pooling, rounds it
    a second time.) Parameters that no fold rewrites are shared with `model`, which is not changed.
    Submodules that the eval graph does not use (auxiliary heads) are left out.

    Args:
        model: any `nn.Module`, or a GraphModule that dropsurgery returned.
        example_inputs: positional inputs; where given, shapes are known and more can be folded
            (which axis holds the channels behind a linear layer, a reshape or a concatenation).

    Raises:
        TraceError: the network cannot be turned into a graph.
    """
    return apply(model, *SLIM, example_inputs=example_inputs).module
