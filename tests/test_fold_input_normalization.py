"""FoldInputNormalization: the network on raw inputs, and how much of that is in its weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import dropsurgery as ds
from dropsurgery.errors import ArgumentError, PassError
from dropsurgery.passes.base import Result
from tests.fold_helpers import Chain, Lambda, ready, relative

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
FOLD = ds.FoldInputNormalization(MEAN, STD)
RAW = torch.rand(2, 3, 32, 30, dtype=torch.float64, generator=torch.Generator().manual_seed(5))


def normalised(x: Tensor, scale: float = 1.0) -> Tensor:
    mean, std = (torch.tensor(v, dtype=x.dtype).view(-1, 1, 1) for v in (MEAN, STD))
    return (x / scale - mean) / std


def check(model: nn.Module, by: Any = FOLD, scale: float = 1.0) -> Result:
    model = ready(model)
    result = ds.apply(model, by)
    x = RAW * scale
    with torch.no_grad():
        assert relative(result.module(x), model(normalised(x, scale))) < 1e-12
    return result


def operations(result: Result) -> list[str]:
    ops = ("placeholder", "get_attr", "output")
    return [node.name for node in result.module.graph.nodes if node.op not in ops]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "settings",
    [{"stride": 4}, {"padding": 1, "padding_mode": "reflect"},
     {"padding": 2, "padding_mode": "circular"}, {"padding": 1, "padding_mode": "replicate"}],
)  # fmt: skip
def test_all_of_it_is_folded(settings: dict[str, Any], bias: bool) -> None:
    result = check(Chain(stem=nn.Conv2d(3, 6, 3, bias=bias, **settings), act=nn.ReLU()))
    assert operations(result) == ["stem", "act"]
    assert result.changes[0].what == "normalisation of 'input_1': mean and std folded into 'stem'"


def test_the_border_is_exact_with_padding() -> None:
    """A constant bias in place of the shift would be wrong at the border alone."""
    result = check(Chain(stem=nn.Conv2d(3, 6, 3, padding=1), act=nn.ReLU()))
    assert operations(result) == ["sub", "stem", "act"]
    assert result.changes[0].what == (
        "normalisation of 'input_1': std folded into 'stem'; x - 1·mean is the first operation, "
        "as what is padded with zeros must stay zero"
    )
    assert set(result.module.state_dict()) == {"input_mean", "stem.weight", "stem.bias"}


def test_a_mean_of_zero_needs_no_shift() -> None:
    by = ds.FoldInputNormalization((0.0,) * 3, (0.5,) * 3)
    model = ready(Chain(stem=nn.Conv2d(3, 6, 3, padding=1)))
    result = ds.apply(model, by)
    assert operations(result) == ["stem"]
    with torch.no_grad():
        assert relative(result.module(RAW), model(RAW / 0.5)) < 1e-12


def test_several_stems() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        return self.a(x) + self.b(x) * x.shape[0]

    both = Lambda(forward, a=nn.Conv2d(3, 6, 3), b=nn.Conv2d(3, 6, 3))
    assert "sub" not in operations(check(both))
    one = Lambda(forward, a=nn.Conv2d(3, 6, 3, padding=1), b=nn.Conv2d(3, 6, 1))
    assert operations(check(one))[0] == "sub"


def test_bytes() -> None:
    by = ds.FoldInputNormalization(MEAN, STD, scale=255.0)
    check(nn.Sequential(nn.Conv2d(3, 6, 4, 4)), by, scale=255.0)
    check(nn.Sequential(nn.Conv2d(3, 6, 3, padding=1)), by, scale=255.0)
    check(nn.Sequential(nn.ReLU(), nn.Conv2d(3, 6, 1)), by, scale=255.0)


def test_readers_that_cannot_take_it_in() -> None:
    result = check(Chain(act=nn.Tanh(), stem=nn.Conv2d(3, 6, 3)))
    assert operations(result)[:2] == ["sub", "mul"]
    assert "is the first operation: 'act' reads the input, too" in result.changes[0].what

    def shared(self: Any, x: Tensor) -> Tensor:
        return self.a(self.a(x).relu())

    result = check(Lambda(shared, a=nn.Conv2d(3, 3, 3)))
    assert "Conv2d 'a' is used elsewhere, too" in result.changes[0].what


def test_linear_stem() -> None:
    by = ds.FoldInputNormalization((0.5,) * 30, (0.25,) * 30)
    model = ready(Chain(fc=nn.Linear(30, 4)))
    result = ds.apply(model, by)
    assert operations(result) == ["fc"]
    with torch.no_grad():
        assert relative(result.module(RAW), model((RAW - 0.5) / 0.25)) < 1e-12


@pytest.mark.parametrize("name", ["resnet18", "convnext_atto", "vit_tiny_patch16_224"])
def test_real_networks(name: str, tmp_path: Path) -> None:
    def make(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        more = {"img_size": 32} if name.startswith("vit") else {}
        return ready(timm.create_model(name, **more), seed)

    model, x = make(0), torch.rand(1, 3, 32, 32, dtype=torch.float64)
    result = ds.apply(model, FOLD)
    with torch.no_grad():
        assert relative(result.module(x), model(normalised(x))) < 1e-12
        slim = ds.slim(result.module)
        assert relative(slim(x), model(normalised(x))) < 1e-12
    ds.save(result.module, tmp_path)
    assert torch.equal(ds.load(tmp_path, make(1))(x), result.module(x))


def test_the_model_is_not_changed() -> None:
    model = ready(nn.Sequential(nn.Conv2d(3, 6, 3)))
    before = model(RAW)
    ds.apply(model, FOLD)
    assert torch.equal(model(RAW), before)


def test_arguments() -> None:
    with pytest.raises(ArgumentError, match="mean has 3 channels and std 1"):
        ds.FoldInputNormalization(MEAN, (1.0,))
    with pytest.raises(ArgumentError, match="std is"):
        ds.FoldInputNormalization((0.0,), (0.0,))
    with pytest.raises(ArgumentError, match="mean is 'imagenet'"):
        ds.FoldInputNormalization("imagenet", STD)  # type: ignore[arg-type]
    with pytest.raises(PassError, match="have 1 channels, and Conv2d '0', which reads the input"):
        ds.apply(nn.Sequential(nn.Conv2d(3, 6, 3)), ds.FoldInputNormalization((0.5,), (0.5,)))
    with pytest.raises(PassError, match="there is no input 'image'"):
        ds.apply(
            nn.Sequential(nn.Conv2d(3, 6, 3)), ds.FoldInputNormalization(MEAN, STD, input="image")
        )
