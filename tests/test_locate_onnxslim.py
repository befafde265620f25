"""Places in files that onnxslim has rewritten: fused, folded, and told apart by values alone."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
import torch
from torch import nn
from torchvision.models import MobileNetV3, ResNet
from torchvision.models.mobilenetv3 import InvertedResidualConfig
from torchvision.models.resnet import BasicBlock

import dropsurgery as ds
from tests.helpers import randomize
from tests.test_locate import attribute, by_name, strip
from tests.verify_helpers import edited, set_weight, vit, weight

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    onnxslim = pytest.importorskip("onnxslim")

Edit = Callable[[onnx.ModelProto], None]


def resnet() -> nn.Module:
    torch.manual_seed(0)
    return randomize(ResNet(BasicBlock, [1, 1, 1, 1], num_classes=8)).eval()


def mobilenet() -> nn.Module:
    torch.manual_seed(0)
    settings = [
        InvertedResidualConfig(8, 3, 16, 8, True, "RE", 1, 1, 1.0),
        InvertedResidualConfig(8, 5, 24, 12, False, "HS", 2, 1, 1.0),
        InvertedResidualConfig(12, 5, 24, 12, True, "HS", 1, 1, 1.0),
    ]
    return randomize(MobileNetV3(settings, 32, num_classes=8)).eval()


def negated(name: str) -> Edit:
    """Return an edit that turns the sign of the largest weight of a node."""

    def edit(model: onnx.ModelProto) -> None:
        tensor = by_name(model, name).input[1]
        values = weight(model, tensor)
        values.view(-1)[values.abs().argmax()] *= -1
        set_weight(model, tensor, values)

    return edit


def skipped(name: str) -> Edit:
    def edit(model: onnx.ModelProto) -> None:
        node = by_name(model, name)
        node.op_type = "Identity"
        del node.input[1:]
        del node.attribute[:]

    return edit


def epsilon(name: str) -> Edit:
    return lambda model: setattr(attribute(by_name(model, name), "epsilon"), "f", 1e-3)


NETWORKS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "resnet": (resnet, 64),
    "vit": (vit, 32),
    "mobilenet": (mobilenet, 32),
}
# The exporter folds a norm into the convolution before it: either is the place.
DEFECTS: list[tuple[str, Edit, str]] = [
    ("resnet", negated("layer2.0.bn1/Conv"), "layer2.0.conv1 layer2.0.bn1"),
    ("resnet", skipped("layer3.0/Add"), "layer3.0"),
    ("resnet", skipped("layer2.0.relu/Relu"), "layer2.0.relu"),
    ("resnet", negated("fc/Gemm"), "fc"),
    ("vit", epsilon("encoder.layers.encoder_layer_1.ln_2/LayerNormalization"),
     "encoder.layers.encoder_layer_1.ln_2"),
    ("vit", skipped("encoder.layers.encoder_layer_0.mlp.1/Gelu"),
     "encoder.layers.encoder_layer_0.mlp.1"),
    ("vit", skipped("encoder.layers.encoder_layer_1.self_attention/Softmax"),
     "encoder.layers.encoder_layer_1.self_attention"),
    ("vit", skipped("encoder.layers.encoder_layer_0/Add"), "encoder.layers.encoder_layer_0"),
    ("mobilenet", negated("features.2.block.1.1/Conv"),
     "features.2.block.1.0 features.2.block.1.1"),
    ("mobilenet", skipped("features.1.block.2.scale_activation/HardSigmoid"),
     "features.1.block.2.scale_activation"),
    ("mobilenet", skipped("features.2.block.0.2/HardSwish"), "features.2.block.0.2"),
    ("mobilenet", skipped("features.3/Add"), "features.3"),
]  # fmt: skip


@pytest.fixture(scope="module")
def rewritten(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[nn.Module, Path]]:
    """The networks beside what onnxslim made of their files."""
    folder, found = tmp_path_factory.mktemp("onnxslim"), {}
    for name, (build, size) in NETWORKS.items():
        model = build()
        path = ds.export_onnx(model, folder / f"{name}.onnx", torch.randn(1, 3, size, size))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            onnx.save(onnxslim.slim(str(path)), str(path))
        found[name] = model, path
    return found


@pytest.mark.parametrize("name", NETWORKS)
def test_a_rewritten_file_has_no_place(
    rewritten: dict[str, tuple[nn.Module, Path]], name: str
) -> None:
    model, path = rewritten[name]
    for file in (path, edited(path, strip, f"{name}-stripped")):
        location = ds.locate(model, file, seeds=(0,))
        assert not location, str(location)
        assert "does not tell the modules" in str(location)


@pytest.mark.parametrize(("name", "edit", "modules"), DEFECTS)
def test_the_place_in_a_rewritten_file(
    rewritten: dict[str, tuple[nn.Module, Path]], name: str, edit: Edit, modules: str
) -> None:
    model, path = rewritten[name]

    def change(file: onnx.ModelProto) -> None:
        edit(file)
        strip(file)

    location = ds.locate(model, edited(path, change))
    assert location.found
    assert location.module in modules.split(), str(location)
