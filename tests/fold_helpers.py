"""What the tests of FoldBatchNorm and FoldAffine share."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from dropsurgery.graph.trace import trace
from dropsurgery.layers import FollowTraining
from dropsurgery.passes.base import Pass, Result, apply
from dropsurgery.passes.fold_affine import FoldAffine
from dropsurgery.passes.fold_batchnorm import FoldBatchNorm
from tests.helpers import randomize


def norms_left(module: fx.GraphModule) -> int:
    """Count BatchNorms in a graph without any of the library's own recognition."""
    count = 0
    for node in module.graph.nodes:
        if node.op == "call_module":
            called = module.get_submodule(node.target)
            kinds = [cls.__name__ for cls in type(called).__mro__]
            if isinstance(called, FollowTraining):
                kinds = [getattr(called.function, "__name__", "")]
            count += any("BatchNorm" in kind or kind == "batch_norm" for kind in kinds)
        elif node.op == "call_function":
            count += node.target in (F.batch_norm, torch.batch_norm)
    return count


def relative(actual: Any, expected: Any) -> float:
    """Return the largest difference over the largest magnitude."""
    if isinstance(expected, tuple | list):
        return max(relative(a, e) for a, e in zip(actual, expected, strict=True))
    assert actual.shape == expected.shape
    assert actual.dtype == expected.dtype
    difference = (actual.double() - expected.double()).abs().max()
    return float(difference / expected.double().abs().max().clamp_min(1e-300))


def ready(model: nn.Module, seed: int = 0) -> nn.Module:
    """Return the model in float64 and eval mode, with random statistics."""
    return randomize(model.double().eval(), seed)


def fold(
    model: nn.Module,
    *inputs: Tensor,
    shapes: bool = False,
    tolerance: float = 1e-12,
    item: Pass | None = None,
) -> Result:
    """Fold, and hold the result to: same function, the model untouched, a graph that is sound."""
    before = copy.deepcopy(model.state_dict())
    names = dict(model.named_modules())
    with torch.no_grad():
        expected = model(*(value.clone() for value in inputs))
    result = apply(model, item or FoldBatchNorm(), example_inputs=inputs if shapes else None)
    with torch.no_grad():
        actual = result.module(*(value.clone() for value in inputs))
        again = model(*(value.clone() for value in inputs))
    assert relative(actual, expected) <= tolerance
    assert relative(again, expected) == 0.0
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[key], before[key]) for key in before)
    assert dict(model.named_modules()) == names
    result.module.graph.lint()
    return result


def fold_affine(
    model: nn.Module, *inputs: Tensor, shapes: bool = True, tolerance: float = 1e-12, **how: Any
) -> Result:
    """Fold every affine map, never into more nodes, and hold the result to the same."""
    given = inputs if shapes else None
    before = len(trace(model, example_inputs=given).graph.nodes)
    item = FoldAffine(**how)
    result = fold(model, *inputs, shapes=shapes, tolerance=tolerance, item=item)
    assert len(result.module.graph.nodes) <= before
    return result


def calls(module: fx.GraphModule) -> list[str]:
    """Return what a graph calls, in order: class names, function names, methods."""
    found = []
    for node in module.graph.nodes:
        if node.op == "call_module":
            found.append(type(module.get_submodule(node.target)).__name__)
        elif node.op in ("call_function", "call_method"):
            found.append(getattr(node.target, "__name__", str(node.target)))
    return found


def assert_all_folded(result: Result) -> None:
    """Everything was folded, and nothing of a BatchNorm is left in graph or state dict."""
    assert result.skipped == ()
    assert norms_left(result.module) == 0
    assert not [key for key in result.module.state_dict() if "running_" in key or "num_ba" in key]


def reasons(result: Result) -> str:
    """Return the reasons, one a line."""
    return "\n".join(skip.reason for skip in result.skipped)


class Chain(nn.Sequential):
    """Layers in a row, under the names that a test gives them."""

    def __init__(self, **layers: nn.Module) -> None:
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)


class Lambda(nn.Module):
    """A forward written in the test, with its layers as submodules and operands as parameters."""

    def __init__(self, function: Callable[..., Any], **parts: nn.Module | Tensor) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            if isinstance(part, nn.Parameter | nn.Module):
                setattr(self, name, part)
            else:
                self.register_buffer(name, part)

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


IMAGE = torch.randn(2, 4, 9, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(7))


def conv_bn(**extra: nn.Module) -> Chain:
    return Chain(conv=nn.Conv2d(4, 6, 3, bias=False), bn=nn.BatchNorm2d(6), **extra)


def values(*shape: int, seed: int = 0, low: float = 0.5, high: float = 1.5) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(shape, dtype=torch.float64, generator=generator) * (high - low) + low


def refused(model: nn.Module, *inputs: Tensor, shapes: bool = False) -> str:
    """Nothing is folded, nothing changes; return the reason."""
    keys = list(model.state_dict())
    result = fold(model, *inputs, shapes=shapes, tolerance=0.0)
    assert result.changes == ()
    assert list(result.module.state_dict()) == keys
    (skip,) = result.skipped
    return skip.reason
