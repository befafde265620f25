"""FoldBatchNorm on real networks: nothing of a BatchNorm is left that could have gone."""

from __future__ import annotations

import warnings

import pytest
import timm
import torch
import torchvision
from torch import nn

from dropsurgery.passes.base import apply
from dropsurgery.passes.fold_batchnorm import FoldBatchNorm
from tests.fold_helpers import fold, norms_left, ready, reasons, relative

# Name, side of the input, BatchNorms in the eval graph, BatchNorms that stay.
MODELS = [
    ("torchvision:resnet18", 64, 20, 0),
    ("torchvision:mobilenet_v2", 64, 52, 0),
    ("torchvision:mobilenet_v3_small", 64, 34, 0),
    ("torchvision:regnet_y_400mf", 64, 53, 0),
    ("torchvision:efficientnet_b0", 64, 49, 0),
    ("torchvision:shufflenet_v2_x0_5", 64, 56, 0),
    ("torchvision:googlenet", 64, 57, 0),
    ("torchvision:inception_v3", 96, 94, 0),
    ("torchvision:densenet121", 64, 121, 62),
    ("timm:resnet26", 64, 29, 0),
    ("timm:efficientnet_b0", 64, 49, 0),
    ("timm:tf_efficientnet_b0", 64, 49, 0),
    ("timm:darknet53", 64, 52, 0),
    ("timm:levit_128s", 224, 52, 2),
]


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    home, _, kind = name.partition(":")
    if home == "timm":
        return timm.create_model(kind)
    two_mode = {"init_weights": False} if kind in ("googlenet", "inception_v3") else {}
    return torchvision.models.get_model(kind, **two_mode)


@pytest.mark.parametrize(("name", "side", "norms", "stay"), MODELS)
def test_batchnorms_left(name: str, side: int, norms: int, stay: int) -> None:
    model = ready(build(name), seed=1)
    result = fold(model, torch.randn(2, 3, side, side, dtype=torch.float64))
    assert norms_left(result.module) == stay == len(result.skipped)
    assert sum("folded into" in change.what for change in result.changes) == norms - stay
    if stay == 0:
        assert reasons(result) == ""


def test_densenet_tells_what_stays() -> None:
    result = apply(build("torchvision:densenet121").eval(), FoldBatchNorm())
    assert len(result.skipped) == 62
    assert all("its input comes from cat 'cat" in skip.reason for skip in result.skipped)


@pytest.mark.parametrize(
    ("name", "side"),
    [("torchvision:resnet18", 64), ("torchvision:densenet121", 64), ("timm:darknet53", 64)],
)
def test_at_least_what_torch_fx_folds(name: str, side: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # its import of torch.jit
        from torch.fx.experimental.optimization import fuse
    model = ready(build(name), seed=2)
    x = torch.randn(1, 3, side, side, dtype=torch.float64)
    theirs, ours = fuse(model), apply(model, FoldBatchNorm()).module
    assert norms_left(ours) <= norms_left(theirs)
    with torch.no_grad():
        assert relative(ours(x), theirs(x)) < 1e-12


def test_whole_network_in_training_mode() -> None:
    model = build("torchvision:resnet18").train()
    result = apply(model, FoldBatchNorm())
    assert result.changes == ()
    assert len(result.skipped) == 20
    assert all(s.reason.endswith("in training mode: call .eval() first") for s in result.skipped)
    assert list(result.module.state_dict()) == list(model.state_dict())


def test_error_in_single_precision_is_no_worse_than_unfolded() -> None:
    model = ready(build("torchvision:resnet18"), seed=3).float()
    x = torch.randn(4, 3, 64, 64)
    folded = apply(model, FoldBatchNorm()).module
    with torch.no_grad():
        ours, theirs = folded(x), model(x)
        exact = model.double()(x.double())
    assert relative(ours.double(), exact) <= 1.2 * relative(theirs.double(), exact)


def test_parameters_of_the_original_are_not_written() -> None:
    model = build("torchvision:mobilenet_v2").eval()
    versions = {name: value._version for name, value in model.state_dict(keep_vars=True).items()}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        apply(model, FoldBatchNorm())
    after = model.state_dict(keep_vars=True)
    assert {name: value._version for name, value in after.items()} == versions
