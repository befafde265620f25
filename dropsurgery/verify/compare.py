"""The comparison itself: inputs, runs, and what they add up to."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from dropsurgery.errors import ArgumentError, ArgumentTypeError, DropsurgeryError, VerifyError
from dropsurgery.graph.signature import argument_list, first_line, named_inputs, shapes, signature
from dropsurgery.verify import providers
from dropsurgery.verify.cases import (
    Case,
    Spec,
    faint,
    given_cases,
    guessed_specs,
    random_cases,
    recorded_specs,
    variations,
)
from dropsurgery.verify.gate import Errors, Gate, Tally, errors, trust_limit
from dropsurgery.verify.onnx_file import OnnxRunner, feeds_for
from dropsurgery.verify.run import ModuleRunner
from dropsurgery.verify.verdict import OutputVerdict, Verdict

Progress = Callable[[str], None]


def verify(
    reference: nn.Module,
    candidate: str | os.PathLike[str] | nn.Module,
    inputs: Any = None,
    *,
    provider: str = "cpu",
    seeds: Sequence[int] = (0, 1, 2),
    batch_sizes: Sequence[int] = (1, 3),
    gate: Gate | None = None,
    progress: Progress | None = None,
) -> Verdict:
    """Say whether an ONNX file, or another module, computes what a network computes in eval mode.

    On every input the reference runs twice, in its own dtype and in float64, and the candidate
    once. The candidate passes if the names, shapes and dtypes of its outputs are the reference's,
    if no value is NaN and infinities are the same, and if its error against float64 is at most a
    few times the reference's own (see `Gate`, also for what is too small to be seen). Integer and
    boolean outputs must be equal. Where no output depends on the inputs, as with a head of zeros,
    the verdict says that nothing was tested (`Verdict.tested`).

    Neither module is changed: both run in eval mode on clones that share their parameters, so their
    `training` flags do not matter and stay. The float64 run needs no second copy of the weights.

    Args:
        reference: the original network.
        candidate: path of an ONNX file, or a module.
        inputs: a tensor, a tuple of forward's arguments, a dict of them by name, or a list of
            these, one for each call. Each is run as it is, then varied a little and in other batch
            sizes. None makes inputs up, from the shapes that the file declares or, for a module,
            that it was traced with or that its first layer suggests: noise for even positions in
            `seeds`, waves as in photographs for odd ones. Either way one more call has inputs next
            to zero, where the reference keeps its digits on them.
        provider: "cpu" or "cuda": what onnxruntime runs the file on. "cuda" turns TF32 off and
            raises where nodes fell back to the CPU.
        seeds: of the random inputs, or of the variations of yours.
        batch_sizes: tried where the candidate's batch is open.
        gate: other limits than the default ones.
        progress: called with one line before each input.

    Raises:
        VerifyError: the comparison could not be carried out: no such file, no ONNX model, no inputs
            that fit, a reference that draws random numbers.
        ProviderError: the provider is missing, or did not get all the work.
        ArgumentError, ArgumentTypeError: an argument cannot be used.
    """
    _check_arguments(reference, candidate, provider)
    seeds, batch_sizes = _whole("seeds", seeds, 0), _whole("batch_sizes", batch_sizes, 1)
    if gate is not None and not isinstance(gate, Gate):
        raise ArgumentTypeError(
            f"gate is a {type(gate).__name__}", fix="a Gate, or None for the default limits"
        )
    comparison = _Comparison(reference, candidate, provider, gate or Gate(), progress)
    comparison.run(comparison.cases(inputs, seeds, batch_sizes))
    return comparison.verdict()


def _check_arguments(reference: Any, candidate: Any, provider: Any) -> None:
    if not isinstance(reference, nn.Module):
        raise ArgumentTypeError(
            f"the reference is a torch.nn.Module, got {type(reference).__name__}",
            fix="the original model first, then the candidate",
        )
    if not isinstance(candidate, str | os.PathLike | nn.Module):
        raise ArgumentTypeError(
            f"the candidate is a path or a torch.nn.Module, got {type(candidate).__name__}",
            fix="the path of an .onnx file, or a module",
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


class _Comparison:
    """One comparison while it runs."""

    def __init__(
        self,
        reference: nn.Module,
        candidate: str | os.PathLike[str] | nn.Module,
        provider: str,
        gate: Gate,
        progress: Progress | None,
    ) -> None:
        self.model = reference
        self.gate = gate
        self.progress = progress
        self.other: OnnxRunner | ModuleRunner
        if isinstance(candidate, nn.Module):
            self.candidate_module: nn.Module | None = candidate
            self.other = ModuleRunner(candidate, "candidate")
            self.candidate_name, self.placement = self.other.name, str(self.other.device)
        else:
            self.candidate_module = None
            self.other = OnnxRunner(Path(candidate), provider)
            self.candidate_name, self.placement = os.fspath(candidate), self.other.placement
        self.reference = ModuleRunner(reference, "reference")
        self.tallies: dict[str, Tally] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.problems: list[str] = []
        self.notes: list[str] = []
        self.labels: list[str] = []

    def cases(
        self, inputs: Any, seeds: tuple[int, ...], batch_sizes: tuple[int, ...]
    ) -> Iterator[Case]:
        """Yield the calls to compare; the last one, with faint inputs, for what others hide."""
        last = None
        for case in self._usual_cases(inputs, seeds, batch_sizes):
            last = last if case.optional else case
            yield case
        shrunk = faint(last) if last is not None else None
        if shrunk is not None:
            yield shrunk

    def _usual_cases(
        self, inputs: Any, seeds: tuple[int, ...], batch_sizes: tuple[int, ...]
    ) -> Iterator[Case]:
        if inputs is not None:
            given = given_cases(inputs)
            open_batch = not isinstance(self.other, OnnxRunner) or self.other.open_batch
            yield from given
            yield from variations(given[0], seeds, batch_sizes if open_batch else None)
        elif isinstance(self.other, OnnxRunner):
            specs = self.other.specs(self.model)
            bind = self._binder([spec.name for spec in specs])
            yield from random_cases(specs, seeds, batch_sizes, bind, optional=False)
        else:
            yield from random_cases(
                self._module_specs(), seeds, batch_sizes, _positional, optional=True
            )

    def _binder(self, names: list[str]) -> Callable[..., tuple[tuple[Any, ...], dict[str, Any]]]:
        """Return how tensors for the file's inputs become arguments of the reference's forward."""
        parameters = signature(self.model).parameters
        kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
        if all(name in parameters and parameters[name].kind in kinds for name in names):
            return lambda tensors: ((), dict(zip(names, tensors, strict=True)))
        try:
            signature(self.model).bind(*names)
        except TypeError as error:
            raise VerifyError(
                f"the file takes {names}, which do not fit the reference: {error}",
                where=argument_list(self.model),
                fix="pass inputs=, a tuple of forward's arguments",
            ) from error
        return _positional

    def _module_specs(self) -> list[Spec]:
        assert self.candidate_module is not None
        for module in (self.candidate_module, self.model):
            specs = recorded_specs(module)
            if specs is not None:
                return specs
        tried = guessed_specs(self.model)
        for specs in tried:
            case = next(random_cases(specs, (0,), (1,), _positional, optional=False))
            try:
                self.reference(case)
            except DropsurgeryError:
                raise
            except Exception:
                continue
            return specs
        sizes = ", ".join(str((1, *specs[0].shape[1:])) for specs in tried)
        raise VerifyError(
            "the reference accepts none of the usual inputs",
            where=f"{self.reference.name}, tried {sizes}",
            fix="pass inputs=, a tensor or a tuple of forward's arguments",
        )

    def run(self, cases: Iterator[Case]) -> None:
        """Run both sides on every case and add up the errors."""
        for case in cases:
            if self.progress is not None:
                self.progress(case.label)
            native = self._reference(case)
            if native is None:
                continue
            wide = self._float64(case)
            if case.faint and not self._keeps_digits(native, wide):
                self._note(f"left out, the reference loses digits on it: {case.label}")
                continue
            self.labels.append(case.label)
            found = self._candidate(case, list(native))
            if found is None:
                continue
            for name, output in native.items():
                tally = self.tallies.setdefault(name, Tally(output.dtype))
                self.shapes.setdefault(name, tuple(output.shape))
                tally.add(output, wide[name], found[name], case.label)

    def _float64(self, case: Case) -> dict[str, Tensor]:
        try:
            return self.reference.float64(case)
        except DropsurgeryError:
            raise
        except Exception as error:
            raise VerifyError(
                f"the reference does not run in float64: {first_line(error)}",
                where=self.reference.name,
                fix="verify on the CPU, without quantised or half-only operators",
            ) from error

    def _keeps_digits(self, native: dict[str, Tensor], wide: dict[str, Tensor]) -> bool:
        """Say whether the reference is as exact on faint inputs as on the others.

        A network that subtracts its mean from what hardly varies is not: there the candidate's
        rounding may differ by anything. Nor does a rank or a threshold survive such inputs.
        """
        known = [self.tallies.get(name) for name in native]
        return all(
            tally is not None and tally.keeps_digits(native[name], wide[name])
            for name, tally in zip(native, known, strict=True)
        )

    def _reference(self, case: Case) -> dict[str, Tensor] | None:
        try:
            return self.reference(case)
        except DropsurgeryError:
            raise
        except Exception as error:
            if case.optional:
                self._note(f"not tried, the reference does not accept it: {case.label}")
                return None
            raise VerifyError(
                f"the reference does not accept the inputs: {first_line(error)}",
                where=f"{self.reference.name}, {case.label}: {self._shapes(case)}",
                fix=f"pass inputs=; {argument_list(self.model)}",
            ) from error

    def _shapes(self, case: Case) -> str:
        try:
            return shapes(named_inputs(self.model, case.args, case.kwargs))
        except ArgumentTypeError as error:
            return error.problem

    def _candidate(self, case: Case, expected: list[str]) -> dict[str, Tensor] | None:
        """Run the candidate; return its outputs under the reference's names."""
        try:
            if isinstance(self.other, OnnxRunner):
                found = self.other(self._feeds(case))
            else:
                found = self.other(case)
        except DropsurgeryError:
            raise
        except Exception as error:
            self._problem(f"the candidate fails on {case.label}: {first_line(error)}")
            return None
        return self._matched(expected, found)

    def _feeds(self, case: Case) -> dict[str, Tensor]:
        assert isinstance(self.other, OnnxRunner)
        return feeds_for(self.other.inputs, named_inputs(self.model, case.args, case.kwargs))

    def _matched(self, expected: list[str], found: dict[str, Tensor]) -> dict[str, Tensor] | None:
        names = list(found)
        if isinstance(self.other, OnnxRunner):
            inputs = self.other.inputs
            exported = [f"{name}_out" if name in inputs else name for name in expected]
            same_names = names in (expected, exported)
            strict = self.other.recorded is not None or sorted(names) == sorted(exported)
        else:
            same_names, strict = names == expected, True
        if len(names) != len(expected) or (strict and not same_names):
            self._problem(f"the outputs are {names} instead of {expected}")
        elif not same_names:
            self._note(f"outputs compared by position: {names} for {expected}")
        if len(names) != len(expected):
            return None
        return dict(zip(expected, found.values(), strict=True))

    def _problem(self, text: str) -> None:
        if text not in self.problems:
            self.problems.append(text)

    def _note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)

    def verdict(self) -> Verdict:
        """Weigh what was found."""
        outputs = tuple(self._judge(name, tally) for name, tally in self.tallies.items())
        if not outputs and not self.problems:
            self._problem("the network has no outputs to compare")
        for name, tally in self.tallies.items():
            if tally.count and not tally.varies:
                self._note(f"'{name}' is the same for every input: nothing before it was tested")
        return Verdict(
            ok=not self.problems and all(output.ok for output in outputs),
            reference=self.reference.name,
            candidate=self.candidate_name,
            provider=self.placement,
            outputs=outputs,
            problems=tuple(self.problems),
            notes=tuple(self.notes),
            inputs=tuple(self.labels),
            gate=self.gate,
        )

    def _judge(self, name: str, tally: Tally) -> OutputVerdict:
        found = None if tally.exact else errors(tally, self.gate)
        share = tally.differing / tally.count if tally.count else 0.0
        reason = tally.problem or _reason(
            tally, found, trust_limit({tally.dtype, *self.reference.dtypes})
        )
        return OutputVerdict(
            name=name,
            ok=not reason,
            dtype=str(tally.dtype).removeprefix("torch."),
            shape=self.shapes[name],
            count=tally.count,
            reference_error=found.reference if found else None,
            candidate_error=found.candidate if found else (share if tally.exact else None),
            ratios=found.ratios if found else (),
            reason=reason,
            varies=tally.varies,
        )


def _reason(tally: Tally, found: Errors | None, limit: float) -> str:
    if tally.differing:
        return f"{tally.differing} of {tally.count} values differ"
    if not tally.count:
        return "" if tally.sums else "no values were compared"
    if found is None:
        return ""
    if found.reference > limit:
        return (
            f"the reference's own error is {found.reference:.2g} of the output: "
            "it computes too inexactly to be compared with"
        )
    over = [f"{r.kind} ratio {r.value:.3g} > {r.limit:.2g}" for r in found.ratios if not r.ok]
    return "error beyond rounding: " + ", ".join(over) if over else ""


def _positional(tensors: list[Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return tuple(tensors), {}


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
    _check_arguments(reference, candidate, provider)
    seeds, batch_sizes = _whole("seeds", seeds, 0), _whole("batch_sizes", batch_sizes, 1)
    comparison = _Comparison(reference, candidate, provider, Gate(), None)
    return comparison.cases(inputs, seeds, batch_sizes)
