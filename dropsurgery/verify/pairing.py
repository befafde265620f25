"""Which value of a candidate is which tensor of the reference."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from dropsurgery.verify.marked import Node
from dropsurgery.verify.recording import Call, Recording, Ref

# Elements that are looked at first, evenly spread over a tensor.
_SAMPLE = 512
# Values further apart than this, relative to their size, are not the same value with an error:
# where the file tells that they should be, and where nothing does.
_NEAR = 0.02
_ALIKE = 1e-3
_SAME = 1e-5
# Fewer elements may be alike by chance.
_FEWEST = 4
# One operation under the names that torch.export and the dispatcher have for it.
_SYNONYMS = {
    "conv1d": "convolution",
    "conv2d": "convolution",
    "conv3d": "convolution",
    "addmm": "linear",
    "mm": "linear",
    "layer_norm": "native_layer_norm",
    "group_norm": "native_group_norm",
    "_native_batch_norm_legit_no_training": "native_batch_norm",
    "batch_norm": "native_batch_norm",
    "scaled_dot_product_attention": "_scaled_dot_product_flash_attention_for_cpu",
    "softmax": "_softmax",
    "log_softmax": "_log_softmax",
    "max_pool2d": "max_pool2d_with_indices",
    "max_pool1d": "max_pool2d_with_indices",
    "adaptive_avg_pool2d": "_adaptive_avg_pool2d",
    "unsafe_view": "view",
    "_unsafe_view": "view",
    "reshape": "view",
}
# What may be folded into the weights of the layer before it.
_AFFINE = {"native_batch_norm", "mul", "add", "sub", "div"}


def expected_pairs(
    nodes: Sequence[Node], outputs: Sequence[str], recording: Recording
) -> dict[str, Ref]:
    """Pair values by what the file tells of them, whatever they hold.

    A value that leaves the nodes of a module is what the module returned; the last value of a node
    of torch's graph is what its operation returned; the graph's outputs are the network's.

    Args:
        nodes: the candidate's, in order of execution.
        outputs: the names of its outputs.
        recording: the reference's run.
    """
    pairs = {**_by_operation(nodes, recording), **_by_module(nodes, outputs, recording)}
    if len(outputs) == len(recording.outputs):
        given = recording.outputs
        same_names = sorted(outputs) == sorted(given)  # in any order
        partners = [given[name] for name in outputs] if same_names else given.values()
        pairs.update(zip(outputs, partners, strict=True))
    users, paths = recording.users(), {node.path for node in nodes}
    return {name: _folded(ref, recording, users, paths) for name, ref in pairs.items()}


def _by_operation(nodes: Sequence[Node], recording: Recording) -> dict[str, Ref]:
    events: dict[tuple[str, str], list[int]] = defaultdict(list)
    for index, event in enumerate(recording.events):
        if event.func is not None and len(event.outputs) > 0:
            events[event.path, _SYNONYMS.get(event.name, event.name)].append(index)
    last: dict[tuple[str, str], dict[str, str]] = defaultdict(dict)
    for node in nodes:
        if node.path is not None and node.source is not None and node.outputs:
            name, operation = node.source
            key = (node.path, _SYNONYMS.get(operation, operation))
            last[key][name] = node.outputs[0]
    pairs: dict[str, Ref] = {}
    for key, values in last.items():
        if len(values) == len(events[key]):
            pairs.update({v: Ref(e, 0) for v, e in zip(values.values(), events[key], strict=True)})
    return pairs


def _by_module(
    nodes: Sequence[Node], outputs: Sequence[str], recording: Recording
) -> dict[str, Ref]:
    calls: dict[str, list[Call]] = defaultdict(list)
    for call in recording.calls:
        calls[call.path].append(call)
    members: dict[str, list[Node]] = defaultdict(list)
    for node in nodes:
        parts = (node.path or "").split(".")
        for length in range(1, len(parts) + 1):
            members[".".join(parts[:length])].append(node)
    readers: dict[str, list[Node]] = defaultdict(list)
    for node in nodes:
        for name in node.inputs:
            readers[name].append(node)
    pairs: dict[str, Ref] = {}
    for path in sorted(members.keys() & calls.keys() - {""}):
        inside = {node.name for node in members[path]}
        leaving = [
            name
            for node in members[path]
            for name in node.outputs
            if name in outputs or any(reader.name not in inside for reader in readers[name])
        ]
        # A module that is called twice has two values that leave it, in the order of the calls.
        if len(leaving) == len(calls[path]):
            found = zip(leaving, (call.output for call in calls[path]), strict=True)
            pairs.update(found)
    return pairs


def _folded(
    ref: Ref, recording: Recording, users: Mapping[Ref, list[int]], paths: set[str | None]
) -> Ref:
    """Return what a value is after the modules behind it that the candidate has no nodes of.

    A BatchNorm that was folded into the convolution before it is gone: what its convolution
    returns is what the BatchNorm returned.
    """
    while True:
        readers = users.get(ref, [])
        if len(readers) != 1:
            return ref
        event = recording.events[readers[0]]
        gone = event.path not in paths and event.name in _AFFINE and len(event.inputs) == 1
        if not gone or recording.native(Ref(readers[0], 0)).shape != recording.native(ref).shape:
            return ref
        ref = Ref(readers[0], 0)


class Pairing:
    """Pairs the values of a candidate's run with the tensors of a reference's run.

    A value's own module, where the file tells it, goes before likeness: a layer that was left out
    returns what another layer returned. Without names, a value is the tensor that it is like, if it
    is not one that went into the same node: then it is a copy, and stays without a partner.

    Args:
        recording: the reference's run.
        expected: what the file tells; see `expected_pairs`.
    """

    def __init__(self, recording: Recording, expected: Mapping[str, Ref]) -> None:
        self.recording = recording
        self.expected = expected
        self._groups: dict[int, list[Ref]] = defaultdict(list)
        self._samples: dict[int, Tensor] = {}
        for index, event in enumerate(recording.events):
            for number, tensor in enumerate(event.outputs):
                ref = Ref(index, number)
                usual = tensor.is_floating_point() and tensor.numel() >= _FEWEST
                if usual and recording.origin(ref) == ref:
                    self._groups[tensor.numel()].append(ref)

    def pair(
        self, nodes: Iterable[Node], values: Mapping[str, Tensor], inputs: Mapping[str, Ref]
    ) -> dict[str, Ref]:
        """Return the tensors that values stand for, by name, in order of execution.

        Args:
            nodes: the candidate's.
            values: what its nodes returned.
            inputs: tensors of the reference by the name of a graph input.
        """
        before = {name: frozenset([ref]) for name, ref in inputs.items()}
        pairs: dict[str, Ref] = {}
        for node in nodes:
            given = frozenset[Ref]().union(*(before.get(n, frozenset()) for n in node.inputs))
            for name in node.outputs:
                ref = self._partner(name, node, values.get(name), given)
                before[name] = given
                if ref is not None:
                    pairs[name], before[name] = ref, frozenset([self.recording.origin(ref)])
        return pairs

    def _partner(
        self, name: str, node: Node, value: Tensor | None, given: frozenset[Ref]
    ) -> Ref | None:
        expected = self.expected.get(name)
        if value is None or not value.is_floating_point():
            return None
        alike = self._alike(value, given)
        if expected is not None:
            if not self.recording.native(expected).is_floating_point():
                return None
            return self._unless_told(value, self.recording.origin(expected), alike)
        if node.path is not None:
            alike = [ref for ref in alike if self.recording.events[ref.event].path == node.path]
        return alike[0] if alike else None

    def _unless_told(self, value: Tensor, expected: Ref, alike: list[Ref]) -> Ref:
        """Return the tensor that a value should be, or the one that it is beyond doubt.

        Layers are folded into those before them, so that a value may be a later one than the file
        tells; and in a module that transposes, it may be told to be the untransposed one.
        """
        if not alike or expected in alike:
            return expected
        distance = _distance(value, self.recording.native(alike[0]))
        later = [ref for ref in alike if ref >= expected]
        if self.near(value, expected):
            return alike[0] if distance <= _SAME else expected
        return later[0] if later else expected

    def near(self, value: Tensor, ref: Ref) -> bool:
        """Say whether a value is a tensor, but for a small error."""
        native = self.recording.native(ref)
        return value.numel() == native.numel() and _distance(value, native) <= _NEAR

    def _alike(self, value: Tensor, given: frozenset[Ref]) -> list[Ref]:
        """Return the tensors that a value may be, best first, but for those that went into it."""
        count = value.numel()
        refs = self._groups.get(count, [])
        if not refs or not value.isfinite().all():
            return []
        if count not in self._samples:
            rows = [_sample(self.recording.native(ref)) for ref in refs]
            self._samples[count] = torch.stack(rows)
        samples = self._samples[count]
        differences = (samples - _sample(value)).square().mean(1).sqrt()
        sizes = samples.square().mean(1).sqrt()
        picked = torch.nonzero(differences <= 4 * _ALIKE * sizes).flatten().tolist()
        picked = sorted(picked, key=lambda i: float(differences[i]))[:8]
        found = {refs[i]: _distance(value, self.recording.native(refs[i])) for i in picked}
        found = {ref: distance for ref, distance in found.items() if distance <= _ALIKE}
        if not found:
            return []
        # All that are as near as rounding puts them; of these the first after what went in.
        eps = torch.finfo(value.dtype).eps
        limit = max(4 * min(found.values()), 8 * eps)
        latest = max(given, default=Ref(-1, 0))
        best = [ref for ref in refs if found.get(ref, 1.0) <= limit and ref not in given]
        return sorted(best, key=lambda ref: (ref < latest, ref))


def _sample(tensor: Tensor) -> Tensor:
    flat = tensor.detach().reshape(-1)
    step = max(flat.numel() // _SAMPLE, 1)
    return flat[::step][:_SAMPLE].double().nan_to_num()


def _distance(value: Tensor, native: Tensor) -> float:
    """Return the relative root-mean-square difference."""
    own = native.detach().reshape(-1).double()
    size = float(own.square().mean().sqrt())
    difference = float((value.reshape(-1).double() - own).square().mean().sqrt())
    return difference / size if size else (0.0 if difference == 0 else float("inf"))
