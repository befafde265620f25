"""The verbs: presets over passes."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Collection
from typing import Any, Literal, get_args

from torch import fx, nn

from dropsurgery import survival
from dropsurgery.errors import ArgumentError
from dropsurgery.graph.affine import norm_nodes
from dropsurgery.graph.module import Skip, module_path
from dropsurgery.half_precision import error_growth, half_dtype
from dropsurgery.layers.drop_path import Mode
from dropsurgery.passes.bake_parametrizations import BakeParametrizations
from dropsurgery.passes.base import Pass, Result, apply
from dropsurgery.passes.drop_path import InsertDropPath, Unit, Where
from dropsurgery.passes.dropout import ConvertDropout
from dropsurgery.passes.fold_affine import FoldAffine
from dropsurgery.passes.inference import DropUnused, KeepEval
from dropsurgery.passes.merge_branches import MergeLinearBranches
from dropsurgery.passes.remove_no_ops import RemoveNoOps

logger = logging.getLogger("dropsurgery")


HalfPrecision = Literal["no worse", "fold"]

# What `slim` is made of, without what it refuses in half precision; `apply(model, *SLIM)` also
# tells what was done.
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


def slim(
    model: nn.Module,
    *,
    example_inputs: Any = None,
    half_precision: HalfPrecision = "no worse",
) -> fx.GraphModule:
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

    A network in half precision is best slimmed before it is converted: its error is then smaller
    than that of the network itself converted. One that comes in float16 or bfloat16 has exact
    BatchNorms, and folded weights and biases that are rounded; where a bias is wrong by the same
    at every position, no pooling averages it away. With example inputs, where something was folded
    or merged, both networks are run on them and on slight variations, beside the network in
    float64. Where the slimmed one errs more (by 2 % and by two standard errors) nothing is folded,
    and where that is not enough nothing is merged either. What cannot be run is not measured, and
    is folded: see the log of "dropsurgery" at level INFO.

    Args:
        model: any `nn.Module`, or a GraphModule that dropsurgery returned.
        example_inputs: a tensor, a sequence of positional inputs or a mapping of inputs by name;
            where given, shapes are known and more can be folded (which axis holds the channels
            behind a linear layer, a reshape or a concatenation).
        half_precision: for a network with float16 or bfloat16 parameters: "no worse" refuses to
            fold where that makes the error on the example inputs larger, "fold" folds all the
            same. Without example inputs nothing is measured.

    Raises:
        ArgumentError: another `half_precision`.
        TraceError: the network cannot be turned into a graph.
    """
    return slimmed(model, example_inputs=example_inputs, half_precision=half_precision).module


def slimmed(
    model: nn.Module,
    *,
    example_inputs: Any = None,
    half_precision: HalfPrecision = "no worse",
) -> Result:
    """Do what `slim` does, and tell what was done and what was left alone."""
    choices = get_args(HalfPrecision)
    if half_precision not in choices:
        raise ArgumentError(
            f"half_precision is {half_precision!r}", fix=" or ".join(map(repr, choices))
        )
    folded = result = apply(model, *SLIM, example_inputs=example_inputs)
    dtype = half_dtype(result.module)
    if dtype is None or example_inputs is None or half_precision == "fold":
        return result
    done = {change.by for change in result.changes}
    refused: tuple[type[Pass], ...] = ()
    worst = 1.0
    # Without the merges there is more for FoldAffine to fold: it goes with them.
    for last, kinds in (
        (FoldAffine, (FoldAffine,)),
        (MergeLinearBranches, (FoldAffine, MergeLinearBranches)),
    ):
        if last.__name__ not in done:
            continue
        growth = error_growth(model, result.module, example_inputs)
        if not growth.is_worse:
            break
        worst, refused = max(worst, growth.ratio), kinds
        kept = [item for item in SLIM if not isinstance(item, kinds)]
        result = apply(model, *kept, example_inputs=example_inputs)
    if not refused:
        return result
    what = f"errs {worst:.2f} times as much" if math.isfinite(worst) else "overflows"
    reason = (
        f"folded, the network {what} in {dtype} on the example inputs: slim it in float32 and "
        "convert the result, or pass half_precision='fold'"
    )
    by = ", ".join(kind.__name__ for kind in refused)
    skips = _skips(folded, norm_nodes(result.module), reason, by)
    return dataclasses.replace(result, skipped=(*result.skipped, *skips))


def _skips(folded: Result, norms: list[fx.Node], reason: str, by: str) -> list[Skip]:
    """Say why each BatchNorm stays: what could not be folded anyway keeps its own reason."""
    given = {skip.node: skip for skip in folded.skipped if skip.by == FoldAffine.__name__}
    for change in folded.changes:
        given.pop(change.node, None)
    skips = [given[node.name] for node in norms if node.name in given]
    left = [node for node in norms if node.name not in given]
    places = [(module_path(node), node.name) for node in left] or [("", "")]
    return skips + [Skip(*place, reason, by) for place in places]
