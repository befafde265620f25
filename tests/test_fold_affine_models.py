"""FoldAffine on real networks, float64, random statistics: how many BatchNorms stay."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
import timm
import torch
import torchvision
from torch import nn

import dropsurgery as ds
from tests.fold_helpers import calls, fold_affine, norms_left, ready, reasons

# Name, side of the input, single additions and multiplications that stay in their place.
MODELS = [
    ("timm:levit_128s", 224, 0, 0),
    ("timm:visformer_tiny", 224, 0, 0),
    ("timm:resnetv2_50", 32, 0, 0),
    ("timm:convmixer_768_32", 28, 32, 0),
    ("torchvision:densenet121", 32, 59, 0),
]


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    home, _, kind = name.partition(":")
    return timm.create_model(kind) if home == "timm" else torchvision.models.get_model(kind)


@pytest.mark.parametrize(("name", "side", "shifts", "scales"), MODELS)
def test_no_batchnorm_stays(name: str, side: int, shifts: int, scales: int) -> None:
    model = ready(build(name), seed=1)
    result = fold_affine(model, torch.randn(2, 3, side, side, dtype=torch.float64))
    assert norms_left(result.module) == 0
    left = calls(result.module)
    assert (left.count("ChannelShift"), left.count("ChannelScale")) == (shifts, scales)
    assert len(result.skipped) == shifts + scales
    assert all("its shift stays: its shift cannot go back: " in skip.reason
               for skip in result.skipped)  # fmt: skip


def test_convmixer_tells_what_stays() -> None:
    model = ready(timm.create_model("convmixer_768_32"), seed=1)
    result = fold_affine(model, torch.randn(1, 3, 28, 28, dtype=torch.float64))
    assert "Conv2d 'blocks.0.0.fn.0' pads with zeros, which a shift does not pass" in reasons(
        result
    )
    assert "'stem_1' is a nonlinearity, which no shift passes" in reasons(result)


def test_what_stays_is_one_node_in_onnx(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = ready(nn.Sequential(nn.Conv2d(3, 4, 3), nn.GELU(), nn.BatchNorm2d(4), nn.ReLU(),
                                nn.Conv2d(4, 2, 3, padding=1))).float()  # fmt: skip
    x = torch.randn(1, 3, 16, 16)
    path = ds.export_onnx(ds.slim(model, example_inputs=(x,)), tmp_path / "m.onnx", (x,))
    kinds = [node.op_type for node in onnx.load(path).graph.node]
    assert kinds[-3:] == ["Conv", "Relu", "Conv"]
    assert "BatchNormalization" not in kinds
    assert ds.verify(model, path).ok
