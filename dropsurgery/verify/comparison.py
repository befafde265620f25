"""A comparison while it runs: both sides on every input, and what the errors add up to."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable

from torch import Tensor, nn

from dropsurgery.errors import ArgumentTypeError, DropsurgeryError, VerifyError
from dropsurgery.graph.signature import argument_list, first_line, named_inputs, shapes
from dropsurgery.verify.algebra import distance, rounded_anew
from dropsurgery.verify.candidate import Candidate
from dropsurgery.verify.cases import Case
from dropsurgery.verify.environment import environment
from dropsurgery.verify.gate import Gate
from dropsurgery.verify.outcome import Record, judge_samples
from dropsurgery.verify.providers import LEVELS
from dropsurgery.verify.run import DrawsInEval, ModuleRunner
from dropsurgery.verify.stochastic import Samples
from dropsurgery.verify.verdict import Verdict

Progress = Callable[[str], None]


class Comparison:
    """One comparison while it runs; it keeps sums, and no outputs."""

    def __init__(
        self,
        reference: nn.Module,
        candidate: str | os.PathLike[str] | nn.Module,
        surgered: nn.Module | None,
        provider: str,
        gate: Gate,
        progress: Progress | None,
        *,
        level: str = LEVELS[-1],
    ) -> None:
        # The module that rounding is measured against, and the one before surgery, if there is one.
        self.model = reference if surgered is None else surgered
        self.gate = gate
        self.progress = progress
        self.other = Candidate(candidate, provider, level)
        self.reference = ModuleRunner(self.model, "reference")
        self.origin = None if surgered is None else ModuleRunner(reference, "reference")
        after = self.other.module or surgered
        self.rounded = None if after is None else rounded_anew(reference, after)
        self.name = type(reference).__name__
        if surgered is not None:
            self.name += f" by way of the surgered {type(surgered).__name__}"
        self.records: dict[str, Record] = {}
        self.samples: dict[str, list[Samples]] = {}
        self.problems: list[str] = self.other.problems()
        self.notes: list[str] = []
        self.labels: list[str] = []
        self.last: Case | None = None

    def run(self, cases: Iterable[Case]) -> None:
        """Run both sides on every case and add up the errors."""
        for case in cases:
            if self.progress is not None:
                self.progress(case.label)
            native = self._reference(case)
            if native is None:
                continue
            wide = self._float64(case)
            if left_out := self._left_out(case, native, wide):
                self._note(f"left out, {left_out}: {case.label}")
                continue
            self.labels.append(case.label)
            self.last = case
            found = self._candidate(case, list(native))
            if found is None:
                continue
            for name, output in native.items():
                record = self.records.setdefault(name, Record.of(name, output))
                record.add(output, wide[name], found[name], case.label)
            self._algebra(case, native, wide)

    def _left_out(
        self, case: Case, native: dict[str, Tensor], wide: dict[str, Tensor]
    ) -> str | None:
        """Return why nothing can be told from a case, or None."""
        if any(native[name].shape != wide[name].shape for name in native):
            return "the shape of an output depends on rounding"
        floats = [t for t in native.values() if t.is_floating_point()]
        if case.optional and any(t.isnan().any() for t in floats):
            return "the reference returns NaN on it"
        if case.faint and not self._keeps_digits(native, wide):
            return "the reference loses digits on it"
        return None

    def _algebra(self, case: Case, native: dict[str, Tensor], wide: dict[str, Tensor]) -> None:
        """Compare the two modules in float64, where there are two."""
        if self.origin is not None:
            before = self._float64(case, self.origin)
            if list(before) != list(wide):
                self._problem(f"surgery turned the outputs {list(before)} into {list(wide)}")
                return
            pairs = {name: (before[name], wide[name]) for name in wide}
        elif isinstance(self.other.runner, ModuleRunner):
            try:
                after = self.other.runner.float64(case)
            except Exception as error:
                self._note(f"no float64 run of the candidate: {first_line(error)}")
                return
            pairs = dict(zip(wide, zip(wide.values(), after.values(), strict=True), strict=True))
        else:
            return
        for name, (exact, other) in pairs.items():
            own = distance(wide[name], native[name])
            self.records[name].add_algebra(exact, other, own, case.label)

    def _float64(self, case: Case, runner: ModuleRunner | None = None) -> dict[str, Tensor]:
        runner = runner or self.reference
        try:
            return runner.float64(case)
        except DropsurgeryError:
            raise
        except Exception as error:
            raise VerifyError(
                f"the reference does not run in float64: {first_line(error)}",
                where=runner.name,
                fix="verify on the CPU, without quantised or half-only operators",
            ) from error

    def _keeps_digits(self, native: dict[str, Tensor], wide: dict[str, Tensor]) -> bool:
        """Say whether the reference is as exact on faint inputs as on the others.

        A network that subtracts its mean from what hardly varies is not: there the candidate's
        rounding may differ by anything. Nor does a rank or a threshold survive such inputs.
        """
        known = [self.records.get(name) for name in native]
        return all(
            record is not None and record.tally.keeps_digits(native[name], wide[name])
            for name, record in zip(native, known, strict=True)
        )

    def _reference(self, case: Case, seed: int | None = None) -> dict[str, Tensor] | None:
        try:
            return self.reference(case) if seed is None else self.reference.drawn(case, seed)
        except DrawsInEval as error:
            raise self.other.frozen_noise(self.model, error) or error from error
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

    def _candidate(
        self, case: Case, expected: list[str], seed: int | None = None
    ) -> dict[str, Tensor] | None:
        """Run the candidate; return its outputs under the reference's names."""
        try:
            found = self.other.run(self.model, case, seed)
        except DropsurgeryError:
            raise
        except Exception as error:
            self._problem(f"the candidate fails on {case.label}: {first_line(error)}")
            return None
        outputs, problem, note = self.other.matched(expected, found)
        if problem:
            self._problem(problem)
        if note:
            self._note(note)
        return outputs

    def _problem(self, text: str) -> None:
        if text not in self.problems:
            self.problems.append(text)

    def _note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)

    def sample(self, cases: Iterable[Case], runs: int) -> None:
        """Run both sides many times on every case and add up the moments."""
        for case in cases:
            if self.progress is not None:
                self.progress(f"{case.label}, {runs} runs")
            self.labels.append(f"{case.label}, {runs} runs")
            first = len(self.labels) == 1
            here: dict[str, Samples] = {}
            for run in range(runs):
                native = self._reference(case, seed=run)
                found = (
                    None if native is None else self._candidate(case, list(native), seed=runs + run)
                )
                if native is None or found is None:
                    return
                for name, output in native.items():
                    if first and not run:
                        self.records.setdefault(name, Record.of(name, output))
                    here.setdefault(name, Samples.of(output)).add(output, found[name], case.label)
            for name, samples in here.items():
                self.samples.setdefault(name, []).append(samples)

    def verdict(self, notes: Iterable[str] = ()) -> Verdict:
        """Weigh what was found.

        Args:
            notes: what else a reader should know.
        """
        for note in notes:
            self._note(note)
        if self.samples:
            outputs = judge_samples(self.records, self.samples)
        else:
            outputs = tuple(
                record.judge(self.gate, dtypes=self.reference.dtypes, rounded=self.rounded)
                for record in self.records.values()
            )
        if not outputs and not self.problems:
            self._problem("the network has no outputs to compare")
        ok = not self.problems and all(output.ok for output in outputs)
        if not ok and not self.samples:
            self._note_unsteady()
        for output in outputs:
            if output.count and not output.varies:
                self._note(
                    f"'{output.name}' is the same for every input: nothing before it was tested"
                )
        return Verdict(
            ok=ok,
            reference=self.name,
            candidate=self.other.name,
            provider=self.other.placement,
            outputs=outputs,
            problems=tuple(self.problems),
            notes=tuple(self.notes),
            inputs=tuple(self.labels),
            gate=self.gate,
            environment=environment(
                onnx_file=self.other.file is not None, device=self.reference.device
            ),
        )

    def _note_unsteady(self) -> None:
        """Say which side returns something else when it is called again, where one does.

        Numbers from another generator than torch's, or memory that nobody wrote to, are no defect
        of the export.
        """
        case = self.last
        if case is None:
            return
        runs: dict[str, Callable[[], dict[str, Tensor]]] = {
            "reference": lambda: self.reference(case),
            "candidate": lambda: self.other.run(self.model, case),
        }
        for role, run in runs.items():
            try:
                first, second = run(), run()
            except Exception:  # that it fails is told already
                continue
            if any(not _alike(first[name], second[name]) for name in first):
                self._note(f"the {role} returns other values when it is called again: {case.label}")


def _alike(one: Tensor, other: Tensor) -> bool:
    """Say whether two outputs are the same, NaN and all."""
    return one.shape == other.shape and bool(((one == other) | (one != one)).all())
