"""Insertion before and after chosen layers: where, at which rank, and out again."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F

import dropsurgery as ds
from dropsurgery.errors import ArgumentError, ArgumentTypeError, PassError
from dropsurgery.graph.drops import is_drop, rate
from tests.drop_helpers import seeded
from tests.helpers import randomize

X = torch.randn(4, 3, 16, 16, generator=seeded(1))


class Net(nn.Module):
    """Convolutions, functions and linear layers; its activation is a module, in place."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(True))
        self.conv = nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 5))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + F.relu(self.conv(x))
        return self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))


def net() -> nn.Module:
    torch.manual_seed(0)
    return randomize(Net()).eval()


def inserted(module: nn.Module) -> dict[str, str]:
    """Return path and class of every drop layer."""
    return {path: type(m).__name__ for path, m in module.named_modules() if is_drop(m)}


def check_reverts(model: nn.Module, *passes: ds.passes.base.Pass, x: Tensor = X) -> None:
    """Assert that an insertion keeps eval outputs and keys, and that its removal leaves nothing."""
    module = ds.apply(model, *passes).module
    assert torch.equal(module(x), model(x))
    assert list(module.state_dict()) == list(model.state_dict())
    assert all(a is b for a, b in zip(module.parameters(), model.parameters(), strict=True))
    back = ds.apply(module, ds.RemoveDrops()).module
    plain = ds.trace(model)
    assert back.code == plain.code
    assert [p for p, _ in back.named_modules()] == [p for p, _ in plain.named_modules()]
    for left, right in zip(back.graph.nodes, plain.graph.nodes, strict=True):
        assert (left.name, left.op, left.target) == (right.name, right.op, right.target)
        assert left.meta.get("nn_module_stack") == right.meta.get("nn_module_stack")


# Where


def test_before_each_linear_but_the_first() -> None:
    result = ds.apply(net(), ds.InsertDropout(0.3, before="Linear", skip_first=1))
    assert inserted(result.module) == {"head.dropout": "Dropout"}
    assert rate(result.module.get_submodule("head.dropout")) == 0.3
    (change,), (skip,) = result.changes, result.skipped
    assert change.what == "inserted 'head.dropout' before 'head.2': Dropout(p=0.3, inplace=False)"
    assert (change.module, change.node) == ("head", "head_2")
    assert (skip.module, skip.reason) == ("head.0", "skip_first=1, skip_last=0")
    line = next(line for line in result.module.code.splitlines() if "dropout" in line)
    assert line.strip().startswith("head_dropout = self.head.dropout(head_1)")


def test_after_each_activation_modules_and_functions_alike() -> None:
    result = ds.apply(net(), ds.InsertDropout(0.3, after="activation"))
    assert [change.node for change in result.changes] == ["stem_2", "relu", "head_1"]
    assert inserted(result.module) == dict.fromkeys(
        ("stem.dropout", "dropout", "head.dropout"), "Dropout"
    )


@pytest.mark.parametrize(
    ("kinds", "nodes"),
    [
        ("ReLU", ["stem_2", "relu"]),
        ("Conv2d", ["stem_0", "conv"]),
        (("conv", "Linear"), ["stem_0", "conv", "head_0", "head_2"]),
        ("norm", ["stem_1"]),
        ("add", ["add"]),
        ("pool", ["adaptive_avg_pool2d"]),
    ],
)
def test_kinds(kinds: str | tuple[str, ...], nodes: list[str]) -> None:
    result = ds.apply(net(), ds.InsertDropout(0.3, after=kinds))
    assert [change.node for change in result.changes] == nodes


@pytest.mark.parametrize(
    ("where", "nodes"),
    [
        ("stem.*", ["stem_2"]),
        ("relu", ["relu"]),
        (("stem.*", "head.?"), ["stem_2", "head_1"]),
        (lambda spot: spot.index >= 1, ["relu", "head_1"]),
        (lambda spot: "GELU" in spot.kinds, ["head_1"]),
    ],
)
def test_where(where: object, nodes: list[str]) -> None:
    result = ds.apply(net(), ds.InsertDropout(0.3, after="activation", where=where))
    assert [change.node for change in result.changes] == nodes


def test_where_alone_drops_the_output_of_what_it_names() -> None:
    result = ds.apply(net(), ds.InsertDropout(0.3, where=("conv", "flatten")))
    assert [change.node for change in result.changes] == ["conv"]


def test_what_matches_nothing() -> None:
    with pytest.raises(PassError, match=r"InsertDropout finds no 'Linaer' in the network") as error:
        ds.apply(net(), ds.InsertDropout(0.3, before="Linaer"))
    assert "it has AdaptiveAvgPool2d, BatchNorm2d, Conv2d, GELU, Linear, ReLU, activation" in str(
        error.value
    )
    with pytest.raises(PassError, match=r"where='layer4.\*' matches none of the 3 places") as error:
        ds.apply(net(), ds.InsertDropout(0.3, after="activation", where="layer4.*"))
    assert "stem.2" in str(error.value)
    with pytest.raises(PassError, match=r"can use none of the 2 places"):
        ds.apply(net(), ds.InsertDropout(0.3, before="Linear", skip_last=2))


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({}, ArgumentError, "InsertDropout needs to know where"),
        ({"before": "Linear", "after": "ReLU"}, ArgumentError, "before or after a layer, got"),
        ({"before": 3}, ArgumentTypeError, "before names kinds of layers, got 3"),
        ({"after": ()}, ArgumentTypeError, "after names kinds of layers"),
        ({"after": "ReLU", "where": 3}, ArgumentTypeError, "where chooses places by a pattern"),
        ({"after": "ReLU", "skip_first": -1}, ArgumentError, "skip_first is a number of places"),
        ({"after": "ReLU", "p": 1.0}, ArgumentError, r"p must lie in \[0, 1\)"),
        ({"after": "ReLU", "p": -0.5}, ArgumentError, r"p must lie in \[0, 1\]"),
        ({"after": "ReLU", "kind": "poisson"}, ArgumentError, "unknown kind 'poisson'"),
        ({"after": "ReLU", "dims": 4}, ArgumentError, "unknown dims 4"),
    ],
)
def test_bad_arguments(arguments: dict[str, object], error: type, match: str) -> None:
    with pytest.raises(error, match=match):
        ds.InsertDropout(**arguments)


# Rank


def test_the_rank_that_the_tensor_has() -> None:
    module = ds.apply(net(), ds.InsertDropout(0.3, after="activation", dims="auto")).module
    assert inserted(module) == {
        "stem.dropout": "Dropout2d",
        "dropout": "Dropout2d",
        "head.dropout": "Dropout",
    }


def test_another_rank_is_left_alone_and_listed() -> None:
    result = ds.apply(net(), ds.InsertDropout(0.3, after="activation", dims=2))
    assert set(inserted(result.module).values()) == {"Dropout2d"}
    (skip,) = result.skipped
    assert (skip.node, skip.reason) == ("head_1", "it is of rank 2, where rank 4 is needed")


@pytest.mark.parametrize(
    ("conv", "shape", "layer"),
    [
        (nn.Conv1d(3, 4, 3), (2, 3, 9), "Dropout1d"),
        (nn.Conv2d(3, 4, 3), (2, 3, 9, 8), "Dropout2d"),
        (nn.Conv3d(3, 4, 3), (2, 3, 5, 9, 8), "Dropout3d"),
    ],
)
def test_the_rank_follows_from_the_convolution(
    conv: nn.Module, shape: tuple[int, ...], layer: str
) -> None:
    model = nn.Sequential(conv, nn.Identity(), nn.Tanh(), nn.ReLU())
    module = ds.apply(model, ds.InsertDropout(0.3, after="ReLU", dims="auto")).module
    assert inserted(module) == {"dropout": layer}
    assert module.train()(torch.randn(shape)).shape == model(torch.randn(shape)).shape


class Tokens(nn.Module):
    """Channels that are not on axis 1: convolution, then tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 4, 4)
        self.lift = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.conv(x).flatten(2).transpose(1, 2)
        return torch.relu(self.lift(tokens))


class ChannelsLast(nn.Module):
    """As in ConvNeXt: the channels go to the back and come to the front again."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.back, self.front = nn.ReLU(), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        x = self.back(self.conv(x).permute(0, 2, 3, 1))
        return self.front(x.permute(0, 3, 1, 2))


@pytest.mark.parametrize("model", [Tokens(), ChannelsLast()])
def test_channels_are_proved_to_be_on_axis_1(model: nn.Module) -> None:
    if isinstance(model, Tokens):
        with pytest.raises(PassError, match=r"its channels are not on axis 1"):
            ds.apply(model, ds.InsertDropout(0.3, after="ReLU", dims="auto"), example_inputs=X)
        # Elements have no axis.
        ds.apply(model, ds.InsertDropout(0.3, after="ReLU"))
        return
    result = ds.apply(model, ds.InsertDropout(0.3, after="ReLU", dims="auto"))
    assert [change.node for change in result.changes] == ["front"]
    assert [skip.reason for skip in result.skipped] == ["its channels are not on axis 1"]


def test_a_rank_that_is_not_proved_takes_example_inputs() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU())
    insertion = ds.InsertDropout(0.3, after="ReLU", dims="auto")
    with pytest.raises(PassError, match=r"its rank is not proved \(example_inputs would tell\)"):
        ds.apply(model, insertion)
    module = ds.apply(model, insertion, example_inputs=torch.randn(2, 6)).module
    assert inserted(module) == {"dropout": "Dropout"}


# Kinds of noise


@pytest.mark.parametrize(
    ("kind", "layer"),
    [("gaussian", "GaussianDropout"), ("uniform", "UniformDropout")],
)
@pytest.mark.parametrize("dims", [0, 2])
def test_noise(kind: str, layer: str, dims: int) -> None:
    insertion = ds.InsertDropout(0.3, kind=kind, after="ReLU", dims=dims)
    module = ds.apply(net(), insertion).module
    assert set(inserted(module).values()) == {layer}
    added = module.get_submodule("dropout")
    assert (added.units, rate(added)) == ("channel" if dims else "element", 0.3)
    check_reverts(net(), insertion)


def test_classic_dropout_scales_in_eval() -> None:
    model = net()
    module = ds.apply(model, ds.InsertDropout(0.25, kind="classic", before="Linear")).module
    expected = copy.deepcopy(model)
    with torch.no_grad():
        for layer in (expected.head[0], expected.head[2]):
            layer.weight.mul_(0.75)
    torch.testing.assert_close(module(X), expected(X))
    assert torch.equal(ds.apply(module, ds.RemoveDrops()).module(X), model(X))


# In, out, and what stays


@pytest.mark.parametrize(
    "insertion",
    [
        ds.InsertDropout(0.3, before="Linear"),
        ds.InsertDropout(0.3, before=("conv", "Linear")),
        ds.InsertDropout(0.3, after=("conv", "activation", "pool", "add")),
        ds.InsertDropout(0.3, after="activation", dims="auto"),
        ds.InsertDropBlock(0.1, 3),
        ds.InsertDropBlock(0.1, 3, before="conv", where="conv"),
        ds.InsertWeightedChannelDropout(0.3),
        ds.InsertDropConnect(0.3),
        ds.InsertCutout(5),
    ],
    ids=lambda p: p.name,
)
def test_eval_and_keys_stay_and_removal_restores(insertion: ds.passes.base.Pass) -> None:
    check_reverts(net(), insertion)


def test_all_at_once() -> None:
    passes = (
        ds.InsertDropout(0.3, before="Linear"),
        ds.InsertDropBlock(0.1, 3),
        ds.InsertWeightedChannelDropout(0.3),
        ds.InsertDropConnect(0.3),
        ds.InsertCutout(5),
        ds.InsertDropPath(ds.survival.constant(0.5)),
    )
    model = net()
    module = ds.apply(model, *passes).module
    assert torch.equal(module(X), model(X))
    back = ds.apply(module, ds.RemoveDrops(), ds.RemoveDropPath()).module
    assert back.code == ds.trace(model).code
    # Some of them go, the others stay.
    part = ds.apply(module, ds.RemoveDrops(where=("head.*", "cutout"))).module
    assert not any(path.startswith(("head.", "cutout")) for path in inserted(part))
    assert len(inserted(part)) == len(inserted(module)) - 5
    assert torch.equal(part(X), model(X))


def test_training_drops_and_trains() -> None:
    model = net()
    module = ds.apply(model, ds.InsertDropout(0.5, before="Linear")).module.train()
    torch.manual_seed(3)
    first = module(X)
    assert not torch.equal(first, module(X))
    torch.manual_seed(3)
    model.train()
    hidden = F.adaptive_avg_pool2d((y := model.stem(X)) + F.relu(model.conv(y)), 1).flatten(1)
    torch.manual_seed(3)
    drop = ds.layers.Dropout(0.5)
    expected = model.head[2](drop(model.head[1](model.head[0](drop(hidden)))))
    torch.testing.assert_close(first, expected)
    first.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_new_layers_take_the_mode_of_their_owner() -> None:
    model = net().train()
    model.head.eval()
    module = ds.apply(model, ds.InsertDropout(0.3, after="activation")).module
    assert module.get_submodule("dropout").training
    assert not module.get_submodule("head.dropout").training


def test_the_same_place_twice_is_left_alone() -> None:
    insertion = ds.InsertDropout(0.3, after="activation")
    module = ds.apply(net(), insertion).module
    with pytest.raises(PassError, match=r"an inserted layer of this kind is there already"):
        ds.apply(module, insertion)
    # Another kind of layer may join it.
    assert len(inserted(ds.apply(module, ds.InsertDropBlock(0.1)).module)) == 5


def test_removing_what_was_not_inserted() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.2))
    module = ds.apply(model, ds.RemoveDrops()).module
    assert inserted(module) == {"1": "Dropout"}
    with pytest.raises(PassError, match=r"where='1' matches none of the 0 inserted layers"):
        ds.apply(model, ds.RemoveDrops(where="1"))
    with pytest.raises(ArgumentTypeError, match=r"where is a pattern for paths, or several"):
        ds.RemoveDrops(where=3)  # type: ignore[arg-type]


class Shared(nn.Module):
    """One layer at two places."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 6)
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.fc(self.act(self.fc(x))))


def test_a_shared_layer_gets_a_drop_at_each_call() -> None:
    torch.manual_seed(0)
    model = Shared().eval()
    x = torch.randn(3, 6)
    module = ds.apply(model, ds.InsertDropout(0.3, after="ReLU")).module
    assert inserted(module) == {"dropout": "Dropout", "dropout_1": "Dropout"}
    check_reverts(model, ds.InsertDropout(0.3, after="ReLU"), x=x)
    check_reverts(model, ds.InsertDropConnect(0.3), x=x)


class Overwrites(nn.Module):
    """A value that an in-place activation overwrites, and that is read afterwards."""

    def __init__(self, inplace: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)
        self.act = nn.ReLU(inplace)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.act(y) * y


class Views(nn.Module):
    """A view through which a value is overwritten that is read afterwards."""

    def forward(self, x: Tensor) -> Tensor:
        y = x * 2
        z = nn.functional.relu_(y.flatten(1))
        return z + y.flatten(1)


@pytest.mark.parametrize("position", ["before", "after"])
def test_a_value_that_is_overwritten_and_read(position: str) -> None:
    insertion = ds.InsertDropout(0.3, **{position: "ReLU"})
    for model in (Overwrites(True), Views()):
        with pytest.raises(PassError, match=r"shares memory with '\w+', which others read"):
            ds.apply(model, insertion)
    check_reverts(Overwrites(False).eval(), insertion)


class TwoModes(nn.Module):
    """An auxiliary head that training alone has."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(6, 6)
        self.aux, self.head = nn.Linear(6, 2), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        x = torch.relu(self.body(x))
        if self.training:
            return self.head(x), self.aux(x)
        return self.head(x)


def test_both_graphs_get_the_layer_and_one_of_them_its_own() -> None:
    model = TwoModes().eval()
    x = torch.randn(3, 6)
    insertion = ds.InsertDropout(0.5, before="Linear", skip_first=1)
    result = ds.apply(model, insertion)
    module = result.module
    assert len(result.changes) == 2
    assert torch.equal(module(x), model(x))
    module.train()
    torch.manual_seed(0)
    left, right = module(x)
    torch.manual_seed(0)
    again = module(x)
    assert torch.equal(left, again[0])
    assert torch.equal(right, again[1])
    assert not torch.equal(right, module(x)[1])
    back = ds.apply(module, ds.RemoveDrops()).module
    assert back.code == ds.trace(model).code
    named = ds.InsertDropout(0.5, before="Linear", where="train:aux")
    assert len(ds.apply(model, named).changes) == 1


class Asks(nn.Module):
    """A training forward that cannot be traced."""

    def forward(self, x: Tensor) -> Tensor:
        if self.training and bool(x.sum() > 0):
            return x
        return torch.relu(x)


def test_a_training_forward_that_is_not_known() -> None:
    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.asks = nn.Linear(4, 4), Asks()

        def forward(self, x: Tensor) -> Tensor:
            if self.training and bool(x.sum() > 0):
                return x
            return self.asks(self.fc(x))

    for insertion in (ds.InsertDropout(0.3, after="Linear"), ds.InsertCutout(4)):
        with pytest.raises(PassError, match=r"needs the training forward, which could not be"):
            ds.apply(Holder(), insertion)


class Recurrent(nn.Module):
    """A classifier whose layers return tuples."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 8)
        self.lstm = nn.LSTM(8, 6, 2, batch_first=True)
        self.attend = nn.MultiheadAttention(6, 2, batch_first=True)
        self.fc = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        y, _ = self.lstm(self.embed(x))
        y, _ = self.attend(y, y, y)
        return self.fc(y.mean(1))


def test_layers_that_return_tuples() -> None:
    torch.manual_seed(0)
    model = Recurrent().eval()
    x = torch.randint(20, (3, 5))
    insertion = ds.InsertDropout(0.5, after=("LSTM", "MultiheadAttention", "Embedding"))
    assert len(ds.apply(model, insertion).changes) == 3
    check_reverts(model, insertion, x=x)


# Saved, pickled, slimmed, exported


INSERTIONS = (
    ds.InsertDropout(0.3, before="Linear", where=lambda spot: spot.path == "head.2"),
    ds.InsertDropout(0.2, after="activation", where="stem.*", dims="auto"),
    ds.InsertDropBlock(0.1, 3, where="relu"),
    ds.InsertWeightedChannelDropout(0.3, 0.1, where="stem.2"),
    ds.InsertDropConnect(0.3, of="Linear", per_sample=True, skip_last=1),
    ds.InsertDropConnect(0.3, of=("conv",)),
    ds.InsertCutout(5, 0.5, value=0.1),
)


def test_a_saved_surgery_comes_back(tmp_path: Path) -> None:
    module = ds.apply(net(), *INSERTIONS, example_inputs=X).module
    module.get_submodule("head.dropout").p = 0.125
    ds.save(module.train(), tmp_path)
    loaded = ds.load(tmp_path, Net())
    assert loaded.code == module.code
    assert loaded.get_submodule("head.dropout").p == 0.125
    torch.manual_seed(4)
    expected = module(X)
    torch.manual_seed(4)
    assert torch.equal(loaded(X), expected)
    assert ds.apply(loaded, ds.RemoveDrops()).module.code == ds.trace(net()).code


def test_ranks_that_examples_proved_are_saved(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU())
    insertion = ds.InsertDropout(0.3, after="ReLU", dims="auto")
    ds.save(ds.apply(model, insertion, example_inputs=torch.randn(2, 6)).module, tmp_path)
    assert inserted(ds.load(tmp_path, model)) == {"dropout": "Dropout"}
    with pytest.raises(ds.errors.ModelLoadError, match=r"was to insert at '_1', which the"):
        ds.load(tmp_path, nn.Sequential(nn.Linear(6, 6), nn.Sequential(nn.ReLU())))


def test_pickles_and_copies_can_be_undone() -> None:
    model = net()
    module = ds.apply(model, *INSERTIONS, example_inputs=X).module
    for twin in (pickle.loads(pickle.dumps(module)), copy.deepcopy(module)):
        assert torch.equal(twin(X), model(X))
        back = ds.apply(twin, ds.RemoveDrops()).module
        assert not inserted(back)
        assert torch.equal(back(X), model(X))


def test_slim_takes_every_drop_out() -> None:
    model = net()
    module = ds.apply(model, *INSERTIONS, example_inputs=X).module
    slim = ds.slim(module)
    assert not inserted(slim)
    torch.testing.assert_close(slim(X), model(X), rtol=1e-4, atol=1e-5)
    plain = ds.apply(module, ds.ConvertDropout("identity")).module
    assert not inserted(plain)
    assert torch.equal(plain(X), model(X))
    assert torch.equal(plain.train()(X), ds.trace(model).train()(X))
    # The calls that were opened for DropConnect can still be closed.
    assert ds.apply(plain, ds.RemoveDrops()).module.code == ds.trace(model).code


def test_export_leaves_no_trace(tmp_path: Path) -> None:
    import onnx

    model = net()
    module = ds.apply(model, *INSERTIONS, example_inputs=X).module
    ds.export_onnx(model, tmp_path / "plain.onnx", example_inputs=(X,))
    ds.export_onnx(module, tmp_path / "drops.onnx", example_inputs=(X,))
    graphs = [onnx.load(tmp_path / name).graph for name in ("plain.onnx", "drops.onnx")]
    types = [sorted(node.op_type for node in graph.node) for graph in graphs]
    assert types[0] == types[1]
    weights = [sorted(tuple(t.dims) for t in graph.initializer) for graph in graphs]
    assert weights[0] == weights[1]
    ds.verify(model, tmp_path / "drops.onnx", (X,))


def test_a_whole_network_compiles_without_a_break() -> None:
    module = ds.apply(net(), *INSERTIONS, example_inputs=X).module.train()
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    compiled(X).sum().backward()


def test_torchvisions_resnet() -> None:
    model = randomize(torchvision.models.resnet18(num_classes=5)).eval()
    x = torch.randn(2, 3, 64, 64, generator=seeded(2))
    check_reverts(
        model,
        ds.InsertDropBlock(0.1, 3, where="layer[34].*"),
        ds.InsertDropConnect(0.1, where="layer4.*"),
        x=x,
    )
