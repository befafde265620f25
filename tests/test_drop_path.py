"""DropPath draws as timm does; inserting and removing it changes nothing else."""

from __future__ import annotations

import copy
from collections import Counter

import pytest
import timm
import torch
import torchvision
from timm.layers import DropPath as TimmDropPath
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torchvision.ops import StochasticDepth

import dropsurgery as ds
from dropsurgery.errors import ArgumentError, ArgumentTypeError, PassError
from dropsurgery.graph.residual import Site
from tests.helpers import randomize

X = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(1))


# The layer


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_draw_is_timms(p: float, dtype: torch.dtype) -> None:
    x = torch.randn(16, 3, 2).to(dtype)
    torch.manual_seed(5)
    expected = TimmDropPath(p).train()(x)
    torch.manual_seed(5)
    assert torch.equal(ds.DropPath(p).train()(x), expected)


@pytest.mark.parametrize("mode", ["row", "batch"])
def test_the_draw_is_torchvisions(mode: str) -> None:
    x = torch.randn(16, 3, 2)
    torch.manual_seed(5)
    expected = StochasticDepth(0.3, mode).train()(x)
    torch.manual_seed(5)
    assert torch.equal(ds.DropPath(0.3, mode).train()(x), expected)


def test_statistics() -> None:
    torch.manual_seed(0)
    draws, keep = 20_000, 0.7
    for mode, rows in (("row", draws), ("batch", 1)):
        layer = ds.DropPath(1 - keep, mode).train()
        runs = 1 if mode == "row" else 4_000
        masks = torch.cat([layer(torch.ones(rows, 2, dtype=torch.float64)) for _ in range(runs)])
        assert torch.equal(masks[:, 0], masks[:, 1])
        kept = (masks[:, 0] > 0).double()
        error = (keep * (1 - keep) / len(kept)) ** 0.5
        assert abs(kept.mean() - keep) < 4 * error
        assert abs(masks.mean() - 1.0) < 4 * error / keep
        assert set(masks[:, 0].tolist()) == {0.0, 1 / keep}


def test_batch_mode_drops_all_samples_or_none() -> None:
    torch.manual_seed(0)
    layer = ds.DropPath(0.5, "batch").train()
    outcomes = {tuple(layer(torch.ones(4, 1)).flatten().tolist()) for _ in range(50)}
    assert outcomes == {(0.0,) * 4, (2.0,) * 4}


@pytest.mark.parametrize("shape", [(3,), (3, 2), (3, 2, 2), (3, 2, 2, 2, 2)])
def test_eval_and_rate_0_return_the_input_itself(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    assert ds.DropPath(0.5).eval()(x) is x
    assert ds.DropPath(0.0).train()(x) is x
    assert torch.equal(ds.DropPath(1.0).train()(x), torch.zeros(shape))


def test_gradients_are_those_of_the_mask() -> None:
    x = torch.ones(8, 2, requires_grad=True)
    y = ds.DropPath(0.5).train()(x)
    y.sum().backward()
    assert torch.equal(x.grad, y.detach())


def test_bad_arguments() -> None:
    with pytest.raises(ArgumentError, match=r"drop_prob must lie in \[0, 1\], got 1.5"):
        ds.DropPath(1.5)
    with pytest.raises(ArgumentTypeError, match="drop_prob must be a number"):
        ds.DropPath("0.5")  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="unknown mode 'sample'"):
        ds.DropPath(0.5, "sample")  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="floating-point tensor with a batch on axis 0"):
        ds.DropPath(0.5).train()(torch.tensor(1.0))
    with pytest.raises(ArgumentError, match=r"torch.int64 of shape \(3,\)"):
        ds.DropPath(0.5).train()(torch.ones(3, dtype=torch.int64))
    assert repr(ds.DropPath(0.25, "batch")) == "DropPath(drop_prob=0.25, mode='batch')"


# The passes


def insert(model: nn.Module, final: float = 0.5, **options: object) -> fx.GraphModule:
    return ds.apply(model, ds.InsertDropPath(ds.survival.linear(final), **options)).module


def describe(module: nn.Module) -> list[tuple[str, str]]:
    return [(path, repr(m)) for path, m in module.named_modules() if path]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + F.relu(self.conv(x))


def test_before_and_after() -> None:
    module = ds.retrofit(nn.Sequential(Block(), Block()), 0.5)
    lines = [line.split(";")[0].strip() for line in module.code.strip().splitlines()]
    assert lines == [
        "def forward(self, input):",
        "input_1 = input",
        '_0_conv = getattr(self, "0").conv(input_1)',
        "relu = torch.nn.functional.relu(_0_conv, inplace = False)",
        '_0_drop_path = getattr(self, "0").drop_path(relu)',
        "add = input_1 + _0_drop_path",
        '_1_conv = getattr(self, "1").conv(add)',
        "relu_1 = torch.nn.functional.relu(_1_conv, inplace = False)",
        '_1_drop_path = getattr(self, "1").drop_path(relu_1)',
        "add_1 = add + _1_drop_path",
        "return add_1",
    ]
    assert [m.drop_prob for m in module.modules() if isinstance(m, ds.DropPath)] == [0.25, 0.5]


NETWORKS = [
    "resnet18",
    "resnext50_32x4d",
    "regnet_y_400mf",
    "mobilenet_v2",
    "mobilenet_v3_small",
    "mnasnet0_5",
    "efficientnet_b0",
    "convnext_tiny",
    "densenet121",
    "shufflenet_v2_x0_5",
    "swin_t",
    "timm:resnet26",
    "timm:resnetv2_50",
    "timm:convnext_atto",
]


@pytest.mark.parametrize("name", NETWORKS)
def test_retrofit_train_and_remove(name: str) -> None:
    _, _, timm_name = name.partition(":")
    model = timm.create_model(timm_name) if timm_name else torchvision.models.get_model(name)
    model = randomize(model).eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    plain = ds.trace(model)
    net = ds.retrofit(model, 0.5)
    with torch.no_grad():
        assert torch.equal(net(X), model(X))
    assert list(net.state_dict()) == list(before)
    net.load_state_dict(before, strict=True)
    copy.deepcopy(model).load_state_dict(net.state_dict(), strict=True)
    removed = ds.apply(net, ds.RemoveDropPath()).module
    assert removed.code == plain.code
    assert describe(removed) == describe(plain)
    trained = copy.deepcopy(net).train()
    trained(X).square().mean().backward()
    grads = [p.grad for p in trained.parameters() if p.grad is not None]
    assert grads
    assert all(grad.isfinite().all() for grad in grads)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_the_version_of_the_state_dict_is_kept() -> None:
    # MNASNet rebuilds its stem when it loads a state dict of version 1.
    model = torchvision.models.mnasnet0_5()
    for net in (ds.trace(model), ds.trace(ds.trace(model)), copy.deepcopy(ds.trace(model))):
        assert net.state_dict()._metadata[""]["version"] == model._version == 2


@pytest.mark.parametrize("unit", ["block", "add"])
def test_units(unit: str) -> None:
    model = timm.create_model("vit_tiny_patch16_224", depth=3, img_size=32)
    net = ds.retrofit(model, 0.4, unit=unit)
    rates = [round(m.drop_prob, 6) for m in net.modules() if isinstance(m, ds.DropPath)]
    block, add = [0.2, 0.2, 0.4, 0.4, 0.6, 0.6], [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]
    assert rates == (block if unit == "block" else add)


def rates(net: nn.Module) -> list[float]:
    return [m.drop_prob for m in net.modules() if isinstance(m, ds.DropPath)]


def test_positions_count_blocks_without_a_residual() -> None:
    # MobileNetV2 has 17 blocks in a row, 10 of them residual.
    rule = ds.survival.constant(1.0)
    seen: list[tuple[int, int]] = []

    def record(l: int, L: int) -> float:
        seen.append((l, L))
        return rule(l, L)

    model = torchvision.models.mobilenet_v2()
    ds.apply(model, ds.InsertDropPath(record, unit="position"))
    assert {L for _, L in seen} == {17}
    linear = ds.apply(model, ds.InsertDropPath(ds.survival.linear(0.0), unit="position")).module
    expected = [3, 5, 6, 8, 9, 10, 12, 13, 15, 16]
    assert [round(p * 17) for p in rates(linear)] == expected


def test_the_adds_of_a_numbered_block_share_its_depth() -> None:
    class Part(Block):
        pass

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.local, self.mix = Part(), Part()

        def forward(self, x: Tensor) -> Tensor:
            return self.mix(self.local(x))

    net = nn.Sequential(Layer(), Layer())
    assert rates(ds.retrofit(net, 0.5)) == [0.25, 0.25, 0.5, 0.5]
    assert rates(ds.retrofit(net, 0.5, unit="add")) == [0.125, 0.25, 0.375, 0.5]


def test_count_over_the_chosen() -> None:
    rule = ds.survival.linear(0.5)
    chosen = ds.InsertDropPath(rule, where="layer4.*", count="chosen")
    assert rates(ds.apply(torchvision.models.resnet18(), chosen).module) == [0.25, 0.5]
    with pytest.raises(ArgumentError, match="unknown count 'some'"):
        ds.InsertDropPath(rule, count="some")  # type: ignore[arg-type]
    with pytest.raises(ArgumentTypeError, match="where chooses sites by a pattern"):
        ds.InsertDropPath(rule, where=5)  # type: ignore[arg-type]


@pytest.mark.parametrize("final", [0.8, 0.5, 0.9])
def test_training_output_is_bit_identical_to_timms_own_resnet50(final: float) -> None:
    torch.manual_seed(0)
    native = randomize(timm.create_model("resnet50", drop_path_rate=1 - final)).train()
    plain = timm.create_model("resnet50")
    plain.load_state_dict(native.state_dict())
    ours = copy.deepcopy(ds.retrofit(plain.train(), final, rule="linspace"))
    torch.manual_seed(7)
    expected = native(X)
    torch.manual_seed(7)
    assert torch.equal(ours(X), expected)


def test_native_rates_are_set_and_nothing_is_stacked() -> None:
    model = torchvision.models.efficientnet_b0()
    net = ds.retrofit(model, 0.5)
    assert not [m for m in net.modules() if isinstance(m, ds.DropPath)]
    targets = {site.native for site in ds.find_residuals(net).sites}
    layers = [net.get_submodule(n.target) for n in net.graph.nodes if n.name in targets]
    assert [round(layer.p, 4) for layer in layers] == [round(l / 18, 4) for l in range(1, 10)]
    assert model.features[2][1].stochastic_depth.p == pytest.approx(0.025)
    back = ds.apply(net, ds.RemoveDropPath()).module
    assert back.features[2][1].stochastic_depth.p == pytest.approx(0.025)


def test_a_shared_native_layer_is_split_where_the_adds_need_different_rates() -> None:
    model = torchvision.models.swin_t()
    plain = ds.trace(model)
    net = ds.retrofit(model, 0.5, unit="add")
    own = [m.drop_prob for m in net.modules() if isinstance(m, ds.DropPath)]
    assert [round(p, 4) for p in own] == [round(l / 48, 4) for l in range(1, 25)]
    targets = [n.target for n in net.graph.nodes if "stochastic_depth" in str(n.target)]
    assert not targets
    back = ds.apply(net, ds.RemoveDropPath()).module
    assert back.code == plain.code
    assert describe(back) == describe(plain)


def test_a_native_timm_layer_has_no_batch_mode_and_is_replaced() -> None:
    model = timm.create_model("resnet18", drop_path_rate=0.2)
    net = ds.retrofit(model, 0.5, mode="batch")
    counts = Counter(type(m).__name__ for n, m in net.named_modules() if "drop_path" in n)
    called = {str(n.target) for n in net.graph.nodes if "drop_path" in str(n.target)}
    assert {type(net.get_submodule(path)) for path in called} == {ds.DropPath}
    assert counts["DropPath"] > len(called)
    assert ds.apply(net, ds.RemoveDropPath()).module.code == ds.trace(model).code


def test_inserting_twice_sets_the_rates_anew() -> None:
    model = torchvision.models.resnet18()
    twice = ds.retrofit(ds.retrofit(model, 0.9), 0.5)
    assert twice.code == ds.retrofit(model, 0.5).code
    assert twice.layer4[1].drop_path.drop_prob == 0.5
    assert ds.apply(twice, ds.RemoveDropPath()).module.code == ds.trace(model).code


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        ("layer4.*", ["layer4.0", "layer4.1"]),
        ("layer1.0", ["layer1.0"]),
        (("layer1.?", "layer2.1"), ["layer1.0", "layer1.1", "layer2.1"]),
        (["add_2"], ["layer2.0"]),
        (lambda site: site.kind == "projection", ["layer2.0", "layer3.0", "layer4.0"]),
    ],
)
def test_where(where: object, expected: list[str]) -> None:
    rule = ds.survival.linear(0.2)
    result = ds.apply(
        torchvision.models.resnet18(),
        ds.InsertDropPath(rule, where=where),  # type: ignore[arg-type]
    )
    assert [change.module for change in result.changes] == expected
    assert len(result.skipped) == 8 - len(expected)
    # l and L count every block, chosen or not.
    depth = {f"layer{s}.{b}": 2 * s + b - 1 for s in range(1, 5) for b in range(2)}
    for path in expected:
        layer = result.module.get_submodule(path).drop_path
        assert layer.drop_prob == pytest.approx(1 - rule(depth[path], 8))


def test_where_that_matches_nothing_names_what_there_is() -> None:
    with pytest.raises(PassError, match="matches none of the 8 residual sites") as caught:
        insert(torchvision.models.resnet18(), where="layer9.*")
    assert "layer1.0" in str(caught.value)


def test_a_network_without_residuals_is_told(caplog: pytest.LogCaptureFixture) -> None:
    model = torchvision.models.vgg11()
    net = ds.retrofit(model, 0.5)
    assert "retrofit changed nothing: VGG has no residual adds" in caplog.text
    assert net.code == ds.trace(model).code
    result = ds.apply(model, ds.InsertDropPath(ds.survival.linear(0.5)))
    assert "no residual adds" in result.skipped[-1].reason


def test_in_place_adds_and_activations_do_not_see_each_other() -> None:
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 3, padding=1)
            self.relu = nn.ReLU(inplace=True)

        def forward(self, x: Tensor) -> Tensor:
            x = self.relu(x)
            out = self.relu(self.conv(x))
            out += x
            return self.relu(out)

    model = InPlace()
    net = ds.retrofit(model, 0.5)
    assert torch.equal(net.eval()(X.clone()), model(X.clone()))
    torch.manual_seed(0)
    x = X.clone().requires_grad_()
    y = net.train()(x * 1)
    y.sum().backward()
    torch.manual_seed(0)
    mask = torch.empty(4, 1, 1, 1).bernoulli_(0.5).div_(0.5)
    skip = F.relu(X)
    assert torch.equal(y, F.relu(skip + F.relu(model.conv(skip)) * mask))


def test_a_branch_that_the_add_overwrites_and_others_read_afterwards() -> None:
    class Overwrites(nn.Module):
        def __init__(self, view: bool) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 3)
            self.view = view

        def forward(self, x: Tensor) -> Tensor:
            y = F.relu(self.linear(x))
            z = y.view(-1, 3) if self.view else y
            z.add_(x)
            return y

    x = torch.randn(5, 3)
    model = Overwrites(view=False)
    net = ds.retrofit(model, 0.0)
    assert torch.equal(net.eval()(x), model(x))
    assert torch.equal(net.train()(x), x)
    assert ds.apply(net, ds.RemoveDropPath()).module.code == ds.trace(model).code
    rule = ds.survival.linear(0.5)
    result = ds.apply(Overwrites(view=True), ds.InsertDropPath(rule))
    assert not result.changes
    assert "overwrites its branch in place, which 'relu' shares" in result.skipped[-1].reason


def test_only_the_add_reads_the_dropped_branch() -> None:
    class Reads(Block):
        def forward(self, x: Tensor) -> Tensor:
            branch = F.relu(self.conv(x))
            return (x + branch) * branch.mean()

    net = ds.retrofit(Reads(), 0.0).train()
    expected = X * F.relu(net.conv(X)).mean()
    assert torch.equal(net(X), expected)


def test_both_graphs_of_a_network_get_the_same_layer() -> None:
    class TwoGraphs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block, self.head = Block(), nn.Conv2d(3, 3, 1)

        def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
            x = self.block(x)
            return (x, self.head(x)) if self.training else x

    model = TwoGraphs()
    net = ds.retrofit(model, 0.0)
    assert torch.equal(net.eval()(X), model.eval()(X))
    assert torch.equal(net.train()(X)[0], X)
    assert ds.apply(net, ds.RemoveDropPath()).module.code == ds.trace(model).code


def test_a_network_whose_training_is_unknown_is_refused() -> None:
    class Loss(Block):
        def forward(self, x: Tensor) -> Tensor:
            y = super().forward(x)
            return y * 2 if self.training and y.sum() > 0 else y

    with pytest.raises(PassError, match="needs the training forward"):
        ds.retrofit(Loss())


def test_new_layers_take_the_mode_of_their_block() -> None:
    model = torchvision.models.resnet18().train()
    model.layer1.eval()
    net = ds.retrofit(model)
    assert not net.layer1[0].drop_path.training
    assert net.layer2[0].drop_path.training


def test_remove_leaves_native_layers_alone_and_says_so() -> None:
    result = ds.apply(torchvision.models.efficientnet_b0(), ds.RemoveDropPath())
    assert not result.changes
    assert len(result.skipped) == 9
    assert "ConvertDropout('identity') removes it" in result.skipped[0].reason


def test_inserted_nodes_stand_in_their_block() -> None:
    net = ds.retrofit(torchvision.models.resnet18())
    node = next(n for n in net.graph.nodes if "drop_path" in str(n.target))
    assert list(node.meta["nn_module_stack"]) == ["layer1", "layer1.0", "layer1.0.drop_path"]


def test_bad_pass_arguments() -> None:
    rule = ds.survival.linear(0.5)
    with pytest.raises(ArgumentError, match="unknown mode 'pixel'"):
        ds.InsertDropPath(rule, mode="pixel")  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="unknown unit 'stage'"):
        ds.InsertDropPath(rule, unit="stage")  # type: ignore[arg-type]
    with pytest.raises(ArgumentTypeError, match="survival is a rule"):
        ds.InsertDropPath(0.5)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="unknown survival rule 'cubic'"):
        ds.retrofit(Block(), rule="cubic")
    with pytest.raises(ArgumentError, match="block 1 of 1 must lie in"):
        ds.apply(Block(), ds.InsertDropPath(lambda l, L: 2.0))
    with pytest.raises(ArgumentTypeError, match="apply takes passes"):
        ds.apply(Block(), ds.InsertDropPath)  # type: ignore[arg-type]


def test_a_pass_prints_as_it_is_written() -> None:
    text = repr(ds.InsertDropPath(ds.survival.linear(0.5), where="layer4.*"))
    assert text.startswith("InsertDropPath(survival=Linear(final=0.5), mode='row', unit='block'")
    assert "where='layer4.*'" in text
    result = ds.apply(Block(), ds.InsertDropPath(ds.survival.linear(0.5)))
    assert "inserted 'drop_path': block 1, survival 0.5, mode 'row'" in str(result)


def test_a_site_says_which_call_it_is_in() -> None:
    site = ds.find_residuals(nn.Sequential(Block())).sites[0]
    assert isinstance(site, Site)
    assert (site.module, site.call, site.native) == ("0", "0", None)
