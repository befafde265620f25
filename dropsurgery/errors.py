"""Typed errors. Each says what is wrong, where, and what to do about it."""

from __future__ import annotations


class DropsurgeryError(Exception):
    """Base of every error that dropsurgery raises on purpose.

    Args:
        problem: one sentence, what is wrong.
        where: the module path, node, file or shapes it is about.
        fix: what the caller can do.
    """

    def __init__(self, problem: str, *, where: str | None = None, fix: str | None = None) -> None:
        self.problem = problem
        self.where = where
        self.fix = fix
        lines = [problem]
        if where:
            lines.append(f"  where: {where}")
        if fix:
            lines.append(f"  fix: {fix}")
        super().__init__("\n".join(lines))

    def __reduce__(self) -> tuple[object, ...]:
        # Exception's own reduce would pass the joined message as `problem`.
        return (_rebuild, (type(self), self.problem, self.where, self.fix))


def _rebuild(
    cls: type[DropsurgeryError], problem: str, where: str | None, fix: str | None
) -> DropsurgeryError:
    return cls(problem, where=where, fix=fix)


class ArgumentError(DropsurgeryError, ValueError):
    """An argument has a value that cannot be used."""


class ArgumentTypeError(DropsurgeryError, TypeError):
    """An argument has a type that cannot be used."""


class TraceError(DropsurgeryError):
    """The network cannot be turned into a graph."""


class PassError(DropsurgeryError):
    """A pass was asked for something that this network does not allow."""


class ModelLoadError(DropsurgeryError):
    """A model, a weights file or a saved surgery could not be found or read."""


class ExportError(DropsurgeryError):
    """The network cannot be exported to ONNX, or the result could not be written."""


class VerifyError(DropsurgeryError):
    """A comparison could not be carried out (which is not the same as a failed one)."""


class OnnxFileError(VerifyError):
    """An ONNX file is missing, damaged or incomplete, so that it cannot be read."""


class UnsafeFileError(OnnxFileError):
    """An ONNX file would reach out of its folder, or take more memory than its size explains."""


class StochasticError(VerifyError):
    """A network or a file draws random numbers, so that single runs of it cannot be compared."""


class ProviderError(VerifyError):
    """The onnxruntime execution provider that was asked for is missing or was not used."""
