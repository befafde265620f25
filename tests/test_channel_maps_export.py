"""How shifts and scales that `slim` leaves are written in ONNX."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import onnx
import pytest
import timm
import torch
from torch import Tensor, nn

import dropsurgery as ds
from dropsurgery.errors import ArgumentError
from dropsurgery.layers.channel import ChannelScale, ChannelShift


class PreActivation(nn.Module):
    """Values that two BatchNorms read: the scales move on, the shifts cannot."""

    def __init__(self, norm: type[nn.Module] = nn.BatchNorm2d) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norms = nn.ModuleList(norm(8) for _ in range(2))
        self.convs = nn.ModuleList(nn.Conv2d(8, 8, 3, padding=1) for _ in range(2))
        for norm in self.norms:
            for tensor in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
                nn.init.uniform_(tensor, 0.5, 1.5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x)
        first, second = (
            conv(norm(y).relu()) for norm, conv in zip(self.norms, self.convs, strict=True)
        )
        return first * second


def operations(path: Path) -> Counter[str]:
    """Return how many nodes of each kind a file has."""
    return Counter(node.op_type for node in onnx.load(path).graph.node)


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, timm.layers.BatchNormAct2d])
def test_shifts_become_depthwise_convolutions(tmp_path: Path, norm: type[nn.Module]) -> None:
    model, x = PreActivation(norm).eval(), torch.randn(2, 3, 9, 9)
    slim = ds.slim(model, example_inputs=x)
    shifts = [path for path, m in slim.named_modules() if isinstance(m, ChannelShift)]
    assert shifts
    as_conv = ds.export_onnx(slim, tmp_path / "conv.onnx", x)
    plain = ds.export_onnx(slim, tmp_path / "add.onnx", x, channel_maps="elementwise")
    before, after = operations(plain), operations(as_conv)
    assert before["Add"] == len(shifts)
    assert after["Add"] == 0
    assert after["Conv"] == before["Conv"] + len(shifts)
    assert sum(before.values()) == sum(after.values())
    # What nobody reads any more is gone from the file.
    graph = onnx.load(as_conv).graph
    read = {name for node in graph.node for name in node.input}
    assert {tensor.name for tensor in graph.initializer} <= read
    for path in (as_conv, plain):
        ds.testing.assert_equivalent(model, path)
    # The nodes still bear the path of the module.
    named = {node.name for node in graph.node}
    assert named >= {f"{path.removesuffix('.map')}/Conv" for path in shifts}


@pytest.mark.parametrize("layer", [ChannelShift, ChannelScale])
@pytest.mark.parametrize(
    ("constant", "shape", "written"),
    [
        ((4, 1, 1), (2, 4, 5, 5), "Conv"),
        ((1, 4, 1, 1), (2, 4, 5, 5), "Conv"),
        ((4, 1), (2, 4, 5), None),  # a sequence
        ((4,), (2, 5, 5, 4), None),  # channels last
        ((4, 1, 1), (2, 3, 4, 5, 5), None),  # one axis more
    ],
)
def test_images_only(
    tmp_path: Path,
    layer: type[nn.Module],
    constant: tuple[int, ...],
    shape: tuple[int, ...],
    written: str | None,
) -> None:
    values = torch.randn(constant)
    model = nn.Sequential(nn.ReLU(), layer(values), nn.Sigmoid()).eval()
    path = ds.export_onnx(model, tmp_path / "m.onnx", torch.randn(shape))
    found = operations(path)
    expected = written or ("Add" if layer is ChannelShift else "Mul")
    assert found == Counter({"Relu": 1, expected: 1, "Sigmoid": 1})
    ds.testing.assert_equivalent(model, path)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_float32_only(tmp_path: Path, dtype: torch.dtype) -> None:
    """onnxruntime has no convolution of other dtypes on a CPU."""
    model = nn.Sequential(nn.ReLU(), ChannelShift(torch.randn(4, 1, 1)), nn.Sigmoid()).eval()
    model = model.to(dtype)
    path = ds.export_onnx(model, tmp_path / "m.onnx", torch.randn(2, 4, 5, 5, dtype=dtype))
    assert operations(path) == Counter({"Relu": 1, "Add": 1, "Sigmoid": 1})
    ds.testing.assert_equivalent(model, path)


def test_one_layer_that_is_called_twice_and_one_that_is_the_output(tmp_path: Path) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shift = ChannelShift(torch.randn(3, 1, 1))

        def forward(self, x: Tensor) -> Tensor:
            return self.shift(self.shift(x).sigmoid())  # type: ignore[no-any-return]

    model = Twice().eval()
    path = ds.export_onnx(model, tmp_path / "m.onnx", torch.randn(2, 3, 4, 4))
    assert operations(path) == Counter({"Conv": 1, "Sigmoid": 1, "Add": 1})
    ds.testing.assert_equivalent(model, path)


def test_an_unknown_way_is_refused(tmp_path: Path) -> None:
    model, x = PreActivation().eval(), torch.randn(2, 3, 9, 9)
    with pytest.raises(ArgumentError, match=r"channel_maps is 'bn'\n.*'conv' or 'elementwise'"):
        ds.export_onnx(model, tmp_path / "m.onnx", x, channel_maps="bn")  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())
