"""Rounding of folded weights to half precision."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import dropsurgery as ds
from dropsurgery.graph.rounding import round_rows

HALVES = (torch.float16, torch.bfloat16)


def spacing(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return the distance of the numbers of a dtype at some values."""
    info = torch.finfo(dtype)
    _, exponent = torch.frexp(values)
    return info.eps * torch.exp2((exponent - 1).double()).clamp_min(info.tiny)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("shape", [(32, 576), (64, 1, 3, 3), (8, 20, 5)])
def test_sums_keep_and_each_weight_is_next_to_its_value(
    dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    values = torch.randn(shape, dtype=torch.float64)
    nearest, rounded = values.to(dtype), round_rows(values, dtype)
    errors = [(r.double() - values).flatten(1) for r in (nearest, rounded)]
    assert rounded.dtype == dtype
    # Below the power of two next to it the spacing is half as wide: never more than one step.
    assert bool((errors[1].abs() <= spacing(values, dtype).flatten(1)).all())
    by_nearest, by_rows = (float(e.sum(1).square().mean()) for e in errors)
    assert by_rows < by_nearest / 4
    squares = [e.square().sum(1) for e in errors]
    assert float(squares[1].mean()) < 1.35 * float(squares[0].mean())
    # What is minimised never grows, in any row.
    goals = [s + 0.5 * e.sum(1).square() for s, e in zip(squares, errors, strict=True)]
    assert bool((goals[1] <= goals[0] * (1 + 1e-12)).all())


@pytest.mark.parametrize("dtype", HALVES)
def test_what_is_representable_stays(dtype: torch.dtype) -> None:
    values = torch.randn(16, 100).to(dtype).double()
    values[:, ::3] = 0.0
    assert torch.equal(round_rows(values, dtype).double(), values)
    # Pruned weights stay pruned beside others that are rounded.
    values[:, 1] += 1e-5
    assert bool((round_rows(values, dtype)[:, ::3] == 0).all())


@pytest.mark.parametrize("dtype", HALVES)
def test_signs_zeros_and_the_largest_number(dtype: torch.dtype) -> None:
    top = torch.finfo(dtype).max
    values = torch.tensor([[top, -top, 1e-30, -1e-30, 1.0 + 1e-9, -1.0 - 1e-9]] * 2).double()
    values[1] *= -1
    rounded = round_rows(values, dtype).double()
    assert bool(rounded.isfinite().all())
    assert torch.equal(rounded[0], -rounded[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_wider_dtypes_are_rounded_to_nearest(dtype: torch.dtype) -> None:
    values = torch.randn(8, 50, dtype=torch.float64)
    assert torch.equal(round_rows(values, dtype), values.to(dtype))


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("layer", ["conv", "depthwise", "transposed", "linear"])
def test_a_fold_errs_less_behind_a_relu(dtype: torch.dtype, layer: str) -> None:
    """Inputs with a mean: the sum over errors is what nearest rounding leaves."""
    torch.manual_seed(0)
    first: nn.Module = {
        "conv": nn.Conv2d(64, 32, 3),
        "depthwise": nn.Conv2d(32, 32, 5, groups=32),
        "transposed": nn.ConvTranspose2d(64, 32, 3),
        "linear": nn.Linear(64, 32),
    }[layer]
    norm = nn.BatchNorm1d(32) if layer == "linear" else nn.BatchNorm2d(32)
    assert norm.running_var is not None
    nn.init.uniform_(norm.running_var, 0.5, 2.0)
    model = nn.Sequential(first, norm).eval().to(dtype)
    wide = copy.deepcopy(model).double()
    x = torch.full((2, 32 if layer == "depthwise" else 64), 0.5, dtype=torch.float64)
    if layer != "linear":
        x = x[..., None, None].expand(-1, -1, 9, 9)
    nearest, folded = fold(wide, x).to(dtype), fold(model, x.to(dtype))
    with torch.no_grad():
        expected = wide(x)
        errors = [(m.double()(x) - expected).square().mean() for m in (folded, nearest)]
    assert 0 < float(errors[0]) < float(errors[1]) / 2


def fold(model: nn.Module, x: torch.Tensor) -> nn.Module:
    """Return the network without its BatchNorm."""
    result = ds.apply(model, ds.FoldBatchNorm(), example_inputs=x)
    assert len(result.changes) == 1
    return result.module
