"""MergeLinearBranches on networks that are built of branches, against their own way to merge."""

from __future__ import annotations

import copy
import warnings

import pytest
import timm
import torch
from timm.utils.model import reparameterize_model
from torch import nn

import dropsurgery as ds
from tests.fold_helpers import fold, norms_left, ready, relative

# Name, side of the input, layers that are merged, convolutions and BatchNorms that are left.
MODELS = [
    ("repvgg_a0", 64, 22, 22, 0),
    ("mobileone_s0", 64, 43, 43, 0),
    ("mobileone_s1", 64, 39, 43, 4),
    ("fastvit_t8", 64, 20, 52, 10),
    ("repghostnet_050", 64, 32, 95, 48),
    ("repvit_m0_9", 64, 24, 103, 60),
]


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model(name)
    for key, parameter in model.named_parameters():
        if "gamma" in key:  # layer scale begins at 1e-5, which hides its branch
            nn.init.uniform_(parameter, -1.0, 1.0)
    return ready(model, seed=1)


def convolutions(model: nn.Module) -> int:
    return sum(isinstance(module, nn.Conv2d) for module in model.modules())


@pytest.mark.parametrize(("name", "side", "merges", "convs", "norms"), MODELS)
def test_one_convolution_a_block(name: str, side: int, merges: int, convs: int, norms: int) -> None:
    model = build(name)
    x = torch.randn(1, 3, side, side, dtype=torch.float64)
    result = fold(model, x, item=ds.MergeLinearBranches())
    assert all("would grow" in skip.reason for skip in result.skipped)
    assert len(result.changes) == merges
    assert (convolutions(result.module), norms_left(result.module)) == (convs, norms)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = reparameterize_model(copy.deepcopy(model))
    assert convolutions(result.module) <= convolutions(theirs)
    with torch.no_grad():
        # Some of theirs are built in float32, whatever dtype the network has.
        assert relative(result.module(x), theirs.double()(x)) < 1e-6


@pytest.mark.parametrize("name", ["repvgg_a0", "mobileone_s0", "fastvit_t8"])
def test_slim_leaves_no_batchnorm(name: str) -> None:
    model = build(name)
    x = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    slim = ds.slim(model)
    assert norms_left(slim) == 0
    with torch.no_grad():
        assert relative(slim(x), model(x)) < 1e-12
