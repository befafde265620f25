"""The first module at which a candidate and a network part."""

from __future__ import annotations

import dataclasses
import itertools
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from dropsurgery.errors import DropsurgeryError, VerifyError
from dropsurgery.graph.signature import argument_list, first_line
from dropsurgery.verify.algebra import rounded_anew
from dropsurgery.verify.cases import Case
from dropsurgery.verify.compare import check_comparison, comparison_cases
from dropsurgery.verify.comparison import Progress
from dropsurgery.verify.location import Location
from dropsurgery.verify.marked import MarkedGraph
from dropsurgery.verify.optimizer import blame
from dropsurgery.verify.pieces import KnownPairs, Pieces
from dropsurgery.verify.recorded import RecordedGraph
from dropsurgery.verify.recording import Recording, record
from dropsurgery.verify.twin import told_by_file, told_by_module, twin

# More inputs, as a folder may hold, are not looked at.
_MOST_CASES = 32


def locate(
    reference: nn.Module,
    candidate: str | os.PathLike[str] | nn.Module,
    inputs: Any = None,
    *,
    surgered: nn.Module | None = None,
    provider: str = "cpu",
    seeds: Sequence[int] = (0, 1, 2),
    batch_sizes: Sequence[int] = (1, 3),
    progress: Progress | None = None,
) -> Location:
    """Say at which module an ONNX file, or another module, stops computing what a network computes.

    All values of the file are seen in one onnxruntime session and paired with the tensors of the
    network in eval mode, by the module paths that the exporter wrote into the file and by what the
    values are. In a second session every paired value is replaced by torch's own for whoever reads
    it, so that each piece between two pairs shows its own error, the *local* one, apart from what
    it was given. Local errors are measured as `verify` measures those of outputs: against float64,
    in multiples of torch's own. The first piece in order of execution whose local error is no
    rounding is the place. Inputs are tried in turn until one shows a place. The values of a module
    are seen by recording it in torch; where it holds the reference's own weights, it is compared in
    float64 as well.

    Surgery scales values, and merges layers, so that a value may have no twin in the original.
    Where it is known what was done, the candidate is therefore compared with the network *after*
    surgery: `surgered`, or the reference after the passes that the candidate tells of, which
    `export_onnx` writes into a file and a network of `slim` or `apply` holds. If they agree, the
    place is where that network and the reference part.

    The file's graph runs without onnxruntime's optimiser, which would leave values out. Where that
    shows no place, and the optimised graph is wrong, this is said. The modules are not changed.
    Needs memory for all activations of one input, about four times over.

    Args:
        reference: the original network.
        candidate: path of an ONNX file, or a module. Where it does not tell the modules of its
            nodes, values are paired by what they hold, and modules are told by the reference.
        inputs, provider, seeds, batch_sizes, progress: as in `verify`.
        surgered: the network that the file was exported from, where that is not the reference.

    Raises:
        VerifyError, ProviderError, ArgumentError, ArgumentTypeError: as in `verify`.
    """
    return search(
        reference,
        candidate,
        inputs,
        surgered=surgered,
        provider=provider,
        seeds=seeds,
        batch_sizes=batch_sizes,
        progress=progress,
    )[0]


def search(
    reference: nn.Module,
    candidate: str | os.PathLike[str] | nn.Module,
    inputs: Any,
    *,
    surgered: nn.Module | None,
    provider: str,
    seeds: Sequence[int],
    batch_sizes: Sequence[int],
    progress: Progress | None,
) -> tuple[Location, Pieces | None]:
    """Do as `locate` does; return the values of the input that showed the place as well."""
    check_comparison(reference, candidate, provider, surgered)
    of: _File | _Module
    of = _Module(candidate) if isinstance(candidate, nn.Module) else _File(candidate, provider)
    made = of.cases(reference, inputs, provider=provider, seeds=seeds, batch_sizes=batch_sizes)
    cases = sorted(itertools.islice(made, _MOST_CASES), key=_order)
    middle = twin(reference, of.history) if surgered is None else surgered
    try:
        found = None if middle is None else _first(middle, of, cases, progress)
    except VerifyError:
        if surgered is not None:
            raise
        found = None  # after these passes the network takes other inputs than before
    if middle is None or found is None:
        return _excused(reference, of, cases, *_first(reference, of, cases, progress))
    location, pieces = found
    if location.found:
        return _noted(location, "compared with the network after its surgery"), pieces
    if isinstance(of, _Module):
        return _first(reference, of, cases, progress)
    before, _ = _first(reference, _Module(middle), cases, progress)
    if before.found:  # no nodes of the file show it
        return _noted(before, "the file is what the network is after its surgery"), None
    return _excused(middle, of, cases, location, None)


def _noted(location: Location, note: str) -> Location:
    return dataclasses.replace(location, notes=(*location.notes, note))


class _File:
    """A file that is searched.

    Attributes:
        history: what it tells of the network that it was exported from.
    """

    def __init__(self, path: str | os.PathLike[str], provider: str) -> None:
        self.path, self.provider = Path(path), provider
        self.graph = MarkedGraph(self.path, provider)
        self.history = told_by_file(self.graph.metadata)

    def cases(self, reference: nn.Module, inputs: Any, **options: Any) -> Iterator[Case]:
        """Yield what `verify` compares, whether the file loads or not."""
        with tempfile.TemporaryDirectory() as folder:
            stand_in = self.graph.save_inputs(Path(folder))
            yield from comparison_cases(reference, stand_in, inputs, **options)

    def pieces(
        self, reference: nn.Module, recording: Recording, case: Case, known: KnownPairs
    ) -> Iterator[Pieces]:
        """Yield the values of both sides."""
        yield Pieces(recording, self.graph, case, known)


class _Module:
    """A module that is searched.

    Attributes:
        history: what was done to it.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.history = told_by_module(module)

    def cases(self, reference: nn.Module, inputs: Any, **options: Any) -> Iterator[Case]:
        """Yield what `verify` compares."""
        return comparison_cases(reference, self.module, inputs, **options)

    def pieces(
        self, reference: nn.Module, recording: Recording, case: Case, known: KnownPairs
    ) -> Iterator[Pieces]:
        """Yield the values of both sides, then those in float64 where nothing was rounded anew."""
        try:
            other = record(self.module, case)
        except DropsurgeryError:
            raise
        except Exception as error:
            raise VerifyError(
                f"the candidate does not accept the inputs: {first_line(error)}",
                where=f"{type(self.module).__name__}, {case.label}",
                fix=f"pass inputs=; {argument_list(self.module)}",
            ) from error
        graph = RecordedGraph(other, {path for path, _ in reference.named_modules()})
        yield Pieces(recording, graph, case, KnownPairs())
        if rounded_anew(reference, self.module) is None:
            yield Pieces(recording.in_float64(), graph.in_float64(), case, KnownPairs())


def _first(
    reference: nn.Module, of: _File | _Module, cases: Sequence[Case], progress: Progress | None
) -> tuple[Location, Pieces | None]:
    """Return the first place that a case shows, or that there is none."""
    location, known = None, KnownPairs()
    for case in cases:
        if progress is not None:
            progress(f"looking for the place: {case.label}")
        recording = _recorded(reference, case)
        if recording is None:
            continue
        for pieces in of.pieces(reference, recording, case, known):
            place = pieces.location()
            if place.found:
                return place, pieces
            location = place if location is None else location
    assert location is not None  # the first case is not optional
    return location, None


def _excused(
    reference: nn.Module,
    of: _File | _Module,
    cases: Sequence[Case],
    location: Location,
    pieces: Pieces | None,
) -> tuple[Location, Pieces | None]:
    """Return a place, or that a file has none since it is onnxruntime's optimiser that errs."""
    if not location.found and isinstance(of, _File):
        reason = blame(reference, of.path, of.provider, cases)
        location = dataclasses.replace(location, reason=reason)
    return location, pieces


def _tensors(case: Case) -> list[Tensor]:
    leaves = pytree.tree_leaves((case.args, dict(case.kwargs)))
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


def _order(case: Case) -> tuple[bool, int]:
    """Put large batches first: pairs are told from them, where no axis of size 1 can be moved."""
    rows = [t.shape[0] for t in _tensors(case) if t.ndim]
    return case.faint, -max(rows, default=0)


def _recorded(reference: nn.Module, case: Case) -> Recording | None:
    """Run the reference on one input; None where it may refuse it and does."""
    try:
        return record(reference, case)
    except DropsurgeryError:
        raise
    except Exception as error:
        if case.optional:
            return None
        raise VerifyError(
            f"the reference does not accept the inputs: {first_line(error)}",
            where=f"{type(reference).__name__}, {case.label}",
            fix=f"pass inputs=; {argument_list(reference)}",
        ) from error
