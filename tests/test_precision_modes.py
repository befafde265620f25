"""Half precision and memory formats: the drop path that saves work against the one that masks."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, fx, nn

import dropsurgery as ds
from dropsurgery.layers.rows import Rows, add_rows, split_rows, take_rows
from tests.distributed_ranks import MODES, Net
from tests.helpers import randomize
from tests.saved_work_helpers import Recorder, gradients, quiet, traced

# Unit roundoff of bfloat16 is 2^-9; a few layers of it.
BF16 = 2.0**-5


class Images(nn.Module):
    """A block with an identity skip and one with a projection; feature maps come out."""

    def __init__(self) -> None:
        super().__init__()
        block = torchvision.models.resnet.BasicBlock
        down = nn.Sequential(nn.Conv2d(4, 6, 1, 2, bias=False), nn.BatchNorm2d(6))
        self.blocks = nn.Sequential(block(4, 4), block(4, 6, 2, down), block(6, 6))

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(x)


def network(name: str, mode: str, *, smooth: bool = False) -> fx.GraphModule:
    """Return a network; a smooth one where half precision may not turn a ReLU on or off."""
    torch.manual_seed(1)
    model = randomize(Images()) if name == "images" else Net()
    for module in model.modules():
        if smooth and hasattr(module, "relu"):
            module.relu = nn.Tanh()
    net = ds.retrofit(model, 0.6, rule="constant", mode=mode)
    quiet(net)
    return net


def inputs(name: str) -> Tensor:
    shape = (7, 4, 6, 6) if name == "images" else (7, 4)
    return torch.randn(shape, generator=torch.Generator().manual_seed(5))


def joined(found: dict[str, Tensor], like: dict[str, Tensor]) -> Tensor:
    """Return all gradients in one float32 vector, zeros where a branch did not run."""
    parts = [found.get(name, torch.zeros_like(g)).float().flatten() for name, g in like.items()]
    return torch.cat(parts)


def against_the_oracle(
    net: fx.GraphModule, x: Tensor, context: Any, monkeypatch: pytest.MonkeyPatch
) -> tuple[Tensor, Tensor]:
    """Run a network and its oracle; check dtypes, and that it rounds no worse than the oracle.

    What both are held to is the oracle in float32, with the same draws.
    """
    recorder = Recorder(net, monkeypatch)
    with context():
        output = net(x.clone())
    found = gradients(net, output)
    with context():
        oracle_output = recorder.run_flat(x.clone())
    oracle = gradients(net, oracle_output)
    assert recorder.drawn
    assert output.dtype == oracle_output.dtype
    assert all(found[name].dtype == oracle[name].dtype for name in found)
    net.float()
    true_output = recorder.run_flat(x.float())
    true = gradients(net, true_output)
    assert relative(output, true_output) <= 2 * relative(oracle_output, true_output) + 1e-5
    gradient, own, expected = (joined(g, true) for g in (found, oracle, true))
    assert relative(gradient, expected) <= 2 * relative(own, expected) + 1e-5
    return output, oracle_output


def relative(found: Tensor, expected: Tensor) -> float:
    """Return how far two tensors are apart, as a share of the second one's norm."""
    found, expected = found.detach().float(), expected.detach().float()
    return float((found - expected).norm() / expected.norm())


def autocast() -> torch.autocast:
    return torch.autocast("cpu", dtype=torch.bfloat16)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["mlp", "images"])
def test_autocast(name: str, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    net, x = network(name, mode, smooth=True), inputs(name)
    output, expected = against_the_oracle(net, x, autocast, monkeypatch)
    assert relative(output, expected) <= BF16


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["mlp", "images"])
def test_bfloat16(name: str, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    net, x = network(name, mode, smooth=True).bfloat16(), inputs(name).bfloat16()
    output, expected = against_the_oracle(net, x, contextlib.nullcontext, monkeypatch)
    assert output.dtype == torch.bfloat16
    assert relative(output, expected) <= BF16


@pytest.mark.parametrize("context", [contextlib.nullcontext, autocast])
@pytest.mark.parametrize("mode", MODES)
def test_dtypes_are_those_of_the_row_mask(mode: str, context: Any) -> None:
    for name in ("mlp", "images"):
        with context():
            expected = network(name, "row")(inputs(name))
            assert network(name, mode)(inputs(name)).dtype == expected.dtype


@pytest.mark.parametrize("mode", MODES)
def test_channels_last(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    net, x = network("images", mode), inputs("images")
    net.to(memory_format=torch.channels_last)
    x = x.to(memory_format=torch.channels_last)
    kept = []
    for layer in net.modules():
        if isinstance(layer, nn.Conv2d):
            layer.register_forward_pre_hook(
                lambda _, args: kept.append(
                    args[0].is_contiguous(memory_format=torch.channels_last)
                )
            )
    output, expected = against_the_oracle(net, x, contextlib.nullcontext, monkeypatch)
    assert kept
    assert all(kept)
    assert output.is_contiguous(memory_format=torch.channels_last)
    assert relative(output, expected) <= 1e-5


@pytest.mark.parametrize("mode", ["row", "subset"])
def test_other_draws_are_further_away(mode: str) -> None:
    """The bounds above tell one draw from another."""
    for name in ("mlp", "images"):
        net, x = network(name, mode), inputs(name)
        with torch.no_grad():
            assert relative(net(x), net(x)) > 2 * BF16


FORMATS = [
    ((6, 3, 4, 5), torch.contiguous_format),
    ((6, 3, 4, 5), torch.channels_last),
    ((6, 3, 2, 4, 5), torch.channels_last_3d),
]


@pytest.mark.parametrize(("shape", "layout"), FORMATS)
@pytest.mark.parametrize("first", [None, 1, 4])
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("in_place", [False, True])
def test_rows_keep_the_memory_format(
    shape: tuple[int, ...],
    layout: torch.memory_format,
    first: int | None,
    last: bool,
    in_place: bool,
) -> None:
    """For a window, one that goes around the end, and an index as for small tensors."""
    torch.manual_seed(0)
    x = torch.randn(shape).to(memory_format=layout).requires_grad_()
    skip = torch.randn(shape).to(memory_format=layout).requires_grad_()
    chosen = [4, 0, 3] if first is None else [(first + i) % 6 for i in range(3)]
    if first is None:
        rows = Rows(torch.tensor(chosen), last=last, scale=2.0)
    else:
        rows = Rows(window=(first, 3), last=last, scale=2.0)
    taken = take_rows(x, rows)
    assert torch.equal(taken, x[chosen])
    assert taken.is_contiguous(memory_format=layout)
    base = skip * 1.0
    total = add_rows(base, taken, rows, in_place=in_place)
    assert (total is base) == in_place
    assert total.is_contiguous(memory_format=layout)
    mask = torch.zeros(6)
    mask[chosen if last else chosen[:-1]] = 2.0
    mask = mask.view(-1, *(1 for _ in shape[1:]))
    expected = skip + x * mask
    torch.testing.assert_close(total, expected)
    weights = torch.randn(shape).to(memory_format=layout)
    found = torch.autograd.grad((total * weights).sum(), (skip, x))
    wanted = torch.autograd.grad((expected * weights).sum(), (skip, x))
    torch.testing.assert_close(found, wanted)
    assert found[0].is_contiguous(memory_format=layout)


@pytest.mark.parametrize(("shape", "layout"), FORMATS)
@pytest.mark.parametrize("first", [1, 4])
def test_split_rows_keep_the_memory_format(
    shape: tuple[int, ...], layout: torch.memory_format, first: int
) -> None:
    torch.manual_seed(0)
    x = torch.randn(shape).to(memory_format=layout).requires_grad_()
    chosen = [(first + i) % 6 for i in range(3)]
    whole, taken = split_rows(x, Rows(window=(first, 3)))
    assert torch.equal(whole, x)
    assert torch.equal(taken, x[chosen])
    assert taken.is_contiguous(memory_format=layout)
    left = torch.randn(shape).to(memory_format=layout)
    right = torch.randn(taken.shape).to(memory_format=layout)
    (found,) = torch.autograd.grad((whole * left).sum() + (taken * right).sum(), x)
    (wanted,) = torch.autograd.grad((x * left).sum() + (x[chosen] * right).sum(), x)
    torch.testing.assert_close(found, wanted)
    assert found.is_contiguous(memory_format=layout)


@pytest.mark.parametrize("skip_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("branch_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("in_place", [False, True])
def test_dtypes_of_a_sum(
    skip_dtype: torch.dtype, branch_dtype: torch.dtype, in_place: bool
) -> None:
    skip, branch = torch.randn(4, 3).to(skip_dtype), torch.randn(4, 3).to(branch_dtype)
    chosen = Rows(window=(1, 2), scale=2.0)
    masked = Rows(mask=torch.tensor([0.0, 2.0, 2.0, 0.0]))
    compiled = traced(chosen)
    results = [
        add_rows(skip.clone(), take_rows(branch, rows), rows, in_place=in_place)
        for rows in (chosen, masked, compiled)
    ]
    for result in results[1:]:  # dtypes too
        torch.testing.assert_close(results[0], result, rtol=2.0**-7, atol=2.0**-7)
