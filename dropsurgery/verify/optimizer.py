"""Whether it is onnxruntime's optimiser that changes what a file computes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import nn

from dropsurgery.verify.cases import Case
from dropsurgery.verify.comparison import Comparison
from dropsurgery.verify.gate import Gate
from dropsurgery.verify.providers import LEVELS


def blame(reference: nn.Module, path: Path, provider: str, cases: Sequence[Case]) -> str:
    """Return what to say where the file is right and its optimised graph is not; "" elsewhere.

    Args:
        reference: the network.
        path: the file.
        provider: what onnxruntime runs it on.
        cases: the inputs.
    """

    def is_right(level: str) -> bool:
        comparison = Comparison(reference, path, None, provider, Gate(), None, level=level)
        comparison.run(cases)
        return comparison.verdict([]).ok

    if is_right(LEVELS[-1]) or not is_right(LEVELS[0]):
        return ""
    between = (level for level in LEVELS[1:-1] if not is_right(level))
    first = next(between, LEVELS[-1])
    import onnxruntime

    return (
        f"onnxruntime {onnxruntime.__version__} computes the file right without its optimiser and "
        f"wrong from {first} on: run it with a lower graph_optimization_level, or leave the faulty "
        "rewrite out (disabled_optimizers)"
    )
