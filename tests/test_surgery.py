"""The verbs end to end, and the networks they leave behind."""

from __future__ import annotations

import copy
from pathlib import Path

import onnx
import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

import dropsurgery as ds
from dropsurgery.errors import ArgumentError, PassError
from tests.helpers import randomize

X = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "resnet152"])
def test_retrofit_slim_export_verify(name: str, tmp_path: Path) -> None:
    model = randomize(torchvision.models.get_model(name)).eval()
    net = ds.retrofit(model, 0.8)
    slim = ds.slim(net)
    assert not [m for m in slim.modules() if isinstance(m, _BatchNorm | ds.DropPath)]
    ds.testing.assert_equivalent(model, slim, X)
    path = tmp_path / f"{name}.onnx"
    ds.export_onnx(slim, path, X)
    operators = {node.op_type for node in onnx.load(path).graph.node}
    assert operators == {"Conv", "Relu", "Add", "MaxPool", "ReduceMean", "Reshape", "Gemm"}
    verdict = ds.verify(model, path)
    assert verdict.ok, str(verdict)


def test_retrofit_chooses_sites_by_where_and_include() -> None:
    class Long(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = torchvision.models.resnet.BasicBlock(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return x + torch.tanh(self.inner(torch.relu(x)))

    def drops(net: nn.Module) -> dict[str, float]:
        return {k: m.drop_prob for k, m in net.named_modules() if isinstance(m, ds.DropPath)}

    model = torchvision.models.resnet18()
    chosen = drops(ds.retrofit(model, 0.8, where="layer4.*"))
    assert chosen == pytest.approx({"layer4.0.drop_path": 0.175, "layer4.1.drop_path": 0.2})
    two = drops(ds.retrofit(model, 0.8, where=("layer1.0", "add_7")))
    assert list(two) == ["layer1.0.drop_path", "layer4.1.drop_path"]
    by_call = drops(ds.retrofit(model, where=lambda site: site.kind == "projection"))
    assert list(by_call) == [f"layer{stage}.0.drop_path" for stage in (2, 3, 4)]
    with pytest.raises(PassError, match="matches none of the 8 residual sites"):
        ds.retrofit(model, where="layer5.*")
    assert len(drops(ds.retrofit(Long()))) == 1
    for include in ("nested", ["nested"], ("linear", "nested")):
        assert len(drops(ds.retrofit(Long(), include=include))) == 2
    with pytest.raises(ArgumentError, match="include names 'long'"):
        ds.retrofit(Long(), include=("long",))


def test_slim_is_an_inference_graph_whatever_the_mode() -> None:
    model = randomize(torchvision.models.mobilenet_v2()).train()
    slim = ds.slim(model)
    assert not any(module.training for module in slim.modules())
    assert all(module.training for module in model.modules())
    assert not [m for m in slim.modules() if isinstance(m, nn.Dropout | _BatchNorm)]
    expected = copy.deepcopy(model).eval().double()(X.double())
    assert (copy.deepcopy(slim).double()(X.double()) - expected).abs().max() < 1e-4


def test_slim_in_double_precision_differs_by_rounding_alone() -> None:
    model = randomize(torchvision.models.resnet18()).double().eval()
    expected, actual = model(X.double()), ds.slim(model)(X.double())
    assert (actual - expected).abs().max() / expected.abs().max() < 1e-12


def test_slim_leaves_out_what_the_eval_graph_does_not_use() -> None:
    model = randomize(torchvision.models.googlenet(init_weights=False))
    slim = ds.slim(model)
    assert not [key for key in slim.state_dict() if key.startswith("aux")]
    assert [key for key in model.state_dict() if key.startswith("aux")]
    ds.testing.assert_equivalent(model.eval(), slim, X)


def test_slim_takes_native_drops_out() -> None:
    model = timm.create_model("resnet18", drop_path_rate=0.2, drop_rate=0.2)
    slim = ds.slim(randomize(model)).train()
    assert torch.equal(slim(X), slim(X))
    assert not [n for n in slim.graph.nodes if "drop_path" in str(n.target)]


def test_verbs_leave_the_model_alone() -> None:
    model = randomize(torchvision.models.resnet18()).train()
    flags = [module.training for module in model.modules()]
    state = {key: value.clone() for key, value in model.state_dict().items()}
    names = [name for name, _ in model.named_modules()]
    net = ds.retrofit(model)
    net.eval()
    ds.slim(model)
    ds.apply(model.eval(), ds.FoldBatchNorm())
    model.train()
    assert [module.training for module in model.modules()] == flags
    assert [name for name, _ in model.named_modules()] == names
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())


def test_fine_tuning_a_retrofitted_network_trains_its_model_too() -> None:
    model = torchvision.models.resnet18()
    net = ds.retrofit(model, 0.5).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = model.fc.weight.detach().clone()
    net(X).square().mean().backward()
    optimizer.step()
    assert not torch.equal(model.fc.weight, before)
    ds.testing.assert_equivalent(model, ds.slim(net), X)


def test_passes_compose_in_order() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)
            self.drop = nn.Dropout(0.2)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.drop(torch.relu(self.norm(self.conv(x))))

    model = randomize(Net()).eval()
    result = ds.apply(
        model,
        ds.InsertDropPath(ds.survival.constant(0.9)),
        ds.ConvertDropout("gaussian"),
        ds.FoldBatchNorm(),
    )
    assert [change.by for change in result.changes] == [
        "InsertDropPath",
        "ConvertDropout",
        "ConvertDropout",
        "FoldBatchNorm",
    ]
    ds.testing.assert_equivalent(model, result.module, X)
    assert ds.apply(model).module.code == ds.trace(model).code
