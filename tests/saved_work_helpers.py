"""The oracle of drop path that saves work: the same draws, every branch computed and masked."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import dropsurgery as ds
from dropsurgery.graph.module import graphs
from dropsurgery.layers.compiled_rows import along
from dropsurgery.layers.rows import Rows


def as_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let rows be windows of the batch, however small its tensors."""
    monkeypatch.setattr("dropsurgery.layers.drop_path.SMALL", 0)


def as_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let rows be drawn as compiled code has them."""
    as_windows(monkeypatch)
    rows = ds.DropPath.rows

    def traced_rows(layer: ds.DropPath, x: Tensor, axis: int, pixelwise: bool) -> Rows | None:
        drawn = rows(layer, x, axis, pixelwise)
        return drawn if drawn is None or drawn.window is None else traced(drawn)

    monkeypatch.setattr(ds.DropPath, "rows", traced_rows)


def as_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let rows be what they are."""


# In which form the rows of a subset are drawn: small tensors by index.
FORMS = (as_drawn, as_windows, as_traced)


def indexed(rows: Rows, batch: int) -> Rows:
    """Return the rows of a window by their numbers."""
    window = rows.window or rows.traced
    assert window is not None
    first, count = window
    index = (int(first) + torch.arange(count)) % batch
    return rows._replace(window=None, traced=None, index=index)


def traced(rows: Rows) -> Rows:
    """Return the rows of a window as compiled code has them."""
    assert rows.window is not None
    start, last = torch.tensor(rows.window[0]), torch.tensor(rows.last)
    return rows._replace(window=None, last=last, traced=(start, rows.window[1]))


class Recorder:
    """Keeps what each drop-path layer draws, so that the flat graph can be run with it.

    Args:
        module: a network with drop path in it.
        monkeypatch: undoes the recording after the test.
    """

    def __init__(self, module: fx.GraphModule, monkeypatch: pytest.MonkeyPatch) -> None:
        self.module = module
        self.drawn: dict[int, list[Tensor]] = {}
        rows, survives = ds.DropPath.rows, ds.DropPath.survives

        def recorded_rows(layer: ds.DropPath, x: Tensor, axis: int, pixelwise: bool) -> Rows | None:
            drawn = rows(layer, x, axis, pixelwise)
            if drawn is not None:
                self.drawn.setdefault(id(layer), []).append(as_mask(drawn, x.shape[axis]))
            return drawn

        def recorded_survives(layer: ds.DropPath) -> bool:
            kept = survives(layer)
            if layer.training and layer.drop_prob > 0.0:
                mask = torch.full((1,), kept / (1.0 - layer.drop_prob), dtype=torch.float64)
                self.drawn.setdefault(id(layer), []).append(mask)
            return kept

        def recorded_forward(layer: ds.DropPath, x: Tensor) -> Tensor:
            if not layer.training or layer.drop_prob == 0.0:
                return x
            mask = layer._mask(x, 1 if layer.mode == "batch" else x.shape[layer.axis], x.dtype)
            self.drawn.setdefault(id(layer), []).append(mask.double())
            return x * along(mask, x, layer.axis)

        monkeypatch.setattr(ds.DropPath, "forward", recorded_forward)
        monkeypatch.setattr(ds.DropPath, "rows", recorded_rows)
        monkeypatch.setattr(ds.DropPath, "survives", recorded_survives)
        self.monkeypatch = monkeypatch

    def run_flat(self, *inputs: Any) -> Any:
        """Run the training graph node by node, and mask with what was drawn."""
        drawn = {key: list(masks) for key, masks in self.drawn.items()}

        def masked(layer: ds.DropPath, x: Tensor) -> Tensor:
            if not layer.training or layer.drop_prob == 0.0:
                return x
            return x * along(drawn[id(layer)].pop(0).to(x.dtype), x, layer.axis)

        with self.monkeypatch.context() as patch:
            patch.setattr(ds.DropPath, "forward", masked)
            result = fx.Interpreter(self.module, graph=graphs(self.module)[-1]).run(*inputs)
        assert not any(drawn.values())
        return result


def as_mask(rows: Rows, batch: int) -> Tensor:
    """Return the factor of each sample, float64 (B,)."""
    if rows.mask is not None:
        return rows.mask.double()
    if rows.index is None:
        rows = indexed(rows, batch)
    assert rows.index is not None
    assert len(set(rows.index.tolist())) == len(rows.index)
    mask = torch.zeros(batch, dtype=torch.float64)
    mask[rows.index] = rows.scale
    if not rows.last:
        mask[rows.index[-1]] = 0.0
    return mask


def quiet(module: nn.Module) -> nn.Module:
    """Put everything but drop path in eval: samples then do not see each other."""
    for layer in module.modules():
        if not isinstance(layer, fx.GraphModule):
            layer.training = isinstance(layer, ds.DropPath)
    module.training = True
    return module


def gradients(module: nn.Module, output: Tensor) -> dict[str, Tensor]:
    """Return the gradient of a fixed weighting of `output` for every parameter that has one."""
    module.zero_grad()
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(7))
    (output * weights.to(output)).sum().backward()
    return {n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}


def assert_runs_as_masked(
    module: fx.GraphModule,
    inputs: tuple[Any, ...],
    monkeypatch: pytest.MonkeyPatch,
    tolerance: float = 1e-10,
) -> None:
    """Check values and gradients of a network in float64 against its flat graph, same draws."""
    quiet(module)
    recorder = Recorder(module, monkeypatch)
    # With gradients of their own: where every branch is dropped, nothing else has any.
    inputs = tuple(v.clone().requires_grad_() for v in inputs)
    output = module(*inputs)
    assert recorder.drawn, "nothing was drawn"
    found = gradients(module, output)
    expected_output = recorder.run_flat(*inputs)
    expected = gradients(module, expected_output)
    scale = expected_output.abs().max()
    assert (output - expected_output).abs().max() <= tolerance * scale
    for name, gradient in expected.items():
        if name not in found:  # a dropped branch did not run
            assert not gradient.any(), name
            continue
        bound = tolerance * max(float(gradient.abs().max()), 1e-3)
        assert (found[name] - gradient).abs().max() <= bound, name
    assert found.keys() <= expected.keys()
