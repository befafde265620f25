"""FoldAffine where a rule nearly holds: nothing may change that is not exact."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dropsurgery.graph.trace import trace
from dropsurgery.passes.base import apply, run
from dropsurgery.passes.fold_affine import FoldAffine
from tests.fold_helpers import (
    IMAGE,
    Chain,
    Lambda,
    calls,
    fold_affine,
    norms_left,
    ready,
    reasons,
    relative,
    values,
)

SQUARE = torch.randn(2, 4, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(9))


def conv(inputs: int = 4, outputs: int = 4, kernel: int = 3, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, **options)


def norm(channels: int = 4) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels)


def negative(model: nn.Module) -> nn.Module:
    """Make one scale of the BatchNorm `bn` negative."""
    with torch.no_grad():
        model.bn.weight[1].neg_()
    return model


# Between a convolution and a BatchNorm; why the scale, or only the shift, cannot go back.
NEAR: dict[str, tuple[Callable[[Any, Tensor], Tensor], str]] = {
    "gelu": (lambda n, y: F.gelu(y), "gelu 'gelu' takes neither"),
    "relu6": (lambda n, y: F.relu6(y), "takes neither scale nor shift"),
    "average of padding": (lambda n, y: F.avg_pool2d(y, 3, 1, 1), "the zeros of its padding"),
    "average with a divisor": (
        lambda n, y: F.avg_pool2d(y, 2, divisor_override=3),
        "the zeros of its padding",
    ),
    "sum": (lambda n, y: y.sum((2, 3), keepdim=True), "is a sum, which multiplies a shift"),
    "zeros": (lambda n, y: F.pad(y, (1, 1)), "pads with zeros"),
    "ones": (lambda n, y: F.pad(y, (1, 1), value=1.0), "pads with"),
    "channel zeros": (lambda n, y: F.pad(y, (0, 0, 0, 0, 1, -1)), "pads"),
    "statistics": (lambda n, y: F.instance_norm(y), "has no weight"),
    "gate": (lambda n, y: y * y.mean((2, 3), keepdim=True), "multiplies values that all change"),
    "square": (lambda n, y: y * y, "multiplies values that all change"),
    "doubled": (lambda n, y: y + y, "adds a value to itself"),
    "the network's input": (lambda n, y: y + n.x[:, :, 1:-1, 1:-1], "comes from placeholder"),
    "channels moved": (lambda n, y: y.transpose(1, 2).reshape(y.shape), "splits|joins"),
    "roll": (lambda n, y: y.roll(1, 1), "takes neither"),
    "every other channel": (lambda n, y: torch.cat([y[:, ::2], y[:, 1::2]], 1), "every other"),
}


@pytest.mark.parametrize("name", NEAR)
def test_near_misses_behind_a_layer(name: str) -> None:
    forward, reason = NEAR[name]

    def whole(n: Any, x: Tensor) -> Tensor:
        n.__dict__["x"] = x
        return n.bn(forward(n, n.conv(x))).sin()

    result = fold_affine(ready(Lambda(whole, conv=conv(), bn=norm())), IMAGE)
    assert len(result.skipped) == 1
    assert re.search(reason, reasons(result))


@pytest.mark.parametrize("pool", [None, nn.MaxPool2d(2), nn.LeakyReLU(), nn.PReLU()])
def test_a_negative_scale_passes_no_maximum_and_no_activation(pool: nn.Module | None) -> None:
    """One channel is enough: the whole BatchNorm stays."""
    model = Lambda(lambda n, x: n.bn(n.act(n.conv(x))).sin(), conv=conv(), bn=norm(),
                   act=pool or nn.ReLU())  # fmt: skip
    assert norms_left(fold_affine(ready(model), IMAGE).module) == 0
    result = fold_affine(negative(ready(model)), IMAGE)
    assert "negative for some channels" in reasons(result)
    forward = Lambda(lambda n, x: n.conv(n.act(n.bn(x.sin()))), conv=conv(), bn=norm(),
                     act=pool or nn.ReLU())  # fmt: skip
    assert norms_left(fold_affine(ready(forward), IMAGE).module) == 0
    after = fold_affine(negative(ready(forward)), IMAGE)
    assert "negative for some channels" in reasons(after)
    # A shift passes a maximum, whatever the scale is; nothing is left to do for the rest.
    maximum = isinstance(pool, nn.MaxPool2d)
    for found in (result, after):
        assert norms_left(found.module) == (not maximum)
        assert ("ChannelScale" in calls(found.module)) == maximum


def test_a_scale_of_zero_is_never_divided_by() -> None:
    def zero(model: nn.Module) -> nn.Module:
        with torch.no_grad():
            model.bn.weight[2] = 0.0
        return model

    back = Lambda(lambda n, x: n.bn(n.conv(x)).sin(), conv=conv(), bn=norm())
    assert norms_left(fold_affine(zero(ready(back)), IMAGE).module) == 0
    forward = Lambda(lambda n, x: n.conv(n.bn(x.sin())), conv=conv(), bn=norm())
    assert norms_left(fold_affine(zero(ready(forward)), IMAGE).module) == 0
    # x + t/s is not there for s = 0, and another reader of the layer would have to undo the zero.
    for model in (
        Lambda(lambda n, x: n.conv(F.relu(n.bn(x.sin()))), conv=conv(), bn=norm()),
        Lambda(lambda n, x: n.bn(y := n.conv(x)).sin() + n.b(y), conv=conv(), b=conv(kernel=1),
               bn=norm()),
    ):  # fmt: skip
        assert norms_left(fold_affine(ready(model), IMAGE).module) == 0
        result = fold_affine(zero(ready(model)), IMAGE)
        assert norms_left(result.module) == 1
        assert "zero" in reasons(result) or "finite" in reasons(result)


def test_the_wrong_axis_of_the_same_length() -> None:
    """All axes have four entries: only the proved one may be taken."""
    for dims in ((0, 2, 1, 3), (0, 3, 2, 1), (2, 1, 0, 3)):
        model = ready(Lambda(lambda n, x, d=dims: n.bn(n.conv(x).permute(d)).sin(),
                             conv=conv(kernel=1), bn=norm()))  # fmt: skip
        result = fold_affine(model, SQUARE.repeat(2, 1, 1, 1))
        assert norms_left(result.module) == (dims[1] != 1)
        if dims[1] != 1:
            assert "and its channels are on axis" in reasons(result)
    for spread in ((4, 1, 1), (4, 1), (4,)):
        model = ready(Lambda(lambda n, x: n.conv(x) * n.gamma, conv=conv(kernel=1),
                             gamma=values(*spread)))  # fmt: skip
        left = calls(fold_affine(model, SQUARE).module)
        assert left == (["Conv2d"] if spread == (4, 1, 1) else ["Conv2d", "mul"])


def test_a_constant_that_gives_the_value_more_axes_stays() -> None:
    model = ready(
        Lambda(lambda n, x: n.conv(x) * n.one, conv=conv(), one=torch.ones(1, 1, 1, 1, 1))
    )
    assert calls(fold_affine(model, IMAGE).module) == ["Conv2d", "mul"]
    assert fold_affine(model, IMAGE, shapes=False).changes == ()


def test_a_constant_of_another_dtype_stays() -> None:
    """float32 times float64 is float64: taking the factor out would change the dtype."""
    model = Lambda(lambda n, x: n.conv(x) * n.gamma, conv=conv(), gamma=values(4, 1, 1)).float()
    model.gamma = model.gamma.double()
    result = apply(model, FoldAffine(), example_inputs=(IMAGE.float(),))
    assert calls(result.module) == ["Conv2d", "mul"]
    integers = Lambda(lambda n, x: n.conv(x / 255.0), conv=conv()).double()
    pixels = torch.randint(0, 255, (1, 4, 8, 8))
    assert apply(integers, FoldAffine()).changes == ()
    with pytest.raises(Exception, match=r"fit|dtype|type"):
        apply(integers, FoldAffine(), example_inputs=(pixels,)).module(pixels)


def test_batch_of_one_does_not_hide_the_batch() -> None:
    """reshape(-1, …) joins the batch to the channels, which a batch of one does not show."""
    model = ready(
        Lambda(lambda n, x: n.bn(n.conv(x).reshape(-1, 1, 7, 6).transpose(0, 1)).sin(),
               conv=conv(), bn=norm(4))
    )  # fmt: skip
    result = apply(model, FoldAffine(), example_inputs=(IMAGE[:1],))
    assert norms_left(result.module) == 1


def test_shared_layers_get_copies_only_where_the_weights_differ() -> None:
    shared = conv(padding=1)
    model = ready(
        Lambda(lambda n, x: n.a(n.conv(x)).sin() + n.b(n.conv(x.cos())).sin() + n.conv(x * x),
               conv=shared, a=norm(), b=norm())
    )  # fmt: skip
    module = fold_affine(model, IMAGE).module
    assert set(module.state_dict()) == {
        f"{name}.{key}" for name in ("conv", "conv_folded", "conv_folded_1")
        for key in ("weight", "bias")
    }  # fmt: skip
    assert torch.equal(module.conv.weight, shared.weight)
    same = ready(
        Lambda(lambda n, x: n.a(n.conv(n.a(n.conv(x)).sin())), conv=conv(padding=1), a=norm())
    )
    assert set(fold_affine(same, IMAGE).module.state_dict()) == {"conv.weight", "conv.bias"}


def test_weights_that_are_read_elsewhere_stay() -> None:
    model = ready(
        Lambda(lambda n, x: n.bn(n.conv(x)).sin() * n.conv.weight.mean(), conv=conv(), bn=norm())
    )
    result = fold_affine(model, IMAGE)
    assert norms_left(result.module) == 1
    assert "is also read by" in reasons(result)


def test_tied_weights_part_ways() -> None:
    first, second = conv(padding=1), conv(padding=1)
    second.weight = first.weight
    model = ready(Lambda(lambda n, x: n.bn(n.a(x)).sin() + n.b(x), a=first, b=second, bn=norm()))
    result = fold_affine(model, IMAGE)
    assert norms_left(result.module) == 0
    assert "(its weight is no longer tied to that of 'b')" in result.changes[0].what


def test_in_place_writes() -> None:
    def stale(n: Any, x: Tensor) -> Tensor:
        y = n.conv(x)
        z = n.bn(y)
        y.add_(1.0)
        return z.sin() + y

    result = fold_affine(ready(Lambda(stale, conv=conv(), bn=norm())), IMAGE)
    assert norms_left(result.module) == 1
    assert "written in place" in reasons(result)

    def behind(n: Any, x: Tensor) -> Tensor:
        y = n.conv(x).sin()
        return n.a(n.relu(n.bn(y))) + n.a(y)

    parts = {"conv": conv(), "a": conv(), "bn": nn.BatchNorm2d(4, affine=False)}
    for relu in (nn.ReLU(inplace=True), nn.ReLU()):
        fold_affine(ready(Lambda(behind, relu=relu, **parts)), IMAGE)


def test_a_map_of_the_input_does_not_let_writes_reach_it() -> None:
    """Were the BatchNorm gone, the ReLU would write into the caller's tensor."""
    model = ready(Lambda(lambda n, x: n.conv(n.relu(n.bn(x))), bn=norm(),
                         relu=nn.ReLU(inplace=True), conv=conv(kernel=1)))  # fmt: skip
    with torch.no_grad():
        model.bn.running_mean.zero_()
        model.bn.bias.zero_()
    x = IMAGE.clone()
    result = fold_affine(model, x)
    result.module(x)
    assert torch.equal(x, IMAGE)
    assert norms_left(result.module) == 0
    assert not result.module.relu.inplace
    assert model.relu.inplace


def test_an_activation_inside_the_batchnorm_becomes_plain_where_it_has_to() -> None:
    import timm

    model = Lambda(lambda n, x: (y := n.a(x)) + n.b(n.bn(y)), a=conv(padding=1), b=conv(padding=1),
                   bn=timm.layers.BatchNormAct2d(4))  # fmt: skip
    result = fold_affine(ready(model), IMAGE)
    assert norms_left(result.module) == 0
    assert model.bn.act.inplace


def test_what_stays_of_a_batchnorm_with_an_activation_is_one_node() -> None:
    import timm

    model = Lambda(lambda n, x: n.b(n.bn(x.sin())), b=conv(padding=1),
                   bn=timm.layers.BatchNormAct2d(4))  # fmt: skip
    result = fold_affine(ready(model), IMAGE)
    assert calls(result.module) == ["sin", "Sequential", "Conv2d"]
    assert [type(part).__name__ for part in result.module.bn_shift] == ["ChannelShift", "ReLU"]
    assert set(result.module.state_dict()) == {"b.weight", "b.bias", "bn_shift.map.shift"}


def test_training_mode_and_missing_statistics() -> None:
    model = ready(Chain(conv=conv(), bn=norm(), last=nn.BatchNorm2d(4, track_running_stats=False)))
    model.bn.train()
    result = run_on(model)
    assert "in training mode: call .eval() first" in reasons(result)
    assert "has no running statistics" in reasons(result)
    assert result.changes == ()
    model = ready(Chain(conv=conv(), bn=norm()))
    model.bn.running_var[0] = float("inf")
    assert "are not finite" in reasons(run_on(model))


def run_on(model: nn.Module) -> Any:
    return apply(model, FoldAffine(), example_inputs=(IMAGE,))


def test_half_precision_that_overflows_or_vanishes_is_refused() -> None:
    x = IMAGE.half()
    for variance, reason in ((1e-12, "not finite in torch.float16"), (1e14, "too small for")):
        model = Chain(conv=conv(bias=False), bn=norm()).eval()
        model.bn.eps = 0.0
        model.bn.running_var.fill_(variance)
        model.conv.half()
        with torch.no_grad():
            model.conv.weight.mul_(1e3 if variance < 1 else 1e-3)
        result = apply(model, FoldAffine(), example_inputs=(x,))
        assert norms_left(result.module) == 1
        assert reason in reasons(result)
    # A shift of 10⁶ would be a number in float32 alone.
    model = Chain(act=nn.SiLU(), bn=norm(), relu=nn.ReLU(), conv=conv()).eval().half()
    model.bn.float()
    with torch.no_grad():
        model.bn.running_mean.fill_(1e6)
        model.bn.bias.fill_(1.0)
    result = apply(model, FoldAffine(), example_inputs=(x,))
    assert "would not be held in torch.float16" in reasons(result)


def test_float32_is_the_exact_weight_rounded_once() -> None:
    """Three maps go into one layer: each entry is what float64 gives, rounded."""
    model = Lambda(lambda n, x: n.b(n.a(n.conv(n.pre(x.sin()))) * 0.3), pre=norm(), conv=conv(),
                   a=norm(), b=norm())  # fmt: skip
    ready(model).float()
    module = apply(model, FoldAffine(), example_inputs=(IMAGE.float(),)).module
    exact = apply(model.double(), FoldAffine(), example_inputs=(IMAGE,)).module
    assert module.conv.weight.dtype == torch.float32
    assert torch.equal(module.conv.weight, exact.conv.weight.float())
    assert torch.equal(module.conv.bias, exact.conv.bias.float())


def test_strides_are_kept_and_views_still_work() -> None:
    model = ready(Chain(conv=conv(), bn=norm(), act=nn.Sigmoid())).to(
        memory_format=torch.channels_last
    )
    module = fold_affine(model, IMAGE).module
    assert module.conv.weight.is_contiguous(memory_format=torch.channels_last)

    def forward(n: Any, x: Tensor) -> Tensor:
        y = n.bn(n.conv(x).permute(0, 1, 3, 2))
        return y.view(y.shape[0], -1).sin()

    fold_affine(ready(Lambda(forward, conv=conv(), bn=norm())), IMAGE)
    result = fold_affine(ready(Lambda(forward, conv=nn.GELU(), bn=norm())), IMAGE)
    assert norms_left(result.module) == 1


def test_a_network_in_two_modes_keeps_its_inference_graph() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = conv(), norm()

        def forward(self, x: Tensor) -> Tensor:
            y = self.bn(self.conv(x))
            return y.sin() if self.training else y.cos()

    model = ready(Two())
    result = apply(model, FoldAffine(), example_inputs=(IMAGE,))
    assert "the training graph was dropped" in str(result)
    with torch.no_grad():
        assert relative(result.module(IMAGE), model(IMAGE)) < 1e-12
    module = trace(model.train(), example_inputs=(IMAGE,))
    plan = run(FoldAffine(), module)
    assert plan.changes == ()
    assert "the network is in training mode" in plan.skipped[0].reason
