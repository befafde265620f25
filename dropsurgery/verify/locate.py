"""The first module at which a candidate and a network part."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from dropsurgery.errors import ArgumentTypeError, DropsurgeryError, VerifyError
from dropsurgery.graph.signature import argument_list, first_line
from dropsurgery.verify.cases import Case
from dropsurgery.verify.compare import comparison_cases
from dropsurgery.verify.comparison import Progress
from dropsurgery.verify.gate import Gate, Tally, errors
from dropsurgery.verify.location import Location, Step
from dropsurgery.verify.marked import MarkedGraph, Node, RunError
from dropsurgery.verify.onnx_file import feeds_for
from dropsurgery.verify.pairing import Pairing, expected_pairs
from dropsurgery.verify.recording import Recording, Ref, Replay, record

# One operation may be exact in torch, by luck or because it only moves data, and a few units of
# rounding off in another runtime, whose exponentials are polynomials of its own.
LOCAL_GATE = Gate(rmse=4.0, maximum=10.0, typical=8.0, mean=8.0, floor=8.0)

# Operations that move data and compute nothing, of ONNX and of torch.
_VIEWS = {"Cast", "Expand", "Flatten", "Identity", "Reshape", "Slice", "Split", "Squeeze"}
_VIEWS |= {"Transpose", "Unsqueeze"}
_MOVES = {"view", "_unsafe_view", "t", "transpose", "permute", "expand", "clone", "squeeze"}
_MOVES |= {"unsqueeze"}


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
    if not isinstance(candidate, str | os.PathLike):
        raise ArgumentTypeError(
            f"the candidate is the path of an ONNX file, got {type(candidate).__name__}",
            fix="export the module first; verify compares modules",
        )
    cases = comparison_cases(
        reference, candidate, inputs, provider=provider, seeds=seeds, batch_sizes=batch_sizes
    )
    graph = MarkedGraph(Path(candidate), provider)
    location = None
    for case in cases:
        if progress is not None:
            progress(f"looking for the place: {case.label}")
        found = examine(reference, graph, case)
        if found is not None and (location is None or found.found):
            location = found
        if found is not None and found.found:
            break
    assert location is not None
    return location


def examine(reference: nn.Module, graph: MarkedGraph, case: Case) -> Location | None:
    """Look for the place on one input; None where the reference does not accept it."""
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
    return Comparison(recording, graph, case).location()


class Comparison:
    """One input's values on both sides.

    Args:
        recording: the reference's run.
        graph: the candidate.
        case: the input.

    Attributes:
        pairs: the tensors of the reference by names of the candidate's values.
        values: the candidate's values as it computed them from the input.
        local: its paired values as it computed them from torch's own.
        failure: what onnxruntime said where the graph does not run, and the node it blames.
    """

    def __init__(self, recording: Recording, graph: MarkedGraph, case: Case) -> None:
        self.recording = recording
        self.graph = graph
        self.case = case
        tensors = {name: recording.native(ref) for name, ref in recording.inputs.items()}
        self.feeds = feeds_for(graph.inputs, tensors)
        self.failure: RunError | None = None
        self.makers = {name: node for node in graph.nodes for name in node.outputs}
        self.values = self._run()
        by_name = feeds_for(graph.inputs, recording.inputs)
        expected = expected_pairs(graph.nodes, graph.outputs, recording)
        pairing = Pairing(recording, expected)
        found = pairing.pair(graph.nodes, self.values, by_name)
        origins = {name: recording.origin(ref) for name, ref in found.items()}
        self._errors = {name: self._error(name, ref) for name, ref in origins.items()}
        unlike = {n for n, ref in origins.items() if not pairing.near(self.values[n], ref)}
        self.pairs = origins if self.failure else self._without_detours(origins, unlike)
        self.local = self._run_fed()

    def _run(self) -> dict[str, Tensor]:
        try:
            return self.graph.run(self.feeds)
        except RunError as error:
            self.failure = error
        try:
            return self.graph.run_before(self.failure.node or "", self.feeds)
        except RunError:
            return {}

    def _run_fed(self) -> dict[str, Tensor]:
        cuts = {}
        for name, ref in self.pairs.items():
            value, native = self.values[name], self.recording.native(ref)
            native = native.to(value.dtype)
            cuts[name] = native.reshape(value.shape) if value.numel() == native.numel() else native
        try:
            return self.graph.run_fed(self.feeds, cuts)
        except RunError:
            return {}  # what stands behind the defect cannot take torch's shapes

    def _without_detours(self, pairs: dict[str, Ref], unlike: set[str]) -> dict[str, Ref]:
        """Take out pairs that are not alike though all that is computed from them is right.

        The value was told by its place in a module, and is another one there: an exporter moved a
        transposition out of the module, say.
        """
        wrong = {name for name in pairs if self._errors[name][2] > 1}
        harmful = (wrong - unlike) | (wrong & set(self.graph.outputs))
        for node in reversed(self.graph.nodes):
            if any(name in harmful for name in node.outputs):
                harmful.update(n for n in node.inputs if n not in pairs or n in unlike)
        return {name: ref for name, ref in pairs.items() if name in harmful or name not in unlike}

    def _error(self, name: str, ref: Ref) -> tuple[float, float, float]:
        """Return a value's accumulated error, torch's own, and their ratio over its limit."""
        value = self.values[name]
        native, wide = self.recording.native(ref), self.recording.wide(ref)
        if value.numel() != native.numel():
            return float("inf"), 0.0, float("inf")
        tally = Tally(native.dtype)
        tally.add(native, wide, value.reshape(native.shape).to(native.dtype), self.case.label)
        return _weigh(tally)[:3]

    def steps(self) -> Iterator[Step]:
        """Yield one step for each pair, in order of execution."""
        cut = set(self.pairs.values())

        def known(ref: Ref) -> Tensor | None:
            return self.recording.native(ref) if self.recording.origin(ref) in cut else None

        for name, ref in self.pairs.items():
            event = self.recording.events[ref.event]
            error, own, _ = self._errors[name]
            replay = self.recording.replay(ref, known, wide=True)
            local, local_own, ratio, reason = self._local(name, ref, replay)
            node, path = self._blamed(name, ref, replay)
            yield Step(
                module=path,
                node=node.name,
                op=node.op,
                value=name,
                torch=f"{event.path or 'the root'}: {event.name}",
                shape=tuple(self.recording.native(ref).shape),
                local=local,
                local_own=local_own,
                ratio=ratio,
                accumulated=error,
                accumulated_own=own,
                reason=reason,
            )

    def _local(self, name: str, ref: Ref, replay: Replay) -> tuple[float, float, float, str]:
        native = self.recording.native(ref)
        value = self.local.get(name, self.values[name])
        if value.numel() != native.numel():
            reason = f"shape {tuple(value.shape)} instead of {tuple(native.shape)}"
            return float("inf"), 0.0, float("inf"), reason
        # Where a tensor on the way was written to in place, nothing tells what it was made of.
        wide = self.recording.wide(ref) if replay.opaque else replay.values[ref]
        tally = Tally(native.dtype)
        tally.add(native, wide, value.reshape(native.shape).to(native.dtype), self.case.label)
        return _weigh(tally)

    def piece(self, name: str) -> list[Node]:
        """Return the nodes that compute a value from other paired values, in order."""
        wanted, found = {name}, []
        for node in reversed(self.graph.nodes):
            if wanted.intersection(node.outputs):
                found.append(node)
                wanted.update(other for other in node.inputs if other not in self.pairs)
        return found[::-1]

    def _blamed(self, name: str, ref: Ref, replay: Replay) -> tuple[Node, str]:
        """Return the node of a piece that a wrong result is put down to, and its module."""
        nodes = self.piece(name)
        computing = [node for node in nodes if node.op not in _VIEWS] or nodes[-1:]
        node = computing[-1]
        if node.path is not None:
            return node, node.path
        if len(computing) == 1:
            return node, self.recording.events[ref.event].path
        # Nothing behind the defect has a partner: the piece goes on to the end of the network, and
        # what is wrong stands at its beginning.
        first = min(replay.events, default=ref.event, key=lambda event: (self._moves(event), event))
        return nodes[0], self.recording.events[first].path

    def _moves(self, event: int) -> bool:
        """Say whether an operation of the reference only moves data."""
        return self.recording.events[event].name in _MOVES

    def location(self) -> Location:
        """Weigh all steps and find the first that is wrong."""
        steps = tuple(self.steps())
        first = next((step for step in steps if not step.ok), None)
        reason, notes = "", []
        if first is not None:
            reason = first.reason
        else:
            first, reason = self._beyond_numbers()
        if self.failure is not None:
            notes.append(f"the graph does not run: {self.failure}")
        if not self.graph.named:
            notes.append("the file does not tell the modules of its nodes: paired by value")
        return Location(
            found=first is not None,
            module=first.module if first else "",
            step=first,
            reason=reason,
            case=self.case.label,
            steps=steps,
            notes=tuple(notes),
        )

    def _beyond_numbers(self) -> tuple[Step | None, str]:
        """Return what is wrong with a graph whose paired values are all right."""
        if self.failure is not None:
            blamed = [node for node in self.graph.nodes if node.name == self.failure.node]
            node = (blamed or self.graph.nodes)[0]
            return self._bare(node), f"does not run: {self.failure}"
        names = list(self.recording.outputs)
        for name, ref in zip(self.graph.outputs, self.recording.outputs.values(), strict=False):
            if name not in self.values:
                continue
            native, value, node = self.recording.native(ref), self.values[name], self.makers[name]
            if (value.dtype, value.shape) != (native.dtype, native.shape):
                return self._bare(node), (
                    f"output '{name}' is {value.dtype} {tuple(value.shape)} instead of "
                    f"{native.dtype} {tuple(native.shape)}"
                )
            if not native.is_floating_point() and not value.equal(native):
                return self._bare(node), f"output '{name}' holds other values"
        if sorted(names) == sorted(self.graph.outputs) and names != self.graph.outputs:
            node = self.makers[self.graph.outputs[0]]
            return self._bare(node), f"the outputs are {self.graph.outputs} instead of {names}"
        return None, ""

    def _bare(self, node: Node) -> Step:
        shape = tuple(self.values[node.outputs[0]].shape) if node.outputs[0] in self.values else ()
        return Step(node.path or "", node.name, node.op, node.outputs[0], "", shape)


def _weigh(tally: Tally) -> tuple[float, float, float, str]:
    """Return (error, torch's own, the worst ratio over its limit, what is wrong)."""
    if tally.problem.startswith("the reference itself returns NaN"):
        return 0.0, 0.0, 0.0, ""
    if tally.problem:
        return float("inf"), 0.0, float("inf"), tally.problem
    found = errors(tally, LOCAL_GATE)
    if found is None:
        return 0.0, 0.0, 0.0, ""
    worst = max(found.ratios, key=lambda ratio: ratio.value / ratio.limit)
    ratio = worst.value / worst.limit
    reason = f"{worst.kind} ratio {worst.value:.3g} > {worst.limit:.2g}" if ratio > 1 else ""
    return found.candidate, found.reference, ratio, reason
