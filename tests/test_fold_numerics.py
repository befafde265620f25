"""FoldBatchNorm in low precision, and saved as data."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from dropsurgery.errors import PassError
from dropsurgery.graph import weighted
from dropsurgery.graph.trace import trace
from dropsurgery.passes.base import apply, run
from dropsurgery.passes.fold_batchnorm import FoldBatchNorm
from tests.fold_helpers import (
    IMAGE,
    Chain,
    assert_all_folded,
    conv_bn,
    fold,
    norms_left,
    ready,
    reasons,
    relative,
)


def test_error_is_no_worse_than_unfolded_in_single_precision() -> None:
    torch.manual_seed(0)
    layers = [m for _ in range(8) for m in (nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8))]
    exact = ready(nn.Sequential(*layers))
    x = torch.randn(4, 8, 12, 12, dtype=torch.float64)
    single = copy.deepcopy(exact).float()
    folded = apply(single, FoldBatchNorm()).module
    with torch.no_grad():
        reference = copy.deepcopy(single).double()(x.float().double())
        ours = relative(folded(x.float()).double(), reference)
        theirs = relative(single(x.float()).double(), reference)
    assert ours <= 1.1 * theirs


@pytest.mark.parametrize("block", [1, 50, 10**6])
def test_blocks_of_the_weight_are_put_together(monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    monkeypatch.setattr(weighted, "BLOCK", block)
    for layer in (
        nn.Conv2d(4, 6, 3, groups=2),
        nn.ConvTranspose2d(4, 6, 3, groups=2),
        nn.ConvTranspose2d(4, 6, 3),
    ):
        assert_all_folded(fold(ready(Chain(layer=layer, bn=nn.BatchNorm2d(6))), IMAGE))


def test_half_precision_layer_and_single_precision_norm_with_tiny_variance() -> None:
    """fx.fuse casts the scale before it multiplies: infinite weights."""
    model = Chain(flat=nn.Flatten(), fc=nn.Linear(8, 4).half(), bn=nn.BatchNorm1d(4, eps=1e-12))
    with torch.no_grad():
        model.fc.weight.mul_(1e-2)
        model.bn.running_var.fill_(1e-10)
        model.bn.running_mean.zero_()
    result = apply(model.eval(), FoldBatchNorm())
    assert_all_folded(result)
    x = torch.randn(16, 8).half()
    model.requires_grad_(False)
    exact = F.linear(x.double(), model.fc.weight.double(), model.fc.bias.double())
    exact = exact / (model.bn.running_var.double() + 1e-12).sqrt()
    assert float(1e-5**-1) > torch.finfo(torch.float16).max  # the scale alone would be infinite
    assert relative(result.module(x).detach().double(), exact) < 2e-3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_results_that_the_dtype_cannot_hold(dtype: torch.dtype) -> None:
    for variance, eps, weight in [(0.0, 1e-12, 1e3), (1e-44, 0.0, 1e30)]:
        model = conv_bn().eval()
        with torch.no_grad():
            model.conv.weight.fill_(1.0)
            model.bn.running_var.fill_(variance)
            model.bn.weight.fill_(weight)
            model.bn.eps = eps
        model.conv.to(dtype)
        reason = reasons(apply(model, FoldBatchNorm()))
        fits = weight / (variance + eps) ** 0.5 < torch.finfo(dtype).max
        assert reason == "" if fits else f"are not finite in {dtype}" in reason


def test_zero_variance_without_eps_is_refused() -> None:
    model = conv_bn().eval()
    with torch.no_grad():
        model.bn.running_var.zero_()
        model.bn.eps = 0.0
    assert "are not finite in torch.float32" in reasons(apply(model, FoldBatchNorm()))


def test_statistics_that_overflowed_are_refused() -> None:
    model = conv_bn().eval()
    with torch.no_grad():
        model.bn.running_var.fill_(1e5)
    model.half()  # 1e5 is inf in float16, and the BatchNorm's output silently its bias
    assert "are not finite" in reasons(apply(model, FoldBatchNorm()))
    assert norms_left(apply(model.float(), FoldBatchNorm()).module) == 1


def test_weights_that_would_lose_their_digits_are_refused() -> None:
    model = conv_bn().eval()
    with torch.no_grad():
        model.bn.running_var.fill_(1e12)
    model.conv.half()
    assert "are too small for torch.float16" in reasons(apply(model, FoldBatchNorm()))
    model.conv.float()
    assert reasons(apply(model, FoldBatchNorm())) == ""


def test_large_variance_in_half_precision_gets_better() -> None:
    model = conv_bn().eval()
    with torch.no_grad():
        model.bn.running_var.fill_(1e5)
    model.conv.half()
    result = apply(model, FoldBatchNorm())
    assert_all_folded(result)
    x = torch.randn(2, 4, 9, 8).half()
    with torch.no_grad():
        reference = copy.deepcopy(model).double()(x.double())
        assert relative(result.module(x).double(), reference) < 2e-3


def test_json_rebuilds_the_same_surgery_on_other_weights() -> None:
    def build() -> nn.Module:
        return Chain(
            fc=nn.Linear(5, 6),
            bn=nn.BatchNorm1d(6),
            fc2=nn.Linear(6, 4),
            bn2=nn.BatchNorm1d(4, eps=0),
        )

    trained = ready(build())
    with torch.no_grad():
        trained.bn2.running_var.zero_()
    x = torch.randn(3, 5, dtype=torch.float64)
    module = trace(trained, example_inputs=(x,))
    plan = run(FoldBatchNorm(), module)
    data = json.loads(json.dumps(FoldBatchNorm().to_json(plan)))
    assert data == {"pass": "FoldBatchNorm", "nodes": ["bn"]}
    del data["pass"]
    fresh = trace(build().double().eval())
    run(FoldBatchNorm.from_json(data), fresh)
    fresh.load_state_dict(module.state_dict(), strict=True)
    assert fresh.code == module.code


def test_saved_nodes_that_cannot_be_folded_are_an_error() -> None:
    model = Chain(conv=nn.Conv2d(4, 6, 3), act=nn.ReLU(), bn=nn.BatchNorm2d(6)).eval()
    with pytest.raises(PassError, match="its input comes from ReLU 'act'"):
        apply(model, FoldBatchNorm(nodes=("bn",)))
    with pytest.raises(PassError, match="there is no such BatchNorm"):
        apply(model, FoldBatchNorm(nodes=("bn_7",)))
