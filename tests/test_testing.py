from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

import dropsurgery as ds
from dropsurgery.errors import OnnxFileError, VerifyError
from dropsurgery.testing import assert_equivalent
from dropsurgery.verify.cases import Case
from dropsurgery.verify.onnx_reference import OnnxModule
from dropsurgery.verify.run import ModuleRunner
from tests.helpers import randomize
from tests.verify_helpers import edited, set_weight, vit, weight

Kind = Callable[[], tuple[nn.Module, Tensor]]


def network() -> nn.Module:
    torch.manual_seed(0)
    layers = (nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU())
    net = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5))
    randomize(net)
    return net.eval()


EXAMPLE = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ds.export_onnx(network(), tmp_path_factory.mktemp("plain") / "plain.onnx", EXAMPLE)


@pytest.fixture(scope="module")
def slim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("slim")
    return ds.export_onnx(ds.slim(network()), folder / "slim.onnx", EXAMPLE)


# --- every combination ---------------------------------------------------------------------------


def test_modules_and_files_in_every_combination(plain: Path, slim: Path) -> None:
    forms: tuple[nn.Module | Path, ...] = (network(), ds.slim(network()), plain, slim)
    for reference in forms:
        for candidate in forms:
            assert_equivalent(reference, candidate)


def test_a_defect_is_found_in_every_combination(plain: Path) -> None:
    other = network()
    other[1].eps = 1e-3

    def change(model: onnx.ModelProto) -> None:
        name = next(t.name for t in model.graph.initializer if len(t.dims) == 2)
        value = weight(model, name)
        value[0, 0] += 1e-3
        set_weight(model, name, value)

    mutant = edited(plain, change)
    for reference in (network(), plain):
        for candidate in (other, mutant):
            with pytest.raises(AssertionError) as caught:
                assert_equivalent(reference, candidate)
            message = str(caught.value)
            assert "NOT EQUIVALENT" in message
            assert "error beyond rounding" in message
            assert "what to do: outputs output: " in message
            assert "own error" in message  # the table
            module = isinstance(candidate, nn.Module)
            place = "1 (native_batch_norm node" if module else "5 (Gemm node '5/Gemm')"
            placed = isinstance(reference, nn.Module)
            assert (f"first differs at {place}" in message) == placed


def test_the_surgered_network_can_be_named(slim: Path) -> None:
    assert_equivalent(network(), slim, surgered=ds.slim(network()))


def test_random_networks_are_compared_when_asked() -> None:
    class Noisy(nn.Module):
        def __init__(self, scale: float) -> None:
            super().__init__()
            self.scale = scale

        def forward(self, x: Tensor) -> Tensor:
            return x + self.scale * torch.randn_like(x)

    x = torch.zeros(1, 8)
    assert_equivalent(Noisy(1.0), Noisy(1.0), x, stochastic=True, runs=64)
    with pytest.raises(AssertionError):
        assert_equivalent(Noisy(1.0), Noisy(3.0), x, stochastic=True, runs=64)


# --- a file as the yardstick ---------------------------------------------------------------------


class Last(nn.Module):
    """The sequence that a recurrent layer returns."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)[0]


def image(*layers: nn.Module) -> tuple[nn.Module, Tensor]:
    return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), *layers), torch.randn(2, 3, 8, 8)


def encoder() -> tuple[nn.Module, Tensor]:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, activation="gelu")
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), torch.randn(2, 5, 8)


# What onnx's own evaluator may differ by: the attributes of operators are float32 in any file.
EXACT: dict[str, tuple[Kind, float]] = {
    "convolutions": (lambda: (network(), EXAMPLE), 1e-7),
    "vision transformer": (lambda: (vit(), torch.randn(2, 3, 32, 32)), 1e-7),
    "encoder": (encoder, 1e-7),
    "lstm": (lambda: (Last(nn.LSTM(4, 6, 2, batch_first=True)), torch.randn(2, 5, 4)), 1e-12),
    "gru": (lambda: (Last(nn.GRU(4, 6, batch_first=True)), torch.randn(2, 5, 4)), 1e-12),
    "up": (lambda: image(nn.ConvTranspose2d(4, 4, 2, 2), nn.Upsample(scale_factor=2.0)), 1e-12),
    "norms": (lambda: image(nn.GroupNorm(2, 4), nn.InstanceNorm2d(4, affine=True)), 1e-6),
    "pools": (lambda: image(nn.AvgPool2d(3, 2, ceil_mode=True), nn.MaxPool2d(2)), 1e-12),
    "activations": (lambda: image(nn.GELU(), nn.Hardswish(), nn.PReLU(), nn.Softplus()), 1e-6),
}


@pytest.mark.parametrize("kind", EXACT)
def test_the_float64_run_of_a_file_has_the_digits_of_float64(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    make, limit = EXACT[kind]
    model, example = make()
    path = ds.export_onnx(model.eval(), tmp_path / "m.onnx", example)
    case = Case("c", (example,), {})
    runner = ModuleRunner(OnnxModule(path), "reference")
    wide, native = (next(iter(run(case).values())) for run in (runner.float64, runner))
    exact = next(iter(ModuleRunner(model, "reference").float64(case).values()))
    assert (wide.dtype, native.dtype) == (torch.float64, torch.float32)
    scale = exact.abs().max()
    assert (wide - exact).abs().max() <= limit * scale
    # The native run is onnxruntime's, with the error of float32.
    assert 0 < (native - wide).abs().max() <= 1e-4 * scale


def test_files_in_half_precision(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3)).half().eval()
    path = ds.export_onnx(net, tmp_path / "m.onnx", torch.randn(2, 6).half())
    assert {p.dtype for p in OnnxModule(path).parameters()} == {torch.float16}
    assert_equivalent(path, path)
    assert_equivalent(path, net)


def made(
    path: Path, nodes: list[onnx.NodeProto], *names: str, weights: tuple[str, ...] = ()
) -> Path:
    inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 3]) for name in names]
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    tensors = [numpy_helper.from_array(torch.rand(3).numpy(), name) for name in weights]
    graph = helper.make_graph(nodes, "g", inputs, [output], tensors)
    opsets = [helper.make_opsetid("", 20)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), path)
    return path


def test_names_that_python_does_not_know(tmp_path: Path) -> None:
    names = ("x.1", "1x", "x:1", "class", "x²")
    nodes = [helper.make_node("Sum", list(names), ["y"])]
    path = made(tmp_path / "m.onnx", nodes, *names)
    assert_equivalent(path, path)
    inputs = tuple(torch.randn(2, 3) for _ in names)
    assert torch.allclose(OnnxModule(path)(*inputs)["y"], sum(inputs))  # type: ignore[arg-type]


def test_constants_that_name_no_type_are_widened_too(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Constant", [], ["a"], value_float=0.1),
        helper.make_node("Constant", [], ["b"], value_floats=[0.1, 0.2, 0.3]),
        helper.make_node("Shape", ["x"], ["s"]),
        helper.make_node("ConstantOfShape", ["s"], ["z"]),
        helper.make_node("Cast", ["s"], ["i"], to=TensorProto.FLOAT),
        helper.make_node("ReduceSum", ["i"], ["j"], keepdims=0),
        helper.make_node("Sum", ["x", "a", "b", "z", "j"], ["y"]),
    ]
    path = made(tmp_path / "m.onnx", nodes, "x")
    assert_equivalent(path, path)


def test_a_file_that_cannot_be_a_yardstick(tmp_path: Path, plain: Path) -> None:
    with pytest.raises(OnnxFileError, match="there is no such file"):
        assert_equivalent(tmp_path / "none.onnx", plain)
    random = made(tmp_path / "r.onnx", [helper.make_node("RandomNormalLike", ["x"], ["y"])], "x")
    with pytest.raises(VerifyError, match="the reference draws random numbers"):
        assert_equivalent(random, plain)
    # An operator whose definition says float32, whatever it is fed.
    nodes = [
        helper.make_node("EyeLike", ["x"], ["e"], dtype=TensorProto.FLOAT),
        helper.make_node("Mul", ["x", "e"], ["y"]),
    ]
    assert_equivalent(made(tmp_path / "e.onnx", nodes, "x"), tmp_path / "e.onnx")
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "w"], ["q"], axis=1),
        helper.make_node("Cast", ["q"], ["y"], to=TensorProto.FLOAT),
    ]
    quantized = made(tmp_path / "q.onnx", nodes, "x", weights="w")
    with pytest.raises((AssertionError, VerifyError)):
        assert_equivalent(quantized, plain)


def test_neither_file_nor_network_is_changed(plain: Path) -> None:
    before, net = plain.read_bytes(), network().train()
    assert_equivalent(plain, net)
    assert plain.read_bytes() == before
    assert net.training
