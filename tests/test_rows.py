"""Rows of a batch: taken, added back and turned around, in each form that they have."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dropsurgery.layers.compiled_rows import along, rectify
from dropsurgery.layers.rows import Order, Rows, add_rows, like_rows, split_rows, take_rows
from tests.saved_work_helpers import as_mask, indexed, traced

FORMS = ("window", "index", "traced")
WINDOWS = [(0, 3), (1, 3), (2, 3), (3, 3), (4, 3), (0, 1), (4, 1), (3, 5)]


def forms(rows: Rows) -> dict[str, Rows]:
    """Return rows of five in every form."""
    return {"window": rows, "index": indexed(rows, 5), "traced": traced(rows)}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("window", WINDOWS)
def test_rows_keep_the_memory_format(window: tuple[int, int], form: str) -> None:
    x = torch.randn(5, 4, 6, 6).contiguous(memory_format=torch.channels_last)
    rows = Rows(window=window, scale=2.0)
    chosen = indexed(rows, 5).index
    rows = forms(rows)[form]
    taken = take_rows(x, rows)
    assert torch.equal(taken, x[chosen])
    assert like_rows(x, rows).shape == taken.shape
    total = add_rows(x, taken, rows)
    if form != "traced":  # the compiler chooses a format itself
        assert taken.is_contiguous(memory_format=torch.channels_last)
        assert total.is_contiguous(memory_format=torch.channels_last)
    expected = x.clone()
    expected[chosen] *= 3
    torch.testing.assert_close(total, expected)


@pytest.mark.parametrize(("in_place", "over"), [(False, False), (True, False), (False, True)])
@pytest.mark.parametrize("shape", [(4, 3, 5), (4, 3, 1)])
def test_masked_sums(
    shape: tuple[int, ...], in_place: bool, over: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dropsurgery.layers.rows.SMALL", 0)
    torch.manual_seed(0)
    mask = torch.tensor([1.7, 0.0, 1.7, 0.0])
    skip = torch.randn(4, 3, 5, dtype=torch.float64, requires_grad=True)
    branch = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(4, 3, 5, dtype=torch.float64)
    expected = skip + branch * mask.double()[:, None, None]
    part = branch * 1.0
    found = add_rows(skip * 1.0, part, Rows(mask=mask), 0, in_place, over=over)
    assert (found.data_ptr() == part.data_ptr()) == (over and shape == found.shape)
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-13)
    for leaf in (skip, branch):
        (gradient,) = torch.autograd.grad((found * weight).sum(), leaf, retain_graph=True)
        (right,) = torch.autograd.grad((expected * weight).sum(), leaf, retain_graph=True)
        torch.testing.assert_close(gradient, right, rtol=1e-13, atol=1e-13)
    half = add_rows(skip.detach().float(), branch.detach().bfloat16(), Rows(mask=mask), over=over)
    assert half.dtype == torch.float32


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("window", WINDOWS)
def test_parts_without_gradient(window: tuple[int, int], form: str, axis: int) -> None:
    x = torch.randn(5, 5, 2, dtype=torch.float64, requires_grad=True)
    rows = forms(Rows(window=window))[form]
    whole, taken = split_rows(x, rows, axis)
    weight = torch.randn_like(taken)
    (found,) = torch.autograd.grad((taken * weight).sum(), x, retain_graph=True)
    (expected,) = torch.autograd.grad((take_rows(x, rows, axis) * weight).sum(), x)
    assert torch.equal(found, expected)
    (found,) = torch.autograd.grad(whole.sum(), x)
    assert torch.equal(found, torch.ones_like(x))
    assert torch.autograd.gradgradcheck(lambda v: split_rows(v, rows, axis)[1] ** 2, (x,))


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("last", [True, False])
@pytest.mark.parametrize("window", WINDOWS)
def test_gradients_of_the_sum(window: tuple[int, int], last: bool, axis: int) -> None:
    torch.manual_seed(0)
    rows = Rows(window=window, last=last, scale=1.7)
    x = torch.randn(5, 5, 2, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(5, 5, 2, dtype=torch.float64)

    def block(x: Tensor, rows: Rows) -> Tensor:
        skip, taken = split_rows(x, rows, axis)
        return add_rows(skip, torch.tanh(3.0 * taken), rows, axis)

    expected = x + torch.tanh(3.0 * x) * along(as_mask(rows, 5), x, axis)
    (gradient,) = torch.autograd.grad((expected * weight).sum(), x, retain_graph=True)
    for form in forms(rows).values():
        total = block(x, form)
        torch.testing.assert_close(total, expected, rtol=1e-13, atol=1e-13)
        (found,) = torch.autograd.grad((total * weight).sum(), x)
        torch.testing.assert_close(found, gradient, rtol=1e-13, atol=1e-13)
        written = add_rows(
            x.detach().clone(),
            torch.tanh(3.0 * take_rows(x.detach(), form, axis)),
            form,
            axis,
            True,
        )
        torch.testing.assert_close(written, expected.detach(), rtol=1e-13, atol=1e-13)
    assert torch.autograd.gradgradcheck(lambda v: block(v, rows), (x,))


def test_a_branch_that_broadcasts() -> None:
    skip, branch = torch.randn(4, 3, 5), torch.randn(2, 3, 1)
    rows = Rows(window=(3, 2), scale=2.0)
    expected = skip.clone()
    expected[[3, 0]] += 2 * branch
    for form in (rows, indexed(rows, 4), traced(rows)):
        torch.testing.assert_close(add_rows(skip, branch, form), expected)


# Samples that are turned around between two blocks


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("projected", [False, True])
@pytest.mark.parametrize("last", [True, False])
@pytest.mark.parametrize("form", ["window", "traced"])
@pytest.mark.parametrize("windows", [(a, b) for a in WINDOWS[::2] for b in WINDOWS[1::2]])
def test_sums_that_are_turned_around(
    windows: tuple[tuple[int, int], ...], form: str, last: bool, projected: bool, axis: int
) -> None:
    torch.manual_seed(0)
    rows = [forms(Rows(window=window, scale=1.7, last=last))[form] for window in windows]
    first, second = rows
    start = windows[1][0] if second.traced is None else second.traced[0]
    x = torch.randn(5, 5, 2, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(5, 5, 2, dtype=torch.float64)

    def blocks(x: Tensor) -> Tensor:
        order: Order | Tensor | None = None if projected or form == "traced" else Order()
        skip, taken = split_rows(x, first, axis, order)
        skip = 0.3 * skip if projected else skip
        y = add_rows(skip, torch.tanh(3.0 * taken), first, axis, False, order, start)
        y, order = torch.sin(y), start if isinstance(start, Tensor) else Order(start)
        skip, taken = split_rows(y, second, axis, order)
        assert taken.data_ptr() == y.data_ptr()
        return add_rows(skip, torch.tanh(2.0 * taken), second, axis, False, order, 0)

    def masked(x: Tensor) -> Tensor:
        masks = [along(as_mask(part, 5), x, axis) for part in rows]
        y = torch.sin((0.3 * x if projected else x) + masks[0] * torch.tanh(3.0 * x))
        return y + masks[1] * torch.tanh(2.0 * y)

    found, expected = blocks(x), masked(x)
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-13)
    gradients = [torch.autograd.grad((y * weight).sum(), x)[0] for y in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-13, atol=1e-13)
    if windows == ((2, 3), (3, 3)):
        assert torch.autograd.gradgradcheck(blocks, (x,))


def test_a_skip_that_is_turned_and_has_no_branch_gradient() -> None:
    x = torch.randn(5, 2, dtype=torch.float64, requires_grad=True)
    order, rows = Order(), Rows(window=(1, 2))
    skip, taken = split_rows(x, rows, 0, order)
    total = add_rows(skip, taken.detach(), rows, 0, False, order, 3)
    weight = torch.randn(5, 2, dtype=torch.float64)
    (gradient,) = torch.autograd.grad((total * weight).sum(), x)
    assert torch.equal(gradient, weight.roll(3, 0))


def test_a_relu_that_keeps_its_result() -> None:
    x = torch.tensor([-2.0, -0.0, 0.0, 1e-30, 3.0], dtype=torch.float64, requires_grad=True)
    weight = torch.randn(5, dtype=torch.float64)
    (found,) = torch.autograd.grad((rectify(x) * weight).sum(), x)
    (expected,) = torch.autograd.grad((x.relu() * weight).sum(), x)
    assert torch.equal(rectify(x), x.relu())
    assert torch.equal(found, expected)


@pytest.mark.parametrize("axis", [0, 1])
def test_a_masked_sum_is_turned_around(axis: int) -> None:
    mask, shape = torch.tensor([1.7, 0.0, 1.7, 0.0, 1.7]), (5, 5, 2)
    skip, branch = torch.randn(2, *shape, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(shape, dtype=torch.float64)
    found = add_rows(skip, branch, Rows(mask=mask), axis, False, None, torch.tensor(3))
    expected = (skip + branch * along(mask.double(), branch, axis)).roll(-3, axis)
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-13)
    gradients = [torch.autograd.grad((y * weight).sum(), (skip, branch)) for y in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-13, atol=1e-13)
