"""For other people's test suites: one assertion, with a message that explains."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from torch import nn

from dropsurgery.errors import DropsurgeryError
from dropsurgery.verify import Gate, Verdict, locate, verify


def assert_equivalent(
    reference: nn.Module | str | os.PathLike[str],
    candidate: str | os.PathLike[str] | nn.Module,
    inputs: Any = None,
    *,
    surgered: nn.Module | None = None,
    provider: str = "cpu",
    seeds: Sequence[int] = (0, 1, 2),
    batch_sizes: Sequence[int] = (1, 3),
    gate: Gate | None = None,
    stochastic: bool = False,
    runs: int = 256,
) -> None:
    """Assert that a candidate computes what a network computes in eval mode.

    Both may be a module or the path of an ONNX file, in any combination. The yardstick is the
    reference's own rounding: its error against a float64 run of itself. A module computes that run
    in torch, an ONNX file in onnx's reference evaluator (see `verify.onnx_reference`).

    Args:
        reference: the original network, or its ONNX file; neither is changed, whatever mode a
            network is in.
        candidate: another module, or the path of an ONNX file.
        inputs, surgered, provider, seeds, batch_sizes, gate, stochastic, runs: as in
            `dropsurgery.verify`.

    Raises:
        AssertionError: it does not. The message holds the table of `verify`, the outputs that
            differ, where the reference is a module the first place at which the two part
            (`locate`), and what to do about it.
        VerifyError: the comparison could not be carried out; this is no failed comparison.
    """
    __tracebackhide__ = True  # pytest shows the caller's line
    verdict = verify(
        reference,
        candidate,
        inputs,
        surgered=surgered,
        provider=provider,
        seeds=seeds,
        batch_sizes=batch_sizes,
        gate=gate,
        stochastic=stochastic,
        runs=runs,
    )
    if not verdict.ok:
        place = ""
        if not stochastic:
            options: dict[str, Any] = {"provider": provider, "surgered": surgered}
            options |= {"seeds": seeds, "batch_sizes": batch_sizes}
            place = _place(reference, candidate, inputs, options)
        raise AssertionError("\n".join(filter(None, (str(verdict), place, _advice(verdict)))))


def _place(reference: Any, candidate: Any, inputs: Any, options: dict[str, Any]) -> str:
    """Return where a candidate and a network part, in words; "" where that cannot be told."""
    if not isinstance(reference, nn.Module):
        return ""
    try:
        return str(locate(reference, candidate, inputs, **options))
    except DropsurgeryError as error:  # an iterator of inputs that has run out, for one
        return f"the place cannot be told: {error.problem}"


def _advice(verdict: Verdict) -> str:
    """Return what to do, by the kind of the failure."""
    reasons = [output.reason for output in verdict.outputs if output.reason]
    if any("NaN" in reason for reason in reasons):
        step = "look for divisions, logarithms and square roots of what may be zero or negative"
    elif any("too inexactly" in reason for reason in reasons):
        step = "compare in float32, or pass inputs= that are like the network's own"
    elif any("error beyond rounding" in reason for reason in reasons):
        step = (
            "a weight, a statistic, an epsilon or an activation was changed: compare the network "
            "before and after each step (assert_equivalent takes two modules) to find which"
        )
    elif any("dtype" in reason or "shape" in reason for reason in reasons):
        step = "export again from this network, with inputs of its own dtype and rank"
    else:
        step = "check that the candidate was made from this network, with the same outputs"
    failed = [output.name for output in verdict.outputs if not output.ok]
    where = f"outputs {', '.join(failed)}: " if failed else ""
    return f"what to do: {where}{step}"
