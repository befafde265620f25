"""The values of a file and of a network on one input, and the error of each piece between them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dropsurgery.verify.cases import Case
from dropsurgery.verify.local_error import Weighed, weigh
from dropsurgery.verify.location import Location, Step
from dropsurgery.verify.marked import MarkedGraph, Node, RunError
from dropsurgery.verify.onnx_file import feeds_for
from dropsurgery.verify.pairing import Pairing, expected_pairs
from dropsurgery.verify.recorded import RecordedGraph
from dropsurgery.verify.recording import Recording, Ref, Replay

_FAR = 100.0  # times the limit: no rounding, and no small defect

# Operations that move data and compute nothing, of ONNX and of torch.
_VIEWS = {"Cast", "Expand", "Flatten", "Identity", "Reshape", "Slice", "Split", "Squeeze"}
_VIEWS |= {"Transpose", "Unsqueeze"}
_MOVES = {"view", "_unsafe_view", "t", "transpose", "permute", "expand", "clone", "squeeze"}
_MOVES |= {"unsqueeze"}

# Of the others, what may have become part of another layer's weights.
_FOLDED = {"convolution", "addmm", "mm", "bmm", "native_batch_norm", "_to_copy"}
_SCALES = {"mul", "add", "sub", "div"}

Graph = MarkedGraph | RecordedGraph


@dataclass
class KnownPairs:
    """Pairs that another input showed, which holds where the network runs the same operations.

    Attributes:
        operations: names of the reference's operations on that input.
        pairs: tensors of the reference by names of values.
    """

    operations: list[str] = field(default_factory=list)
    pairs: dict[str, Ref] = field(default_factory=dict)


class Pieces:
    """One input's values on both sides.

    Args:
        recording: the reference's run.
        graph: the candidate.
        case: the input.
        known: pairs of an earlier input, which are taken over; filled by the first one.

    Attributes:
        pairs: the tensors of the reference by names of the candidate's values.
        values: the candidate's values as it computed them from the input.
        fed: torch's own in their place, as it was given them.
        local: its paired values as it computed them from these.
        failure: what onnxruntime said where the graph does not run, and the node it blames.
    """

    def __init__(self, recording: Recording, graph: Graph, case: Case, known: KnownPairs) -> None:
        self.recording = recording
        self.graph = graph
        self.case = case
        tensors = {name: recording.native(ref) for name, ref in recording.inputs.items()}
        self.feeds = feeds_for(graph.inputs, tensors)
        self.failure: RunError | None = None
        self.makers = {name: node for node in graph.nodes for name in node.outputs}
        self.values = self._run()
        pairs = self._paired(known)
        self._errors = {name: self._error(name, ref) for name, ref in pairs.items()}
        self.pairs = pairs if self.failure else self._without_detours(pairs)
        self._cut = set(self.pairs.values())
        self.fed = self._fed()
        self.local = self._run_fed()

    def _paired(self, known: KnownPairs) -> dict[str, Ref]:
        operations = [event.name for event in self.recording.events]
        if operations == known.operations and known.pairs.keys() <= self.values.keys():
            return known.pairs
        by_name = feeds_for(self.graph.inputs, self.recording.inputs)
        expected = expected_pairs(self.graph.nodes, self.graph.outputs, self.recording)
        found = Pairing(self.recording, expected).pair(self.graph.nodes, self.values, by_name)
        pairs = {name: self.recording.origin(ref) for name, ref in found.items()}
        if not known.pairs:
            known.operations, known.pairs = operations, pairs
        return pairs

    def _run(self) -> dict[str, Tensor]:
        try:
            return self.graph.run(self.feeds)
        except RunError as error:
            self.failure = error
        for _ in self.graph.nodes:
            try:
                return self.graph.run_before(self.failure.node or "", self.feeds)
            except RunError as error:  # sizes that do not fit are told of behind what fails
                if error.node in (None, self.failure.node):
                    break
                self.failure = error
        return {}

    def _fed(self) -> dict[str, Tensor]:
        """Return torch's tensors in the shapes and dtypes of the values that they replace."""
        cuts = {}
        for name, ref in self.pairs.items():
            value, native = self.values[name], self.recording.native(ref)
            native = native.to(value.dtype)
            cuts[name] = native.reshape(value.shape) if value.numel() == native.numel() else native
        return cuts

    def _run_fed(self) -> dict[str, Tensor]:
        try:
            return self.graph.run_fed(self.feeds, self.fed)
        except RunError:
            return {}  # what stands behind the defect cannot take torch's shapes

    def _without_detours(self, pairs: dict[str, Ref]) -> dict[str, Ref]:
        """Take out pairs that are far from alike though all that is computed from them is right.

        The value was told by its place in a module, and is another one there: an exporter moved a
        transposition out of the module, say. A real error does not vanish in one step.
        """
        behind: dict[str, float] = {}
        dropped = set()
        for node in reversed(self.graph.nodes):
            worst = 0.0
            for name in node.outputs:
                after = behind.get(name)
                error = self._errors[name].ratio if name in pairs else None
                if error is not None and after is not None and error > _FAR and after <= 1:
                    dropped.add(name)
                    error = None
                worst = max(worst, (after or 0.0) if error is None else error)
            for name in node.inputs:
                behind[name] = max(behind.get(name, 0.0), worst)
        return {name: ref for name, ref in pairs.items() if name not in dropped}

    def _error(self, name: str, ref: Ref) -> Weighed:
        """Weigh a value's accumulated error."""
        native, wide = self.recording.native(ref), self.recording.wide(ref)
        return weigh(native, wide, self.values[name], faint=self.case.faint)

    def replay(self, ref: Ref) -> Replay:
        """Compute a tensor of the network again in float64, from torch's own paired ones."""

        def known(start: Ref) -> Tensor | None:
            origin = self.recording.origin(start)
            return self.recording.native(start) if origin in self._cut else None

        return self.recording.replay(ref, known, wide=True)

    def partner(self, name: str) -> Ref | None:
        """Return the tensor of the network that a value stands for, or None."""
        outputs = dict(zip(self.graph.outputs, self.recording.outputs.values(), strict=False))
        return self.pairs.get(name, outputs.get(name))

    def given(self, name: str) -> Tensor | None:
        """Return what a node is given under a name in its piece: torch's own, or the input's."""
        return self.fed.get(name, self.feeds.get(name))

    def steps(self) -> Iterator[Step]:
        """Yield one step for each pair, in order of execution."""
        for name, ref in self.pairs.items():
            event = self.recording.events[ref.event]
            accumulated = self._errors[name]
            replay = self.replay(ref)
            local = self._local(name, ref, replay)
            node, path = self._blamed(name, ref, replay)
            yield Step(
                module=path,
                node=node.name,
                op=node.op,
                value=name,
                torch=f"{event.path or 'the root'}: {event.name}",
                shape=tuple(self.recording.native(ref).shape),
                local=local.error,
                local_own=local.own,
                ratio=local.ratio,
                accumulated=accumulated.error,
                accumulated_own=accumulated.own,
                reason=local.reason,
            )

    def _local(self, name: str, ref: Ref, replay: Replay) -> Weighed:
        if name not in self.local:  # the graph does not run from torch's own: what there is
            return self._errors[name]
        # Where a tensor on the way was written to in place, nothing tells what it was made of.
        wide = self.recording.wide(ref) if replay.opaque else replay.values[ref]
        return weigh(self.recording.native(ref), wide, self.local[name], faint=self.case.faint)

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
        computing = [node for node in nodes if self._computes(node)] or nodes[-1:]
        # The values of a module before the last one of the piece have no partner: they are wrong
        # already, or have none in torch.
        node = [node for node in computing if node.path == computing[0].path][-1]
        if node.path is not None:
            left_out = self._left_out(nodes, replay)
            return node, node.path if left_out is None else left_out
        if len(computing) == 1:
            return node, self.recording.events[ref.event].path
        # Nothing behind the defect has a partner: the piece goes on to the end of the network, and
        # what is wrong stands at its beginning.
        first = min(replay.events, default=ref.event, key=lambda event: (self._moves(event), event))
        return nodes[0], self.recording.events[first].path

    def _left_out(self, nodes: list[Node], replay: Replay) -> str | None:
        """Return the module of an operation that a piece should have and has no node of."""
        there = {node.path for node in nodes}
        for index in sorted(replay.events):
            event = self.recording.events[index]
            folded = event.name in _FOLDED or (event.name in _SCALES and len(event.inputs) < 2)
            if not folded and not self._moves(index) and event.path not in there:
                return event.path
        return None

    def _computes(self, node: Node) -> bool:
        value = self.values.get(node.outputs[0]) if node.outputs else None
        return node.op not in _VIEWS | _MOVES and (value is None or value.is_floating_point())

    def _moves(self, event: int) -> bool:
        """Say whether an operation of the reference only moves data."""
        return self.recording.events[event].name in _MOVES

    def location(self) -> Location:
        """Weigh all steps and find the first that is wrong."""
        steps = tuple(self.steps())
        first = next((step for step in steps if not step.ok), None)
        notes = []
        if reason := self._exchanged():
            first = self._bare(self.makers[self.graph.outputs[0]])
        elif first is not None:
            reason = first.reason
        else:
            first, reason = self._beyond_numbers()
        if self.failure is not None:
            notes.append(f"the graph does not run: {self.failure}")
        if not self.graph.named:
            notes.append("the candidate does not tell the modules of its nodes: paired by value")
        return Location(
            found=first is not None,
            module=first.module if first else "",
            step=first,
            reason=reason,
            case=self.case.label,
            steps=steps,
            notes=tuple(notes),
        )

    def _exchanged(self) -> str:
        """Return which outputs have changed places, in words; "" where none have."""
        given, found = self.recording.outputs, self.graph.outputs
        if len(given) != len(found) or not self.values.keys() >= set(found):
            return ""
        places = dict(zip(found, given, strict=True))
        if sorted(given) == sorted(found):
            places = {name: name for name in found}
        held = {}
        for name in found:
            alike = [n for n, ref in given.items() if self._same(self.values[name], ref)]
            held[name] = places[name] if places[name] in alike or not alike else alike[0]
        if held == places or sorted(held.values()) != sorted(given):
            return ""
        moved = ", ".join(f"'{n}' holds '{held[n]}'" for n in found if held[n] != places[n])
        return f"the outputs are exchanged: {moved}"

    def _same(self, value: Tensor, ref: Ref) -> bool:
        native = self.recording.native(ref)
        return value.shape == native.shape and bool(
            torch.allclose(value.double(), native.double(), rtol=1e-3, atol=1e-6)
        )

    def _beyond_numbers(self) -> tuple[Step | None, str]:
        """Return what is wrong with a graph whose paired values are all right."""
        if self.failure is not None:
            blamed = [node for node in self.graph.nodes if node.name == self.failure.node]
            node = (blamed or self.graph.nodes)[0]
            for name in node.inputs:  # of a shape that torch has not, it is given what cannot fit
                ref = self.pairs.get(name)
                native = None if ref is None else self.recording.native(ref)
                if native is not None and native.shape != self.values[name].shape:
                    shape = tuple(self.values[name].shape)
                    reason = f"shape {shape} instead of {tuple(native.shape)}"
                    return self._bare(self.makers[name]), reason
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
        moved = sorted(names) == sorted(self.graph.outputs) and names != self.graph.outputs
        if moved or len(names) != len(self.graph.outputs):
            node = self.makers[self.graph.outputs[0]]
            return self._bare(node), f"the outputs are {self.graph.outputs} instead of {names}"
        return None, ""

    def _bare(self, node: Node) -> Step:
        shape = tuple(self.values[node.outputs[0]].shape) if node.outputs[0] in self.values else ()
        return Step(node.path or "", node.name, node.op, node.outputs[0], "", shape)
