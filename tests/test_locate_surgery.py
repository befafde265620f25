"""Places in networks that were operated on, in files of them and in modules."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
import torch
from torch import Tensor, nn

import dropsurgery as ds
from dropsurgery.errors import VerifyError
from dropsurgery.passes.inference import KeepEval
from dropsurgery.testing import assert_equivalent
from dropsurgery.verify.twin import told_by_file, twin
from tests.helpers import randomize
from tests.test_locate import Block, Net, averaged_axis, by_name, head_bias, skipped_activation
from tests.verify_helpers import edited, vit

Edit = Callable[[onnx.ModelProto], None]
Break = Callable[[nn.Module], None]
IMAGE = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(3))


def skipped_residual(model: onnx.ModelProto) -> None:
    node = by_name(model, "blocks.1/Add")
    node.op_type = "Identity"
    del node.input[1:]


def take_out(model: onnx.ModelProto, name: str) -> None:
    """Take a node away, as an optimiser does with what it takes for an identity."""
    node = by_name(model, name)
    for other in model.graph.node:
        other.input[:] = [node.input[0] if n == node.output[0] else n for n in other.input]
    model.graph.node.remove(node)


def left_out_residual(model: onnx.ModelProto) -> None:
    take_out(model, "blocks.1/Add")


def left_out_activation(model: onnx.ModelProto) -> None:
    take_out(model, "blocks.1.relu/Relu")


def wrong_branch(model: onnx.ModelProto) -> None:
    by_name(model, "blocks.2/Add").input[1] = by_name(model, "blocks.0/Add").output[0]


FILE_DEFECTS: dict[str, tuple[Edit, str]] = {
    "skipped_activation": (skipped_activation, "blocks.1.relu"),
    "skipped_residual": (skipped_residual, "blocks.1"),
    "left_out_residual": (left_out_residual, "blocks.1"),
    "left_out_activation": (left_out_activation, "blocks.1.relu"),
    "wrong_branch": (wrong_branch, "blocks.2"),
    "head_bias": (head_bias, "head"),
    "padding": (averaged_axis, "stem"),
}


@pytest.fixture(scope="module")
def net() -> nn.Module:
    torch.manual_seed(0)
    return randomize(Net()).eval()


@pytest.fixture(scope="module")
def slim_file(net: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("slim") / "slim.onnx"
    return ds.export_onnx(ds.slim(net), path, IMAGE)


# Files


@pytest.mark.parametrize("name", FILE_DEFECTS)
def test_a_slim_file_is_compared_with_the_slim_network(
    net: nn.Module, slim_file: Path, name: str
) -> None:
    edit, module = FILE_DEFECTS[name]
    location = ds.locate(net, edited(slim_file, edit))
    assert location.module == module, str(location)
    assert "compared with the network after its surgery" in location.notes
    # Nothing else is blamed, though slim scaled values.
    assert [step.module for step in location.steps if not step.ok] == [module]


def test_the_reference_may_have_gone_through_part_of_the_surgery(
    net: nn.Module, tmp_path: Path
) -> None:
    retrofitted = ds.retrofit(net, 0.5)
    path = ds.export_onnx(ds.slim(retrofitted), tmp_path / "m.onnx", IMAGE)
    changed = edited(path, skipped_activation)
    for reference in (net, retrofitted, ds.slim(retrofitted)):
        location = ds.locate(reference, changed, seeds=(0,))
        assert location.module == "blocks.1.relu"
        assert [step.module for step in location.steps if not step.ok] == ["blocks.1.relu"]
    # One that went through something else is compared as it is.
    told = told_by_file({item.key: item.value for item in onnx.load(str(path)).metadata_props})
    assert twin(net, told) is not None
    assert twin(ds.slim(retrofitted), told) is None
    assert twin(ds.apply(net, ds.FoldBatchNorm()).module, told) is None


@pytest.mark.parametrize(
    ("key", "text"),
    [
        ("passes", "[" * 50_000),
        ("passes", '{"pass": "KeepEval"}'),
        ("passes", '["KeepEval"]'),
        ("passes", '[{"pass": "RemoveNoOps", "steps": 7}]'),
        ("passes", '[{"pass": "FoldAffine", "steps": [{"step": "move", "source": "none"}]}]'),
        ("passes", json.dumps([{"pass": "KeepEval"}] * 65)),
        ("trace", "[]"),
        ("trace", '{"inputs": {"star": 1000000000, "names": []}}'),
        ("trace", '{"inputs": {"star": "many"}}'),
        ("trace", '{"inputs": 3}'),
        ("trace", '{"leaf_modules": 3}'),
        ("trace", '{"inputs": {"examples": [{"shape": [-1], "dtype": "nothing"}]}}'),
    ],
)
def test_a_history_that_cannot_be_used_is_left_alone(
    net: nn.Module, tmp_path: Path, key: str, text: str
) -> None:
    path = ds.export_onnx(ds.apply(net, KeepEval()).module, tmp_path / "m.onnx", IMAGE)

    def damage(model: onnx.ModelProto) -> None:
        skipped_activation(model)
        entry = next(e for e in model.metadata_props if e.key == f"dropsurgery.{key}")
        entry.value = text

    location = ds.locate(net, edited(path, damage), seeds=(0,))
    assert location.module == "blocks.1.relu"
    assert "compared with the network after its surgery" not in location.notes


def test_surgery_that_is_wrong_itself(net: nn.Module, tmp_path: Path) -> None:
    surgered = ds.slim(net)
    with torch.no_grad():
        surgered.get_submodule("blocks.1.conv1").weight.mul_(1.01)  # type: ignore[operator, union-attr]
    path = ds.export_onnx(surgered, tmp_path / "m.onnx", IMAGE)
    # Done again on the network, the surgery is right, and the file is not.
    assert ds.locate(net, path).module == "blocks.1.conv1"
    # The file is what was passed as the network behind it: that one is wrong.
    location = ds.locate(net, path, surgered=surgered)
    assert location.module in ("blocks.1.conv1", "blocks.1.bn1"), str(location)
    assert "the file is what the network is after its surgery" in location.notes
    with pytest.raises(VerifyError, match="no piece of the file shows it: first differs at"):
        ds.write_repro(net, path, tmp_path / "case", surgered=surgered)
    assert not (tmp_path / "case").exists()
    with pytest.raises(AssertionError, match=r"first differs at blocks.1.(conv1|bn1)"):
        assert_equivalent(net, path, surgered=surgered)


def test_a_case_of_a_slim_file(net: nn.Module, slim_file: Path, tmp_path: Path) -> None:
    changed = edited(slim_file, skipped_activation, "changed")
    assert ds.write_repro(net, changed, tmp_path / "case").module == "blocks.1.relu"
    assert (tmp_path / "case" / "run.py").is_file()


# Modules


def epsilon(model: nn.Module) -> None:
    model.get_submodule("blocks.1.bn1").eps = 1e-3  # type: ignore[assignment]


def little_epsilon(model: nn.Module) -> None:
    # Far below the rounding of float32.
    model.get_submodule("blocks.1.bn1").eps += 1e-9  # type: ignore[operator]


def weight(model: nn.Module) -> None:
    layer = model.get_submodule("blocks.2.conv2")
    assert isinstance(layer.weight, nn.Parameter)
    layer.weight = nn.Parameter(layer.weight.detach().clone())
    with torch.no_grad():
        layer.weight[0, 0, 0, 0] += 0.05


def activation(model: nn.Module) -> None:
    model.get_submodule("blocks.0").relu = nn.LeakyReLU(1e-3)


def bias(model: nn.Module) -> None:
    layer = model.get_submodule("head")
    assert isinstance(layer.bias, nn.Parameter)
    layer.bias = nn.Parameter(layer.bias.detach() + 1e-3)


class NoSkip(Block):
    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x))))))


def residual(model: nn.Module) -> None:
    model.get_submodule("blocks.1").__class__ = NoSkip


def copied(model: nn.Module) -> nn.Module:
    """Copy the modules and share the weights, as surgery does."""
    memo = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, memo)


MODULE_DEFECTS: dict[str, tuple[Break, str]] = {
    "epsilon": (epsilon, "blocks.1.bn1"),
    "little epsilon": (little_epsilon, "blocks.1.bn1"),
    "weight": (weight, "blocks.2.conv2"),
    "activation": (activation, "blocks.0.relu"),
    "residual": (residual, "blocks.1"),
    "bias": (bias, "head"),
}


@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize("name", MODULE_DEFECTS)
def test_the_place_in_a_module(net: nn.Module, name: str, traced: bool) -> None:
    change, module = MODULE_DEFECTS[name]
    candidate = copied(net)
    change(candidate)
    location = ds.locate(net, ds.trace(candidate) if traced else candidate)
    assert location.module == module, str(location)
    assert not ds.verify(net, candidate).ok


def test_modules_that_are_the_same_have_no_place(net: nn.Module) -> None:
    for candidate in (
        net,
        copy.deepcopy(net),
        ds.trace(net),
        ds.retrofit(net, 0.5),
        ds.apply(net, ds.FoldBatchNorm()).module,
        ds.slim(net),
        ds.slim(ds.retrofit(net, 0.5)),
    ):
        before = {name: value.clone() for name, value in candidate.state_dict().items()}
        location = ds.locate(net, candidate, seeds=(0,))
        assert not location, str(location)
        assert len(location.steps) >= 15
        after = candidate.state_dict()
        assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_transformers(tmp_path: Path) -> None:
    model = vit()
    assert not ds.locate(model, ds.slim(model), seeds=(0,))
    candidate = copied(model)
    layer = candidate.get_submodule("encoder.layers.encoder_layer_1.ln_2")
    layer.eps = 1e-5  # type: ignore[assignment]
    assert ds.locate(model, candidate).module == "encoder.layers.encoder_layer_1.ln_2"


def test_a_slim_module_is_compared_with_the_slim_network(net: nn.Module) -> None:
    candidate = ds.slim(net)
    with torch.no_grad():
        candidate.get_submodule("blocks.1.conv2").weight[0] *= 1.01  # type: ignore[operator, index, union-attr]
    location = ds.locate(net, candidate)
    assert location.module == "blocks.1.conv2", str(location)
    assert "compared with the network after its surgery" in location.notes
    assert [step.module for step in location.steps if not step.ok] == ["blocks.1.conv2"]


class Renamed(nn.Module):
    """The same network written by somebody else."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.first = nn.Sequential(net.get_submodule("norm"), nn.ReLU(), net.get_submodule("stem"))
        self.middle = nn.ModuleList(net.get_submodule("blocks").children())
        self.last = net.get_submodule("head")

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.middle:
            x = block(x)
        return self.last(x.flatten(2).mean(2))


def test_a_module_of_other_names_is_paired_by_value(net: nn.Module) -> None:
    candidate = copied(net)
    assert not ds.locate(net, Renamed(candidate), seeds=(0,))
    epsilon(candidate)
    location = ds.locate(net, Renamed(candidate))
    assert location.module == "blocks.1.bn1", str(location)
    assert "does not tell the modules" in str(location)


def test_the_message_of_two_modules_tells_the_place(net: nn.Module) -> None:
    candidate = copied(net)
    epsilon(candidate)
    with pytest.raises(AssertionError, match=r"first differs at blocks.1.bn1 \(native_batch_norm"):
        assert_equivalent(net, candidate)


class Wider(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x @ torch.ones(7, 3)


def test_a_module_that_does_not_take_the_inputs() -> None:
    with pytest.raises(VerifyError, match="the candidate does not accept the inputs"):
        ds.locate(nn.Identity(), Wider(), torch.randn(2, 3))
