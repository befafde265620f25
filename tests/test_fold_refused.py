"""What FoldBatchNorm leaves alone, each with its reason."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

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
    refused,
    values,
)


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
    reason = refused(model, x, shapes=True)
    assert "axis 1 of the output of Linear 'fc', and the channels are on axis 2" in reason
    assert "ds.apply(model, ds.FoldBatchNorm(), example_inputs=(x,))" in refused(model, x)


@pytest.mark.parametrize("name", ["merged", "moved", "reshaped", "read twice"])
def test_views_that_do_not_keep_the_channels(name: str) -> None:
    views = {
        "merged": lambda y: y.flatten(1),
        "moved": lambda y: y.transpose(0, 1),
        "reshaped": lambda y: y.reshape(-1, 5),
        "read twice": lambda y: y.transpose(1, 2),
    }
    expected = {
        "merged": "the axes of the output of Linear 'fc' are merged",
        "moved": "it normalises axis 0 of the output of Linear 'fc', and the channels are on",
        "reshaped": "its input comes from reshape 'reshape'",
        "read twice": "its input 'transpose' has several readers: bn, mul",
    }

    def forward(self: nn.Module, x: Tensor) -> Tensor:
        y = views[name](self.fc(x))
        return self.bn(y) + (y * 2 if name == "read twice" else 0)

    features = 25 if name == "merged" else 5
    model = ready(Lambda(forward, fc=nn.Linear(5, 5), bn=nn.BatchNorm1d(features)))
    assert expected[name] in refused(model, torch.randn(5, 5, 5).double(), shapes=True)


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


def test_linear_function_with_a_vector_as_weight() -> None:
    def forward(self: nn.Module, x: Tensor) -> Tensor:
        return F.batch_norm(F.linear(x, self.w), self.mean, self.var)

    parts = {"w": torch.randn(4), "mean": values(6, seed=1), "var": values(6, seed=2)}
    x = torch.randn(3, 6, 4, dtype=torch.float64)
    reason = refused(Lambda(forward, **parts).double().eval(), x, shapes=True)
    assert "linear 'linear' has a weight of rank 1" in reason


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
