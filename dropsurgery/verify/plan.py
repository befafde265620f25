"""Which inputs a comparison runs: the caller's own, or made up to fit the network."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn

from dropsurgery.errors import DropsurgeryError, VerifyError
from dropsurgery.graph.signature import argument_list, signature
from dropsurgery.verify.candidate import Candidate
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
from dropsurgery.verify.run import ModuleRunner


class Plan:
    """The inputs of one comparison.

    Args:
        model: the reference.
        reference: runs it.
        other: the candidate.
    """

    def __init__(self, model: nn.Module, reference: ModuleRunner, other: Candidate) -> None:
        self.model = model
        self.reference = reference
        self.other = other

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
            yield from given_cases(inputs)
        else:
            yield from self._usual_cases(None, seeds, batch_sizes[-1:])

    def _usual_cases(
        self, inputs: Any, seeds: tuple[int, ...], batch_sizes: tuple[int, ...]
    ) -> Iterator[Case]:
        if inputs is not None:
            given = given_cases(inputs)
            open_batch = self.other.file is None or self.other.file.open_batch
            yield from given
            yield from variations(given[0], seeds, batch_sizes if open_batch else None)
        elif self.other.file is not None:
            specs = self.other.file.specs(self.model)
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
        for module in (self.other.module, self.model):
            specs = None if module is None else recorded_specs(module)
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


def _positional(tensors: list[Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return tuple(tensors), {}
