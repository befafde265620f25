"""The algebra of stencils against convolutions that torch computes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from dropsurgery.graph.affine import Affine, Refused
from dropsurgery.graph.stencil import POINT, Axis, Kernel, Stencil

FEW = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def kernel(axes: tuple[Axis, ...], ins: int, outs: int, groups: int, seed: int) -> Kernel:
    generator = torch.Generator().manual_seed(seed)
    inside = all(axis.is_inside for axis in axes)
    form = Stencil(axes, ins, outs, groups, None if inside else "zeros", True)
    weight = torch.randn(form.shape, dtype=torch.float64, generator=generator)
    return Kernel(form, weight, torch.randn(outs, dtype=torch.float64, generator=generator))


def run(given: Kernel, x: Tensor) -> Tensor:
    """Compute a kernel by torch's convolution, with its padding put there by hand."""
    axes = given.form.axes
    pads = [end for axis in reversed(axes) for end in (axis.before, axis.after_end)]
    padded = F.pad(x, pads)
    stride = tuple(axis.stride for axis in axes)
    dilation = tuple(axis.step or 1 for axis in axes)
    convolve: Any = (F.conv1d, F.conv2d)[len(axes) - 1]
    return convolve(
        padded, given.placed(given.form), given.bias, stride, 0, dilation, given.form.groups
    )


@st.composite
def axis(draw: st.DrawFn) -> Axis:
    size, dilation = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    before, after = draw(st.integers(-1, 4)), draw(st.integers(-1, 4))
    return Axis.window(size, draw(st.integers(1, 3)), dilation, before, after)


@FEW
@given(st.tuples(axis(), axis()), st.tuples(axis(), axis()), st.sampled_from([1, 2, 4]),
       st.sampled_from([1, 2, 4]), st.integers(0, 9))  # fmt: skip
def test_one_behind_another(
    inner: tuple[Axis, Axis], outer: tuple[Axis, Axis], g1: int, g2: int, more: int
) -> None:
    first, second = kernel(inner, 4, 8, g1, more), kernel(outer, 8, 4, g2, more + 1)
    x = torch.randn(2, 4, 15 + more, 17, dtype=torch.float64)
    try:
        whole = second.behind(first)
    except Refused:
        assert second.form.border == "zeros"
        return
    try:
        expected = run(second, run(first, x))
    except RuntimeError:  # nothing is left of the image
        return
    torch.testing.assert_close(run(whole, x), expected, rtol=1e-11, atol=1e-11)


@FEW
@given(st.tuples(axis(), axis()), st.tuples(axis(), axis()), st.sampled_from([1, 2, 4]),
       st.sampled_from([1, 2, 4]), st.integers(0, 9))  # fmt: skip
def test_one_beside_another(
    left: tuple[Axis, Axis], right: tuple[Axis, Axis], g1: int, g2: int, more: int
) -> None:
    # Make the second one read as many places, so that there is a sum.
    right = tuple(
        Axis(b.first, b.step, b.count, a.stride, a.slack) for a, b in zip(left, right, strict=True)
    )  # type: ignore[assignment]
    one, two = kernel(left, 4, 8, g1, more), kernel(right, 4, 8, g2, more + 1)
    x = torch.randn(2, 4, 15 + more, 17, dtype=torch.float64)
    for sign in (1.0, -1.0):
        total = one.plus(two, sign)
        expected = run(one, x) + sign * run(two, x)
        torch.testing.assert_close(run(total, x), expected, rtol=1e-11, atol=1e-11)
    even = total.form.even()
    assert all(a.before == a.after_end >= 0 for a in even.axes)
    placed = Kernel(even, total.placed(even), total.bias)
    torch.testing.assert_close(run(placed, x), expected, rtol=1e-11, atol=1e-11)


def test_a_pointwise_layer_without_a_bias_goes_before_padding() -> None:
    inner = kernel((POINT, POINT), 4, 6, 2, 0)
    outer = kernel((Axis.window(3, 1, 1, 1, 1),) * 2, 6, 6, 6, 1)
    with pytest.raises(Refused, match="pads with zeros a value that has a bias"):
        outer.behind(inner)
    form = Stencil(inner.form.axes, 4, 6, 2)
    plain = Kernel(form, inner.weight, torch.zeros_like(inner.bias))
    x = torch.randn(1, 4, 6, 7, dtype=torch.float64)
    whole = outer.behind(plain)
    assert whole.form.groups == 2
    torch.testing.assert_close(run(whole, x), run(outer, run(plain, x)), rtol=1e-12, atol=1e-12)


def test_a_gain() -> None:
    one = kernel((Axis.window(3, 2, 1, 1, 1),), 4, 6, 2, 0)
    affine = Affine(torch.randn(6, dtype=torch.float64), torch.randn(6, dtype=torch.float64))
    x = torch.randn(2, 4, 9, dtype=torch.float64)
    expected = run(one, x) * affine.scale[:, None] + affine.shift[:, None]
    torch.testing.assert_close(run(one.then(affine), x), expected, rtol=1e-12, atol=1e-12)


def test_the_number_of_outputs() -> None:
    for size, stride, dilation, pad in [(3, 2, 1, 1), (1, 2, 1, 0), (4, 3, 2, 2), (2, 2, 1, 0)]:
        found = Axis.window(size, stride, dilation, pad, pad)
        for n in range(12, 20):
            y = F.conv1d(torch.zeros(1, 1, n), torch.zeros(1, 1, size), None, stride, pad, dilation)
            assert (n - 1 + found.slack) // stride + 1 == y.shape[-1]


def test_the_union_of_taps_keeps_a_common_dilation() -> None:
    wide, narrow = Axis.window(3, 1, 4, 4, 4), Axis.window(3, 1, 2, 2, 2)
    assert (wide.plus(POINT).step, wide.plus(POINT).count) == (4, 3)
    assert (wide.plus(narrow).step, wide.plus(narrow).count) == (2, 5)
    assert wide.plus(Axis.window(3, 1, 1, 1, 1)).count == 9
