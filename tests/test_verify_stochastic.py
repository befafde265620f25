"""Random networks and files: recognised, refused, or compared by their statistics."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn
from torch.nn import functional as F

import dropsurgery as ds
from dropsurgery.errors import ArgumentError, ArgumentTypeError, StochasticError, VerifyError
from dropsurgery.layers.monte_carlo import MonteCarloDropout
from dropsurgery.onnx_random import op_draws, random_nodes, train_mode_norms
from dropsurgery.verify.stochastic import Moments, Samples, limit, weigh


class Net(nn.Module):
    def __init__(self, p: float = 0.3, units: Any = "element", shift: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc = nn.Linear(6, 16)
        self.drop = MonteCarloDropout(p, units=units)
        self.head = nn.Linear(16, 4)
        self.head.bias.data += shift

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.drop(torch.relu(self.fc(x))))


X = torch.randn(2, 6, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def random_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ds.export_onnx(Net().eval(), tmp_path_factory.mktemp("mc") / "m.onnx", X)


def proto(nodes: list[Any], opset: int = 20, functions: list[Any] | None = None) -> Any:
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 6])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [
            numpy_helper.from_array(torch.tensor(0.5).numpy(), "half"),
            numpy_helper.from_array(torch.tensor(0.0).numpy(), "none"),
            numpy_helper.from_array(torch.tensor(True).numpy(), "true"),
            numpy_helper.from_array(torch.tensor(False).numpy(), "false"),
        ],
    )
    imports = [helper.make_opsetid("", opset), helper.make_opsetid("own", 1)]
    return helper.make_model(graph, opset_imports=imports, functions=functions, ir_version=10)


def node(op: str, inputs: list[str], output: str = "y", **attributes: Any) -> Any:
    return helper.make_node(op, inputs, [output], name=f"here/{op}", **attributes)


# Recognised


@pytest.mark.parametrize(
    ("op", "inputs"),
    [
        ("RandomNormalLike", ["x"]),
        ("RandomUniformLike", ["x"]),
        ("Bernoulli", ["x"]),
        ("Multinomial", ["x"]),
        ("Dropout", ["x", "half", "true"]),
        ("Dropout", ["x", "half", "computed"]),
    ],
)
def test_operators_that_draw(op: str, inputs: list[str]) -> None:
    (found,) = random_nodes(proto([node(op, inputs)]))
    assert (found.name, found.op_type) == (f"here/{op}", op)


@pytest.mark.parametrize(
    ("op", "inputs"),
    [
        ("Relu", ["x"]),
        ("AffineGrid", ["x", "size"]),  # onnx says non-deterministic: its definition holds an If
        ("Dropout", ["x"]),
        ("Dropout", ["x", "half"]),
        ("Dropout", ["x", "half", "false"]),
        ("Dropout", ["x", "none", "true"]),
        ("BatchNormalization", ["x", "a", "b", "c", "d"]),
    ],
)
def test_operators_that_do_not_draw(op: str, inputs: list[str]) -> None:
    assert not random_nodes(proto([node(op, inputs)]))


def branches(inner: Any) -> Any:
    def body(name: str, part: Any) -> Any:
        y = helper.make_tensor_value_info("z", TensorProto.FLOAT, None)
        return helper.make_graph([part], name, [], [y])

    other = helper.make_node("Identity", ["x"], ["z"], name="other")
    return node("If", ["true"], then_branch=body("then", other), else_branch=body("else", inner))


def test_a_branch_draws_or_not() -> None:
    assert not random_nodes(proto([branches(helper.make_node("Sin", ["x"], ["z"], name="sin"))]))
    draw = helper.make_node("RandomNormalLike", ["x"], ["z"], name="inner/draw")
    (found,) = random_nodes(proto([branches(draw)]))
    assert found.name == "inner/draw"


def test_a_function_that_draws_is_named_where_it_is_called() -> None:
    def function(name: str, op: str) -> Any:
        body = [helper.make_node(op, ["a"], ["b"])]
        imports = [helper.make_opsetid("", 20)]
        return helper.make_function("own", name, ["a"], ["b"], body, imports)

    functions = [function("Noise", "RandomNormalLike"), function("Calm", "Sin")]
    nodes = [
        helper.make_node("Calm", ["x"], ["c"], name="calm", domain="own"),
        helper.make_node("Noise", ["c"], ["y"], name="layer.3/Noise", domain="own"),
    ]
    (found,) = random_nodes(proto(nodes, functions=functions))
    assert str(found) == "layer.3/Noise (RandomNormalLike)"


def test_unknown_operators_count_as_deterministic() -> None:
    assert not op_draws("Mystery", "com.example")
    assert op_draws("Bernoulli")
    assert not op_draws("Loop")


def test_a_network_with_branches_can_be_exported_and_verified(tmp_path: Path) -> None:
    class Branches(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.cond(x.sum() > 0, lambda t: t * 2, lambda t: t.sin(), (x,))

    path = ds.export_onnx(Branches().eval(), tmp_path / "m.onnx", torch.rand(2, 3))
    assert "If" in {n.op_type for n in onnx.load(str(path)).graph.node}
    assert ds.verify(Branches(), path).ok


# Refused


def test_a_random_file_is_refused_with_its_place(random_file: Path) -> None:
    with pytest.raises(StochasticError, match="the file draws random numbers, in 1 node") as caught:
        ds.verify(Net(), random_file)
    assert caught.value.where is not None
    assert "(RandomUniformLike) in module 'drop'" in caught.value.where
    assert "stochastic=True" in str(caught.value.fix)
    assert isinstance(caught.value, VerifyError)


def test_a_random_network_is_refused_with_its_place() -> None:
    for pair in ((Net(), Net()), (nn.Linear(6, 4), Net())):
        with pytest.raises(StochasticError, match="draws random numbers in eval mode") as caught:
            ds.verify(*pair, X)
        assert caught.value.where == "Net: drop (MonteCarloDropout)"
    again = pickle.loads(pickle.dumps(caught.value))
    assert str(again) == str(caught.value)


def test_a_draw_of_the_outermost_forward_has_no_path() -> None:
    class Bare(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.dropout(x, 0.5, training=True)

    with pytest.raises(StochasticError) as caught:
        ds.verify(Bare(), Bare(), X)
    assert caught.value.where == "Bare"


def frozen(path: Path, *, named: bool = True) -> Path:
    """Put a constant where the file draws."""
    model = onnx.load(str(path))
    (draw,) = [n for n in model.graph.node if n.op_type == "RandomUniformLike"]
    mask = torch.rand(1, 16, generator=torch.Generator().manual_seed(3))
    model.graph.initializer.append(numpy_helper.from_array(mask.numpy(), draw.output[0]))
    model.graph.node.remove(draw)
    if not named:
        for n in model.graph.node:
            del n.metadata_props[:]
            n.name = ""
    target = path.with_name(f"frozen_{named}.onnx")
    onnx.save(model, str(target))
    return target


def test_a_frozen_draw_is_named(random_file: Path) -> None:
    with pytest.raises(StochasticError, match="its noise is frozen, or left out") as caught:
        ds.verify(Net(), frozen(random_file), X)
    where = str(caught.value.where)
    assert where.startswith("Net: drop (MonteCarloDropout); ")
    assert "[1, 16] read by drop/" in where
    with pytest.raises(StochasticError, match="its noise is frozen") as caught:
        ds.verify(Net(), frozen(random_file, named=False), X)
    assert caught.value.where == "Net: drop (MonteCarloDropout)"


def test_a_train_mode_batchnorm_is_named(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.ReLU()).eval()
    path = tmp_path / "m.onnx"
    names = ("1.weight", "1.bias", "1.running_mean", "1.running_var")
    nodes = [
        helper.make_node("Gemm", ["x", "0.weight", "0.bias"], ["a"], name="0/Gemm", transB=1),
        helper.make_node(
            "BatchNormalization",
            ["a", *names],
            ["b", "mean", "var"],
            name="1/BatchNormalization",
            training_mode=1,
        ),
        helper.make_node("Relu", ["b"], ["output"], name="2/Relu"),
    ]
    state = model.state_dict()
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 6])],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, ["N", 4])],
        [numpy_helper.from_array(state[n].numpy(), n) for n in ("0.weight", "0.bias", *names)],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    (found,) = train_mode_norms(proto)
    assert found.name == "1/BatchNormalization"
    onnx.save(proto, str(path))
    problem = (
        "train-mode BatchNormalization: 1/BatchNormalization (BatchNormalization) normalises "
        "each batch by itself"
    )
    verdict = ds.verify(model, path, torch.randn(3, 6))
    assert problem in verdict.problems
    assert not verdict.ok
    proto.graph.node[1].attribute[0].i = 0
    del proto.graph.node[1].output[1:]
    onnx.save(proto, str(path))
    assert ds.verify(model, path, torch.randn(3, 6)).ok


# Compared


def test_a_random_file_is_its_random_network(random_file: Path) -> None:
    verdict = ds.verify(Net(), random_file, X, stochastic=True)
    assert verdict.ok, str(verdict)
    assert verdict.inputs == ("yours, 256 runs",)
    (output,) = verdict.outputs
    assert output.statistics is not None
    assert output.statistics.runs == 256
    assert output.statistics.tests == 2 * (8 + 4)
    assert output.statistics.seen < 0.6
    assert "over 256 runs: means differ by" in str(verdict)
    assert verdict.to_json()["outputs"][0]["statistics"]["limit"] > 5


def test_inputs_are_made_up_with_seeds(random_file: Path) -> None:
    verdict = ds.verify(Net(), random_file, stochastic=True, runs=64)
    assert verdict.ok, str(verdict)
    assert verdict.inputs == tuple(f"seed {s}, batch 3, 64 runs" for s in range(3))


def test_the_same_modules_are_never_told_apart() -> None:
    for units in ("element", "channel", "row", "batch"):
        verdict = ds.verify(Net(units=units), Net(units=units), X, stochastic=True)
        assert verdict.ok, str(verdict)


@pytest.mark.parametrize(
    ("candidate", "word"),
    [
        (Net(p=0.4), "variances differ by"),
        (Net(shift=0.5), "means differ by"),
        (Net(units="row"), "variances differ by"),  # one draw for a row: elements go together
        (Net(p=0.0), "frozen: the reference varies from run to run"),
    ],
)
def test_another_distribution_is_caught(candidate: nn.Module, word: str) -> None:
    verdict = ds.verify(Net(), candidate, X, stochastic=True, runs=512)
    assert not verdict.ok
    assert word in verdict.outputs[0].reason


def test_shared_draws_with_equal_marginals_show_in_the_sums() -> None:
    class Noise(nn.Module):
        def __init__(self, shared: bool) -> None:
            super().__init__()
            self.shared = shared

        def forward(self, x: Tensor) -> Tensor:
            like = x[:, :1] if self.shared else x
            return x + torch.randn_like(like)

    assert ds.verify(Noise(False), Noise(False), X, stochastic=True).ok
    verdict = ds.verify(Noise(False), Noise(True), X, stochastic=True)
    assert "variances differ by" in verdict.outputs[0].reason


def test_frozen_noise_is_caught_by_statistics_too(random_file: Path) -> None:
    verdict = ds.verify(Net(), frozen(random_file), X, stochastic=True, runs=64)
    assert not verdict.ok
    assert verdict.outputs[0].reason.startswith("frozen: the reference varies")
    other_way = ds.verify(Net(p=0.0), random_file, X, stochastic=True, runs=64)
    assert other_way.outputs[0].reason.startswith("the candidate varies from run to run")


def test_networks_that_do_not_draw_are_compared_up_to_rounding() -> None:
    assert ds.verify(Net(p=0.0), Net(p=0.0), X, stochastic=True, runs=32).ok
    verdict = ds.verify(Net(p=0.0), Net(p=0.0, shift=1e-4), X, stochastic=True, runs=32)
    assert not verdict.ok


def test_global_random_state_is_left_alone() -> None:
    before = torch.get_rng_state()
    ds.verify(Net(), Net(), X, stochastic=True, runs=32)
    assert torch.equal(before, torch.get_rng_state())


def test_arguments() -> None:
    with pytest.raises(ArgumentError, match="runs is 8"):
        ds.verify(Net(), Net(), X, stochastic=True, runs=8)
    with pytest.raises(ArgumentTypeError, match=r"runs is 3\.5"):
        ds.verify(Net(), Net(), X, stochastic=True, runs=3.5)  # type: ignore[arg-type]


# The arithmetic


def test_moments_are_those_of_the_whole_sample() -> None:
    values = torch.rand(50, 3, dtype=torch.float64) ** 3
    moments = Moments()
    for row in values:
        moments.add(row)
    centred = values - values.mean(0)
    torch.testing.assert_close(moments.mean, values.mean(0))
    torch.testing.assert_close(moments.variance, values.var(0))
    for power, found in ((3, moments.third), (4, moments.fourth)):
        torch.testing.assert_close(found, centred.pow(power).sum(0))
    torch.testing.assert_close(moments.variance_of_squares, centred.square().var(0))


def drawn(seed: int, runs: int, draw: Any, other: Any) -> list[Samples]:
    generator = torch.Generator().manual_seed(seed)
    samples = Samples.of(torch.zeros(200))
    for _ in range(runs):
        samples.add(draw(generator), other(generator), "here")
    return [samples]


def rare(generator: torch.Generator) -> Tensor:
    return (torch.rand(200, generator=generator) < 0.005).float()


def usual(generator: torch.Generator) -> Tensor:
    return torch.randn(200, generator=generator)


def test_chance_is_never_taken_for_a_difference() -> None:
    for seed in range(60):
        for draw in (rare, usual):
            samples = drawn(seed, 48, draw, draw)
            found, reason = weigh(samples, samples[0].tests)
            assert reason == "", (seed, draw.__name__, found)


def test_what_is_beyond_chance() -> None:
    def wider(generator: torch.Generator) -> Tensor:
        return 1.5 * usual(generator)

    def shifted(generator: torch.Generator) -> Tensor:
        return usual(generator) + 0.05

    samples = drawn(0, 256, usual, wider)
    assert "variances differ" in weigh(samples, samples[0].tests)[1]
    samples = drawn(0, 256, usual, shifted)  # seen by the sum alone
    assert "means differ" in weigh(samples, samples[0].tests)[1]


def test_limits_are_those_of_students_t() -> None:
    # Quantiles of Student's t at 1e-6 two-sided, from tables.
    assert limit(1, 10**6 + 1) == pytest.approx(4.8917, abs=1e-3)
    assert limit(1, 31) == pytest.approx(6.1194, abs=0.02)
    assert limit(1000, 256) > limit(1, 256)


def test_what_no_statistics_cover() -> None:
    one = torch.ones(3)
    for other, problem in (
        (torch.ones(2), "shape (2,) instead of (3,) (here)"),
        (torch.ones(3).half(), "dtype float16 instead of float32 (here)"),
        (torch.tensor([1.0, torch.nan, 1.0]), "the candidate returns values that are not finite"),
    ):
        samples = Samples.of(one)
        samples.add(one, other, "here")
        samples.add(one, one, "here")
        found, reason = weigh([samples], 1)
        assert found is None
        assert problem in reason
