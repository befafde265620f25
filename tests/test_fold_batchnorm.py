"""FoldBatchNorm on small networks: what folds, and what is left alone with which reason."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dropsurgery.errors import PassError
from dropsurgery.graph.trace import trace
from dropsurgery.layers import DropPath
from dropsurgery.passes.base import apply, run
from dropsurgery.passes.fold_batchnorm import FoldBatchNorm
from tests.fold_helpers import (
    Chain,
    Lambda,
    assert_all_folded,
    fold,
    norms_left,
    ready,
    reasons,
    relative,
)

IMAGE = torch.randn(2, 4, 9, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(7))


def conv_bn(**extra: nn.Module) -> Chain:
    return Chain(conv=nn.Conv2d(4, 6, 3, bias=False), bn=nn.BatchNorm2d(6), **extra)


def values(*shape: int, seed: int = 0, low: float = 0.5, high: float = 1.5) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(shape, dtype=torch.float64, generator=generator) * (high - low) + low


# --- what folds -----------------------------------------------------------------------------------

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
    assert (change.module, change.by) == ("", "FoldBatchNorm") or change.module == "stem"


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


# --- what is left alone ---------------------------------------------------------------------------


def refused(model: nn.Module, *inputs: Tensor, shapes: bool = False) -> str:
    """Nothing is folded, nothing changes; return the reason."""
    keys = list(model.state_dict())
    result = fold(model, *inputs, shapes=shapes, tolerance=0.0)
    assert result.changes == ()
    assert list(result.module.state_dict()) == keys
    (skip,) = result.skipped
    return skip.reason


def test_training_mode() -> None:
    for model in (conv_bn().train(), conv_bn().eval()):
        model.bn.train()
        result = apply(model, FoldBatchNorm())
        assert result.changes == ()
        assert reasons(result) == "BatchNorm2d 'bn': it is in training mode: call .eval() first"


def test_functional_training() -> None:
    def forward(self: nn.Module, x: Tensor) -> Tensor:
        return F.batch_norm(self.conv(x), self.mean, self.var, training=True)

    parts = {"mean": torch.zeros(6), "var": torch.ones(6)}
    result = apply(Lambda(forward, conv=nn.Conv2d(4, 6, 3), **parts).eval(), FoldBatchNorm())
    assert "always uses the statistics of the batch (training=True)" in reasons(result)


def test_no_running_statistics() -> None:
    model = Chain(conv=nn.Conv2d(4, 6, 3), bn=nn.BatchNorm2d(6, track_running_stats=False))
    assert "no running statistics" in refused(model.double().eval(), IMAGE)


def test_other_readers() -> None:
    def forward(self: nn.Module, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.bn(y) + y

    model = ready(Lambda(forward, conv=nn.Conv2d(4, 6, 3), bn=nn.BatchNorm2d(6)))
    assert refused(model, IMAGE) == "BatchNorm2d 'bn': its input 'conv' is read by add, too"


def test_other_readers_behind_a_dropout() -> None:
    def forward(self: nn.Module, x: Tensor) -> Tensor:
        y = self.drop(self.conv(x))
        return self.bn(y) + y

    model = ready(Lambda(forward, conv=nn.Conv2d(4, 6, 3), drop=nn.Dropout(), bn=nn.BatchNorm2d(6)))
    assert "its input 'drop' has several readers: add, bn" in refused(model, IMAGE)


@pytest.mark.parametrize("between", [nn.ReLU(), nn.MaxPool2d(2), nn.GroupNorm(1, 6)])
def test_other_producers(between: nn.Module) -> None:
    model = ready(Chain(conv=nn.Conv2d(4, 6, 3), between=between, bn=nn.BatchNorm2d(6)))
    kind = type(between).__name__
    assert f"its input comes from {kind} 'between', into which nothing" in refused(model, IMAGE)


def test_network_input_as_producer() -> None:
    assert "its input comes from placeholder" in refused(ready(Chain(bn=nn.BatchNorm2d(4))), IMAGE)


def test_unknown_forwards() -> None:
    class Norm(nn.BatchNorm2d):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * 2

    class Conv(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * x.mean()

    class Inner(nn.Conv2d):
        def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            return super()._conv_forward(x, weight, bias).relu()

    model = ready(Chain(conv=nn.Conv2d(4, 6, 3), bn=Norm(6)))
    assert "Norm has a forward of its own (tests.test_fold" in refused(model, IMAGE)
    for conv in (Inner(4, 6, 3), Conv(4, 6, 3)):
        model = ready(Chain(conv=conv, bn=nn.BatchNorm2d(6)))
        result = apply(model, FoldBatchNorm())
        assert norms_left(result.module) == 1
    replaced = ready(conv_bn())
    replaced.conv.forward = lambda x: F.relu(F.conv2d(x, replaced.conv.weight))
    assert norms_left(apply(replaced, FoldBatchNorm()).module) == 1


def test_hooks_would_be_lost() -> None:
    for layer in ("conv", "bn"):
        model = ready(conv_bn())
        model.get_submodule(layer).register_forward_hook(lambda module, args, out: out * 2)
        assert "forward hooks" in refused(model, IMAGE)


def test_computed_weights() -> None:
    parametrized = ready(conv_bn())
    nn.utils.parametrizations.weight_norm(parametrized.conv)
    reason = refused(parametrized, IMAGE)
    assert "is computed by a parametrization" in reason
    assert "remove_parametrizations makes it a parameter" in reason
    spectral = ready(conv_bn())
    nn.utils.parametrizations.spectral_norm(spectral.conv)
    assert "is computed by a parametrization" in refused(spectral.eval(), IMAGE)
    hooked = ready(conv_bn())
    with pytest.warns(FutureWarning):
        nn.utils.weight_norm(hooked.conv)
    assert "may compute its weight" in refused(hooked, IMAGE)

    def forward(self: nn.Module, x: Tensor) -> Tensor:
        return self.bn(F.conv2d(x, self.w * 2))

    functional = ready(
        Lambda(forward, w=nn.Parameter(torch.randn(6, 4, 3, 3)), bn=nn.BatchNorm2d(6))
    )
    assert "is computed by the network, not a parameter" in refused(functional, IMAGE)


def test_linear_on_three_axes_with_equal_sizes() -> None:
    """fx.fuse, torch.ao and jit.freeze are silently wrong by 4 to 6 here."""
    model = ready(Chain(fc=nn.Linear(5, 6), bn=nn.BatchNorm1d(6)))
    x = torch.randn(2, 6, 5, dtype=torch.float64)
    assert "it normalises axis 1, and the channels of Linear 'fc' are on axis 2" in refused(
        model, x, shapes=True
    )
    assert "ds.apply(model, ds.FoldBatchNorm(), example_inputs=(x,))" in refused(model, x)


def test_linear_on_three_axes_with_other_sizes() -> None:
    """An AssertionError ends the whole of fx.fuse here."""
    model = ready(Chain(fc=nn.Linear(5, 6), bn=nn.BatchNorm1d(4)))
    x = torch.randn(2, 4, 5, dtype=torch.float64)
    assert "are on axis 2" in refused(model, x)  # 4 features rule rank 2 out, without examples


def test_linear_with_example_inputs() -> None:
    model = ready(Chain(fc=nn.Linear(5, 6), bn=nn.BatchNorm1d(6)))
    assert_all_folded(fold(model, torch.randn(3, 5, dtype=torch.float64), shapes=True))


def test_unbatched_input() -> None:
    model = ready(Chain(conv=nn.Conv1d(4, 6, 1), bn=nn.BatchNorm1d(6)))
    x = torch.randn(4, 6, dtype=torch.float64)  # (C, L): the BatchNorm then normalises L
    assert "are on axis 0" in refused(model, x, shapes=True)
    mixed = ready(Chain(conv=nn.Conv3d(4, 6, 1), bn=nn.BatchNorm2d(5)))
    x = torch.randn(4, 5, 3, 3, dtype=torch.float64)
    assert "are on axis 0" in refused(mixed, x, shapes=True)
    assert "are on axis 0" in refused(mixed, x)  # the BatchNorm2d rules a batch out


def test_features_that_are_not_the_channels() -> None:
    from torchvision.ops import FrozenBatchNorm2d

    model = ready(Chain(conv=nn.Conv2d(4, 6, 3), bn=FrozenBatchNorm2d(1)))
    assert "it has 1 features, Conv2d 'conv' 6 channels" in refused(model, IMAGE)


def test_dtype_that_promotion_would_change() -> None:
    from torchvision.ops import FrozenBatchNorm2d

    model = Chain(conv=nn.Conv2d(4, 6, 3).half(), bn=FrozenBatchNorm2d(6)).eval()
    result = apply(model, FoldBatchNorm())
    assert "is torch.float16 and the statistics are torch.float32" in reasons(result)


def test_meta_device() -> None:
    result = apply(conv_bn().eval().to("meta"), FoldBatchNorm())
    assert "not real floating-point values" in reasons(result)


def test_statistics_that_the_network_writes() -> None:
    def forward(self: nn.Module, x: Tensor) -> Tensor:
        y = F.batch_norm(self.conv(x), self.mean, self.var)
        return y + self.mean.sum()

    model = Lambda(
        forward, conv=nn.Conv2d(4, 6, 3), mean=values(6, seed=1), var=values(6, seed=2)
    ).double()
    assert "reads its statistics or parameters, too" in refused(model.eval(), IMAGE)


# --- numerics -------------------------------------------------------------------------------------


def test_error_is_no_worse_than_unfolded_in_single_precision() -> None:
    torch.manual_seed(0)
    layers = [m for _ in range(8) for m in (nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8))]
    exact = ready(nn.Sequential(*layers))
    x = torch.randn(4, 8, 12, 12, dtype=torch.float64)
    single = copy.deepcopy(exact).float()
    folded = apply(single, FoldBatchNorm()).module
    with torch.no_grad():
        reference = copy.deepcopy(single).double()(x.float().double())
        ours = relative(folded(x.float()).double(), reference)
        theirs = relative(single(x.float()).double(), reference)
    assert ours <= 1.1 * theirs


def test_half_precision_layer_and_single_precision_norm_with_tiny_variance() -> None:
    """fx.fuse casts the scale before it multiplies: infinite weights."""
    model = Chain(flat=nn.Flatten(), fc=nn.Linear(8, 4).half(), bn=nn.BatchNorm1d(4, eps=1e-12))
    with torch.no_grad():
        model.fc.weight.mul_(1e-2)
        model.bn.running_var.fill_(1e-10)
        model.bn.running_mean.zero_()
    result = apply(model.eval(), FoldBatchNorm())
    assert_all_folded(result)
    x = torch.randn(16, 8).half()
    model.requires_grad_(False)
    exact = F.linear(x.double(), model.fc.weight.double(), model.fc.bias.double())
    exact = exact / (model.bn.running_var.double() + 1e-12).sqrt()
    assert float(1e-5**-1) > torch.finfo(torch.float16).max  # the scale alone would be infinite
    assert relative(result.module(x).detach().double(), exact) < 2e-3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_results_that_the_dtype_cannot_hold(dtype: torch.dtype) -> None:
    for variance, eps, weight in [(0.0, 1e-12, 1e3), (1e-44, 0.0, 1e30)]:
        model = conv_bn().eval()
        with torch.no_grad():
            model.conv.weight.fill_(1.0)
            model.bn.running_var.fill_(variance)
            model.bn.weight.fill_(weight)
            model.bn.eps = eps
        model.conv.to(dtype)
        reason = reasons(apply(model, FoldBatchNorm()))
        fits = weight / (variance + eps) ** 0.5 < torch.finfo(dtype).max
        assert reason == "" if fits else f"are not finite in {dtype}" in reason


def test_zero_variance_without_eps_is_refused() -> None:
    model = conv_bn().eval()
    with torch.no_grad():
        model.bn.running_var.zero_()
        model.bn.eps = 0.0
    assert "are not finite in torch.float32" in reasons(apply(model, FoldBatchNorm()))


def test_statistics_that_overflowed_are_refused() -> None:
    model = conv_bn().eval()
    with torch.no_grad():
        model.bn.running_var.fill_(1e5)
    model.half()  # 1e5 is inf in float16, and the BatchNorm's output silently its bias
    assert "are not finite" in reasons(apply(model, FoldBatchNorm()))
    assert norms_left(apply(model.float(), FoldBatchNorm()).module) == 1


def test_weights_that_would_lose_their_digits_are_refused() -> None:
    model = conv_bn().eval()
    with torch.no_grad():
        model.bn.running_var.fill_(1e12)
    model.conv.half()
    assert "are too small for torch.float16" in reasons(apply(model, FoldBatchNorm()))
    model.conv.float()
    assert reasons(apply(model, FoldBatchNorm())) == ""


def test_large_variance_in_half_precision_gets_better() -> None:
    model = conv_bn().eval()
    with torch.no_grad():
        model.bn.running_var.fill_(1e5)
    model.conv.half()
    result = apply(model, FoldBatchNorm())
    assert_all_folded(result)
    x = torch.randn(2, 4, 9, 8).half()
    with torch.no_grad():
        reference = copy.deepcopy(model).double()(x.double())
        assert relative(result.module(x).double(), reference) < 2e-3


# --- saved surgeries ------------------------------------------------------------------------------


def test_json_rebuilds_the_same_surgery_on_other_weights() -> None:
    def build() -> nn.Module:
        return Chain(
            fc=nn.Linear(5, 6),
            bn=nn.BatchNorm1d(6),
            fc2=nn.Linear(6, 4),
            bn2=nn.BatchNorm1d(4, eps=0),
        )

    trained = ready(build())
    with torch.no_grad():
        trained.bn2.running_var.zero_()
    x = torch.randn(3, 5, dtype=torch.float64)
    module = trace(trained, example_inputs=(x,))
    plan = run(FoldBatchNorm(), module)
    data = json.loads(json.dumps(FoldBatchNorm().to_json(plan)))
    assert data == {"pass": "FoldBatchNorm", "nodes": ["bn"]}
    del data["pass"]
    fresh = trace(build().double().eval())
    run(FoldBatchNorm.from_json(data), fresh)
    fresh.load_state_dict(module.state_dict(), strict=True)
    assert fresh.code == module.code


def test_saved_nodes_that_cannot_be_folded_are_an_error() -> None:
    model = Chain(conv=nn.Conv2d(4, 6, 3), act=nn.ReLU(), bn=nn.BatchNorm2d(6)).eval()
    with pytest.raises(PassError, match="its input comes from ReLU 'act'"):
        apply(model, FoldBatchNorm(nodes=("bn",)))
    with pytest.raises(PassError, match="there is no such BatchNorm"):
        apply(model, FoldBatchNorm(nodes=("bn_7",)))
