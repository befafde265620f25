from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import onnx
import pytest
import torch
import torchvision
from onnx import TensorProto, helper
from torch import Tensor, nn
from torch.nn import functional as F

import dropsurgery as ds
from dropsurgery.errors import (
    ArgumentError,
    ArgumentTypeError,
    ProviderError,
    StochasticError,
    VerifyError,
)
from dropsurgery.testing import assert_equivalent
from dropsurgery.verify import Gate
from tests.helpers import randomize


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.drop = nn.Dropout(0.5)
        self.fc = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.bn(self.conv(x)))
        return self.fc(self.drop(y.mean((2, 3))))


def net(seed: int = 0) -> Net:
    torch.manual_seed(seed)
    model = Net()
    randomize(model, seed)
    return model.eval()


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ds.export_onnx(net(), tmp_path_factory.mktemp("net") / "m.onnx", torch.randn(1, 3, 8, 8))


# Verdicts


def test_an_export_is_its_network(path: Path) -> None:
    verdict = ds.verify(net(), path)
    assert verdict.ok
    assert bool(verdict)
    usual = tuple(f"seed {s}, batch {b}" for s in range(3) for b in (1, 3))
    assert verdict.inputs == (*usual, "seed 2, batch 3, faint")
    assert verdict.provider.startswith("CPU ")
    (output,) = verdict.outputs
    assert (output.name, output.dtype, output.shape, output.count) == (
        "output",
        "float32",
        (1, 10),
        150,
    )
    assert output.reference_error is not None
    assert 0 < output.reference_error < 1e-6


def test_another_network_is_not(path: Path) -> None:
    verdict = ds.verify(net(1), path)
    assert not verdict.ok
    assert not bool(verdict)
    assert "error beyond rounding: rmse ratio" in verdict.outputs[0].reason


def test_the_table_can_be_read(path: Path) -> None:
    text = str(ds.verify(net(), path))
    assert text.splitlines()[0].startswith(f"{path} against Net on CPU")
    for word in ("own error", "typical", "seed 2, batch 3", "EQUIVALENT"):
        assert word in text
    assert "NOT EQUIVALENT" in str(ds.verify(net(1), path))


def test_the_verdict_is_json(path: Path) -> None:
    for model in (net(), net(1)):
        verdict = ds.verify(model, path)
        data = json.loads(json.dumps(verdict.to_json(), allow_nan=False))
        assert data["ok"] == verdict.ok
        assert data["outputs"][0]["ratios"][0]["kind"] == "rmse"
        assert data["gate"]["rmse"] == Gate().rmse


def test_the_same_call_gives_the_same_verdict(path: Path) -> None:
    assert ds.verify(net(), path) == ds.verify(net(), path)
    assert ds.verify(net(), path) != ds.verify(net(), path, seeds=(5, 6, 7))


def test_a_constant_output_is_said_to_test_nothing() -> None:
    model = net()
    nn.init.zeros_(model.fc.weight)
    changed = net(1)
    changed.fc = model.fc
    verdict = ds.verify(model, changed)
    conclusion = "EQUIVALENT, but the output is constant: nothing before it was tested"
    lines = str(verdict).splitlines()
    assert lines[0] == lines[-1] == verdict.conclusion == conclusion
    assert verdict.ok
    assert not verdict.tested
    data = verdict.to_json()
    assert (data["ok"], data["tested"], data["conclusion"]) == (True, False, conclusion)
    assert data["outputs"][0]["varies"] is False
    changed.fc = nn.Linear(8, 10)
    assert str(ds.verify(model, changed)).splitlines()[-1] == "NOT EQUIVALENT"


def test_one_constant_output_among_others_is_noted() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.fc(x), self.fc.weight

    two = Two()
    verdict = ds.verify(two, two)
    assert verdict.conclusion == "EQUIVALENT"
    assert [output.varies for output in verdict.outputs] == [True, False]
    assert "'output_1' is the same for every input: nothing before it was tested" in verdict.notes


def test_progress_is_told(path: Path) -> None:
    told: list[str] = []
    verdict = ds.verify(net(), path, progress=told.append)
    assert tuple(told) == verdict.inputs


# Nothing is touched


def test_neither_module_is_changed() -> None:
    reference, candidate = net().train(), net()
    reference.bn.eval()  # a frozen BatchNorm in a network in training
    before = {key: value.clone() for key, value in reference.state_dict().items()}
    flags = {name: m.training for name, m in reference.named_modules()}
    attributes = {name: dict(vars(m)) for name, m in reference.named_modules()}
    assert ds.verify(reference, candidate).ok
    assert {name: m.training for name, m in reference.named_modules()} == flags
    assert all(torch.equal(value, before[key]) for key, value in reference.state_dict().items())
    for name, module in reference.named_modules():
        assert set(vars(module)) == set(attributes[name])


def test_a_forward_that_writes_leaves_no_trace_and_no_float64_behind() -> None:
    class Caching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)
            self.cache: Tensor | None = None
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            if self.cache is None:
                self.cache = torch.linspace(0, 1, 4)
            x += 1  # the caller's input is not to be changed either
            return self.fc(x) + self.cache

    model, x = Caching().eval(), torch.randn(2, 4)
    kept = x.clone()
    assert ds.verify(model, model, x).ok
    assert model.cache is None
    assert model.calls == 0
    assert torch.equal(x, kept)


def test_the_global_random_state_is_left_alone(path: Path) -> None:
    model = net()
    before = torch.get_rng_state()
    ds.verify(model, path)
    assert torch.equal(before, torch.get_rng_state())


# Module against module


def test_surgery_is_equivalent_and_a_changed_weight_is_not() -> None:
    model = randomize(torchvision.models.resnet18()).eval()
    assert ds.verify(model, ds.retrofit(model), torch.randn(2, 3, 32, 32)).ok
    slim = ds.slim(model)
    assert ds.verify(model, slim, torch.randn(2, 3, 32, 32)).ok
    weight = slim.get_parameter("fc.weight")
    slim.fc.weight = nn.Parameter(weight + 1e-5)  # type: ignore[union-attr]
    assert not ds.verify(model, slim, torch.randn(2, 3, 32, 32)).ok


def test_a_traced_network_tells_its_inputs() -> None:
    class Pair(nn.Module):
        def forward(self, tokens: Tensor, scale: Tensor) -> Tensor:
            return F.one_hot(tokens, 4).float() * scale

    example = (torch.zeros(2, 5, dtype=torch.int64), torch.randn(2, 1, 4))
    traced = ds.trace(Pair().eval(), example_inputs=example)
    verdict = ds.verify(Pair(), traced)
    assert verdict.ok
    assert verdict.outputs[0].shape == (1, 5, 4)


GUESSED = {
    "linear": (nn.Linear(5, 2), (1, 2)),
    "sequence": (nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), (1, 16, 8)),
    "recurrent": (nn.GRU(6, 4, batch_first=True), (1, 16, 4)),
    "signal": (nn.Conv1d(2, 3, 3), (1, 3, 14)),
    "image": (nn.Conv2d(1, 3, 3), (1, 3, 62, 62)),
    "volume": (nn.Conv3d(1, 2, 3), (1, 2, 14, 14, 14)),
    "tokens": (nn.Embedding(7, 3), (1, 16, 3)),
    "digits": (nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(1352, 4)), (1, 4)),
    "norm": (nn.LayerNorm(6), (1, 6)),
    "batchnorm": (nn.BatchNorm2d(3), (1, 3, 16, 16)),
}


@pytest.mark.parametrize("kind", GUESSED)
def test_inputs_are_guessed_from_the_first_layer(kind: str) -> None:
    model, shape = GUESSED[kind]
    verdict = ds.verify(model, model)
    assert verdict.ok
    assert verdict.outputs[0].shape == shape


def test_a_model_that_knows_its_image_size() -> None:
    model = torchvision.models.VisionTransformer(48, 16, 1, 2, 16, 32)
    verdict = ds.verify(model, model)
    assert verdict.ok
    # Its head starts at zero.
    assert "'output' is the same for every input: nothing before it was tested" in verdict.notes


def test_inputs_that_cannot_be_guessed() -> None:
    with pytest.raises(VerifyError, match="cannot be told from the network") as caught:
        ds.verify(nn.ReLU(), nn.ReLU())
    assert caught.value.fix is not None
    assert "pass inputs=" in caught.value.fix
    with pytest.raises(VerifyError, match="cannot be told from the network"):
        ds.verify(nn.Bilinear(2, 2, 2), nn.Bilinear(2, 2, 2))
    odd = nn.Sequential(nn.Linear(4, 4), nn.Unflatten(1, (3, 5)))
    with pytest.raises(VerifyError, match="accepts none of the usual inputs"):
        ds.verify(odd, odd)


# The caller's inputs


def test_own_inputs_are_run_as_they_are_and_varied(path: Path) -> None:
    verdict = ds.verify(net(), path, torch.rand(2, 3, 8, 8), seeds=(4,))
    assert verdict.inputs == (
        "yours",
        "yours varied, seed 4, batch 1",
        "yours varied, seed 4, batch 3",
        "yours, faint",
    )
    several = [torch.rand(2, 3, 8, 8), (torch.rand(1, 3, 8, 8),), {"x": torch.rand(5, 3, 8, 8)}]
    assert ds.verify(net(), path, several, seeds=(4,)).inputs[:3] == (
        "yours 0",
        "yours 1",
        "yours 2",
    )


def test_variations_keep_sign_and_range() -> None:
    class Careful(nn.Module):
        def forward(self, x: Tensor, index: Tensor) -> Tensor:
            assert x.min() >= 0
            assert x.max() <= 1
            return torch.acos(x)[:, index].sqrt()

    inputs = (torch.rand(4, 6), torch.tensor([5, 0, 3]))
    assert ds.verify(Careful(), Careful(), inputs).ok


@pytest.mark.parametrize("inputs", [3, b"x", [], (), (1, 2), [torch.ones(1), 3], iter(())])
def test_inputs_of_the_wrong_kind(path: Path, inputs: Any) -> None:
    with pytest.raises(ArgumentTypeError, match="inputs holds"):
        ds.verify(net(), path, inputs)


def test_inputs_that_the_reference_refuses(path: Path) -> None:
    with pytest.raises(VerifyError, match="the reference does not accept the inputs") as caught:
        ds.verify(net(), path, torch.randn(2, 4, 8, 8))
    assert caught.value.where is not None
    assert "x float32 (2, 4, 8, 8)" in caught.value.where


def test_inputs_that_only_the_file_refuses(tmp_path: Path) -> None:
    fixed = ds.export_onnx(net(), tmp_path / "m.onnx", torch.randn(2, 3, 8, 8), dynamic_batch=False)
    verdict = ds.verify(net(), fixed)
    assert verdict.ok
    assert verdict.inputs == ("seed 0", "seed 1", "seed 2", "seed 2, faint")
    verdict = ds.verify(net(), fixed, torch.randn(5, 3, 8, 8))
    assert not verdict.ok
    assert "the candidate fails on yours" in verdict.problems[0]


def test_a_batch_size_that_the_reference_refuses_is_left_out() -> None:
    class One(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x.reshape(1, 4))

    model = One()
    verdict = ds.verify(model, model)
    assert verdict.ok
    tried = tuple(f"seed {seed}, batch 1" for seed in range(3))
    assert verdict.inputs == (*tried, "seed 2, batch 1, faint")
    assert "not tried, the reference does not accept it: seed 0, batch 3" in verdict.notes


# Faint inputs


class Growing(nn.Module):
    """Activations that have grown to 1e7 where the bias of the last layer is added."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(32, 32, bias=False), nn.ReLU())
        self.last = nn.Linear(32, 32)
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.last(3e7 * self.body(x))))


def test_faint_inputs_show_what_large_activations_hide() -> None:
    model, changed = Growing(), Growing()
    changed.last.bias.data += 1e-2
    usual = torch.randn(3, 32)
    with torch.no_grad():
        assert (model(usual) - changed(usual)).abs().max() / model(usual).abs().max() < 1e-7
    verdict = ds.verify(model, changed)
    assert not verdict.ok
    assert ds.verify(model, copy.deepcopy(model)).ok
    # Sees as much without them.
    assert not ds.verify(model.double(), changed.double()).ok


@pytest.mark.parametrize("kind", ["instance norm", "rank", "zero", "refused"])
def test_faint_inputs_are_left_out_where_they_cannot_be_compared(kind: str) -> None:
    class Odd(nn.Module):
        def __init__(self, flip: bool) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.conv = nn.Conv2d(3, 8, 3)
            self.more = nn.Conv2d(8, 8, 3)
            self.norm = nn.InstanceNorm2d(8)
            self.flip = flip

        def rounded(self, y: Tensor) -> Tensor:
            """The same values, rounded otherwise."""
            return (y * 3) / 3 if self.flip else y

        def forward(self, x: Tensor) -> Tensor:
            if kind == "refused" and bool(x.abs().max() < 1e-3):
                raise ValueError("too dark")
            if kind == "zero":
                return torch.relu(self.rounded(self.conv(x)) - 0.5 - self.conv.bias[:, None, None])
            y = self.norm(self.rounded(self.conv(x)))
            y = self.norm(self.rounded(self.more(torch.relu(y)))).flatten(1)
            return y.argsort(1) if kind == "rank" else y

    verdict = ds.verify(Odd(False), Odd(kind != "rank"))
    assert verdict.ok, str(verdict)
    assert not any("faint" in label for label in verdict.inputs)
    assert any("faint" in note for note in verdict.notes)


def test_numbers_that_are_no_floats_cannot_be_faint(path: Path) -> None:
    model = nn.Embedding(11, 4)
    assert ds.verify(model, model).inputs[-1] == "seed 2, batch 3"


# Outputs


class Pair(NamedTuple):
    left: Tensor
    right: Tensor


@dataclass
class Bundle:
    logits: Tensor
    hidden: Tensor | None = None


class Nested(nn.Module):
    def __init__(self, change: float = 0.0) -> None:
        super().__init__()
        self.change = change

    def forward(self, x: Tensor) -> dict[str, Any]:
        return {
            "pair": Pair(x.sin(), x.cos()),
            "list": [x.exp(), (x.tanh() + self.change,)],
            "data": Bundle(x * 2),
            "rank": x.argmax(1),
            "mask": x > 0.5,
            "count": 3,
        }


def test_nested_outputs_are_compared_one_by_one() -> None:
    x = torch.rand(2, 5)
    verdict = ds.verify(Nested(), Nested(), x)
    assert verdict.ok
    names = [
        "pair_left",
        "pair_right",
        "list_0",
        "list_1_0",
        "data_logits",
        "rank",
        "mask",
        "count",
    ]
    assert [output.name for output in verdict.outputs] == names
    verdict = ds.verify(Nested(), Nested(1e-5), x)
    assert [output.name for output in verdict.outputs if not output.ok] == ["list_1_0"]


class Typed(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, x: Tensor) -> Any:
        return {
            "reference": lambda: (x, x * 2),
            "fewer": lambda: (x,),
            "single": lambda: x,
            "named": lambda: {"a": x, "b": x * 2},
            "dtype": lambda: (x, (x * 2).half()),
            "shape": lambda: (x, (x * 2)[:, None]),
            "integer": lambda: (x, (x * 2).long()),
            "nan": lambda: (x, (x - 0.5).sqrt()),
            "inf": lambda: (x, x / 0),
        }[self.kind]()


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("fewer", "the outputs are ['output_0'] instead of ['output_0', 'output_1']"),
        ("single", "the outputs are ['output'] instead of"),
        ("named", "the outputs are ['a', 'b'] instead of"),
        ("dtype", "dtype float16 instead of float32"),
        ("shape", "shape (2, 1, 3) instead of (2, 3)"),
        ("integer", "dtype int64 instead of float32"),
        ("nan", "values are NaN"),
        ("inf", "infinite where the reference is finite"),
    ],
)
def test_outputs_of_another_kind_are_caught(kind: str, message: str) -> None:
    verdict = ds.verify(Typed("reference"), Typed(kind), torch.rand(2, 3))
    assert not verdict.ok
    assert message in str(verdict)


def test_nan_never_passes_even_where_both_have_it() -> None:
    verdict = ds.verify(Typed("nan"), Typed("nan"), torch.rand(2, 3))
    assert not verdict.ok
    assert (
        "the reference itself returns NaN, as the candidate does" in verdict.outputs[0 + 1].reason
    )


def test_equal_infinities_pass() -> None:
    assert ds.verify(Typed("inf"), Typed("inf"), torch.rand(2, 3) + 1).ok


def test_an_integer_that_differs_once_is_caught() -> None:
    class Count(nn.Module):
        def __init__(self, extra: int) -> None:
            super().__init__()
            self.extra = extra

        def forward(self, x: Tensor) -> Tensor:
            y = torch.bucketize(x, torch.linspace(0, 1, 9))
            y[0, 0] += self.extra
            return y

    x = torch.rand(2, 50)
    assert ds.verify(Count(0), Count(0), x).ok
    verdict = ds.verify(Count(0), Count(1), x)
    assert not verdict.ok
    assert "values differ" in verdict.outputs[0].reason


def test_an_output_that_is_no_tensor() -> None:
    class Text(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return x, "text"

    with pytest.raises(VerifyError, match="the reference returns what cannot be compared"):
        ds.verify(Text(), Text(), torch.ones(1))


def test_a_network_without_outputs_proves_nothing() -> None:
    class Silent(nn.Module):
        def forward(self, x: Tensor) -> None:
            return None

    assert not ds.verify(Silent(), Silent(), torch.ones(1)).ok


# References that are no yardstick


def test_a_random_reference_is_refused() -> None:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return F.dropout(self.fc(x), 0.5, training=True)

    for pair in ((Noisy(), nn.Linear(4, 4)), (nn.Linear(4, 4), Noisy())):
        with pytest.raises(VerifyError, match="draws random numbers in eval mode"):
            ds.verify(*pair)


def test_a_reference_without_digits_is_no_yardstick() -> None:
    class Cancelling(nn.Module):
        def __init__(self, shift: float) -> None:
            super().__init__()
            self.shift = shift

        def forward(self, x: Tensor) -> Tensor:
            return (x + 300000) - 300000 + self.shift

    verdict = ds.verify(Cancelling(0.0), Cancelling(1e-3), torch.randn(4, 5))
    assert not verdict.ok
    assert "computes too inexactly to be compared with" in verdict.outputs[0].reason


def test_modules_without_weights_or_in_torchscript() -> None:
    meta = nn.Linear(2, 2, device="meta")
    with pytest.raises(VerifyError, match="the reference has no weights"):
        ds.verify(meta, nn.Linear(2, 2))


# Precisions


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_export_and_verify(tmp_path: Path, dtype: torch.dtype) -> None:
    # onnxruntime's CPU kernels know bfloat16 in casts only.
    body: nn.Module = nn.Identity() if dtype == torch.bfloat16 else nn.Linear(6, 4)

    class Cast(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = body.to(dtype)

        def forward(self, x: Tensor) -> Tensor:
            return self.body(x).float().relu().to(dtype)

    model = Cast().eval()
    path = ds.export_onnx(model, tmp_path / "m.onnx", torch.randn(2, 6, dtype=dtype))
    verdict = ds.verify(model, path)
    assert verdict.ok, str(verdict)
    assert verdict.outputs[0].dtype == str(dtype).removeprefix("torch.")


# Files


def test_missing_and_broken_files(tmp_path: Path, path: Path) -> None:
    with pytest.raises(VerifyError, match="there is no such file"):
        ds.verify(net(), tmp_path / "no.onnx")
    with pytest.raises(VerifyError, match="this is no file"):
        ds.verify(net(), tmp_path)
    broken = tmp_path / "broken.onnx"
    whole = path.read_bytes()
    for content in (b"", b"not an onnx file", whole[: len(whole) // 2], whole[:-1], b"\x00" * 500):
        broken.write_bytes(content)
        with pytest.raises(VerifyError) as caught:
            ds.verify(net(), broken)
        assert str(broken) in str(caught.value)
        assert "\n  fix:" in str(caught.value)


def test_weights_that_are_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dropsurgery import onnx_writer

    monkeypatch.setattr(onnx_writer, "ONE_FILE_LIMIT", 100)
    path = ds.export_onnx(net(), tmp_path / "m.onnx", torch.randn(1, 3, 8, 8))
    (tmp_path / "m.onnx.data").unlink()
    with pytest.raises(VerifyError, match=r"external data are missing"):
        ds.verify(net(), path)


def written(path: Path, nodes: list[Any], inputs: list[Any], outputs: list[Any]) -> Path:
    graph = helper.make_graph(nodes, "g", inputs, outputs)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.save(model, str(path))
    return path


def value(name: str, *shape: int | str, kind: int = TensorProto.FLOAT) -> Any:
    return helper.make_tensor_value_info(name, kind, shape)


def test_a_file_of_other_origin_is_compared_by_position(tmp_path: Path) -> None:
    path = written(
        tmp_path / "other.onnx",
        [helper.make_node("Relu", ["in.0"], ["out.0"])],
        [value("in.0", "N", 4)],
        [value("out.0", "N", 4)],
    )
    verdict = ds.verify(nn.ReLU(), path)
    assert verdict.ok
    assert verdict.notes == ("outputs compared by position: ['out.0'] for ['output']",)
    assert not ds.verify(nn.GELU(), path).ok


def test_a_file_with_another_number_of_inputs(tmp_path: Path) -> None:
    path = written(
        tmp_path / "other.onnx",
        [helper.make_node("Add", ["a", "b"], ["c"])],
        [value("a", "N", 4), value("b", "N", 4)],
        [value("c", "N", 4)],
    )
    with pytest.raises(VerifyError, match="which do not fit the reference"):
        ds.verify(nn.ReLU(), path)
    with pytest.raises(VerifyError, match="the file takes 2 inputs and the call has 1 tensors"):
        ds.verify(nn.ReLU(), path, torch.randn(2, 4))


def test_a_random_file_is_refused(tmp_path: Path) -> None:
    path = written(
        tmp_path / "random.onnx",
        [
            helper.make_node("RandomNormalLike", ["x"], ["noise"], scale=1e-3),
            helper.make_node("Add", ["x", "noise"], ["y"]),
        ],
        [value("x", "N", 4)],
        [value("y", "N", 4)],
    )
    with pytest.raises(StochasticError, match="the file draws random numbers, in 1 node"):
        ds.verify(nn.Identity(), path)


def test_token_inputs_stay_within_the_vocabulary(tmp_path: Path) -> None:
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(11, 4)
            self.segment = nn.Embedding(5, 4)

        def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
            y = self.embed(ids) + self.segment(ids % 5)
            return (y * mask[..., None]).sum(1)

    model = Tokens().eval()
    example = (torch.randint(5, (2, 6)), torch.ones(2, 6, dtype=torch.bool))
    path = ds.export_onnx(model, tmp_path / "m.onnx", example)
    assert ds.verify(model, path).ok
    model.embed.weight.data[4] += 1e-4
    assert not ds.verify(model, path).ok


# Arguments and providers


def test_arguments_of_the_wrong_kind(path: Path) -> None:
    with pytest.raises(ArgumentTypeError, match=r"a torch\.nn\.Module or a path, got int"):
        ds.verify(3, path)  # type: ignore[arg-type]
    with pytest.raises(ArgumentTypeError, match="the candidate is a path or"):
        ds.verify(net(), 3)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="provider is 'tpu'"):
        ds.verify(net(), path, provider="tpu")
    with pytest.raises(ArgumentError, match="the candidate is a module"):
        ds.verify(net(), net(), provider="cuda")
    for options in (
        *({"seeds": ()}, {"seeds": (-1,)}, {"seeds": (2**70,)}, {"seeds": "12"}),
        *({"batch_sizes": ()}, {"batch_sizes": (0,)}, {"batch_sizes": (1.5,)}),
    ):
        with pytest.raises(ArgumentError, match=next(iter(options))):
            ds.verify(net(), path, **options)  # type: ignore[arg-type]
    for name in ("seeds", "batch_sizes"):
        with pytest.raises(ArgumentTypeError, match=f"{name} is 3"):
            ds.verify(net(), path, **{name: 3})  # type: ignore[arg-type]
    for provider in (None, [], 3):
        with pytest.raises(ArgumentError, match="provider is"):
            ds.verify(net(), path, provider=provider)  # type: ignore[arg-type]
    with pytest.raises(ArgumentTypeError, match="gate is a float"):
        ds.verify(net(), path, gate=3.0)  # type: ignore[arg-type]
    for name in ("a" * 400, "a\0.onnx", ""):
        with pytest.raises(VerifyError):
            ds.verify(net(), name)
    assert ds.verify(net(), path, seeds=iter([0]), batch_sizes=range(1, 3)).ok  # type: ignore[arg-type]


def test_a_provider_that_is_missing(path: Path) -> None:
    import onnxruntime

    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this onnxruntime has the provider")
    with pytest.raises(ProviderError, match="has no CUDAExecutionProvider"):
        ds.verify(net(), path, provider="cuda")


@pytest.mark.gpu
def test_the_cuda_provider_runs_everything_without_tf32(path: Path) -> None:
    import onnxruntime

    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        pytest.skip("needs onnxruntime-gpu and a CUDA device")
    verdict = ds.verify(net(), path, provider="cuda")
    assert verdict.ok, str(verdict)
    assert verdict.provider.startswith("CUDA ")


@pytest.mark.gpu
def test_a_reference_on_a_gpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    before = torch.backends.cudnn.allow_tf32
    model = randomize(torchvision.models.resnet18()).eval().cuda()
    assert ds.verify(model, ds.slim(model)).ok
    assert torch.backends.cudnn.allow_tf32 == before


# The assertion


def test_assert_equivalent_is_silent_where_it_holds(path: Path) -> None:
    assert_equivalent(net(), path)
    assert_equivalent(net(), net(), torch.randn(2, 3, 8, 8))


def test_assert_equivalent_explains(path: Path) -> None:
    with pytest.raises(AssertionError) as caught:
        assert_equivalent(net(1), path)
    text = str(caught.value)
    assert "own error" in text
    assert "output: error beyond rounding" in text
    assert "what to do: outputs output: a weight, a statistic, an epsilon" in text


@pytest.mark.parametrize(
    ("kind", "advice"),
    [
        ("nan", "look for divisions"),
        ("fewer", "check that the candidate was made from this network"),
        ("dtype", "export again from this network"),
    ],
)
def test_assert_equivalent_advises(kind: str, advice: str) -> None:
    with pytest.raises(AssertionError, match=advice):
        assert_equivalent(Typed("reference"), Typed(kind), torch.rand(2, 3))


def test_a_comparison_that_cannot_be_made_is_no_assertion(tmp_path: Path) -> None:
    with pytest.raises(VerifyError):
        assert_equivalent(net(), tmp_path / "no.onnx")
