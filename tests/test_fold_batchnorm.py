"""FoldBatchNorm on small networks: what folds, and what is left alone with which reason."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dropsurgery.layers import DropPath
from dropsurgery.passes.base import apply
from dropsurgery.passes.fold_batchnorm import FoldBatchNorm
from tests.fold_helpers import (
    IMAGE,
    Chain,
    Lambda,
    assert_all_folded,
    conv_bn,
    fold,
    norms_left,
    ready,
    reasons,
    values,
)

LAYERS = {
    "Conv1d": (nn.Conv1d(4, 6, 3, dilation=2), nn.BatchNorm1d(6), (2, 4, 12)),
    "Conv2d": (nn.Conv2d(4, 6, 3, stride=2, padding="valid"), nn.BatchNorm2d(6), (2, 4, 9, 8)),
    "Conv3d": (nn.Conv3d(4, 6, (1, 2, 3), groups=2), nn.BatchNorm3d(6), (2, 4, 4, 5, 6)),
    "ConvTranspose1d": (nn.ConvTranspose1d(4, 6, 3), nn.BatchNorm1d(6), (2, 4, 5)),
    "ConvTranspose2d": (
        nn.ConvTranspose2d(4, 6, 3, stride=2, output_padding=1, groups=2),
        nn.BatchNorm2d(6),
        (2, 4, 5, 4),
    ),
    "ConvTranspose3d": (nn.ConvTranspose3d(4, 6, 2), nn.BatchNorm3d(6), (2, 4, 3, 3, 3)),
    "depthwise": (nn.Conv2d(4, 8, 3, groups=4), nn.BatchNorm2d(8), (1, 4, 5, 5)),
    "circular": (
        nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular", bias=False),
        nn.BatchNorm2d(6),
        (2, 4, 6, 6),
    ),
    "reflect": (
        nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"),
        nn.BatchNorm2d(6),
        (1, 4, 6, 6),
    ),
    "no affine": (nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6, affine=False), (2, 4, 5, 5)),
    "no BatchNorm bias": (nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6, bias=False), (2, 4, 5, 5)),
    "eps": (nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6, eps=0.3), (2, 4, 5, 5)),
    "SyncBatchNorm": (nn.Conv2d(4, 6, 3), nn.SyncBatchNorm(6), (2, 4, 5, 5)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layer_and_norm_become_the_layer(name: str) -> None:
    layer, norm, shape = LAYERS[name]
    model = ready(Chain(layer=layer, norm=norm, act=nn.ReLU(inplace=True)))
    result = fold(model, torch.randn(shape, dtype=torch.float64))
    assert_all_folded(result)
    assert [node.target for node in result.module.graph.nodes][1:-1] == ["layer", "act"]
    assert set(result.module.state_dict()) == {"layer.weight", "layer.bias"}
    assert type(result.module.layer) is type(layer)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("affine", [True, False])
def test_linear_after_flatten(bias: bool, affine: bool) -> None:
    """The third of torch.fx's gaps: Linear → BatchNorm1d(affine=False) is a TypeError there."""
    model = ready(
        Chain(
            flat=nn.Flatten(), fc=nn.Linear(24, 5, bias=bias), bn=nn.BatchNorm1d(5, affine=affine)
        )
    )
    assert_all_folded(fold(model, torch.randn(3, 2, 12, dtype=torch.float64)))


def test_changes_name_the_modules() -> None:
    result = fold(ready(Chain(stem=conv_bn(), head=nn.ReLU())), IMAGE)
    (change,) = result.changes
    assert change.what == "BatchNorm2d 'stem.bn' folded into Conv2d 'stem.conv'"
    assert (change.module, change.node, change.by) == ("stem", "stem_bn", "FoldBatchNorm")


VIEWS = {
    "levit": lambda y: y.flatten(0, 1),
    "transpose": lambda y: y.transpose(1, 2),
    "negative transpose": lambda y: torch.transpose(y, -1, -2).contiguous(),
    "permute": lambda y: y.permute(0, 2, 1),
    "permute list": lambda y: torch.permute(y, (1, -1, 0)),
}


@pytest.mark.parametrize("name", VIEWS)
def test_linear_on_three_axes_whose_channels_are_moved_to_axis_one(name: str) -> None:
    def forward(self: nn.Module, x: Tensor) -> Tensor:
        y = self.fc(x.flatten(2))
        z = self.bn(self.drop(VIEWS[name](y)))
        # Shapes are recorded on fake tensors, whose BatchNorm keeps strides that the real one's
        # output does not have.
        z = z.view(-1) if flat else z
        return z.relu_().reshape_as(y)

    parts = {"fc": nn.Linear(5, 5), "drop": nn.Dropout(), "bn": nn.BatchNorm1d(5)}
    x = torch.randn(2, 5, 5, 1, dtype=torch.float64)
    flat = True
    assert_all_folded(fold(ready(Lambda(forward, **parts)), x))
    flat = False
    assert_all_folded(fold(ready(Lambda(forward, **parts)), x, shapes=True))


def test_views_between_batchnorms() -> None:
    def forward(self: nn.Module, x: Tensor) -> Tensor:
        y = self.first(self.conv(x)).permute(2, 1, 0, 3)
        return self.second(y)

    parts = {"conv": nn.Conv2d(4, 6, 3), "first": nn.BatchNorm2d(6), "second": nn.BatchNorm2d(6)}
    assert_all_folded(fold(ready(Lambda(forward, **parts)), IMAGE))


def test_several_batchnorms_in_a_row_are_rounded_once() -> None:
    model = ready(conv_bn(second=nn.BatchNorm2d(6), third=nn.BatchNorm2d(6, affine=False)))
    result = fold(model, IMAGE)
    assert_all_folded(result)
    assert len(result.changes) == 3


def test_dropout_between_is_no_obstacle_in_eval() -> None:
    model = ready(
        Chain(
            conv=nn.Conv2d(4, 6, 3),
            drop=nn.Dropout2d(0.4),
            path=DropPath(0.3),
            identity=nn.Identity(),
            bn=nn.BatchNorm2d(6),
            after=nn.Dropout(0.5),
        )
    )
    result = fold(model, IMAGE)
    assert_all_folded(result)
    targets = [node.target for node in result.module.graph.nodes]
    assert targets[1:-1] == ["conv", "after"]
    assert "Dropout2d 'drop' removed: in eval mode it is the identity" in str(result)
    assert not hasattr(result.module, "path")


def test_functional_dropout_between() -> None:
    def forward(self: nn.Module, x: Tensor) -> Tensor:
        return self.bn(F.dropout(self.conv(x), 0.5, self.training))

    model = ready(Lambda(forward, conv=nn.Conv2d(4, 6, 3), bn=nn.BatchNorm2d(6)))
    assert_all_folded(fold(model, IMAGE))


@pytest.mark.parametrize("always", [True, False])
def test_dropout_with_its_own_flag(always: bool) -> None:
    def forward(self: nn.Module, x: Tensor) -> Tensor:
        return self.bn(F.dropout(self.conv(x), 0.5, always))

    model = ready(Lambda(forward, conv=nn.Conv2d(4, 6, 3), bn=nn.BatchNorm2d(6)))
    if not always:
        assert_all_folded(fold(model, IMAGE))
        return
    result = apply(model, FoldBatchNorm())
    assert norms_left(result.module) == 1
    assert "its input comes from dropout 'dropout'" in reasons(result)


def test_dropout_in_training_mode_is_an_obstacle() -> None:
    model = ready(Chain(conv=nn.Conv2d(4, 6, 3), drop=nn.Dropout(0.5), bn=nn.BatchNorm2d(6)))
    model.drop.train()
    result = apply(model, FoldBatchNorm())
    assert "its input comes from Dropout 'drop' in training mode" in reasons(result)


@pytest.mark.parametrize("style", ["positional", "keywords", "torch", "no affine", "follows"])
def test_functional_batch_norm(style: str) -> None:
    """pytorch#122070: F.batch_norm is folded, and its tensors leave the state dict."""

    def forward(self: nn.Module, x: Tensor) -> Tensor:
        y = self.conv(x)
        if style == "positional":
            return F.batch_norm(y, self.mean, self.var, self.gamma, self.beta, False, 0.1, 1e-3)
        if style == "keywords":
            return F.batch_norm(
                eps=1e-3, bias=self.beta, weight=self.gamma, running_var=self.var,
                input=y, running_mean=self.mean,
            )  # fmt: skip
        if style == "torch":
            return torch.batch_norm(
                y, self.gamma, self.beta, self.mean, self.var, False, 0.1, 1e-3, False
            )
        if style == "follows":
            return F.batch_norm(y, self.mean, self.var, None, self.beta, training=self.training)
        return F.batch_norm(y, self.mean, self.var)

    model = Lambda(
        forward,
        conv=nn.Conv2d(4, 6, 3),
        mean=values(6, seed=1),
        var=values(6, seed=2),
        gamma=nn.Parameter(values(6, seed=3)),
        beta=nn.Parameter(values(6, seed=4)),
    ).double()
    result = fold(model.eval(), IMAGE)
    assert_all_folded(result)
    used = {"keywords": set(), "positional": set(), "torch": set(), "follows": {"gamma"}}
    left = used.get(style, {"gamma", "beta"})
    assert set(result.module.state_dict()) == {"conv.weight", "conv.bias"} | left


FUNCTIONS = {
    "conv1d": (F.conv1d, (6, 2, 3), (2, 4, 8), {"groups": 2}),
    "conv2d": (F.conv2d, (6, 4, 3, 3), (2, 4, 8, 7), {"stride": 2}),
    "conv3d": (F.conv3d, (6, 4, 1, 2, 2), (2, 4, 3, 4, 4), {}),
    "conv_transpose1d": (F.conv_transpose1d, (4, 3, 3), (2, 4, 8), {"groups": 2}),
    "conv_transpose2d": (F.conv_transpose2d, (4, 3, 2, 2), (2, 4, 8, 7), {"groups": 2}),
    "conv_transpose3d": (F.conv_transpose3d, (4, 6, 1, 2, 2), (2, 4, 3, 4, 4), {}),
    "linear": (F.linear, (6, 4), (5, 4), {}),
}


@pytest.mark.parametrize("bias", ["none", "parameter", "explicit None"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_functional_layers(name: str, bias: str) -> None:
    function, weight_shape, input_shape, options = FUNCTIONS[name]

    def forward(self: nn.Module, x: Tensor) -> Tensor:
        more = {"parameter": (getattr(self, "b", None),), "none": (), "explicit None": (None,)}
        y = function(x, self.w, *more[bias], **options)
        return F.batch_norm(y, self.mean, self.var, eps=0.1)

    parts: dict[str, Tensor] = {"w": nn.Parameter(torch.randn(weight_shape).double())}
    if bias == "parameter":
        parts["b"] = nn.Parameter(values(6, seed=5))
    model = Lambda(forward, **parts, mean=values(6, seed=1), var=values(6, seed=2)).eval()
    result = fold(model, torch.randn(input_shape).double(), shapes=name == "linear")
    assert_all_folded(result)
    assert set(result.module.state_dict()) == {"w", "b" if bias == "parameter" else "w_bias"}


def test_functional_weight_in_a_buffer_stays_a_buffer() -> None:
    def forward(self: nn.Module, x: Tensor) -> Tensor:
        return self.bn(F.conv2d(x, self.kernel, padding=1))

    kernel = torch.randn(6, 4, 3, 3, dtype=torch.float64)
    result = fold(ready(Lambda(forward, kernel=kernel, bn=nn.BatchNorm2d(6))), IMAGE)
    assert_all_folded(result)
    assert set(dict(result.module.named_buffers())) == {"kernel", "kernel_bias"}


def test_modules_of_others() -> None:
    from timm.layers import BatchNormAct2d, Conv2dSame, FrozenBatchNormAct2d, Linear
    from timm.layers.norm_act import SyncBatchNormAct, convert_sync_batchnorm
    from torchvision.ops import FrozenBatchNorm2d

    def layer() -> nn.Module:
        return Conv2dSame(4, 6, 3, stride=2)

    for norm in (FrozenBatchNorm2d(6, eps=0.2), FrozenBatchNormAct2d(6), BatchNormAct2d(6)):
        assert_all_folded(fold(ready(Chain(conv=layer(), bn=norm)), IMAGE))
    sync = convert_sync_batchnorm(Chain(conv=layer(), bn=BatchNormAct2d(6, act_layer=nn.SiLU)))
    assert isinstance(sync.bn, SyncBatchNormAct)
    assert_all_folded(fold(ready(sync), IMAGE))
    timm_linear = Chain(flat=nn.Flatten(), fc=Linear(24, 5), bn=nn.BatchNorm1d(5))
    assert_all_folded(fold(ready(timm_linear), torch.randn(3, 24, dtype=torch.float64)))


def test_batchnorm_act_keeps_drop_and_activation_in_place() -> None:
    from timm.layers import BatchNormAct2d

    bn = BatchNormAct2d(6, act_layer=nn.PReLU, inplace=False, drop_layer=nn.Dropout)
    result = fold(ready(Chain(conv=nn.Conv2d(4, 6, 3), bn=bn)), IMAGE)
    assert_all_folded(result)
    assert [node.target for node in result.module.graph.nodes][1:-1] == [
        "conv",
        "bn.drop",
        "bn.act",
    ]
    assert set(result.module.state_dict()) == {"conv.weight", "conv.bias", "bn.act.weight"}
    assert result.changes[0].what.endswith("; its drop and act stay")


def test_batchnorm_act_without_activation_leaves_nothing_and_chains() -> None:
    from timm.layers import BatchNormAct2d

    plain = BatchNormAct2d(6, apply_act=False)
    model = ready(Chain(conv=nn.Conv2d(4, 6, 3), bn=plain, second=nn.BatchNorm2d(6)))
    result = fold(model, IMAGE)
    assert_all_folded(result)
    assert [node.target for node in result.module.graph.nodes][1:-1] == ["conv"]


def test_batchnorm_behind_an_activation_of_batchnorm_act_stays() -> None:
    from timm.layers import BatchNormAct2d

    model = ready(Chain(conv=nn.Conv2d(4, 6, 3), bn=BatchNormAct2d(6), second=nn.BatchNorm2d(6)))
    result = fold(model, IMAGE)
    assert norms_left(result.module) == 1
    assert "'second': its input comes from BatchNormAct2d 'bn'" in reasons(result)


def test_subclass_without_a_forward_of_its_own_is_its_base() -> None:
    class MyConv(nn.Conv2d):
        pass

    class MyNorm(nn.BatchNorm2d):
        pass

    assert_all_folded(fold(ready(Chain(conv=MyConv(4, 6, 3), bn=MyNorm(6))), IMAGE))


def test_in_place_operations_behind_the_fold_stay_right() -> None:
    """The add reads what the in-place ReLU wrote, before and after."""

    def forward(self: nn.Module, x: Tensor) -> Tensor:
        y = self.bn(self.conv(x))
        z = F.relu(y, inplace=True)
        return z.mul_(2.0) + y

    assert_all_folded(
        fold(ready(Lambda(forward, conv=nn.Conv2d(4, 6, 3), bn=nn.BatchNorm2d(6))), IMAGE)
    )


def test_readers_of_the_shape_are_no_readers() -> None:
    def forward(self: nn.Module, x: Tensor) -> Tensor:
        y = self.conv(x)
        n, c = y.shape[0], y.size(1)
        z = self.drop(y)
        return self.bn(z).view(n, c, -1).to(z.dtype)

    parts = {"conv": nn.Conv2d(4, 6, 3), "drop": nn.Dropout(), "bn": nn.BatchNorm2d(6)}
    assert_all_folded(fold(ready(Lambda(forward, **parts)), IMAGE))


def test_in_place_write_before_the_batchnorm_is_another_reader() -> None:
    def forward(self: nn.Module, x: Tensor) -> Tensor:
        y = self.conv(x)
        y.add_(1.0)
        return self.bn(y)

    result = fold(ready(Lambda(forward, conv=nn.Conv2d(4, 6, 3), bn=nn.BatchNorm2d(6))), IMAGE)
    assert norms_left(result.module) == 1
    assert "its input 'conv' is read by add_, too" in reasons(result)


def test_new_parameters_keep_what_the_old_ones_were() -> None:
    model = ready(conv_bn()).to(memory_format=torch.channels_last)
    model.conv.weight.requires_grad_(False)
    result = fold(model, IMAGE)
    weight, bias = result.module.conv.weight, result.module.conv.bias
    assert isinstance(weight, nn.Parameter)
    assert weight.stride() == model.conv.weight.stride()
    assert weight.is_contiguous(memory_format=torch.channels_last)
    assert (weight.requires_grad, bias.requires_grad) == (False, False)
    assert weight.data_ptr() != model.conv.weight.data_ptr()


@pytest.mark.parametrize("kind", ["transposed", "strided", "expanded"])
def test_weights_that_are_not_contiguous(kind: str) -> None:
    model = conv_bn()
    weight = {
        "transposed": torch.randn(3, 3, 4, 6).permute(3, 2, 1, 0),
        "strided": torch.randn(6, 4, 3, 6)[..., ::2],
        "expanded": torch.randn(6, 1, 3, 3).expand(6, 4, 3, 3),
    }[kind]
    model.conv.weight = nn.Parameter(weight)
    assert_all_folded(fold(ready(model), IMAGE))


def test_train_afterwards_changes_nothing_in_a_folded_layer() -> None:
    """pytorch#108863: no stale weights when a folded module goes back to train()."""
    result = fold(ready(conv_bn()), IMAGE)
    in_eval = result.module(IMAGE)
    assert torch.equal(result.module.train()(IMAGE), in_eval)


def test_two_mode_network_keeps_its_eval_graph() -> None:
    def forward(self: nn.Module, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        y = self.bn(self.conv(x))
        return (y, y.mean()) if self.training else y

    model = ready(Lambda(forward, conv=nn.Conv2d(4, 6, 3), bn=nn.BatchNorm2d(6)))
    result = fold(model, IMAGE)
    assert_all_folded(result)
    assert "the training graph was dropped" in str(result)
    assert isinstance(result.module.train()(IMAGE), Tensor)
    model.train()
    model.bn.eval()
    skipped = apply(model, FoldBatchNorm())
    assert skipped.changes == ()
    assert "its forward is another: call .eval() on it first" in reasons(skipped)


def test_folding_twice_finds_nothing_more() -> None:
    first = fold(ready(conv_bn()), IMAGE)
    second = apply(first.module, FoldBatchNorm())
    assert (second.changes, second.skipped) == ((), ())
