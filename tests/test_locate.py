"""The place at which a file and a network part is the one that was changed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
import torch
from onnx import helper
from torch import Tensor, nn

import dropsurgery as ds
from dropsurgery.errors import ArgumentTypeError, VerifyError
from tests.helpers import randomize
from tests.verify_helpers import edited, nodes, set_weight, vit, weight

Edit = Callable[[onnx.ModelProto], None]


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        y += x
        return self.relu(y)


class Net(nn.Module):
    """A residual network whose first norm no exporter can fold."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(3)
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.blocks = nn.Sequential(Block(8), Block(8), Block(8))
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.blocks(self.stem(torch.relu(self.norm(x))))
        return self.head(y.mean((2, 3)))


@pytest.fixture(scope="module")
def net() -> nn.Module:
    torch.manual_seed(0)
    return randomize(Net()).eval()


@pytest.fixture(scope="module")
def files(net: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder, x = tmp_path_factory.mktemp("net"), torch.randn(1, 3, 16, 16)
    folded = ds.apply(net, ds.FoldBatchNorm()).module
    return {
        "plain": ds.export_onnx(net, folder / "plain.onnx", x),
        "folded": ds.export_onnx(folded, folder / "folded.onnx", x),
        "slim": ds.export_onnx(ds.slim(net), folder / "slim.onnx", x),
    }


@pytest.fixture(scope="module")
def transformer() -> nn.Module:
    return vit()


@pytest.fixture(scope="module")
def transformer_file(transformer: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("vit") / "model.onnx"
    return ds.export_onnx(transformer, path, torch.randn(1, 3, 32, 32))


def strip(model: onnx.ModelProto) -> None:
    """Take all names away, as optimisers of ONNX files do."""
    renamed: dict[str, str] = {}
    kept = {value.name for value in [*model.graph.input, *model.graph.output]}
    for index, node in enumerate(model.graph.node):
        node.name = ""
        del node.metadata_props[:]
        for place, name in enumerate(node.output):
            if name not in kept:
                renamed[name] = f"{index}_{place}"
    for node in model.graph.node:
        node.input[:] = [renamed.get(name, name) for name in node.input]
        node.output[:] = [renamed.get(name, name) for name in node.output]


def by_name(model: onnx.ModelProto, name: str) -> onnx.NodeProto:
    return next(node for node in model.graph.node if node.name == name)


def attribute(node: onnx.NodeProto, name: str) -> onnx.AttributeProto:
    return next(a for a in node.attribute if a.name == name)


# Equivalent files have no place


@pytest.mark.parametrize("form", ["plain", "slim"])
@pytest.mark.parametrize("named", [True, False])
def test_an_equivalent_file_has_no_place(
    net: nn.Module, files: dict[str, Path], form: str, named: bool
) -> None:
    path = files[form] if named else edited(files[form], strip, "stripped")
    location = ds.locate(net, path, seeds=(0, 1))
    assert not location, str(location)
    assert location.module == ""
    # Every convolution, sum and activation is among the values that were compared.
    assert len(location.steps) >= 15
    assert "no place: all" in location.conclusion
    assert ("does not tell the modules" in str(location)) == (not named)


def test_an_equivalent_transformer_has_no_place(
    transformer: nn.Module, transformer_file: Path
) -> None:
    for path in (transformer_file, edited(transformer_file, strip, "stripped")):
        location = ds.locate(transformer, path, seeds=(0, 1))
        assert not location, str(location)


# One defect


def convolution_weight(model: onnx.ModelProto) -> None:
    values = weight(model, "blocks.1.conv1.weight")
    values.view(-1)[values.abs().argmax()] *= -1
    set_weight(model, "blocks.1.conv1.weight", values)


def norm_epsilon(model: onnx.ModelProto) -> None:
    attribute(nodes(model, "BatchNormalization")[0], "epsilon").f = 1e-3


def norm_statistic(model: onnx.ModelProto) -> None:
    name = nodes(model, "BatchNormalization")[0].input[3]
    values = weight(model, name)
    values[1] += 1e-3
    set_weight(model, name, values)


def skipped_activation(model: onnx.ModelProto) -> None:
    by_name(model, "blocks.1.relu/Relu").op_type = "Identity"


def skipped_residual(model: onnx.ModelProto) -> None:
    node = nodes(model, "Add")[1]
    node.op_type = "Identity"
    del node.input[1:]


def wrong_branch(model: onnx.ModelProto) -> None:
    nodes(model, "Add")[2].input[1] = nodes(model, "Add")[0].output[0]


def head_bias(model: onnx.ModelProto) -> None:
    values = weight(model, "head.bias")
    values[2] += 1e-3
    set_weight(model, "head.bias", values)


def averaged_axis(model: onnx.ModelProto) -> None:
    padded = (n for n in nodes(model, "Conv") if any(a.name == "pads" for a in n.attribute))
    attribute(next(padded), "pads").ints[:] = [0, 0, 2, 2]


DEFECTS: dict[str, tuple[Edit, str]] = {
    "norm_epsilon": (norm_epsilon, "norm"),
    "norm_statistic": (norm_statistic, "norm"),
    "skipped_activation": (skipped_activation, "blocks.1.relu"),
    "skipped_residual": (skipped_residual, "blocks.1"),
    "wrong_branch": (wrong_branch, "blocks.2"),
    "head_bias": (head_bias, "head"),
    "padding": (averaged_axis, "stem"),
}


@pytest.mark.parametrize("name", DEFECTS)
@pytest.mark.parametrize("form", ["plain", "folded"])
def test_the_place_is_the_module_that_was_changed(
    net: nn.Module, files: dict[str, Path], form: str, name: str
) -> None:
    edit, module = DEFECTS[name]
    location = ds.locate(net, edited(files[form], edit))
    assert location.found
    assert location.module == module, str(location)
    assert f"first differs at {module} (" in location.conclusion


@pytest.mark.parametrize(
    ("form", "module", "twin"),
    [
        ("plain", "blocks.1.bn1", "blocks.1.bn1: native_batch_norm"),
        ("slim", "blocks.1.conv1", "blocks.1.conv1: convolution"),
    ],
)
def test_a_folded_convolution_is_compared_behind_its_norm(
    net: nn.Module, files: dict[str, Path], form: str, module: str, twin: str
) -> None:
    location = ds.locate(net, edited(files[form], convolution_weight))
    assert location.module == module
    step = location.step
    assert step is not None
    # One element of 72: far from rounding, and far from the whole difference of a norm.
    assert 1e-5 < step.local < 0.5
    assert step.torch == twin
    before = location.steps[: location.steps.index(step)]
    behind = location.steps[location.steps.index(step) + 1 :]
    assert before
    assert behind
    # What comes after computes right from torch's input, and wrong from the file's.
    assert all(other.ok for other in behind)
    assert all(other.accumulated < 1e-5 for other in before)
    assert all(other.accumulated > 1e-5 for other in behind)


@pytest.mark.parametrize("name", DEFECTS)
def test_the_place_is_found_without_names(
    net: nn.Module, files: dict[str, Path], name: str
) -> None:
    edit, module = DEFECTS[name]

    def both(model: onnx.ModelProto) -> None:
        edit(model)
        strip(model)

    location = ds.locate(net, edited(files["plain"], both))
    # A function of the root's forward has no module of its own to be named by.
    assert location.module == module, str(location)


def softmax_axis(model: onnx.ModelProto) -> None:
    node = nodes(model, "Softmax")[1]
    del node.attribute[:]
    node.attribute.append(helper.make_attribute("axis", -2))


def gelu_form(model: onnx.ModelProto) -> None:
    attribute(nodes(model, "Gelu")[0], "approximate").s = b"tanh"


def layer_norm_epsilon(model: onnx.ModelProto) -> None:
    attribute(nodes(model, "LayerNormalization")[3], "epsilon").f = 1e-5


@pytest.mark.parametrize(
    ("edit", "module"),
    [
        (softmax_axis, "encoder.layers.encoder_layer_1.self_attention"),
        (gelu_form, "encoder.layers.encoder_layer_0.mlp.1"),
        (layer_norm_epsilon, "encoder.layers.encoder_layer_1.ln_2"),
    ],
)
@pytest.mark.parametrize("named", [True, False])
def test_the_place_in_a_transformer(
    transformer: nn.Module, transformer_file: Path, edit: Edit, module: str, named: bool
) -> None:
    def change(model: onnx.ModelProto) -> None:
        edit(model)
        if not named:
            strip(model)

    location = ds.locate(transformer, edited(transformer_file, change))
    assert location.module == module, str(location)


def test_of_two_defects_the_first_is_told(net: nn.Module, files: dict[str, Path]) -> None:
    def two(model: onnx.ModelProto) -> None:
        head_bias(model)
        skipped_activation(model)

    location = ds.locate(net, edited(files["plain"], two))
    assert location.module == "blocks.1.relu"
    assert [step.module for step in location.steps if not step.ok] == ["blocks.1.relu", "head"]


def test_a_file_that_does_not_run_has_a_place(net: nn.Module, files: dict[str, Path]) -> None:
    def shrink(model: onnx.ModelProto) -> None:
        attribute(by_name(model, "blocks.1.bn1/Conv"), "pads").ints[:] = [0, 0, 0, 0]

    location = ds.locate(net, edited(files["plain"], shrink))
    assert location.module == "blocks.1.bn1"
    assert "shape (3, 8, 6, 6) instead of (3, 8, 8, 8)" in location.reason
    assert "the graph does not run" in str(location)


def test_nan_on_some_inputs_only(net: nn.Module, files: dict[str, Path]) -> None:
    def root(model: onnx.ModelProto) -> None:
        node = by_name(model, "blocks.0.relu/Relu")
        index = list(model.graph.node).index(node)
        node.op_type = "Sqrt"
        square = helper.make_node("Mul", ["root", "root"], [node.output[0]])
        square.metadata_props.extend(node.metadata_props)
        node.output[0] = "root"
        model.graph.node.insert(index + 1, square)

    location = ds.locate(net, edited(files["plain"], root))
    assert location.module == "blocks.0.relu"
    assert "NaN" in location.reason


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Linear(8, 4)
        self.right = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        left = self.left(x)
        return left, self.right(x), left.argmax(1)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Path]:
    torch.manual_seed(0)
    model = Two().eval()
    path = tmp_path_factory.mktemp("two") / "two.onnx"
    return model, ds.export_onnx(model, path, torch.randn(1, 8))


def test_outputs_in_another_order(two: tuple[nn.Module, Path]) -> None:
    model, path = two
    assert not ds.locate(model, path)

    def exchange(file: onnx.ModelProto) -> None:
        first = onnx.ValueInfoProto()
        first.CopyFrom(file.graph.output[0])
        file.graph.output[0].CopyFrom(file.graph.output[1])
        file.graph.output[1].CopyFrom(first)

    location = ds.locate(model, edited(path, exchange))
    assert location.found
    assert "the outputs are ['output_1', 'output_0', 'output_2']" in location.reason
    assert all(step.ok for step in location.steps)


def test_an_integer_output(two: tuple[nn.Module, Path]) -> None:
    model, path = two

    def smallest(file: onnx.ModelProto) -> None:
        next(n for n in file.graph.node if n.op_type == "ArgMax").op_type = "ArgMin"

    location = ds.locate(model, edited(path, smallest))
    assert location.found
    assert location.step is not None
    assert location.step.op == "ArgMin"
    assert "output 'output_2' holds other values" in location.conclusion


class Shared(nn.Module):
    """A module that is called twice, and memory that is written to through a view."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)
        self.last = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.layer(torch.relu(self.layer(x))))
        y = y.clone()
        y[:, :4] *= 2
        y[:, 4:].add_(1)
        return self.last(y)


def test_shared_modules_and_writes_through_views(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Shared().eval()
    path = ds.export_onnx(model, tmp_path / "m.onnx", torch.randn(1, 8))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    location = ds.locate(model, path)
    assert not location, str(location)

    def second(file: onnx.ModelProto) -> None:
        attribute(nodes(file, "Gemm")[1], "alpha").f = 1.001

    location = ds.locate(model, edited(path, second))
    assert location.module == "layer"
    assert location.step is not None
    assert location.step.node == "layer/Gemm_1"
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_traced_reference_names_functions_by_their_modules(
    net: nn.Module, files: dict[str, Path]
) -> None:
    reference = ds.retrofit(net, final_survival=0.5)
    assert not ds.locate(reference, files["folded"], seeds=(0,))
    location = ds.locate(reference, edited(files["folded"], skipped_residual))
    assert location.module == "blocks.1"


@pytest.mark.parametrize("name", ["skipped_activation", "head_bias", "padding"])
def test_values_that_slim_rescaled_are_compared_with_the_slim_network(
    net: nn.Module, files: dict[str, Path], name: str
) -> None:
    edit, module = DEFECTS[name]
    assert not ds.locate(net, files["slim"], seeds=(0,))
    location = ds.locate(ds.slim(net), edited(files["slim"], edit))
    assert location.module == module, str(location)


def test_plain_data_and_text(net: nn.Module, files: dict[str, Path]) -> None:
    location = ds.locate(net, edited(files["plain"], averaged_axis))
    document = location.to_json()
    assert document["module"] == "stem"
    assert document["step"]["op"] == "Conv"
    assert len(document["steps"]) == len(location.steps)
    for width in (80, 120):
        assert all(len(line) <= width for line in location.table(width).splitlines())
    assert "stem" in str(location)
    assert "differs" in str(location)


def test_bad_arguments(net: nn.Module, files: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ArgumentTypeError, match=r"the candidate is a path or a torch.nn.Module"):
        ds.locate(net, 3)  # type: ignore[arg-type]
    with pytest.raises(ArgumentTypeError, match="surgered is a Net beside a Net"):
        ds.locate(net, net, surgered=net)
    with pytest.raises(ArgumentTypeError, match="a case is written of a file"):
        ds.write_repro(net, net, tmp_path / "case")  # type: ignore[arg-type]
    with pytest.raises(VerifyError, match="there is no such file"):
        ds.locate(net, tmp_path / "none.onnx")
    with pytest.raises(VerifyError, match="the reference does not accept the inputs"):
        ds.locate(net, files["plain"], torch.randn(1, 4, 16, 16))


def test_a_file_that_does_not_load_has_a_place(net: nn.Module, tmp_path: Path) -> None:
    path = ds.export_onnx(net, tmp_path / "m.onnx", torch.randn(1, 3, 16, 16))

    def shrink(model: onnx.ModelProto) -> None:
        del model.graph.value_info[:]  # then sizes are worked out before anything runs
        attribute(by_name(model, "blocks.1.bn1/Conv"), "pads").ints[:] = [0, 0, 0, 0]

    changed = edited(path, shrink)
    with pytest.raises(VerifyError, match="cannot load"):
        ds.verify(net, changed)
    location = ds.locate(net, changed)
    assert location.module == "blocks.1.bn1", str(location)


def test_exchanged_and_missing_outputs(two: tuple[nn.Module, Path]) -> None:
    model, path = two

    def exchange(file: onnx.ModelProto) -> None:
        swap = {"output_0": "output_1", "output_1": "output_0"}
        for node in file.graph.node:
            node.input[:] = [swap.get(name, name) for name in node.input]
            node.output[:] = [swap.get(name, name) for name in node.output]

    location = ds.locate(model, edited(path, exchange))
    assert "exchanged: 'output_0' holds 'output_1', 'output_1' holds 'output_0'" in location.reason

    def leave_out(file: onnx.ModelProto) -> None:
        del file.graph.output[-1]

    location = ds.locate(model, edited(path, leave_out))
    assert location.found
    assert "['output_0', 'output_1'] instead of" in location.reason


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 8)
        self.lstm = nn.LSTM(8, 6, batch_first=True)
        self.norm = nn.LayerNorm(6)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.lstm(self.embedding(x))[0])


def test_recurrent_layers_return_several_tensors(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = randomize(Words()).eval()
    path = ds.export_onnx(model, tmp_path / "m.onnx", torch.randint(20, (1, 5)))
    assert not ds.locate(model, path)

    def sign(file: onnx.ModelProto) -> None:
        name = nodes(file, "LSTM")[0].input[1]
        values = weight(file, name)
        values.view(-1)[3] *= -1
        set_weight(file, name, values)

    assert ds.locate(model, edited(path, sign)).module == "lstm"


def test_a_value_without_its_axes_is_blamed_and_not_its_reader(tmp_path: Path) -> None:
    class Gate(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pool = nn.AdaptiveAvgPool2d(1)
            self.conv = nn.Conv2d(3, 3, 1)

        def forward(self, x: Tensor) -> Tensor:
            return x * self.conv(self.pool(x)).sigmoid()

    model = randomize(Gate()).eval()
    path = ds.export_onnx(model, tmp_path / "m.onnx", torch.randn(1, 3, 8, 8))

    def squeeze(file: onnx.ModelProto) -> None:
        attribute(nodes(file, "ReduceMean")[0], "keepdims").i = 0

    location = ds.locate(model, edited(path, squeeze))
    assert location.module == "pool", str(location)
    assert "shape (3, 3) instead of (3, 3, 1, 1)" in location.conclusion
