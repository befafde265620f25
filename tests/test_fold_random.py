"""FoldBatchNorm on random layers and random networks."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from dropsurgery.passes.base import apply
from dropsurgery.passes.fold_batchnorm import FoldBatchNorm
from tests.fold_helpers import Chain, assert_all_folded, fold, norms_left, ready, relative
from tests.helpers import randomize

NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
CONVS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
EXACT = settings(max_examples=60, deadline=None, derandomize=True)


@st.composite
def layers(draw: st.DrawFn) -> tuple[nn.Module, nn.Module, Tensor]:
    """A convolution with any options, a BatchNorm, and an input."""
    axes = draw(st.integers(1, 3))
    groups = draw(st.sampled_from([1, 2, 3]))
    channels_in, channels_out = (groups * draw(st.integers(1, 3)) for _ in range(2))
    transposed = draw(st.booleans())
    stride, dilation = draw(st.integers(1, 3)), draw(st.integers(1, 2))
    options: dict[str, Any] = {"stride": stride, "dilation": dilation, "groups": groups}
    options["bias"] = draw(st.booleans())
    options["padding"] = draw(st.integers(0, 1))
    kernel = draw(st.integers(1, 3))
    if transposed:
        options["output_padding"] = draw(st.integers(0, max(stride, dilation) - 1))
    else:
        modes = ("zeros", "reflect", "replicate", "circular")
        options["padding_mode"] = draw(st.sampled_from(modes))
    torch.manual_seed(draw(st.integers(0, 2**31)))
    kind = (TRANSPOSED if transposed else CONVS)[axes]
    conv = kind(channels_in, channels_out, kernel, **options)
    norm = NORMS[axes](channels_out, affine=draw(st.booleans()), eps=draw(st.floats(1e-8, 1.0)))
    x = torch.randn(draw(st.integers(1, 2)), channels_in, *(7,) * axes, dtype=torch.float64)
    return conv, norm, x


@EXACT
@given(layers())
def test_any_convolution(case: tuple[nn.Module, nn.Module, Tensor]) -> None:
    conv, norm, x = case
    model = ready(Chain(conv=conv, bn=norm))
    if norm.weight is not None:  # negative and zero scales are as good as any
        with torch.no_grad():
            norm.weight.sub_(1.0)
            norm.weight[0] = 0.0
    assert_all_folded(fold(model, x))


@EXACT
@given(layers(), st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
def test_error_is_bounded_by_the_rounding_of_the_weights(
    case: tuple[nn.Module, nn.Module, Tensor], dtype: torch.dtype
) -> None:
    """In lower precision the folded weights are the exact ones, rounded: nothing else is lost."""
    conv, norm, x = case
    model = Chain(conv=conv.to(dtype), bn=randomize(norm)).eval()
    result = apply(model, FoldBatchNorm())
    assert_all_folded(result)
    assert {p.dtype for p in result.module.parameters()} == {dtype}
    eps = torch.finfo(dtype).eps
    with torch.no_grad():
        exact = model.double()(x)
        folded = result.module.double()(x)
        size = model.bn(model.conv.__class__.forward(_magnitudes(model.conv), x.abs())).abs().max()
    assert float((folded - exact).abs().max()) <= 4 * eps * float(size + exact.abs().max())


def _magnitudes(conv: nn.Module) -> nn.Module:
    for parameter in conv.parameters():
        parameter.data = parameter.data.abs()
    return conv


class RandomNet(nn.Module):
    """Blocks drawn at random; the order of the draws is the order of the calls."""

    def __init__(self, kinds: list[str], shared: bool) -> None:
        super().__init__()
        self.kinds = kinds
        self.stem = nn.Conv2d(3, 4, 1)
        common = nn.Conv2d(4, 4, 3, padding=1)
        for index in range(len(kinds)):
            self.add_module(f"conv{index}", common if shared else nn.Conv2d(4, 4, 3, padding=1))
            self.add_module(f"bn{index}", nn.BatchNorm2d(4))
        self.drop = nn.Dropout(0.3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for index, kind in enumerate(self.kinds):
            conv, bn = getattr(self, f"conv{index}"), getattr(self, f"bn{index}")
            if kind == "plain":
                x = bn(conv(x)).relu_()
            elif kind == "residual":
                x = x + bn(conv(x))
            elif kind == "dropout":
                x = bn(self.drop(conv(x)))
            elif kind == "tap":
                y = conv(x)
                x = bn(y) + y.tanh()
            elif kind == "preactivation":
                x = x + conv(bn(x).relu())
            else:
                x = torch.cat([bn(conv(x))[:, :2], bn(x)[:, 2:]], 1)
        return x


KINDS = ["plain", "residual", "dropout", "tap", "preactivation", "cat"]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(st.sampled_from(KINDS), min_size=1, max_size=6), st.booleans(), st.integers(0, 99))
def test_random_networks(kinds: list[str], shared: bool, seed: int) -> None:
    torch.manual_seed(seed)
    model = ready(RandomNet(kinds, shared), seed)
    result = fold(model, torch.randn(2, 3, 6, 6, dtype=torch.float64))
    calls = len(kinds) + kinds.count("cat")
    taken = sum("folded into" in change.what for change in result.changes)
    assert norms_left(result.module) == calls - taken == len(result.skipped)
    assert taken >= sum(kind in ("plain", "residual", "dropout", "cat") for kind in kinds)


def test_the_comparison_would_notice_a_wrong_fold() -> None:
    """A scale on the wrong axis, or a shift that is off by 1e-9, is far outside the tolerance."""
    model = ready(Chain(conv=nn.Conv2d(4, 4, 3), bn=nn.BatchNorm2d(4)))
    x = torch.randn(2, 4, 6, 6, dtype=torch.float64)
    folded = apply(model, FoldBatchNorm()).module
    with torch.no_grad():
        expected = model(x)
        folded.conv.bias.add_(1e-9)
        assert relative(folded(x), expected) > 1e-12
        wrong = apply(model, FoldBatchNorm()).module
        scale = model.bn.weight / (model.bn.running_var + model.bn.eps).sqrt()
        wrong.conv.weight.copy_(model.conv.weight * scale.view(1, -1, 1, 1))
        assert relative(wrong(x), expected) > 1e-3
