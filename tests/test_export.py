from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any, NamedTuple

import onnx
import onnxruntime
import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F

import dropsurgery as ds
from dropsurgery import onnx_writer
from dropsurgery.errors import ArgumentError, ArgumentTypeError, ExportError
from tests.helpers import randomize


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.bn = nn.BatchNorm2d(4)
        self.block = nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU(), nn.Dropout(0.5))
        self.fc = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.bn(self.conv(x)))
        return self.fc((y + self.block(y)).mean((2, 3)))


def small() -> Small:
    torch.manual_seed(0)
    model = Small().eval()
    randomize(model)
    return model


IMAGE = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def dims(value: Any) -> list[int | str]:
    return [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]


def run(path: Path, *inputs: Tensor) -> list[Any]:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]
    return session.run(
        None, {name: tensor.numpy() for name, tensor in zip(names, inputs, strict=True)}
    )


def metadata(path: Path) -> dict[str, str]:
    return {item.key: item.value for item in onnx.load(str(path)).metadata_props}


# What is written


def test_an_example_of_one_leaves_the_batch_open(tmp_path: Path) -> None:
    path = ds.export_onnx(small(), tmp_path / "m.onnx", IMAGE)
    graph = onnx.load(str(path)).graph
    assert [(v.name, dims(v)) for v in graph.input] == [("x", ["batch", 3, 8, 8])]
    assert [(v.name, dims(v)) for v in graph.output] == [("output", ["batch", 5])]
    for batch in (1, 2, 5):
        x = torch.randn(batch, 3, 8, 8)
        torch.testing.assert_close(torch.from_numpy(run(path, x)[0]), small()(x))


@pytest.mark.parametrize("batch", [1, 4])
def test_a_fixed_batch_is_the_example_s(tmp_path: Path, batch: int) -> None:
    example = IMAGE.expand(batch, -1, -1, -1)
    path = ds.export_onnx(small(), tmp_path / "m.onnx", (example,), dynamic_batch=False)
    assert dims(onnx.load(str(path)).graph.input[0]) == [batch, 3, 8, 8]


def test_the_path_comes_back_and_nothing_else_is_left(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = ds.export_onnx(small(), str(tmp_path / "m.onnx"), [IMAGE])
    assert path == tmp_path / "m.onnx"
    assert os.listdir(tmp_path) == ["m.onnx"]
    assert capfd.readouterr() == ("", "")


def test_nodes_are_named_after_modules(tmp_path: Path) -> None:
    for model in (small(), ds.trace(small()), ds.slim(small())):
        nodes = onnx.load(str(ds.export_onnx(model, tmp_path / "m.onnx", IMAGE))).graph.node
        names = {node.name for node in nodes}
        assert {"block.0/Conv", "block.1/Relu", "fc/Gemm"} <= names
        assert len(names) == len(nodes)


def test_a_slim_resnet_keeps_the_users_paths_and_nothing_to_drop(tmp_path: Path) -> None:
    model = torchvision.models.ResNet(torchvision.models.resnet.BasicBlock, [1, 1, 1, 2]).eval()
    slim = ds.slim(ds.retrofit(model))
    path = ds.export_onnx(slim, tmp_path / "m.onnx", torch.randn(1, 3, 32, 32))
    nodes = {node.name: node.op_type for node in onnx.load(str(path)).graph.node}
    assert nodes["layer1.0.conv1/Conv"] == "Conv"
    assert nodes["layer4.1/Add"] == "Add"
    assert not {"BatchNormalization", "Dropout", "Bernoulli"} & set(nodes.values())


def test_metadata_says_what_made_it(tmp_path: Path) -> None:
    plain = metadata(ds.export_onnx(small(), tmp_path / "m.onnx", IMAGE))
    assert plain["dropsurgery.source"] == f"{__name__}.Small"
    assert plain["dropsurgery.torch"] == torch.__version__
    assert plain["dropsurgery.onnx"] == onnx.__version__
    assert plain["dropsurgery.version"] == ds.__version__
    assert json.loads(plain["dropsurgery.passes"]) == []
    assert json.loads(plain["dropsurgery.inputs"]) == ["x"]
    assert json.loads(plain["dropsurgery.outputs"]) == ["output"]
    slim = metadata(ds.export_onnx(ds.slim(small()), tmp_path / "s.onnx", IMAGE))
    assert slim["dropsurgery.source"] == f"{__name__}.Small"
    assert "FoldAffine" in [item["pass"] for item in json.loads(slim["dropsurgery.passes"])]


def test_the_file_tells_nothing_of_this_machine(tmp_path: Path) -> None:
    path = ds.export_onnx(small(), tmp_path / "m.onnx", IMAGE)
    assert str(Path(__file__).parent).encode() not in path.read_bytes()
    assert b"site-packages" not in path.read_bytes()


def test_the_same_network_gives_the_same_bytes(tmp_path: Path) -> None:
    first = ds.export_onnx(small(), tmp_path / "a.onnx", IMAGE).read_bytes()
    assert ds.export_onnx(small(), tmp_path / "b.onnx", IMAGE).read_bytes() == first


def test_the_model_is_not_changed(tmp_path: Path) -> None:
    model = small()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    attributes = {name: set(vars(module)) for name, module in model.named_modules()}
    ds.export_onnx(model, tmp_path / "m.onnx", IMAGE)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert {name: set(vars(module)) for name, module in model.named_modules()} == attributes
    assert not any(module.training for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("opset", [18, 23])
def test_the_opset_can_be_chosen(tmp_path: Path, opset: int) -> None:
    path = ds.export_onnx(small(), tmp_path / "m.onnx", IMAGE, opset=opset)
    assert {o.domain: o.version for o in onnx.load(str(path)).opset_import}[""] == opset
    assert ds.verify(small(), path).ok


class Pair(NamedTuple):
    mean: Tensor
    same: Tensor


class Several(nn.Module):
    """Nested inputs; an output that is an input, one that stands twice, one that is a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor, more: list[Tensor], scale: float = 2.0) -> dict[str, Any]:
        y = self.fc(x) * scale + more[0]
        return {"logits": y, "x": x, "pair": Pair(y, y), "w": self.fc.weight}


def test_names_of_nested_inputs_and_outputs(tmp_path: Path) -> None:
    inputs = (torch.randn(1, 4), [torch.randn(1, 4)])
    model = Several().eval()
    path = ds.export_onnx(model, tmp_path / "m.onnx", inputs)
    graph = onnx.load(str(path)).graph
    assert [v.name for v in graph.input] == ["x", "more_0"]
    # An ONNX value has one name: the output that is the input "x" needs another one.
    assert [v.name for v in graph.output] == ["logits", "x_out", "pair_mean", "pair_same", "w"]
    x, more = torch.randn(3, 4), torch.randn(3, 4)
    expected = model(x, [more])
    logits, same, mean, _, weight = map(torch.from_numpy, run(path, x, more))
    torch.testing.assert_close(logits, expected["logits"])
    torch.testing.assert_close(mean, expected["logits"])
    assert torch.equal(same, x)
    assert torch.equal(weight, model.fc.weight)


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 4)

    def forward(self, tokens: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
        return self.embed(tokens) @ table, table.sum()


def test_only_inputs_of_the_batch_s_size_are_open(tmp_path: Path) -> None:
    inputs = (torch.randint(10, (2, 7)), torch.randn(4, 3))
    path = ds.export_onnx(TwoInputs().eval(), tmp_path / "m.onnx", inputs)
    graph = onnx.load(str(path)).graph
    assert [(v.name, dims(v)) for v in graph.input] == [
        ("tokens", ["batch", 7]),
        ("table", [4, 3]),
    ]
    assert [(v.name, dims(v)) for v in graph.output] == [
        ("output_0", ["batch", 7, 3]),
        ("output_1", []),
    ]


def test_both_modes_of_a_traced_network_export_as_eval(tmp_path: Path) -> None:
    class Modes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            if self.training:
                return self.fc(x) * 2
            return F.dropout(self.fc(x), 0.5, self.training)

    model = Modes().eval()
    traced = ds.trace(model)
    path = ds.export_onnx(traced, tmp_path / "m.onnx", torch.randn(1, 4))
    assert [v.name for v in onnx.load(str(path)).graph.input] == ["x"]
    assert ds.verify(model, path).ok
    assert ds.verify(traced, path).ok
    traced.train()  # both graphs are still there
    assert not torch.equal(traced(torch.ones(1, 4)), model(torch.ones(1, 4)))


def test_any_number_of_inputs(tmp_path: Path) -> None:
    class Sum(nn.Module):
        def forward(self, *parts: Tensor) -> Tensor:
            return torch.stack(parts).sum(0)

    path = ds.export_onnx(Sum().eval(), tmp_path / "m.onnx", (torch.randn(1, 4),) * 3)
    graph = onnx.load(str(path)).graph
    assert [(v.name, dims(v)) for v in graph.input] == [
        (f"parts_{index}", ["batch", 4]) for index in range(3)
    ]
    assert ds.verify(Sum(), path).ok


class Difference(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.fc(x) - y


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("shared", ["object", "memory", "weight"])
def test_one_tensor_for_two_inputs_stays_two_inputs(
    tmp_path: Path, batch: int, shared: str
) -> None:
    model = Difference().eval()
    x = torch.randn(batch, 4)
    y = {"object": x, "memory": x.view_as(x), "weight": model.fc.weight[:batch]}[shared]
    path = ds.export_onnx(model, tmp_path / "m.onnx", (x, y))
    one, two = torch.randn(3, 4), torch.randn(3, 4)
    torch.testing.assert_close(torch.from_numpy(run(path, one, two)[0]), model(one, two))


def test_a_forward_that_writes_to_its_input_leaves_the_example_alone(tmp_path: Path) -> None:
    example = torch.randn(2, 4)
    before = example.clone()
    ds.export_onnx(Function(lambda x: x.mul_(2) + 1).eval(), tmp_path / "m.onnx", example)
    assert torch.equal(example, before)


# Large files


def test_weights_beyond_one_file_go_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = ds.export_onnx(small(), tmp_path / "one.onnx", IMAGE)
    monkeypatch.setattr(onnx_writer, "ONE_FILE_LIMIT", 100)
    path = ds.export_onnx(small(), tmp_path / "m.onnx", IMAGE)
    assert sorted(os.listdir(tmp_path)) == ["m.onnx", "m.onnx.data", "one.onnx"]
    assert path.stat().st_size < one.stat().st_size
    assert ds.verify(small(), path).ok
    os.rename(path, tmp_path / "moved.onnx")  # the location inside is relative and clean
    assert ds.verify(small(), tmp_path / "moved.onnx").ok


@pytest.mark.parametrize("stop", [1, 2, 3])
@pytest.mark.parametrize("old", [True, False])
def test_an_interrupted_move_brings_back_both_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: int, old: bool
) -> None:
    folder = tmp_path / "new"
    folder.mkdir()
    names = ("m.onnx", "m.onnx.data")
    for name in names:
        (folder / name).write_text("new")
        if old:
            (tmp_path / name).write_text("old")
    replace, calls = os.replace, []

    def interrupted(source: Path, target: Path) -> None:
        calls.append(target)
        if len(calls) == stop:
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", interrupted)
    if stop == 3 and not old:  # nothing had to be put aside: two moves are all
        onnx_writer._move(folder, tmp_path / "m.onnx", "m.onnx.data")
        assert all((tmp_path / name).read_text() == "new" for name in names)
        return
    with pytest.raises(KeyboardInterrupt):
        onnx_writer._move(folder, tmp_path / "m.onnx", "m.onnx.data")
    left = {name: (tmp_path / name).read_text() for name in names if (tmp_path / name).exists()}
    assert left == (dict.fromkeys(names, "old") if old else {})


def test_new_weights_replace_old_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_writer, "ONE_FILE_LIMIT", 100)
    for seed in (0, 1):
        torch.manual_seed(seed)
        model = nn.Linear(30, 30).eval()
        path = ds.export_onnx(model, tmp_path / "m.onnx", torch.randn(1, 30))
    assert ds.verify(model, path).ok
    assert sorted(os.listdir(tmp_path)) == ["m.onnx", "m.onnx.data"]


# What is refused


def refused(
    model: nn.Module, tmp_path: Path, match: str, example: Any = IMAGE, **options: Any
) -> ExportError:
    target = tmp_path / "m.onnx"
    target.write_bytes(b"before")
    with pytest.raises(ExportError, match=match) as caught:
        ds.export_onnx(model, target, example, **options)
    assert os.listdir(tmp_path) == ["m.onnx"]
    assert target.read_bytes() == b"before"
    assert caught.value.fix
    return caught.value


def test_training_mode_is_refused(tmp_path: Path) -> None:
    refused(small().train(), tmp_path, "the model is in training mode")


@pytest.mark.parametrize("path", ["bn", "block.2"])
def test_a_layer_in_training_mode_is_refused_by_name(tmp_path: Path, path: str) -> None:
    model = small()
    model.get_submodule(path).train()
    error = refused(model, tmp_path, "is in training mode")
    assert error.where is not None
    assert error.where.startswith(f"{path} (")


@pytest.mark.parametrize("kind", ["ours", "torchvision", "timm"])
def test_a_drop_path_in_training_mode_is_refused(tmp_path: Path, kind: str) -> None:
    import timm.layers

    layers = {
        "ours": ds.DropPath(0.1),
        "torchvision": torchvision.ops.StochasticDepth(0.1, "row"),
        "timm": timm.layers.DropPath(0.1),
    }
    model = nn.Sequential(nn.Conv2d(3, 3, 1), layers[kind]).eval()
    model[1].train()
    refused(model, tmp_path, "is in training mode")


def test_a_fresh_layer_in_an_eval_model_does_not_matter(tmp_path: Path) -> None:
    model = small()
    model.fc = nn.Linear(4, 7)  # training, as new layers are, and without effect
    assert model.fc.training
    assert ds.verify(model, ds.export_onnx(model, tmp_path / "m.onnx", IMAGE)).ok


def test_batch_statistics_are_refused(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, track_running_stats=False)).eval()
    error = refused(model, tmp_path, "without running statistics")
    assert error.where == "1 (BatchNorm2d)"


class Function(nn.Module):
    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def test_functional_batch_statistics_are_refused(tmp_path: Path) -> None:
    inner = Function(lambda x: F.batch_norm(x, None, None, training=True))
    error = refused(nn.Sequential(nn.ReLU(), inner).eval(), tmp_path, "batch statistics")
    assert error.where is not None
    assert error.where.startswith("1 (Function)")
    assert "test_export.py" in error.where


RANDOM = {
    "dropout": lambda x: F.dropout(x, 0.5, training=True),
    "attention": lambda x: F.scaled_dot_product_attention(x, x, x, dropout_p=0.1),
    "bernoulli of a constant": lambda x: x * torch.bernoulli(torch.full((8,), 0.5)),
    "normal": lambda x: x + torch.randn_like(x),
    "uniform": lambda x: x * torch.rand(8),
    "permutation": lambda x: x[..., torch.randperm(8)],
}


@pytest.mark.parametrize("kind", RANDOM)
def test_randomness_in_eval_is_refused(tmp_path: Path, kind: str) -> None:
    model = nn.Sequential(nn.ReLU(), Function(RANDOM[kind])).eval()
    error = refused(model, tmp_path, "draws random numbers in eval mode")
    assert error.where is not None
    assert error.where.startswith("1 (Function)")


CERTAIN = {
    "dropout off": lambda x: F.dropout(x, 0.5, training=False),
    "attention": lambda x: F.scaled_dot_product_attention(x, x, x),
}


@pytest.mark.parametrize("kind", CERTAIN)
def test_what_only_looks_random_is_exported(tmp_path: Path, kind: str) -> None:
    model = nn.Sequential(nn.ReLU(), Function(CERTAIN[kind])).eval()
    assert ds.verify(model, ds.export_onnx(model, tmp_path / "m.onnx", IMAGE)).ok


def test_wrong_inputs_are_refused_with_shapes(tmp_path: Path) -> None:
    error = refused(
        small(), tmp_path, "does not accept the example inputs", torch.randn(1, 4, 8, 8)
    )
    assert error.where == "Small with x float32 (1, 4, 8, 8)"
    assert error.fix is not None
    assert "forward takes (x" in error.fix


def test_too_many_inputs_are_an_argument_error(tmp_path: Path) -> None:
    with pytest.raises(ArgumentTypeError, match=r"do not fit Small\.forward: too many"):
        ds.export_onnx(small(), tmp_path / "m.onnx", (IMAGE, IMAGE))
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("function", "example", "reason"),
    [
        (lambda x: x.reshape(2, -1), torch.randn(2, 6), "takes a batch of 2 for granted"),
        (
            lambda x: x if x.shape[0] % 2 else x + 1,
            torch.randn(2, 6),
            r"it takes another way where not \(batch % 2\) == 0",
        ),
        (lambda x: x + torch.zeros(2, 6), torch.randn(2, 6), r"with a batch of 4, .* must match"),
        (lambda x: x + torch.zeros(6), torch.randn(6), r"with a batch of 12, .* must match"),
    ],
)
def test_a_batch_that_cannot_stay_open_is_refused(
    tmp_path: Path, function: Any, example: Tensor, reason: str
) -> None:
    model = Function(function).eval()
    error = refused(model, tmp_path, f"does not work for every batch size: .*{reason}", example)
    assert error.fix is not None
    assert "dynamic_batch=False" in error.fix
    assert ("x[None]" in error.fix) == (example.ndim == 1)
    assert "TORCH_LOGS" not in str(error)


def test_an_empty_batch_is_no_example(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="hold a batch of 0"):
        ds.export_onnx(small(), tmp_path / "m.onnx", IMAGE[:0])
    assert os.listdir(tmp_path) == []


def test_a_number_among_the_outputs_is_refused_and_none_is_left_out(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model = Function(lambda x: (x + 1, 3)).eval()
    refused(model, tmp_path, "returns 3, a Python int, and an ONNX graph returns tensors")
    path = ds.export_onnx(Function(lambda x: (x + 1, None)).eval(), tmp_path / "m.onnx", IMAGE)
    assert [v.name for v in onnx.load(str(path)).graph.output] == ["output_0"]
    assert capfd.readouterr() == ("", "")


def test_a_network_for_a_batch_of_one_is_refused(tmp_path: Path) -> None:
    model = nn.Sequential(Function(lambda x: x.reshape(1, -1)), nn.Linear(6, 2)).eval()
    error = refused(model, tmp_path, "with a batch of 1 and not with 2", torch.randn(1, 6))
    assert error.fix is not None
    assert "dynamic_batch=False" in error.fix
    ds.export_onnx(model, tmp_path / "m.onnx", torch.randn(1, 6), dynamic_batch=False)


def test_an_operator_that_onnx_lacks_is_named(tmp_path: Path) -> None:
    model = nn.Sequential(nn.ReLU(), Function(lambda x: torch.linalg.eigvals(x).real)).eval()
    error = refused(model, tmp_path, r"no counterpart.*linalg_eig")
    assert error.where is not None
    assert error.where.startswith("1 (Function)")


def test_a_branch_on_values_is_refused(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model = Function(lambda x: x if x.sum() > 0 else -x).eval()
    error = refused(model, tmp_path, "cannot be captured as a graph: Python code depends on the v")
    assert error.where is not None
    assert "test_export.py" in error.where
    assert "TORCH_LOGS" not in str(error)
    assert capfd.readouterr() == ("", "")


def test_arguments_of_the_wrong_kind(tmp_path: Path) -> None:
    target = tmp_path / "m.onnx"
    with pytest.raises(ArgumentTypeError, match=r"expected a torch\.nn\.Module, got type"):
        ds.export_onnx(Small, target, IMAGE)  # type: ignore[arg-type]
    for example in (None, {"x": IMAGE}, (3,), ()):
        with pytest.raises(ArgumentTypeError, match="without tensors"):
            ds.export_onnx(small(), target, example)  # type: ignore[arg-type]
    for opset in (5, 99, "20", 20.0):
        with pytest.raises(ArgumentError, match="opset is"):
            ds.export_onnx(small(), target, IMAGE, opset=opset)  # type: ignore[arg-type]
    for path in (None, 3, b"m.onnx"):
        with pytest.raises(ArgumentTypeError, match="path is a"):
            ds.export_onnx(small(), path, IMAGE)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match=r"path is 'a\\x00b'"):
        ds.export_onnx(small(), "a\0b", IMAGE)
    with pytest.raises(ExportError, match="File name too long"):
        ds.export_onnx(small(), tmp_path / ("a" * 300), IMAGE)
    assert os.listdir(tmp_path) == []


# Files and interruptions


LINE = torch.randn(1, 2)


def linear() -> nn.Module:
    return nn.Linear(2, 2).eval()


def test_a_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="the folder does not exist"):
        ds.export_onnx(linear(), tmp_path / "no" / "m.onnx", LINE)
    assert os.listdir(tmp_path) == []


def test_a_folder_in_the_place_of_the_file(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="the path is a folder"):
        ds.export_onnx(linear(), tmp_path, LINE)


def test_a_folder_that_cannot_be_written_to() -> None:
    if not Path("/proc/self").is_dir():
        pytest.skip("needs /proc, which nobody can write to")
    with pytest.raises(ExportError, match="the file cannot be written"):
        ds.export_onnx(linear(), "/proc/m.onnx", LINE)


def test_a_link_stays_a_link_to_the_new_file(tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    real, link = tmp_path / "models" / ("a" * 250), tmp_path / "m.onnx"
    real.write_bytes(b"before")
    link.symlink_to(Path("models") / real.name)
    model = linear()
    assert ds.export_onnx(model, link, LINE) == link
    assert link.is_symlink()
    assert ds.verify(model, real).ok
    assert sorted(os.listdir(tmp_path)) == ["m.onnx", "models"]
    assert os.listdir(real.parent) == [real.name]
    link.unlink()
    link.symlink_to(tmp_path / "no" / "m.onnx")
    with pytest.raises(ExportError, match="the folder does not exist"):
        ds.export_onnx(model, link, LINE)


def test_a_read_only_file_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "m.onnx"
    target.write_bytes(b"before")
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write everywhere
    with pytest.raises(ExportError, match="the file is read-only"):
        ds.export_onnx(linear(), target, LINE)
    assert target.read_bytes() == b"before"


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device")])
@pytest.mark.parametrize("before", [b"before", None])
def test_a_write_that_stops_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, before: bytes | None
) -> None:
    import onnx_ir

    def stop(model: Any, path: Path, **options: Any) -> None:
        Path(path).write_bytes(b"half")
        raise error

    monkeypatch.setattr(onnx_ir, "save", stop)
    target = tmp_path / "m.onnx"
    if before:
        target.write_bytes(before)
    expected = KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else ExportError
    with pytest.raises(expected, match="No space left" if expected is ExportError else None):
        ds.export_onnx(linear(), target, LINE)
    assert os.listdir(tmp_path) == (["m.onnx"] if before else [])
    assert not before or target.read_bytes() == before


def test_a_file_that_the_checker_refuses_is_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: str) -> None:
        raise onnx.checker.ValidationError("bad graph")

    monkeypatch.setattr(onnx.checker, "check_model", refuse)
    with pytest.raises(ExportError, match="not valid ONNX: bad graph"):
        ds.export_onnx(linear(), tmp_path / "m.onnx", LINE)
    assert os.listdir(tmp_path) == []


def test_ctrl_c_during_an_export_in_a_process_of_its_own(tmp_path: Path) -> None:
    script = textwrap.dedent(
        """
        import signal, sys, torch
        from torch import nn
        import dropsurgery as ds
        # A job in the background of a script inherits that interrupts are ignored.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        class Slow(nn.Module):
            def __init__(self):
                super().__init__()
                self.layers = nn.Sequential(*(nn.Linear(64, 64) for _ in range(800)))
            def forward(self, x):
                print("running", flush=True) if not torch.compiler.is_exporting() else None
                return self.layers(x)
        try:
            ds.export_onnx(Slow().eval(), sys.argv[1], torch.randn(2, 64))
        except KeyboardInterrupt:
            print("interrupted", flush=True)
        """
    )
    target = tmp_path / "m.onnx"
    target.write_bytes(b"before")
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(target)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "running\n"
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=60)
    assert out.endswith("interrupted\n")
    assert os.listdir(tmp_path) == ["m.onnx"]
    assert target.read_bytes() == b"before"


def fitted(window: list[int], size: int) -> list[int]:
    """Fit a window in place, as torchvision's video Swin does."""
    if size <= window[0]:
        window[0] = size
    return window


torch.fx.wrap("fitted")


def test_a_function_that_writes_into_its_list(tmp_path: Path) -> None:
    class Windows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Conv2d(3, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            window = fitted([7], x.shape[3])
            return self.scale(x)[:, :, :, : window[0]] * window[0]

    model, x = Windows().eval(), torch.randn(2, 3, 9, 5)
    slim = ds.slim(model)
    path = ds.export_onnx(slim, tmp_path / "m.onnx", x)
    ds.testing.assert_equivalent(model, path, x)
    # The nodes still tell their module, and the network has not changed.
    assert "scale/Conv" in {node.name for node in onnx.load(path).graph.node}
    assert torch.equal(slim(x), model(x))
    assert slim(torch.randn(1, 3, 9, 9)).shape[3] == 7
