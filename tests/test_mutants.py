"""Networks and files with one thing wrong, each of which `verify` must catch."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
import torch
import torchvision
from onnx import helper
from torch import Tensor, nn

import dropsurgery as ds
from tests.helpers import randomize
from tests.verify_helpers import edited, nodes, resnet, set_weight, vit, weight

Mutate = Callable[[nn.Module], None]


def batchnorms(model: nn.Module) -> list[nn.BatchNorm2d]:
    return [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]


def eps(model: nn.Module, index: int) -> None:
    batchnorms(model)[index].eps = 1e-3


def mean(model: nn.Module, index: int) -> None:
    batchnorms(model)[index].running_mean += 1e-3  # type: ignore[operator]


def mean_of_one_channel(model: nn.Module, index: int) -> None:
    layer = batchnorms(model)[index]
    assert layer.running_mean is not None
    layer.running_mean[int(layer.weight.abs().argmax())] += 1e-3


def channels(model: nn.Module, index: int) -> None:
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    layer = convolutions[index]
    order = torch.arange(layer.out_channels)
    order[[1, 2]] = order[[2, 1]]
    layer.weight.data = layer.weight.data[order]


def one_weight(model: nn.Module, index: int) -> None:
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    values = convolutions[index].weight.data
    values.view(-1)[values.abs().argmax()] *= -1


def spread(count: int) -> list[int]:
    """The first layer, the last, and one in between."""
    return [0, count // 2, count - 1]


CONVOLUTIONAL: dict[str, Mutate] = {
    f"{mutate.__name__} {index}": lambda model, m=mutate, i=index: m(model, i)  # type: ignore[misc]
    for mutate in (eps, mean, mean_of_one_channel, channels, one_weight)
    for index in spread(20)
}


@pytest.fixture(scope="module")
def resnet18() -> nn.Module:
    return resnet(18)


@pytest.fixture(scope="module")
def resnet18_file(resnet18: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("resnet18") / "model.onnx"
    return ds.export_onnx(ds.slim(ds.retrofit(resnet18)), path, torch.randn(1, 3, 64, 64))


@pytest.fixture(scope="module")
def transformer() -> nn.Module:
    return vit()


@pytest.fixture(scope="module")
def transformer_file(transformer: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("vit") / "model.onnx"
    return ds.export_onnx(transformer, path, torch.randn(1, 3, 32, 32))


def mutant(model: nn.Module, mutate: Mutate) -> nn.Module:
    changed = copy.deepcopy(model)
    with torch.no_grad():
        mutate(changed)
    return changed


def assert_caught(reference: nn.Module, candidate: nn.Module | Path) -> None:
    # With fewer inputs than by default: what is caught here is caught by far.
    verdict = ds.verify(reference, candidate, seeds=(0,))
    assert not verdict.ok, f"not caught:\n{verdict}"


# Modules


def test_the_right_networks_pass(
    resnet18: nn.Module, resnet18_file: Path, transformer: nn.Module, transformer_file: Path
) -> None:
    for model, path in ((resnet18, resnet18_file), (transformer, transformer_file)):
        for candidate in (path, ds.slim(model), copy.deepcopy(model)):
            verdict = ds.verify(model, candidate)
            assert verdict.ok, f"false alarm:\n{verdict}"


@pytest.mark.parametrize("name", CONVOLUTIONAL)
def test_a_changed_resnet18_is_caught(resnet18: nn.Module, resnet18_file: Path, name: str) -> None:
    changed = mutant(resnet18, CONVOLUTIONAL[name])
    assert_caught(resnet18, changed)
    assert_caught(changed, resnet18_file)


@pytest.mark.parametrize("depth", [50, 152])
@pytest.mark.parametrize("statistics", ["fresh", "random"])
def test_a_changed_deep_resnet_is_caught(depth: int, statistics: str) -> None:
    if statistics == "random":
        model = resnet(depth)
    else:
        torch.manual_seed(0)
        model = getattr(torchvision.models, f"resnet{depth}")().eval()
    slim, x = ds.slim(model), torch.randn(1, 3, 64, 64)
    verdict = ds.verify(model, slim, x, seeds=(0,))
    assert verdict.ok, f"false alarm:\n{verdict}"
    last = len(batchnorms(model)) - 1
    wrong: list[tuple[Callable[[nn.Module, int], None], int]] = [(mean, last), (mean, last // 2)]
    if depth == 50:
        wrong += [(mean, 0), (eps, last // 2), (channels, 9)]
    for mutate, index in wrong:
        changed = mutant(model, lambda m, f=mutate, i=index: f(m, i))  # type: ignore[misc]
        caught = ds.verify(changed, slim, x, seeds=(0,), batch_sizes=(1,))
        assert not caught.ok, f"not caught:\n{caught}"


def swap_gelu(model: nn.Module) -> None:
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.GELU):
            model.set_submodule(name, nn.GELU(approximate="tanh"))
            return


def norm_eps(model: nn.Module) -> None:
    layer = next(m for m in model.modules() if isinstance(m, nn.LayerNorm))
    layer.eps = 1e-5  # torchvision's is 1e-6


def transpose(model: nn.Module) -> None:
    layer = next(
        m for m in model.modules() if isinstance(m, nn.Linear) and m.in_features == m.out_features
    )
    layer.weight.data = layer.weight.data.T.contiguous()


def exchange_heads(model: nn.Module) -> None:
    layer = next(m for m in model.modules() if isinstance(m, nn.MultiheadAttention))
    layer.in_proj_weight.data[:32] = layer.in_proj_weight.data[:32].roll(16, 0)


def exchange_logits(model: nn.Module) -> None:
    head = model.get_submodule("heads.head")
    assert isinstance(head, nn.Linear)
    head.weight.data[[3, 4]] = head.weight.data[[4, 3]]


def position(model: nn.Module) -> None:
    model.get_parameter("encoder.pos_embedding").data[0, 5, 7] += 1e-3


TRANSFORMER = (swap_gelu, norm_eps, transpose, exchange_heads, exchange_logits, position)


@pytest.mark.parametrize("mutate", TRANSFORMER)
def test_a_changed_transformer_is_caught(
    transformer: nn.Module, transformer_file: Path, mutate: Mutate
) -> None:
    changed = mutant(transformer, mutate)
    assert_caught(transformer, changed)
    assert_caught(changed, transformer_file)


# ONNX files


def one_element(model: onnx.ModelProto) -> None:
    values = weight(model, "layer3.0.conv1.weight")
    values.view(-1)[values.abs().argmax()] *= -1
    set_weight(model, "layer3.0.conv1.weight", values)


def one_bias(model: onnx.ModelProto) -> None:
    values = weight(model, "layer2.1.conv2.bias")
    values[3] += 1e-3
    set_weight(model, "layer2.1.conv2.bias", values)


def two_channels(model: onnx.ModelProto) -> None:
    values = weight(model, "layer4.0.conv2.weight")
    values[[10, 11]] = values[[11, 10]]
    set_weight(model, "layer4.0.conv2.weight", values)


def half_precision(model: onnx.ModelProto) -> None:
    values = weight(model, "layer1.0.conv1.weight")
    set_weight(model, "layer1.0.conv1.weight", values.half().float())


def no_activation(model: onnx.ModelProto) -> None:
    nodes(model, "Relu")[5].op_type = "Identity"


def other_activation(model: onnx.ModelProto) -> None:
    node = nodes(model, "Relu")[5]
    node.op_type = "LeakyRelu"
    node.attribute.append(helper.make_attribute("alpha", 1e-4))


def asymmetric_padding(model: onnx.ModelProto) -> None:
    node = next(n for n in nodes(model, "Conv") if n.name == "layer2.0.conv1/Conv")
    pads = next(a for a in node.attribute if a.name == "pads")
    pads.ints[:] = [0, 0, 2, 2]


def nan_from_negative(model: onnx.ModelProto) -> None:
    """The square root of an activation that is positive on most inputs."""
    node = next(n for n in nodes(model, "Relu") if n.name == "layer1.0.relu/Relu")
    root = helper.make_node("Sqrt", [node.input[0]], ["root"])
    square = helper.make_node("Mul", ["root", "root"], [node.output[0]])
    index = list(model.graph.node).index(node)
    model.graph.node.remove(node)
    model.graph.node.insert(index, square)
    model.graph.node.insert(index, root)


CONVOLUTIONAL_FILES = (
    one_element,
    one_bias,
    two_channels,
    half_precision,
    no_activation,
    other_activation,
    asymmetric_padding,
    nan_from_negative,
)


@pytest.mark.parametrize("edit", CONVOLUTIONAL_FILES)
def test_a_changed_resnet_file_is_caught(
    resnet18: nn.Module, resnet18_file: Path, edit: Callable[[onnx.ModelProto], None]
) -> None:
    assert_caught(resnet18, edited(resnet18_file, edit))


def gelu_form(model: onnx.ModelProto) -> None:
    next(a for a in nodes(model, "Gelu")[0].attribute if a.name == "approximate").s = b"tanh"


def layer_norm_eps(model: onnx.ModelProto) -> None:
    attribute = next(
        a for a in nodes(model, "LayerNormalization")[0].attribute if a.name == "epsilon"
    )
    attribute.f = 1e-5


def square_weight(model: onnx.ModelProto) -> None:
    name = next(
        item.name
        for item in model.graph.initializer
        if len(item.dims) == 2 and item.dims[0] == item.dims[1]
    )
    set_weight(model, name, weight(model, name).T.contiguous())


def softmax_axis(model: onnx.ModelProto) -> None:
    node = nodes(model, "Softmax")[0]
    del node.attribute[:]
    node.attribute.append(helper.make_attribute("axis", -2))


@pytest.mark.parametrize("edit", [gelu_form, layer_norm_eps, square_weight, softmax_axis])
def test_a_changed_transformer_file_is_caught(
    transformer: nn.Module, transformer_file: Path, edit: Callable[[onnx.ModelProto], None]
) -> None:
    assert_caught(transformer, edited(transformer_file, edit))


class NormFirst(nn.Module):
    """A BatchNorm that no exporter can fold, since nothing linear stands before it."""

    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(3)
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(torch.relu(self.bn(x)))


def batchnorm_eps(model: onnx.ModelProto) -> None:
    node = nodes(model, "BatchNormalization")[0]
    next(a for a in node.attribute if a.name == "epsilon").f = 1e-3


def batchnorm_mean(model: onnx.ModelProto) -> None:
    name = nodes(model, "BatchNormalization")[0].input[3]
    values = weight(model, name)
    values[1] += 1e-3
    set_weight(model, name, values)


@pytest.mark.parametrize("edit", [batchnorm_eps, batchnorm_mean])
def test_a_changed_batchnorm_node_is_caught(
    tmp_path: Path, edit: Callable[[onnx.ModelProto], None]
) -> None:
    model = randomize(NormFirst()).eval()
    path = ds.export_onnx(model, tmp_path / "m.onnx", torch.randn(1, 3, 16, 16))
    assert ds.verify(model, path).ok
    assert not ds.verify(model, edited(path, edit)).ok


class TwoHeads(nn.Module):
    """Two outputs of one shape, one large and one small."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(8, 8)
        self.left = nn.Linear(8, 4)
        self.right = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = torch.relu(self.body(x))
        return self.left(y), 1e-3 * self.right(y)


def test_exchanged_outputs_are_caught(tmp_path: Path) -> None:
    model = TwoHeads().eval()
    path = ds.export_onnx(model, tmp_path / "m.onnx", torch.randn(1, 8))
    assert ds.verify(model, path).ok

    def exchange_order(file: onnx.ModelProto) -> None:
        file.graph.output[0].CopyFrom(file.graph.output[1])
        file.graph.output[1].CopyFrom(onnx.load(str(path)).graph.output[0])

    verdict = ds.verify(model, edited(path, exchange_order))
    assert not verdict.ok
    assert "['output_1', 'output_0'] instead of ['output_0', 'output_1']" in str(verdict)

    def exchange_values(file: onnx.ModelProto) -> None:
        swap = {"output_0": "output_1", "output_1": "output_0"}
        for node in file.graph.node:
            node.output[:] = [swap.get(name, name) for name in node.output]

    verdict = ds.verify(model, edited(path, exchange_values))
    assert [output.ok for output in verdict.outputs] == [False, False]


class Mixed(nn.Module):
    """One output that holds large numbers beside small ones, as boxes beside scores."""

    def __init__(self) -> None:
        super().__init__()
        self.boxes = nn.Linear(16, 4)
        self.scores = nn.Linear(16, 60)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([1000 * self.boxes(x), self.scores(x).sigmoid()], dim=1)


def test_an_error_that_large_neighbours_hide_is_caught() -> None:
    model = Mixed().eval()
    changed = mutant(model, lambda m: m.scores.bias.add_(3e-5))
    verdict = ds.verify(model, changed)
    ratios = {ratio.kind: ratio for ratio in verdict.outputs[0].ratios}
    assert ratios["rmse"].ok  # the boxes' own rounding is as large
    assert not ratios["typical"].ok
    assert not verdict.ok


def test_one_wrong_element_among_many_is_caught() -> None:
    class Dense(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x)

    class Wrong(Dense):
        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x).clone()
            y[-1, 0, 3, 4] += 3e-5
            return y

    model, wrong = Dense().eval(), Wrong().eval()
    wrong.load_state_dict(model.state_dict())
    verdict = ds.verify(model, wrong, torch.randn(2, 3, 64, 64))
    ratios = {ratio.kind: ratio for ratio in verdict.outputs[0].ratios}
    assert ratios["typical"].ok
    assert not ratios["max"].ok


@pytest.mark.parametrize("when", ["batch of one", "large values"])
def test_a_candidate_that_is_wrong_on_some_inputs_only_is_caught(when: str) -> None:
    class Sometimes(nn.Module):
        def __init__(self, body: nn.Module) -> None:
            super().__init__()
            self.body = body

        def forward(self, x: Tensor) -> Tensor:
            wrong = x.shape[0] == 1 if when == "batch of one" else bool(x.max() > 3)
            return self.body(x) * (1 + 1e-5 * wrong)

    body = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10)).eval()
    assert not ds.verify(body, Sometimes(body)).ok


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_mutant_in_another_precision_is_caught(dtype: torch.dtype) -> None:
    body = nn.Sequential(nn.Linear(32, 32), nn.LayerNorm(32), nn.GELU(), nn.Linear(32, 10))
    body = body.eval().to(dtype)
    size = 30 * torch.finfo(dtype).eps
    if dtype == torch.float64:
        size = 1e-11  # nothing more exact is at hand
    changed = mutant(body, lambda m: m[1].bias.add_(size))
    assert ds.verify(body, copy.deepcopy(body)).ok
    assert not ds.verify(body, changed).ok
