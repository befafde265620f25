"""The candidate of a comparison: a file or a module, run under the reference's names."""

from __future__ import annotations

import os
from pathlib import Path

from torch import Tensor, nn

from dropsurgery.errors import StochasticError
from dropsurgery.graph.signature import named_inputs
from dropsurgery.verify.cases import Case
from dropsurgery.verify.onnx_file import OnnxRunner, feeds_for
from dropsurgery.verify.providers import LEVELS
from dropsurgery.verify.run import DrawsInEval, ModuleRunner


class Candidate:
    """What is compared with the reference.

    Args:
        target: path of an ONNX file, or a module.
        provider: what onnxruntime runs the file on.
        level: how far onnxruntime optimises it; see `providers.LEVELS`.

    Attributes:
        module: the module; None for a file.
        runner: runs it.
        name: path or class.
        placement: what runs it.
    """

    def __init__(
        self,
        target: str | os.PathLike[str] | nn.Module,
        provider: str,
        level: str = LEVELS[-1],
    ) -> None:
        self.runner: OnnxRunner | ModuleRunner
        if isinstance(target, nn.Module):
            self.module: nn.Module | None = target
            self.runner = ModuleRunner(target, "candidate")
            self.name, self.placement = self.runner.name, str(self.runner.device)
        else:
            self.module = None
            self.runner = OnnxRunner(Path(target), provider, level)
            self.name, self.placement = os.fspath(target), self.runner.placement

    @property
    def file(self) -> OnnxRunner | None:
        """The runner of a file, or None for a module."""
        return self.runner if isinstance(self.runner, OnnxRunner) else None

    def run(self, model: nn.Module, case: Case, seed: int | None = None) -> dict[str, Tensor]:
        """Return the outputs on one input, under their own names.

        Args:
            model: the reference, whose signature says which argument is which input of a file.
            case: the input.
            seed: seeds the draws of a random module; None where none may draw.
        """
        if isinstance(self.runner, OnnxRunner):
            tensors = named_inputs(model, case.args, case.kwargs)
            return self.runner(feeds_for(self.runner.inputs, tensors))
        return self.runner(case) if seed is None else self.runner.drawn(case, seed)

    def matched(
        self, expected: list[str], found: dict[str, Tensor]
    ) -> tuple[dict[str, Tensor] | None, str, str]:
        """Return (outputs under the reference's names, or None; a problem; a note)."""
        names = list(found)
        if isinstance(self.runner, OnnxRunner):
            inputs = self.runner.inputs
            exported = [f"{name}_out" if name in inputs else name for name in expected]
            same_names = names in (expected, exported)
            strict = self.runner.recorded is not None or sorted(names) == sorted(exported)
        else:
            same_names, strict = names == expected, True
        problem = note = ""
        if len(names) != len(expected) or (strict and not same_names):
            problem = f"the outputs are {names} instead of {expected}"
        elif not same_names:
            note = f"outputs compared by position: {names} for {expected}"
        if len(names) != len(expected):
            return None, problem, note
        return dict(zip(expected, found.values(), strict=True)), problem, note

    def problems(self) -> list[str]:
        """Return what is wrong with a file before it runs."""
        if not isinstance(self.runner, OnnxRunner):
            return []
        return [
            f"train-mode BatchNormalization: {node} normalises each batch by itself"
            for node in self.runner.train_norms
        ]

    def refuse_draws(self) -> None:
        """Refuse an exact comparison with a file that draws.

        Raises:
            StochasticError: it does.
        """
        if isinstance(self.runner, OnnxRunner) and self.runner.draws:
            draws = self.runner.draws
            shown = ", ".join(map(str, draws[:5]))
            raise StochasticError(
                f"the file draws random numbers, in {len(draws)} "
                f"{'node' if len(draws) == 1 else 'nodes'}",
                where=shown + (f" and {len(draws) - 5} more" if len(draws) > 5 else ""),
                fix="stochastic=True compares means and variances of many runs; or export the "
                "network without its randomness",
            )

    def frozen_noise(self, model: nn.Module, error: DrawsInEval) -> StochasticError | None:
        """Return the error for a reference that draws where the file holds a constant, or None."""
        if not isinstance(self.runner, OnnxRunner) or self.runner.draws:
            return None
        constants = frozen_constants(self.runner, model, error.places)
        return StochasticError(
            "the reference draws random numbers in eval mode and the file draws none: its noise "
            "is frozen, or left out",
            where="; ".join([str(error.where), *constants]),
            fix="export with draws that are made like the input at run time "
            '(ds.ConvertDropout("monte-carlo")), or with the noise as an input',
        )


def frozen_constants(runner: OnnxRunner, model: nn.Module, places: dict[str, str]) -> list[str]:
    """Return, in words, the constants of a file that stand where modules of the network draw."""
    weights = {name for name, _ in [*model.named_parameters(), *model.named_buffers()]}
    return [text for path in places if path for text in runner.frozen(path, weights)]
