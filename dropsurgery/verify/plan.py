"""Which inputs a comparison runs: the caller's own, or made up to fit the network."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from dropsurgery.errors import DropsurgeryError, VerifyError
from dropsurgery.graph.signature import argument_list, signature
from dropsurgery.verify.axes import first_sizes, swept_sizes
from dropsurgery.verify.candidate import Candidate
from dropsurgery.verify.cases import Case, Spec, faint, other_symbols, random_cases
from dropsurgery.verify.given import given_cases, variations
from dropsurgery.verify.onnx_file import OnnxRunner
from dropsurgery.verify.run import ModuleRunner
from dropsurgery.verify.specs import bounded, guessed_specs, recorded_specs

Bind = Callable[[list[Tensor]], tuple[tuple[Any, ...], dict[str, Any]]]


class Plan:
    """The inputs of one comparison.

    Args:
        model: the reference.
        reference: runs it.
        other: the candidate.

    Attributes:
        notes: what could not be tried, in words; complete when the cases have run out.
    """

    def __init__(self, model: nn.Module, reference: ModuleRunner, other: Candidate) -> None:
        self.model = model
        self.reference = reference
        self.other = other
        self.notes: list[str] = []

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

    def plain_cases(
        self, inputs: Any, seeds: tuple[int, ...], batch_sizes: tuple[int, ...]
    ) -> Iterator[Case]:
        """Yield the caller's calls as they are, or one for each seed in the last batch size."""
        if inputs is not None:
            yield from given_cases(inputs, signature(self.model).parameters)
        else:
            yield from self._usual_cases(None, seeds, batch_sizes[-1:])

    def _usual_cases(
        self, inputs: Any, seeds: tuple[int, ...], batch_sizes: tuple[int, ...]
    ) -> Iterator[Case]:
        if inputs is not None:
            yield from self._given(inputs, seeds, batch_sizes)
        elif self.other.file is not None:
            yield from self._of_file(self.other.file, seeds, batch_sizes)
        else:
            specs = self._bounded(self._module_specs(), _positional, {})
            yield from random_cases(specs, seeds, batch_sizes, _positional, optional=True)

    def _given(
        self, inputs: Any, seeds: tuple[int, ...], batch_sizes: tuple[int, ...]
    ) -> Iterator[Case]:
        """Yield the caller's calls one by one, then variations of the first."""
        first = None
        for case in given_cases(inputs, signature(self.model).parameters):
            first = first or case
            yield case
        assert first is not None
        file = self.other.file
        open_batch = file is None or file.open_batch
        yield from variations(first, seeds, batch_sizes if open_batch else None)
        for name in other_symbols(file.open_shapes()) if file is not None else ():
            self.notes.append(
                f"the file's axis '{name}' was tried in the sizes of your inputs only"
            )

    def _of_file(
        self, file: OnnxRunner, seeds: tuple[int, ...], batch_sizes: tuple[int, ...]
    ) -> Iterator[Case]:
        """Yield random calls that fit what the file declares, then a sweep of each open axis."""
        specs = file.specs(self.model)
        bind = self._binder([spec.name for spec in specs])

        def accepts(sizes: Mapping[str, int]) -> bool:
            case = next(random_cases(specs, (0,), batch_sizes, bind, optional=False, sizes=sizes))
            return self._accepted(case)

        base = first_sizes(specs, accepts, self.reference.name)
        specs = self._bounded(specs, bind, base)
        yield from random_cases(specs, seeds, batch_sizes, bind, optional=False, sizes=base)
        for name in base:
            tried = 0
            for sizes in swept_sizes(name, base, accepts):
                tried += 1
                for case in random_cases(
                    specs, seeds[:1], batch_sizes[-1:], bind, optional=True, sizes=sizes
                ):
                    yield replace(case, optional=True)
            if not tried:
                self.notes.append(
                    f"the file's axis '{name}' was tried in one size, {base[name]}: the reference "
                    "accepts no other that was tried"
                )

    def _accepted(self, case: Case) -> bool:
        """Say whether the reference runs on a case and returns numbers."""
        try:
            outputs = self.reference.drawn(case, 0)  # whether it may draw is asked later
        except DropsurgeryError:
            raise
        except Exception:
            return False
        return not any(t.is_floating_point() and t.isnan().any() for t in outputs.values())

    def _bounded(self, specs: list[Spec], bind: Bind, sizes: Mapping[str, int]) -> list[Spec]:
        """Bound token ids by the table that they are looked up in, as a first run tells."""
        if not any(spec.integer for spec in specs):
            return specs
        tensors: list[Tensor] = []

        def kept(drawn: list[Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
            tensors[:] = [tensor.clone() for tensor in drawn]
            return bind(drawn)

        case = next(random_cases(specs, (0,), (2,), kept, optional=False, sizes=sizes))
        try:
            return bounded(specs, tensors, lambda: self.reference.drawn(case, 0))
        except DropsurgeryError:
            raise
        except Exception:  # a batch of two may be refused; the first case will tell
            return specs

    def _binder(self, names: list[str]) -> Bind:
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
        for module in (self.other.module, self.model):
            specs = None if module is None else recorded_specs(module)
            if specs is not None:
                return specs
        tried = guessed_specs(self.model)
        for specs in tried:
            case = next(random_cases(specs, (0,), (1,), _positional, optional=False))
            if self._accepted(case):
                return specs
        sizes = ", ".join(dict.fromkeys(str((1, *specs[0].shape[1:])) for specs in tried))
        raise VerifyError(
            "the reference accepts none of the usual inputs",
            where=f"{self.reference.name}, tried {sizes}",
            fix="pass inputs=, a tensor or a tuple of forward's arguments",
        )


def _positional(tensors: list[Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return tuple(tensors), {}
