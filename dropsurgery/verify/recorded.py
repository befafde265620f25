"""A module as a candidate whose values can be seen, like those of an ONNX file."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from torch import Tensor

from dropsurgery.graph.signature import first_line
from dropsurgery.verify.marked import Node, RunError
from dropsurgery.verify.recording import Recording, Ref, computed


class RecordedGraph:
    """What `MarkedGraph` is for a file, from one run of a module.

    Args:
        recording: the run; it holds for the input that it was made on.
        known_paths: paths of the reference's modules. Operations in other modules, which surgery or
            somebody else put there, are compared by what they return.

    Attributes:
        nodes: the operations in order of execution, and one that passes on each output.
        inputs, outputs: the names of the network's inputs and outputs.
    """

    def __init__(self, recording: Recording, known_paths: Collection[str]) -> None:
        self.recording = recording
        self.inputs = list(recording.inputs)
        self.outputs = list(recording.outputs)
        given = set(recording.inputs.values())
        self.nodes = []
        for index, event in enumerate(recording.events):
            if Ref(index, 0) in given:
                continue
            path = event.path if event.path in known_paths else None
            name = f"{event.path}/{event.name or 'written'}_{index}"
            outputs = tuple(_name(Ref(index, n)) for n in range(len(event.outputs)))
            inputs = tuple(self._value(ref) for ref in event.inputs)
            self.nodes.append(Node(name, event.name, path, (name, event.name), inputs, outputs))
        for name, ref in recording.outputs.items():
            inside = recording.events[ref.event].path
            path = inside if inside in known_paths else None
            node = Node(f"output {name}", "Identity", path, None, (self._value(ref),), (name,))
            self.nodes.append(node)

    @property
    def named(self) -> bool:
        """Whether the operations stand in modules that the reference has too."""
        return any(node.path for node in self.nodes)

    def in_float64(self) -> RecordedGraph:
        """Return the same graph with every value in float64."""
        known = {node.path for node in self.nodes if node.path is not None}
        return RecordedGraph(self.recording.in_float64(), known)

    def run(self, feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return every value of the run; `feeds` are what it was made on."""
        values = {
            _name(Ref(index, number)): tensor
            for index, event in enumerate(self.recording.events)
            for number, tensor in enumerate(event.outputs)
        }
        outputs = {name: self.recording.native(ref) for name, ref in self.recording.outputs.items()}
        return {**values, **outputs}

    def run_before(self, name: str, feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return every value: a module that was recorded runs to its end."""
        return self.run(feeds)

    def run_fed(self, feeds: Mapping[str, Tensor], cuts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Run it in pieces: whoever reads a value of `cuts` is given that tensor instead.

        Returns:
            The values of `cuts` as the module computed them from what it was given.

        Raises:
            RunError: an operation does not take what it is given.
        """
        made: dict[str, Tensor] = {}
        given: dict[Ref, Tensor] = {}
        for index, event in enumerate(self.recording.events):
            try:
                results = event.outputs if event.func is None else computed(event, given)
            except Exception as error:
                raise RunError(first_line(error), None) from error
            for number, result in enumerate(results):
                name = _name(Ref(index, number))
                made[name] = result
                given[Ref(index, number)] = cuts.get(name, result)
        made.update({name: given[ref] for name, ref in self.recording.outputs.items()})
        return {name: made[name] for name in cuts}

    def _value(self, ref: Ref) -> str:
        names = [name for name, known in self.recording.inputs.items() if known == ref]
        return names[0] if names else _name(ref)


def _name(ref: Ref) -> str:
    return f"{ref.event}.{ref.output}"
