"""Hold an export equal to its network in your own test suite: copy, and put your model in.

pytest examples/check_equivalence_in_pytest.py
"""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

import dropsurgery as ds


def my_model() -> nn.Module:
    """Build and load your model here."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Dropout(0.1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 10),
    )
    net(torch.randn(32, 3, 16, 16) * 2 + 1)  # statistics that are not the default
    return net.eval()


@pytest.fixture(scope="module")
def model() -> nn.Module:
    """The network that everything is held to."""
    return my_model()


@pytest.fixture(scope="module")
def exported(model: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file that would be deployed."""
    path = tmp_path_factory.mktemp("onnx") / "model.onnx"
    ds.export_onnx(ds.slim(model), path, (torch.randn(2, 3, 16, 16),))
    return path


def test_slim_equals_the_model(model: nn.Module) -> None:
    """Folding is algebra: any module can be the candidate."""
    ds.testing.assert_equivalent(model, ds.slim(model), (torch.randn(4, 3, 16, 16),))


def test_export_equals_the_model(model: nn.Module, exported: Path) -> None:
    """The file runs in onnxruntime, on several seeds and batch sizes."""
    ds.testing.assert_equivalent(model, exported)


def test_the_check_can_fail(model: nn.Module, exported: Path) -> None:
    """A check that cannot fail proves nothing: another epsilon is another network."""
    other = copy.deepcopy(model)
    other[1].eps = 1e-3
    with pytest.raises(AssertionError):
        ds.testing.assert_equivalent(other, exported)
