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
    model[0].bias.requires_grad_(False)
    ds.save(ds.trace(model), tmp_path)
    fresh = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    fresh[0].requires_grad_(False)
    loaded = ds.load(tmp_path, fresh)
    assert [p.dtype for p in loaded.parameters()] == [torch.bfloat16] * 4
    assert [p.requires_grad for p in loaded.parameters()] == [True, False, True, True]
    assert fresh[0].weight.dtype == torch.float32


def test_modes_and_rates_that_were_set_afterwards_are_kept(tmp_path: Path) -> None:
    net = ds.retrofit(torchvision.models.resnet18(), 0.5).train()
    net.layer1[0].bn1.eval()
    net.layer1[0].drop_path.drop_prob = 0.75
    ds.save(net, tmp_path)
    loaded = ds.load(tmp_path, torchvision.models.resnet18())
    flags = {path: module.training for path, module in loaded.named_modules()}
    assert flags == {path: module.training for path, module in net.named_modules()}
    assert loaded.layer1[0].drop_path.drop_prob == 0.75


def test_a_classic_dropouts_new_rate_is_kept(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Dropout(0.3), nn.Linear(4, 4))
    net = ds.apply(model, ds.ConvertDropout("classic")).module.eval()
    (layer,) = [m for m in net.modules() if isinstance(m, ds.layers.ClassicDropout)]
    x = torch.randn(2, 4)
    before = net(x)
    layer.p = 0.5
    loaded = ds.load(ds.save(net, tmp_path), model).eval()
    assert torch.equal(loaded(x), net(x))
    assert not torch.equal(net(x), before)


def test_leaves_and_inputs_are_traced_alike(tmp_path: Path) -> None:
    model = torchvision.models.resnet18()
    net = ds.retrofit(ds.trace(model, leaf_modules=["layer1", type(model.layer2[0])]), 0.5)
    ds.save(net, tmp_path)
    assert ds.load(tmp_path, torchvision.models.resnet18()).code == net.code

    class Masked(nn.Module):
        def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
            return x if mask is None else x * mask

    x = torch.ones(2)
    ds.save(ds.trace(Masked(), example_inputs=(x, x)), tmp_path)
    assert torch.equal(ds.load(tmp_path, Masked())(x, x * 3), x * 3)


def test_a_whole_module_survives_a_pickle(tmp_path: Path) -> None:
    net = ds.retrofit(torchvision.models.efficientnet_b0(), 0.5).eval()
    torch.save(net, tmp_path / "net.pt")
    loaded = torch.load(tmp_path / "net.pt", weights_only=False)
    assert torch.equal(loaded(X), net(X))
    assert ds.save(loaded, tmp_path).exists()
    assert [str(s.module) for s in ds.find_residuals(loaded).sites]
    removed = ds.apply(loaded, ds.RemoveDropPath())
    assert len(removed.changes) == 9
    assert removed.module.features[2][1].stochastic_depth.p == pytest.approx(0.025)


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
            "count": "all",
            "break_even": 0.1,
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


def test_a_state_that_is_no_tensor_is_refused(tmp_path: Path) -> None:
    class Extra(nn.Linear):
        def get_extra_state(self) -> dict[str, int]:
            return {"step": 1}

        def set_extra_state(self, state: dict[str, int]) -> None:
            pass

    with pytest.raises(ArgumentTypeError, match="safetensors holds only tensors"):
        ds.save(ds.trace(nn.Sequential(Extra(2, 2))), tmp_path)


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
        ({"passes": 3}, "damaged: 'passes' is 3"),
        ({"passes": [3]}, "unknown pass None"),
        ({"aliases": {"a": "b"}}, "'a' repeats 'b', which is not saved"),
        ({"rates": {"nowhere": 0.5}}, "names 'nowhere', which this model does not have"),
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
