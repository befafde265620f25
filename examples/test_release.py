"""Checks for a release of an exported network: copy this file, and put your model and files in.

pytest examples/test_release.py
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import dropsurgery as ds


def my_model() -> nn.Module:
    """Build and load the network that was trained."""
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


def my_images() -> torch.Tensor:
    """Return a few inputs of the kind that the network will see; here they are made up."""
    return torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def model() -> nn.Module:
    """The network that the release is held to."""
    return my_model()


@pytest.fixture(scope="module")
def released(model: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file to be released, with its verdict in it; yours may lie in a folder already."""
    path = tmp_path_factory.mktemp("release") / "model.onnx"
    ds.export_onnx(ds.slim(model), path, (my_images(),))
    ds.record(path, model, ds.verify(model, path, my_images()))
    return path


def test_surgery_changed_nothing(model: nn.Module) -> None:
    """Module against module: folding is algebra, and shows in float64."""
    ds.testing.assert_equivalent(model, ds.slim(model), my_images())


def test_the_file_is_the_network(model: nn.Module, released: Path) -> None:
    """Module against ONNX: on inputs that are made up, several seeds and batch sizes."""
    ds.testing.assert_equivalent(model, released)


def test_the_file_is_the_network_on_real_inputs(model: nn.Module, released: Path) -> None:
    """Module against ONNX, on the inputs that matter."""
    ds.testing.assert_equivalent(model, released, my_images())


def test_another_export_is_the_same_network(
    model: nn.Module, released: Path, tmp_path: Path
) -> None:
    """ONNX against ONNX: an optimiser's output, another opset, the file of the last release."""
    other = ds.export_onnx(model, tmp_path / "other.onnx", (my_images(),), opset=19)
    ds.testing.assert_equivalent(released, other)


def test_the_file_is_the_one_that_was_verified(model: nn.Module, released: Path) -> None:
    """The record in the file: nobody changed graph, weights or verdict since, and it was good."""
    check = ds.check_record(released, reference=model)
    assert check.equivalent, check.text()


def test_the_checks_can_fail(model: nn.Module, released: Path) -> None:
    """A check that cannot fail proves nothing: another epsilon is another network."""
    other = my_model()
    other[1].eps = 1e-3
    with pytest.raises(AssertionError, match="error beyond rounding"):
        ds.testing.assert_equivalent(other, released)
