"""A surgery is saved as JSON and safetensors, and rebuilt bit for bit."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import timm
import torch
import torchvision
from torch import Tensor, fx, nn

import dropsurgery as ds
from dropsurgery.errors import ArgumentTypeError, ModelLoadError
from tests.helpers import randomize

X = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def surgeries(model: nn.Module) -> dict[str, fx.GraphModule]:
    rule = ds.survival.linspace(0.7)
    return {
        "retrofit": ds.retrofit(model, 0.5),
        "custom rule and where": ds.apply(
            model, ds.InsertDropPath(lambda l, L: 1 - l / L / 2, where=lambda s: s.block % 2 == 0)
        ).module,
        "several": ds.apply(
            model, ds.InsertDropPath(rule, where="layer4.*"), ds.ConvertDropout("gaussian")
        ).module,
        "undone": ds.apply(ds.retrofit(model), ds.RemoveDropPath()).module,
        "slim": ds.slim(ds.retrofit(model)),
    }


@pytest.mark.parametrize("name", surgeries(torchvision.models.resnet18()))
def test_round_trip(name: str, tmp_path: Path) -> None:
    model = randomize(torchvision.models.resnet18()).eval()
    module = surgeries(model)[name]
    ds.save(module, tmp_path / "surgery")
    fresh = torchvision.models.resnet18()
    before = copy.deepcopy(fresh.state_dict())
    loaded = ds.load(tmp_path / "surgery", fresh)
    assert loaded.code == module.code
    assert list(loaded.state_dict()) == list(module.state_dict())
    assert torch.equal(loaded(X), module(X))
    for training in (False, True):
        torch.manual_seed(2)
        expected = copy.deepcopy(module).train(training)(X)
        torch.manual_seed(2)
        assert torch.equal(copy.deepcopy(loaded).train(training)(X), expected)
    assert all(torch.equal(before[k], v) for k, v in fresh.state_dict().items())
    assert sorted(path.name for path in (tmp_path / "surgery").iterdir()) == [
        "model.safetensors",
        "surgery.json",
    ]


@pytest.mark.parametrize("name", ["googlenet", "efficientnet_b0", "timm:repvgg_a0"])
def test_slim_networks_round_trip(name: str, tmp_path: Path) -> None:
    def make() -> nn.Module:
        if name == "googlenet":
            return torchvision.models.googlenet(init_weights=False)
        return timm.create_model(name[5:]) if ":" in name else torchvision.models.get_model(name)

    slim = ds.slim(randomize(make()))
    expected = slim(X)
    # In training mode when it is saved, which no fold would accept.
    ds.save(slim.train(), tmp_path)
    loaded = ds.load(tmp_path, make())
    assert loaded.training
    assert torch.equal(loaded.eval()(X), expected)
    assert list(loaded.state_dict()) == list(slim.state_dict())


def test_the_mode_is_kept(tmp_path: Path) -> None:
    ds.save(ds.retrofit(torchvision.models.resnet18().train()), tmp_path)
    assert ds.load(tmp_path, torchvision.models.resnet18().eval()).training
    ds.save(ds.retrofit(torchvision.models.resnet18().eval()), tmp_path)
    assert not ds.load(tmp_path, torchvision.models.resnet18().train()).training


def test_a_plain_state_dict_and_a_retrofitted_one_are_interchangeable() -> None:
    model = randomize(timm.create_model("resnet18"))
    net = ds.retrofit(timm.create_model("resnet18"), 0.5)
    net.load_state_dict(model.state_dict(), strict=True)
    other = timm.create_model("resnet18")
    other.load_state_dict(net.state_dict(), strict=True)
    assert torch.equal(other.eval()(X), model.eval()(X))


def test_tied_parameters_stay_tied(tmp_path: Path) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(7, 4)
            self.head = nn.Linear(4, 7, bias=False)
            self.head.weight = self.embed.weight
            self.register_buffer("view", torch.zeros(8)[2:6])

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.embed(x)) + 0 * self.view.sum()

    module = ds.trace(Tied())
    ds.save(module, tmp_path)
    loaded = ds.load(tmp_path, Tied())
    assert loaded.head.weight is loaded.embed.weight
    x = torch.tensor([1, 5])
    assert torch.equal(loaded(x), module(x))


def test_frozen_parameters_and_half_precision_are_kept(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)).bfloat16()
    ds.save(ds.trace(model), tmp_path)
    fresh = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    fresh[0].requires_grad_(False)
    loaded = ds.load(tmp_path, fresh)
    assert [p.dtype for p in loaded.parameters()] == [torch.bfloat16] * 4
    assert [p.requires_grad for p in loaded.parameters()] == [False, False, True, True]
    assert fresh[0].weight.dtype == torch.float32


def test_nothing_is_pickled_and_the_json_is_readable(tmp_path: Path) -> None:
    ds.save(ds.retrofit(torchvision.models.resnet18(), 0.5), tmp_path)
    document = json.loads((tmp_path / "surgery.json").read_text())
    assert document["source"] == "torchvision.models.resnet.ResNet"
    assert document["passes"] == [
        {
            "pass": "InsertDropPath",
            "survival": {"rule": "linear", "final": 0.5},
            "mode": "row",
            "unit": "block",
            "where": None,
            "include": [],
        }
    ]


def test_an_interrupted_save_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = ds.retrofit(nn.Sequential(nn.Linear(2, 2)))
    ds.save(module, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def interrupted(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("safetensors.torch.save_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        ds.save(module, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_what_cannot_be_saved(tmp_path: Path) -> None:
    with pytest.raises(ArgumentTypeError, match="save takes a module that dropsurgery returned"):
        ds.save(nn.Linear(2, 2), tmp_path)
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ModelLoadError, match="cannot be written"):
        ds.save(ds.trace(nn.Linear(2, 2)), tmp_path / "file" / "below")


def test_what_cannot_be_loaded(tmp_path: Path) -> None:
    model = torchvision.models.resnet18()
    with pytest.raises(ModelLoadError, match="no saved surgery here"):
        ds.load(tmp_path, model)
    ds.save(ds.retrofit(model), tmp_path)
    with pytest.raises(ModelLoadError, match=r"do not fit this model.*\n.*model.safetensors"):
        ds.load(tmp_path, torchvision.models.resnet34())
    surgery = tmp_path / "surgery.json"
    document = json.loads(surgery.read_text())
    for change, message in (
        ({"format": 99}, "not a saved surgery that this version can read"),
        ({"passes": [{"pass": "Explode"}]}, "unknown pass 'Explode'"),
        ({"passes": [{"pass": "ConvertDropout"}]}, "parameters of pass ConvertDropout"),
        ({"passes": [{"pass": "ConvertDropout", "to": "x"}]}, "cannot be converted to 'x'"),
        (
            {"passes": [{**document["passes"][0], "where": "nowhere"}]},
            "does not fit this ResNet: where='nowhere' matches none",
        ),
    ):
        surgery.write_text(json.dumps({**document, **change}))
        with pytest.raises(ModelLoadError, match=message):
            ds.load(tmp_path, model)
    surgery.write_text("{")
    with pytest.raises(ModelLoadError, match="damaged"):
        ds.load(tmp_path, model)
    surgery.write_text(json.dumps(document))
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ModelLoadError, match="weights cannot be read"):
        ds.load(tmp_path, model)
