"""`verify`: is an ONNX file, or another module, the network that it was made from?"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from dropsurgery.errors import ArgumentError, ArgumentTypeError
from dropsurgery.verify import providers
from dropsurgery.verify.candidate import Candidate
from dropsurgery.verify.cases import Case
from dropsurgery.verify.comparison import Comparison, Progress
from dropsurgery.verify.gate import Gate
from dropsurgery.verify.given import check_path
from dropsurgery.verify.onnx_reference import OnnxModule
from dropsurgery.verify.plan import Plan
from dropsurgery.verify.run import ModuleRunner
from dropsurgery.verify.verdict import Verdict


def verify(
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
    progress: Progress | None = None,
) -> Verdict:
    """Say whether an ONNX file, or another module, computes what a network computes in eval mode.

    On every input the reference runs twice, in its own dtype and in float64, and the candidate
    once. The candidate passes if the names, shapes and dtypes of its outputs are the reference's,
    if no value is NaN and infinities are the same, and if its error against float64 is at most a
    few times the reference's own (see `Gate`, also for what is too small to be seen). Integer and
    boolean outputs must be equal, to the reference's or to its float64 run's. Where no output
    depends on the inputs, as with a head of zeros, the verdict says that nothing was tested
    (`Verdict.tested`).

    Surgery has a budget of its own: a candidate that is a module runs in float64 as well, where it
    may differ from the reference by 1e-12 of the output, or by what rounding its new weights costs
    (`Algebra`). A file that was made from a surgered network is held to both budgets when that
    network is passed as `surgered`: reference → surgered in float64, surgered → file in rounding.

    Neither module is changed: both run in eval mode on clones that share their parameters, so their
    `training` flags do not matter and stay. The float64 run needs no second copy of the weights.

    Args:
        reference: the original network, or the path of an ONNX file, which onnxruntime runs on the
            CPU and onnx's reference evaluator in float64 (see `OnnxModule`).
        candidate: path of an ONNX file, or a module.
        inputs: a tensor, a tuple of forward's arguments, a dict of them by name, or a list of
            these, one for each call. Each is run as it is, then varied a little and in other batch
            sizes. None makes inputs up, from the shapes that the file declares or, for a module,
            that it was traced with or that its first layer suggests: noise for even positions in
            `seeds`, waves as in photographs for odd ones. Either way one more call has inputs next
            to zero, where the reference keeps its digits on them.
        surgered: the network that the file was exported from, where that is not the reference.
        provider: "cpu" or "cuda": what onnxruntime runs the file on. "cuda" turns TF32 off and
            raises where nodes fell back to the CPU.
        seeds: of the random inputs, or of the variations of yours.
        batch_sizes: tried where the candidate's batch is open.
        gate: other limits than the default ones.
        stochastic: compare random networks: means and variances over `runs` runs of each, on the
            same inputs, within the standard errors that chance leaves (see `Statistics`). Without
            it a network or a file that draws is refused.
        runs: of each network for each input, 32 or more.
        progress: called with one line before each input.

    Raises:
        VerifyError: the comparison could not be carried out: no such file, no ONNX model, no inputs
            that fit.
        StochasticError: a network or the file draws random numbers, and `stochastic` is not set.
            The message names the nodes and the module paths, and constants that stand in the file
            where the network draws.
        ProviderError: the provider is missing, or did not get all the work.
        ArgumentError, ArgumentTypeError: an argument cannot be used.
    """
    name = None
    if isinstance(reference, str | os.PathLike):
        name, reference = os.fspath(reference), OnnxModule(reference)
    check_comparison(reference, candidate, provider, surgered)
    seeds, batch_sizes = _whole("seeds", seeds, 0), _whole("batch_sizes", batch_sizes, 1)
    if gate is not None and not isinstance(gate, Gate):
        raise ArgumentTypeError(
            f"gate is a {type(gate).__name__}", fix="a Gate, or None for the default limits"
        )
    if stochastic and surgered is not None:
        raise ArgumentError(
            "surgered= is about float64 runs, which random networks have none of",
            fix="compare the two steps one by one",
        )
    check_path(inputs)
    comparison = Comparison(reference, candidate, surgered, provider, gate or Gate(), progress)
    plan = Plan(comparison.model, comparison.reference, comparison.other)
    if stochastic:
        comparison.sample(plan.plain_cases(inputs, seeds, batch_sizes), _count("runs", runs, 32))
    else:
        comparison.other.refuse_draws()
        comparison.run(plan.cases(inputs, seeds, batch_sizes))
    verdict = comparison.verdict(plan.notes)
    return verdict if name is None else dataclasses.replace(verdict, reference=name)


def comparison_cases(
    reference: nn.Module,
    candidate: str | os.PathLike[str] | nn.Module,
    inputs: Any,
    *,
    provider: str,
    seeds: Sequence[int],
    batch_sizes: Sequence[int],
) -> Iterator[Case]:
    """Return the calls that `verify` compares; the arguments and errors are those of `verify`."""
    check_comparison(reference, candidate, provider, None)
    seeds, batch_sizes = _whole("seeds", seeds, 0), _whole("batch_sizes", batch_sizes, 1)
    runner = ModuleRunner(reference, "reference")
    plan = Plan(reference, runner, Candidate(candidate, provider))
    return plan.cases(inputs, seeds, batch_sizes)


def check_comparison(reference: Any, candidate: Any, provider: Any, surgered: Any) -> None:
    """Raise where these cannot be the arguments of a comparison; see `verify`."""
    if not isinstance(reference, nn.Module):
        raise ArgumentTypeError(
            f"the reference is a torch.nn.Module or a path, got {type(reference).__name__}",
            fix="the original model, or its ONNX file, first, then the candidate",
        )
    if not isinstance(candidate, str | os.PathLike | nn.Module):
        raise ArgumentTypeError(
            f"the candidate is a path or a torch.nn.Module, got {type(candidate).__name__}",
            fix="the path of an .onnx file, or a module",
        )
    if surgered is not None and (
        not isinstance(surgered, nn.Module) or isinstance(candidate, nn.Module)
    ):
        raise ArgumentTypeError(
            f"surgered is a {type(surgered).__name__} beside a {type(candidate).__name__}",
            fix="surgered= is the module that an ONNX file was exported from; two modules are "
            "compared without it",
        )
    if not isinstance(provider, str) or provider not in providers.PROVIDERS:
        raise ArgumentError(
            f"provider is {provider!r}", fix=f"one of {', '.join(map(repr, providers.PROVIDERS))}"
        )
    if provider != "cpu" and isinstance(candidate, nn.Module):
        raise ArgumentError(
            f"provider={provider!r} is about ONNX files, and the candidate is a module",
            fix="move both modules to the device before the call",
        )


def _whole(name: str, values: Any, least: int) -> tuple[int, ...]:
    try:
        numbers = tuple(values)
    except TypeError:
        raise ArgumentTypeError(
            f"{name} is {values!r}", fix=f"a sequence of whole numbers, as {name}=(1, 2)"
        ) from None
    if not numbers or not all(isinstance(v, int) and least <= v < 2**63 for v in numbers):
        raise ArgumentError(
            f"{name} is {values!r}", fix=f"at least one whole number, each {least} or more"
        )
    return numbers


def _count(name: str, value: Any, least: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise ArgumentTypeError(f"{name} is {value!r}", fix=f"a whole number, as {name}=256")
    if value < least:
        raise ArgumentError(f"{name} is {value}", fix=f"{least} or more")
    return value
