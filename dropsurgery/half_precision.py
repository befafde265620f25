"""Whether surgery makes a half-precision network err more than it did."""

from __future__ import annotations

import logging
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from dropsurgery.graph.rounding import HALF
from dropsurgery.graph.trace import as_tuple
from dropsurgery.verify.cases import Case
from dropsurgery.verify.run import ModuleRunner

logger = logging.getLogger("dropsurgery")

Call = tuple[tuple[Any, ...], dict[str, Any]]  # what a forward takes by position and by name
# A network errs by chance: on one batch the ratio of two errors may be off by a half. The same
# inputs a little varied are rounded anew, and the mean over some of them tells more.
_RUNS = 8
_FEWEST = 3
_VARIATION = 2.0**-6
_CLEAR = 3.0  # standard errors from one, beyond which no more runs are needed
_MORE = 1.02
_BEYOND = 2.0


@dataclass(frozen=True)
class Growth:
    """How much more a network errs after surgery.

    Attributes:
        ratio: of the errors, after over before: the geometric mean over some runs. Infinity where
            values overflow only after surgery; NaN where it cannot be told.
        spread: standard error of the ratio's logarithm.
    """

    ratio: float
    spread: float = 0.0

    @property
    def is_worse(self) -> bool:
        """Whether it errs more: by 2 % at least, and by more than two standard errors."""
        return self.ratio > _MORE and math.log(self.ratio) > _BEYOND * self.spread

    @classmethod
    def of(cls, ratios: Sequence[float]) -> Self:
        """Return what several runs tell."""
        if not all(map(math.isfinite, ratios)):
            return cls(math.nan if any(map(math.isnan, ratios)) else math.inf)
        logs = [math.log(ratio) for ratio in ratios]
        spread = statistics.stdev(logs) / math.sqrt(len(logs)) if len(logs) > 1 else math.inf
        return cls(math.exp(statistics.fmean(logs)), spread)


def half_dtype(module: nn.Module) -> torch.dtype | None:
    """Return the half precision of a network's parameters, or None where none is in it."""
    return next((p.dtype for p in module.parameters() if p.dtype in HALF), None)


def error_growth(before: nn.Module, after: nn.Module, example_inputs: Any) -> Growth:
    """Return how much more a network errs after surgery, on inputs and on slight variations.

    Errors are root mean squares over all outputs, each relative to its own root mean square,
    against `before` computed in float64. Both networks are run in eval mode on clones, 3 to 8
    times: until it is clear which of them errs more.

    Args:
        before: the network as it was.
        after: what surgery made of it.
        example_inputs: a tensor, a sequence of positional inputs or a mapping of inputs by name.

    Returns:
        The growth. Its ratio is NaN where a network cannot be run, in its own dtype or in float64,
        draws random numbers or has no weights, and where `before` overflows or makes no error.
    """
    by_name = isinstance(example_inputs, Mapping)
    given: Call = ((), dict(example_inputs)) if by_name else (as_tuple(example_inputs), {})
    if any(isinstance(leaf, Tensor) and leaf.is_meta for leaf in pytree.tree_leaves(given)):
        return Growth(math.nan)
    varied = partial(_varied, generator=torch.Generator("cpu").manual_seed(0))
    ratios: list[float] = []
    try:
        reference, candidate = ModuleRunner(before, "reference"), ModuleRunner(after, "candidate")
        for run in range(_RUNS):
            args, kwargs = pytree.tree_map(varied, given) if run else given
            case = Case("the example inputs", args, kwargs)
            ratios.append(_ratio(reference, candidate, case))
            growth = Growth.of(ratios)
            if not math.isfinite(growth.ratio):
                break
            if run + 1 >= _FEWEST and abs(math.log(growth.ratio)) >= _CLEAR * growth.spread:
                break
    except Exception as error:  # a forward may raise anything, and surgery does not need the figure
        logger.info("the error in half precision was not measured: %s", error)
        return Growth(math.nan)
    return growth


def _varied(leaf: Any, generator: torch.Generator) -> Any:
    """Return a tensor of real numbers with each of them moved by some per cent."""
    if not isinstance(leaf, Tensor) or not leaf.is_floating_point():
        return leaf
    noise = torch.randn(leaf.shape, generator=generator, device="cpu").to(leaf.device)
    return (leaf * (1.0 + _VARIATION * noise)).to(leaf.dtype)


def _ratio(reference: ModuleRunner, candidate: ModuleRunner, case: Case) -> float:
    """Return the candidate's error over the reference's own, on one batch."""
    expected = reference.float64(case)
    own, new = (_error(runner(case), expected) for runner in (reference, candidate))
    if not math.isfinite(own) or own == 0.0:
        return math.nan
    return max(new / own, 1e-30) if math.isfinite(new) else math.inf


def _error(outputs: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Return the root mean square of the relative error."""
    squares = []
    for name, value in expected.items():
        if value.is_floating_point() and value.numel():
            size = float(value.square().mean()) or 1.0
            squares.append(float((outputs[name].double() - value).square().mean()) / size)
    return math.sqrt(sum(squares) / len(squares)) if squares else 0.0
