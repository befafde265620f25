"""Where dropout shifts the variance that a BatchNorm sees, by theory and by measurement."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dropsurgery.errors import ArgumentTypeError, DropsurgeryError
from dropsurgery.graph.clone import clone_structure
from dropsurgery.graph.module import graphs, module_path
from dropsurgery.graph.moments import Seen, call_keys, noise_of, propagate
from dropsurgery.graph.trace import arguments, trace
from dropsurgery.recalibrate import add_moments, batches, run_batch
from dropsurgery.tables import NOTHING, render


@dataclass(frozen=True)
class Shift:
    """The variance shift at one BatchNorm: ratios below 1 are variance that eval does not have.

    Attributes:
        path: dotted path of the BatchNorm.
        module: dotted path of the module that calls it ("" is the root).
        dropouts: paths of the dropouts whose noise reaches it before any other BatchNorm.
        predicted: variance without dropout over variance with it, mean over the channels, by
            theory; 1 is no shift. None where something in between has no rule.
        by_dropout: the same ratio measured in training mode, with and without the noise of these
            dropouts and all before them alike. None without data.
        measured: variance in eval mode over variance in training mode, measured: with what earlier
            BatchNorms do to it in eval. None without data.
    """

    path: str
    module: str
    dropouts: tuple[str, ...]
    predicted: float | None
    by_dropout: float | None = None
    measured: float | None = None


@dataclass(frozen=True)
class VarianceShift:
    """What `find_variance_shift` returns.

    Attributes:
        shifts: the BatchNorms behind a dropout, in the order of the network.
    """

    shifts: tuple[Shift, ...]

    def __iter__(self) -> Iterator[Shift]:
        return iter(self.shifts)

    def __len__(self) -> int:
        return len(self.shifts)

    def __str__(self) -> str:
        rows = [
            (
                shift.path,
                len(shift.dropouts),
                *(
                    NOTHING if ratio is None else f"{ratio:.3f}"
                    for ratio in (shift.predicted, shift.by_dropout, shift.measured)
                ),
            )
            for shift in self.shifts
        ]
        return render(
            ("BatchNorm", "dropouts", "predicted", "without/with", "eval/training"),
            rows,
            title=f"{len(rows)} BatchNorms behind a dropout: ratios of the variance",
        )

    def plot(self, path: str | os.PathLike[str]) -> Path:
        """Draw the ratios along the depth and write the picture.

        Args:
            path: the file; its suffix decides the format (png, svg, pdf).

        Raises:
            DropsurgeryError: matplotlib is not installed, there is nothing to draw, or the file
                cannot be written.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise DropsurgeryError(
                "the plot needs matplotlib", fix="pip install 'dropsurgery[plot]'"
            ) from error
        if not self.shifts:
            raise DropsurgeryError("no BatchNorm stands behind a dropout: there is nothing to draw")
        figure = Figure(figsize=(8, 4.2), layout="constrained")
        axes = figure.subplots()
        depth = list(range(1, len(self.shifts) + 1))
        axes.axhline(1.0, color="0.6", linewidth=1, label="no shift")
        for name, label, style, color, size in _LINES:
            values = [getattr(shift, name) for shift in self.shifts]
            known = [(d, v) for d, v in zip(depth, values, strict=True) if v is not None]
            if known:
                axes.plot(
                    *zip(*known, strict=True),
                    style,
                    color=color,
                    markersize=size,
                    fillstyle="none",
                    label=label,
                )
        axes.set_xlabel("BatchNorms behind a dropout, in the order of the network")
        axes.set_ylabel("ratio of the variance")
        axes.set_ylim(bottom=0.0)
        axes.legend()
        try:
            figure.savefig(path, dpi=150)
        except (OSError, ValueError) as error:
            raise DropsurgeryError(f"{path} cannot be written: {error}") from error
        return Path(path)


_LINES = (
    ("predicted", "predicted by theory", "o-", "tab:blue", 9),
    ("by_dropout", "measured: without / with these dropouts", "s--", "tab:orange", 5),
    ("measured", "measured: eval / training", "^:", "tab:red", 5),
)


def find_variance_shift(
    model: nn.Module, data: Any = None, *, example_inputs: Any = None
) -> VarianceShift:
    """Find the BatchNorms behind a dropout, and how their variance shifts from training to eval.

    Li et al., "Understanding the Disharmony between Dropout and Batch Normalization by Variance
    Shift", 2018, arXiv:1801.05134. Dropout adds to a unit's variance in training and not in eval; a
    BatchNorm's running variance is that of training, so that it divides by too much in eval.

    Predicted is v/((c² + v)/keep - c²) for a BatchNorm that sees a dropout of a unit with mean c
    and variance v; with weights in between, the noise that the dropout adds goes through them,
    Σw²·(c² + v)·(1 - keep)/keep. Without data, c and v follow from the affine terms of the
    BatchNorms before, through activations (of a normal variable), weights (of independent units),
    sums and concatenations. With data they are measured where the dropouts and the BatchNorms are
    given them; what dropout does is still theory.

    Measured are two ratios of variances over all the data. That of theory: training mode, without
    the noise of these dropouts over with it, all before them alike. And eval mode over training
    mode, where what earlier BatchNorms pass on adds up. Remedies: `ds.MoveDropoutAfterLastNorm`,
    `ds.ConvertDropout("uniform", beta=0.1)` and `ds.recalibrate_batchnorm`.

    The network is not changed: neither its statistics nor its flags.

    Args:
        model: any `nn.Module`, or a GraphModule that dropsurgery returned.
        data: batches, as for `recalibrate_batchnorm`; None for the prediction alone.
        example_inputs: as in `trace`; with shapes known, noise that a global pooling averages is
            told exactly.

    Raises:
        ArgumentError, ArgumentTypeError: no data in `data`, or the network does not run on it.
        TraceError: the network cannot be turned into a graph.
    """
    if not isinstance(model, nn.Module):
        raise ArgumentTypeError(
            f"find_variance_shift takes a torch.nn.Module, got {type(model).__name__}"
        )
    given = None
    if data is not None:
        given = iter(batches(data))
        first = next(given)
        given = itertools.chain([first], given)
        if example_inputs is None:
            run_batch(_own_buffers(model).eval(), first)
            example_inputs = first[1] or first[0]
    module = trace(model, example_inputs=example_inputs)
    seen = [found for found in propagate(module, module.graph, {}) if found.dropouts]
    if given is None:
        return VarianceShift(tuple(_shift(module, found) for found in seen))
    measured = _measure(module, model, seen, given)
    again = {f.node: f for f in propagate(module, module.graph, measured.clean)}
    keys = call_keys(module.graph)
    shifts = []
    for found in seen:
        key = keys[found.node]
        noisy = measured.noisy.get(key)
        ratios = [
            None if noisy is None or key not in over else _mean(over[key][1] / noisy[1])
            for over in (measured.clean, measured.evaluating)
        ]
        shift = _shift(module, again[found.node])
        shifts.append(replace(shift, by_dropout=ratios[0], measured=ratios[1]))
    return VarianceShift(tuple(shifts))


def _shift(module: fx.GraphModule, found: Seen) -> Shift:
    targets = {node.name: str(node.target) for node in module.graph.nodes}
    return Shift(
        path=str(found.node.target),
        module=module_path(found.node),
        dropouts=tuple(dict.fromkeys(targets[name] for name in found.dropouts)),
        predicted=None if found.moments is None else _mean(found.moments.ratio),
    )


def _mean(ratios: Tensor) -> float | None:
    """Return the mean over the channels that vary."""
    known = ratios[ratios.isfinite()]
    return float(known.mean()) if len(known) else None


Measured = dict[str, tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class _Measured:
    """Mean and variance by channel of what calls of layers are given, by their keys.

    Attributes:
        evaluating: in eval mode.
        noisy: in training mode.
        clean: in training mode, without the noise of the dropouts since the last BatchNorm.
    """

    evaluating: Measured
    noisy: Measured
    clean: Measured


class _Sums:
    """Count, Σx and Σx² by channel (axis 1) of what calls of layers are given, by their keys."""

    def __init__(self, keys: set[str]) -> None:
        self._keys = keys
        self._sums: dict[str, Tensor] = {}

    def add(self, key: str, x: Tensor) -> None:
        """Add what a call is given, if it is one of those."""
        if key not in self._keys or x.ndim < 2:
            return
        if key not in self._sums:
            self._sums[key] = torch.zeros(3, x.shape[1], dtype=torch.float64, device=x.device)
        add_moments(self._sums[key], x)

    def moments(self) -> Measured:
        """Return mean and variance over all that was added."""
        found = {}
        for key, sums in self._sums.items():
            count, first, second = sums.cpu().unbind()
            mean = first / count
            found[key] = (mean, (second / count - mean.square()).clamp(min=0.0))
        return found


class _Twice(fx.Interpreter):
    """Runs a graph, and beside it what it would be without the noise of dropout.

    The second value of a node differs from the first only from a dropout to the next BatchNorm.
    """

    def __init__(self, module: fx.GraphModule, graph: fx.Graph, noisy: _Sums, clean: _Sums) -> None:
        super().__init__(module, graph=graph)
        self._noisy, self._clean = noisy, clean
        self._keys = call_keys(graph)
        self._other: dict[fx.Node, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        """Run a node, and again on the other values where they differ."""
        called = self.fetch_attr(str(n.target)) if n.op == "call_module" else None
        inputs = n.all_input_nodes
        other = None
        if isinstance(called, _BatchNorm):
            self._noisy.add(self._keys[n], self.env[inputs[0]])
            self._clean.add(self._keys[n], self._value(inputs[0]))
        elif called is not None and noise_of(called) > 0.0:
            self._clean.add(self._keys[n], self._value(inputs[0]))
            # A copy, since the layer may work in place.
            other = _in_eval(called, self._value(inputs[0]).clone())
        elif n.op.startswith("call_") and any(value in self._other for value in inputs):
            args, kwargs = fx.map_arg((n.args, n.kwargs), self._value)
            other = getattr(self, n.op)(n.target, args, kwargs)
        result = super().run_node(n)
        if other is not None:
            self._other[n] = other
        return result

    def _value(self, node: fx.Node) -> Any:
        return self._other.get(node, self.env[node])


def _in_eval(layer: nn.Module, x: Tensor) -> Tensor:
    shadow = clone_structure(layer).eval()
    value: Tensor = shadow(x)
    return value


def _measure(
    module: fx.GraphModule, model: nn.Module, seen: list[Seen], given: Iterable[Any]
) -> _Measured:
    """Run the data through the network in each mode."""
    evaluating, training = (_own_buffers(module) for _ in range(2))
    evaluating.eval()
    if not model.training:
        training.train()
    keys = call_keys(module.graph)
    named = {node.name: node for node in module.graph.nodes}
    norms = {keys[found.node] for found in seen}
    drops = {keys[named[name]] for found in seen for name in found.dropouts}
    sums = _Sums(norms), _Sums(norms), _Sums(norms | drops)
    with torch.no_grad(), torch.random.fork_rng():
        for batch in given:
            inputs = arguments(module, batch[1] or batch[0])
            _run(_Twice(evaluating, module.graph, sums[0], _Sums(set())), inputs)
            _run(_Twice(training, graphs(module)[-1], *sums[1:]), inputs)
    return _Measured(*(each.moments() for each in sums))


def _run(network: _Twice, inputs: tuple[Any, ...]) -> None:
    run_batch(network.run, (inputs, {}))


def _own_buffers(module: nn.Module) -> Any:
    """Return a clone with buffers of its own, to which a forward may write."""
    clone = clone_structure(module)
    for layer in clone.modules():
        for name, buffer in layer._buffers.items():
            layer._buffers[name] = None if buffer is None else buffer.clone()
    return clone
