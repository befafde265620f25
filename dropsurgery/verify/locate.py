"""The first module at which a candidate and a network part."""

from __future__ import annotations

import itertools
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from dropsurgery.errors import ArgumentTypeError, DropsurgeryError, VerifyError
from dropsurgery.graph.signature import argument_list, first_line
from dropsurgery.verify import providers
from dropsurgery.verify.cases import Case
from dropsurgery.verify.compare import comparison_cases
from dropsurgery.verify.comparison import Progress
from dropsurgery.verify.location import Location
from dropsurgery.verify.marked import MarkedGraph
from dropsurgery.verify.pieces import KnownPairs, Pieces
from dropsurgery.verify.recording import record

# More inputs, as a folder may hold, are not looked at.
_MOST_CASES = 32


def locate(
    reference: nn.Module,
    candidate: str | os.PathLike[str],
    inputs: Any = None,
    *,
    provider: str = "cpu",
    seeds: Sequence[int] = (0, 1, 2),
    batch_sizes: Sequence[int] = (1, 3),
    progress: Progress | None = None,
) -> Location:
    """Say at which module an ONNX file stops computing what a network computes in eval mode.

    All values of the file are seen in one onnxruntime session and paired with the tensors of the
    network, by the module paths that the exporter wrote into the file and by what the values are.
    In a second session every paired value is replaced by torch's own for whoever reads it, so that
    each piece between two pairs shows its own error, the *local* one, apart from what it was given.
    Local errors are measured as `verify` measures those of outputs: against float64, in multiples
    of torch's own. The first piece in order of execution whose local error is no rounding is the
    place. Inputs are tried in turn until one shows a place.

    `slim` moves scales and shifts through values, which then have no twin in the original network.
    A difference may be put down to such a value; with the slim network as the reference, the place
    in a file of it is exact.

    The file's graph runs without onnxruntime's optimiser, which would leave values out. The network
    is not changed. Needs memory for all activations of one input, about four times over.

    Args:
        reference: the original network.
        candidate: path of an ONNX file. Where it does not tell the modules of its nodes, values are
            paired by what they hold, and modules are told by torch.
        inputs, provider, seeds, batch_sizes, progress: as in `verify`.

    Raises:
        VerifyError, ProviderError, ArgumentError, ArgumentTypeError: as in `verify`.
    """
    return search(
        reference,
        candidate,
        inputs,
        provider=provider,
        seeds=seeds,
        batch_sizes=batch_sizes,
        progress=progress,
    )[0]


def search(
    reference: nn.Module,
    candidate: str | os.PathLike[str],
    inputs: Any,
    *,
    provider: str,
    seeds: Sequence[int],
    batch_sizes: Sequence[int],
    progress: Progress | None,
) -> tuple[Location, Pieces | None]:
    """Do as `locate` does; return the values of the input that showed the place as well."""
    if not isinstance(candidate, str | os.PathLike):
        raise ArgumentTypeError(
            f"the candidate is the path of an ONNX file, got {type(candidate).__name__}",
            fix="export the module first; verify compares modules",
        )
    providers.check(provider)
    graph, known = MarkedGraph(Path(candidate), provider), KnownPairs()
    with tempfile.TemporaryDirectory() as folder:
        # The file itself may not load.
        stand_in = graph.save_inputs(Path(folder))
        found = comparison_cases(
            reference, stand_in, inputs, provider=provider, seeds=seeds, batch_sizes=batch_sizes
        )
        cases = list(itertools.islice(found, _MOST_CASES))
    location = None
    for case in sorted(cases, key=_order):
        if progress is not None:
            progress(f"looking for the place: {case.label}")
        here = _examine(reference, graph, case, known)
        if here is not None:
            place = here.location()
            if place.found:
                return place, here
            location = location or place
    assert location is not None
    return location, None


def _tensors(case: Case) -> list[Tensor]:
    leaves = pytree.tree_leaves((case.args, dict(case.kwargs)))
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


def _order(case: Case) -> tuple[bool, int]:
    """Put large batches first: pairs are told from them, where no axis of size 1 can be moved."""
    rows = [t.shape[0] for t in _tensors(case) if t.ndim]
    return case.faint, -max(rows, default=0)


def _examine(
    reference: nn.Module, graph: MarkedGraph, case: Case, known: KnownPairs
) -> Pieces | None:
    """Run both sides on one input; None where the reference does not accept it."""
    try:
        recording = record(reference, case)
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
    return Pieces(recording, graph, case, known)
