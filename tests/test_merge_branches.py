"""MergeLinearBranches: what becomes one layer, and the near misses where nothing may change."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

import dropsurgery as ds
from dropsurgery.errors import ModelLoadError, PassError
from dropsurgery.passes.base import apply
from dropsurgery.passes.merge_branches import MergeLinearBranches
from tests.fold_helpers import IMAGE, Chain, Lambda, fold, ready, values

MERGE = MergeLinearBranches()


def conv(ins: int = 4, outs: int = 4, size: Any = 3, **more: Any) -> nn.Conv2d:
    more = {"padding": "same" if more.get("stride", 1) == 1 else 0, "bias": False, **more}
    if more["padding"] == "same" and size == 3:
        more["padding"] = more.get("dilation", 1)
    return nn.Conv2d(ins, outs, size, **more)


def bn(count: int = 4) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(count)


def merged(model: nn.Module, *inputs: Tensor, item: Any = MERGE, shapes: bool = False) -> fx.Graph:
    """Merge; everything between input and output is one layer then. Return the graph."""
    result = fold(ready(model), *(inputs or (IMAGE,)), item=item, shapes=shapes)
    kinds = [node.op for node in result.module.graph.nodes]
    assert kinds == ["placeholder", "call_module", "output"], result.module.code
    assert result.skipped == ()
    return result.module.graph


def layer(graph: fx.Graph) -> Any:
    (node,) = (node for node in graph.nodes if node.op == "call_module")
    assert graph.owning_module is not None
    return graph.owning_module.get_submodule(str(node.target))


def kept(model: nn.Module, *inputs: Tensor, item: Any = MERGE) -> str:
    """Nothing is merged; return the reasons."""
    result = fold(ready(model), *(inputs or (IMAGE,)), item=item, tolerance=0.0)
    assert result.changes == ()
    return "\n".join(skip.reason for skip in result.skipped)


def test_repvgg_block_before_and_after() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        return torch.relu(self.a(x) + self.b(x) + self.identity(x))

    model = Lambda(
        forward, a=Chain(conv=conv(), bn=bn()), b=Chain(conv=conv(size=1), bn=bn()), identity=bn()
    )
    result = fold(ready(model), IMAGE, item=MERGE)
    assert result.module.code.strip().splitlines()[1:] == [
        "    merged = self.merged(x);  x = None",
        "    relu = torch.relu(merged);  merged = None",
        "    return relu",
    ]
    assert set(result.module.state_dict()) == {"merged.weight", "merged.bias"}
    (change,) = result.changes
    assert change.what == (
        "3 BatchNorms, 2 convolutions of 'x' merged into Conv2d 'merged' (4x4x3x3); "
        "weights 160 → 144"
    )
    assert (change.module, change.node, change.by) == ("", "add_1", "MergeLinearBranches")


def test_identity_is_a_delta_kernel() -> None:
    model = Lambda(lambda self, x: x + self.conv(x), conv=conv(groups=2))
    found = layer(merged(model))
    expected = model.conv.weight.clone()
    for channel in range(4):
        expected[channel, channel % 2, 1, 1] += 1
    assert torch.equal(found.weight, expected)
    assert found.bias is None
    assert found.groups == 2


def test_repmixer() -> None:
    """x + g·(mixer(x) - norm(x)) is one depthwise convolution."""

    def forward(self: Any, x: Tensor) -> Tensor:
        mixed = self.wide(x) + self.point(x) + self.skip(x)
        return x + self.gamma * (mixed - self.norm(x))

    def depthwise(size: int) -> nn.Module:
        return Chain(conv=conv(size=size, groups=4), bn=bn())

    model = Lambda(
        forward, wide=depthwise(3), point=depthwise(1), skip=bn(), norm=bn(),
        gamma=nn.Parameter(values(4, 1, 1)),
    )  # fmt: skip
    found = layer(merged(model))
    assert (found.groups, found.weight.shape) == (4, (4, 1, 3, 3))


def test_mobileone_block_with_python_zeros() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        out = 0 + self.scale(x)
        for branch in self.branches:
            out = out + branch(x)
        return out

    branches = nn.ModuleList(Chain(conv=conv(4, 8, stride=2, padding=1), bn=bn(8)) for _ in "abc")
    scale = Chain(conv=conv(4, 8, 1, stride=2), bn=bn(8))
    found = layer(merged(Lambda(forward, branches=branches, scale=scale)))
    assert (found.stride, found.padding, found.weight.shape) == ((2, 2), (1, 1), (8, 4, 3, 3))


def test_acnet() -> None:
    model = Lambda(
        lambda self, x: self.n(self.square(x) + self.flat(x) + self.tall(x)),
        square=conv(),
        flat=conv(size=(1, 3), padding=(0, 1)),
        tall=conv(size=(3, 1), padding=(1, 0)),
        n=bn(),
    )
    assert layer(merged(model)).weight.shape == (4, 4, 3, 3)


def test_diverse_branch_block() -> None:
    """A wide, a pointwise, and a wide and an average behind a pointwise one, which pads."""

    def forward(self: Any, x: Tensor) -> Tensor:
        return self.a(x) + self.b(x) + self.c(x) + self.d(x)

    model = Lambda(
        forward,
        a=Chain(conv=conv(), bn=bn()),
        b=Chain(conv=conv(size=1), bn=bn()),
        c=Chain(one=conv(size=1, padding=1), n=bn(), two=conv(padding=0), m=bn()),
        d=Chain(one=conv(size=1, padding=1), n=bn(), two=nn.AvgPool2d(3, 1), m=bn()),
    )
    found = layer(merged(model))
    assert (found.padding, found.weight.shape) == ((1, 1), (4, 4, 3, 3))


@pytest.mark.parametrize(
    ("pool", "wide"),
    [
        (nn.AvgPool2d(3, 1, 1), conv()),
        (nn.AvgPool2d(3, 1, 1, ceil_mode=True), conv()),
        (nn.AvgPool2d(3, 1, 1, count_include_pad=False, divisor_override=5), conv()),
        (nn.AvgPool2d(2, count_include_pad=False), conv(size=2, stride=2)),
        (nn.AvgPool2d(3, 2, 1, divisor_override=7), conv(stride=2, padding=1)),
        (nn.AvgPool2d((1, 3), 1, (0, 1)), conv()),
    ],
)
def test_average_pooling_is_a_convolution(pool: nn.Module, wide: nn.Module) -> None:
    merged(Lambda(lambda self, x: self.pool(x) - 2 * self.conv(x), pool=pool, conv=wide))


def test_functions_of_parameters() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        pooled = F.avg_pool2d(x, 3, stride=1, padding=1)
        left = F.conv2d(x, self.w, self.b, padding=1)
        return left.add(torch.sub(pooled, F.conv2d(x, self.v))) / 3

    weight = nn.Parameter(torch.randn(4, 4, 3, 3))
    point, bias = nn.Parameter(torch.randn(4, 4, 1, 1)), nn.Parameter(torch.randn(4))
    result = fold(ready(Lambda(forward, w=weight, v=point, b=bias)), IMAGE, item=MERGE)
    assert set(result.module.state_dict()) == {"merged.weight", "merged.bias"}


def test_one_and_three_axes() -> None:
    one = Lambda(
        lambda self, x: self.n(x) + self.a(x) + self.b(x),
        a=nn.Conv1d(4, 4, 3, padding=1), b=nn.Conv1d(4, 4, 1), n=nn.BatchNorm1d(4),
    )  # fmt: skip
    assert isinstance(layer(merged(one, torch.randn(2, 4, 9).double())), nn.Conv1d)
    three = Lambda(
        lambda self, x: self.n(x) + self.a(x) + self.b(x),
        a=nn.Conv3d(4, 4, 3, padding=1), b=nn.Conv3d(4, 4, 1), n=nn.BatchNorm3d(4),
    )  # fmt: skip
    assert isinstance(layer(merged(three, torch.randn(1, 4, 4, 5, 3).double())), nn.Conv3d)


def test_groups_are_expanded_to_the_common_ones() -> None:
    model = Lambda(
        lambda self, x: self.a(x) + self.b(x) + x,
        a=conv(8, 8, groups=4),
        b=conv(8, 8, groups=2),
    )
    assert layer(merged(model, values(1, 8, 6, 6))).groups == 2


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
def test_padding_modes(mode: str) -> None:
    """A pointwise layer with a bias goes before padding that copies entries."""
    model = Lambda(
        lambda self, x: self.a(x) + self.b(x) + self.d(self.n(self.c(x))),
        a=conv(padding_mode=mode), b=conv(size=1), c=conv(size=1), n=bn(),
        d=conv(padding_mode=mode),
    )  # fmt: skip
    assert layer(merged(model)).padding_mode == mode


def test_dilated_branch_of_a_larger_kernel() -> None:
    model = Lambda(
        lambda self, x: self.a(x) + self.b(x) + self.c(x),
        a=conv(size=5, padding=2), b=conv(dilation=2), c=conv(),
    )  # fmt: skip
    assert layer(merged(model)).weight.shape == (4, 4, 5, 5)
    dilated = Lambda(lambda self, x: self.a(x) + self.b(x) + x, a=conv(dilation=2), b=conv(size=1))
    found = layer(merged(dilated))
    assert (found.dilation, found.weight.shape) == ((2, 2), (4, 4, 3, 3))


def test_even_kernels_that_pad_by_the_same_rule() -> None:
    """Padding that is not the same at both ends needs zero taps, which must pay."""

    def even(size: int, *pads: int) -> nn.Module:
        return Chain(pad=nn.ZeroPad2d(pads), conv=conv(size=size, padding=0))

    model = two(conv(size=5, padding=2), even(4, 1, 2, 2, 1))
    assert layer(merged(model)).weight.shape == (4, 4, 5, 5)
    alone = two(even(2, 0, 1, 0, 1), nn.Identity())
    assert "would grow 64 weights to 144" in kept(alone)
    merged(alone, item=MergeLinearBranches(allow_growth=True))


@pytest.mark.parametrize(
    "model",
    [
        Chain(a=conv(4, 16, 1), b=conv(16, 4, 3)),
        Chain(a=conv(4, 8, 3), b=nn.BatchNorm2d(8), c=conv(8, 4, 1)),
        Chain(a=conv(4, 4, 3, groups=4), b=conv(4, 4, 3, groups=4, padding=0)),
        Chain(a=nn.ZeroPad2d(1), b=conv(4, 8, 3, padding=0), c=bn(8)),
        Chain(a=conv(4, 4, 3, stride=2), b=bn(), c=conv(4, 4, 1, stride=2)),
        Chain(a=conv(8, 2, 1, groups=2), b=conv(2, 4, 1, groups=2)),
    ],
    ids=["1x1-3x3", "3x3-1x1", "depthwise", "pad", "strides", "groups"],
)
def test_chains(model: Chain) -> None:
    channels = next(p.shape[1] * 1 for p in model.parameters() if p.ndim == 4)
    first = next(m for m in model if isinstance(m, nn.Conv2d))
    result = fold(
        ready(model), values(2, channels * first.groups, 9, 8),
        item=MergeLinearBranches(allow_growth=True),
    )  # fmt: skip
    assert [node.op for node in result.module.graph.nodes][1:-1] == ["call_module"]


def test_linear_chains_that_shrink() -> None:
    model = Chain(a=nn.Linear(6, 32), b=nn.Identity(), c=nn.Linear(32, 4))
    found = layer(merged(model, values(2, 5, 6)))
    assert (type(found), tuple(found.weight.shape)) == (nn.Linear, (4, 6))
    wide = kept(Chain(a=nn.Linear(16, 2), c=nn.Linear(2, 16)), values(2, 16))
    assert wide == "one layer of shape 16x16 would grow 64 weights to 256"


def test_chains_that_would_grow_are_told() -> None:
    """Only these: a chain that a border cuts is no candidate."""
    several = Chain(a=nn.Linear(9, 2), b=nn.Linear(2, 9), act=nn.ReLU(), c=nn.Linear(9, 3),
                    d=nn.Linear(3, 9))  # fmt: skip
    result = fold(ready(several), values(2, 9), item=MERGE, tolerance=0.0)
    assert {skip.node: skip.reason for skip in result.skipped} == {
        "b": "one layer of shape 9x9 would grow 36 weights to 81",
        "d": "one layer of shape 9x9 would grow 54 weights to 81",
    }
    depthwise = Chain(a=conv(4, 4, 3, groups=4), b=conv(4, 8, 1), c=nn.ReLU(), d=conv(8, 8, 1))
    assert kept(depthwise) == "one layer of shape 8x4x3x3 would grow 68 weights to 288"
    pooled = Chain(pool=nn.AvgPool2d(2), b=conv(4, 8, 1))
    assert kept(pooled) == "one layer of shape 8x4x2x2 would grow 32 weights to 128"
    assert kept(Chain(a=conv(4, 8, 3), b=conv(8, 8, 3))) == ""  # the border cuts a's bias off


def test_low_rank_adapter() -> None:
    model = Lambda(
        lambda self, x: self.w(x) + 0.5 * self.b(self.a(x)) + x,
        w=nn.Linear(8, 8), a=nn.Linear(8, 2, bias=False), b=nn.Linear(2, 8, bias=False),
    )  # fmt: skip
    merged(model, values(2, 3, 8))


def test_batchnorm_of_a_linear_layers_input_needs_two_axes() -> None:
    def make() -> nn.Module:
        return Lambda(lambda self, x: self.n(x) + self.a(x), a=nn.Linear(5, 5), n=bn1())

    def bn1() -> nn.Module:
        return nn.BatchNorm1d(5)

    merged(make(), values(3, 5), shapes=True)
    result = fold(ready(make()), values(3, 5, 5), item=MERGE, shapes=True, tolerance=0.0)
    assert "normalises axis 1, which may not be the last" in result.skipped[0].reason


def two(left: nn.Module, right: nn.Module) -> Lambda:
    return Lambda(lambda self, x: self.a(x) + self.b(x), a=left, b=right)


CEIL = "an average pooling with ceil_mode has windows of other sizes"


@pytest.mark.parametrize(
    ("left", "right", "reason"),
    [
        (conv(), conv(padding_mode="reflect"), "pad in different ways: reflect and zeros"),
        (conv(), nn.AvgPool2d(3, 1, 1, count_include_pad=False), "count_include_pad=False weighs"),
        (conv(size=2, stride=2), nn.AvgPool2d(2, ceil_mode=True), CEIL),
        (conv(size=(1, 3), padding=(0, 1)), conv(size=(3, 1), padding=(1, 0)), "would grow 96"),
        (conv(), Chain(a=conv(4, 2, 1), b=bn(2), c=conv(2, 4)), "zeros a value that has a bias"),
        (conv(), Chain(b=bn(), c=conv()), "zeros a value that has a bias"),
        (conv(), Chain(a=conv(4, 2), c=conv(2, 4)), "output of a layer that is not 1x1"),
        (conv(groups=4), conv(size=1), "would grow 52 weights to 144"),
        (conv(), Chain(a=conv(), b=bn().train()), "it is in training mode"),
    ],
    ids=["padding", "borders", "ceil", "cost", "bias", "norm", "kernel", "groups", "training"],
)
def test_near_misses(left: nn.Module, right: nn.Module, reason: str) -> None:
    model = two(left, right)
    training = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d) and m.training]
    ready(model)
    modes = [m for m in training if reason.endswith("training mode")]
    x = values(2, 4, 8, 8)
    for module in modes:
        module.train()
    result = apply(model, MERGE)
    assert result.changes == ()
    assert reason in "\n".join(skip.reason for skip in result.skipped)
    assert torch.equal(result.module.eval()(x), model.eval()(x))


def test_strides_differ() -> None:
    """Two entries in, one out: by a stride of 2, or by a kernel of 2."""
    model = two(conv(size=1, stride=2), conv(size=2, padding=0))
    assert "different strides" in kept(model, values(1, 4, 2, 2))


def test_outputs_of_one_size_for_this_input_only() -> None:
    model = two(conv(stride=2, padding=1), nn.AvgPool2d(2))
    assert "are of one size for some inputs only" in kept(model, values(1, 4, 8, 8))


def test_broadcasting_over_the_channels() -> None:
    model = Lambda(lambda self, x: x + self.a(x), a=conv(4, 1))
    assert "4 and 1 channels, of which one is broadcast" in kept(model)


def test_broadcasting_over_positions() -> None:
    """A row of one entry is added to all rows: the sum is no convolution."""
    model = two(conv(size=(9, 8), padding=0), conv(size=1))
    assert "are of one size for some inputs only" in kept(model)


def test_gain_on_the_wrong_axis_of_the_same_length() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        return x + self.gamma * self.a(x)

    for shape in [(4,), (4, 1), (4, 1, 1, 1)]:
        model = Lambda(forward, a=conv(), gamma=nn.Parameter(values(*shape)))
        assert "is not one number for each channel" in kept(model, values(4, 4, 4, 4))
    merged(Lambda(forward, a=conv(), gamma=nn.Parameter(values(1, 4, 1, 1))), values(4, 4, 4, 4))
    fifth = Lambda(forward, a=conv(), gamma=nn.Parameter(values(1, 1, 4, 1, 1)))
    assert "more axes" in kept(fifth, values(4, 4, 4, 4))


@pytest.mark.parametrize("act", [nn.ReLU(), nn.MaxPool2d(3, 1, 1), nn.GroupNorm(2, 4)])
def test_nonlinearity_between(act: nn.Module) -> None:
    assert kept(two(conv(), Chain(a=conv(size=1), b=act))) == ""
    assert kept(Chain(a=conv(size=1), b=act, c=conv(size=1))) == ""


def test_extra_reader() -> None:
    def forward(self: Any, x: Tensor) -> Any:
        left = self.a(x)
        return left + self.b(x), left

    assert "'a', between its branches, is read by output, too" in kept(
        Lambda(forward, a=conv(), b=conv())
    )


def test_inner_sum_where_the_outer_one_cannot_be() -> None:
    model = Lambda(
        lambda self, x: self.c(x) + (self.a(x) + self.b(x)),
        a=conv(), b=conv(), c=conv(padding_mode="reflect"),
    )  # fmt: skip
    result = fold(ready(model), IMAGE, item=MERGE)
    assert [node.name for node in result.module.graph.nodes] == [
        "x",
        "c",
        "merged",
        "add_1",
        "output",
    ]
    assert "pad in different ways" in result.skipped[0].reason


def test_writes_in_place() -> None:
    def into_source(self: Any, x: Tensor) -> Tensor:
        y = x.relu()
        left = self.a(y)
        y.mul_(2)
        return left + self.b(y)

    assert "'mul_' writes into its input in between" in kept(
        Lambda(into_source, a=conv(), b=conv(size=1))
    )

    def into_branch(self: Any, x: Tensor) -> Tensor:
        left = self.a(x)
        left.add_(1)
        return left + self.b(x)

    kept(Lambda(into_branch, a=conv(), b=conv(size=1)))


def test_constant_that_is_written_to() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        self.gamma.mul_(2)
        return self.a(x) * self.gamma.view(4, 1, 1) + self.b(x)

    model = Lambda(forward, a=conv(), b=conv(size=1), gamma=values(4))
    (skip,) = apply(ready(model), MERGE).skipped
    assert skip.reason == "'mul_' writes into a constant that it reads"


def test_write_behind_the_sum_follows() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        total = self.a(x) + self.b(x)
        total.mul_(2)
        return total

    result = fold(ready(Lambda(forward, a=conv(), b=conv(size=1))), IMAGE, item=MERGE)
    assert len(result.changes) == 1


def test_shared_layer() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        return (self.a(x) + self.b(x)).relu() + self.a(x.relu())

    reason = kept(Lambda(forward, a=conv(), b=conv(size=1)))
    assert reason == "Conv2d 'a' or its weight is also used by a_1, and would have to stay"


def test_shared_block_is_merged_once() -> None:
    block = two(conv(), conv(size=1))
    model = Lambda(lambda self, x: self.block(self.block(x).relu()), block=block)
    result = fold(ready(model), IMAGE, item=MERGE)
    assert set(result.module.state_dict()) == {"block.merged.weight"}
    calls = [n.target for n in result.module.graph.nodes if n.op == "call_module"]
    assert calls == ["block.merged"] * 2


def test_tied_weights() -> None:
    block, other = two(conv(), conv(size=1)), conv()
    other.weight = block.a.weight
    reason = kept(
        Lambda(lambda self, x: self.other(self.block(x).relu()), block=block, other=other)
    )
    assert "is also used by Conv2d, and would have to stay" in reason


def test_hooks_and_parametrizations() -> None:
    hooked = two(conv(), conv(size=1))
    hooked.a.register_forward_hook(lambda *args: None)
    assert "has forward hooks" in kept(hooked)
    normed = two(nn.utils.parametrizations.weight_norm(conv()), conv(size=1))
    assert "computed by a parametrization" in kept(normed)


def test_half_precision() -> None:
    def make(scale: float) -> nn.Module:
        model = two(Chain(conv=conv(), bn=bn()), conv(size=1)).half().eval()
        model.a.bn.weight.data.fill_(3e4)
        model.a.bn.eps = 1e-12
        model.a.bn.running_var.fill_(scale)
        return model

    result = apply(make(3e4), MERGE)
    assert result.module.merged.weight.dtype == torch.float16
    (skip,) = apply(make(0.0), MERGE).skipped
    assert skip.reason == "the merged weights are not finite in torch.float16"
    mixed = two(Chain(conv=conv(), bn=bn()), conv(size=1)).half().eval()
    mixed.a.bn.float()
    assert len(apply(mixed, MERGE).changes) == 1
    mixed.b.float()
    assert "different dtypes" in apply(mixed, MERGE).skipped[0].reason


def test_rounded_once() -> None:
    model = two(Chain(conv=conv(), bn=bn()), conv(size=1))
    single = apply(ready(model).float(), MERGE).module.merged
    exact = apply(model.double(), MERGE).module.merged
    assert torch.equal(exact.weight.float(), single.weight)
    assert torch.equal(exact.bias.float(), single.bias)


def test_channels_last_and_what_is_frozen() -> None:
    model = two(conv(), conv(size=1)).to(memory_format=torch.channels_last)
    model.requires_grad_(False)
    weight = apply(ready(model), MERGE).module.merged.weight
    assert weight.is_contiguous(memory_format=torch.channels_last)
    assert not weight.requires_grad


def test_save_and_load(tmp_path: Path) -> None:
    def make(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        model = two(Chain(conv=conv(), bn=bn()), Chain(conv=conv(size=1), bn=bn()))
        return ready(Lambda(lambda self, x: self.block(x).relu(), block=model), seed)

    model = make(0)
    result = apply(model, MERGE)
    ds.save(result.module, tmp_path)
    again = ds.load(tmp_path, make(1))
    assert torch.equal(again(IMAGE), result.module(IMAGE))
    assert list(again.state_dict()) == ["block.merged.weight", "block.merged.bias"]
    (entry,) = result.module.meta["dropsurgery"]["passes"]
    assert entry == {
        "pass": "MergeLinearBranches",
        "allow_growth": False,
        "merges": [["x", "add"]],
    }
    with pytest.raises(ModelLoadError, match="MergeLinearBranches is to merge"):
        ds.load(tmp_path, ready(Lambda(lambda self, x: self.block(x), block=conv())))


def test_export_names_the_merged_layer(tmp_path: Path) -> None:
    block = two(Chain(conv=conv(), bn=bn()), Chain(conv=conv(size=1), bn=bn()))
    model = ready(Lambda(lambda self, x: self.block(x).relu(), block=block)).float()
    path = ds.export_onnx(ds.slim(model), tmp_path / "net.onnx", IMAGE.float())
    graph = onnx.load(path).graph
    assert [(n.op_type, n.name) for n in graph.node] == [
        ("Conv", "block.merged/Conv"),
        ("Relu", "Relu"),
    ]
    assert ds.verify(model, path).ok


def test_pairs_that_are_not_there() -> None:
    model = ready(two(conv(), conv(size=1)))
    with pytest.raises(PassError, match="is to merge 'sum' from 'x': there is no such pair"):
        apply(model, MergeLinearBranches(merges=(("x", "sum"),)))
    with pytest.raises(PassError, match="it is not linear in it"):
        apply(model, MergeLinearBranches(merges=(("a", "b"),)))


def test_two_mode_network_keeps_its_eval_graph() -> None:
    def forward(self: Any, x: Tensor) -> Any:
        out = self.block(x)
        return (out, out.mean()) if self.training else out

    model = ready(Lambda(forward, block=two(conv(), conv(size=1))))
    result = fold(model, IMAGE, item=MERGE)
    assert result.changes[-1].what.startswith("the training graph was dropped")


@pytest.mark.parametrize("by", [MERGE, MergeLinearBranches(allow_growth=True)])
def test_random_networks_of_branches(by: MergeLinearBranches) -> None:
    """Sums and chains at random, whatever can be merged of them: the same function."""
    generator = torch.Generator().manual_seed(11)

    def pick(count: int) -> int:
        return int(torch.randint(count, (), generator=generator))

    def branch(depth: int) -> nn.Module:
        kind = 5 + pick(2) if depth and pick(4) else pick(5)
        if kind == 0:
            return conv(groups=(1, 2, 4)[pick(3)], bias=bool(pick(2)))
        if kind == 1:
            return conv(size=1, groups=(1, 2)[pick(2)], bias=pick(4) > 2)
        if kind == 2:
            return nn.AvgPool2d(3, 1, 1, count_include_pad=pick(4) > 0)
        if kind == 3:
            return bn()
        if kind == 4:
            return nn.Identity()
        first, second = branch(depth - 1), branch(depth - 1)
        return two(first, second) if kind == 5 else Chain(a=first, b=second)

    merges = 0
    for _ in range(60):
        model = ready(Chain(a=branch(3), b=nn.ReLU(), c=branch(2)))
        merges += len(fold(model, IMAGE, item=by).changes)
    assert merges > (20 if by.allow_growth else 10)
