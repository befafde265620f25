"""FoldAffine on small networks: one rule at a time, as code before and after, and as numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import dropsurgery as ds
from dropsurgery.layers import ChannelScale, ChannelShift, ClassicDropout
from dropsurgery.models import import_torchvision
from tests.fold_helpers import (
    IMAGE,
    Chain,
    Lambda,
    calls,
    fold_affine,
    norms_left,
    ready,
    reasons,
    values,
)

TOKENS = torch.randn(2, 5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(5))


def conv(inputs: int = 4, outputs: int = 4, kernel: int = 3, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, **options)


def norm(channels: int = 4) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels)


# Between a convolution and the BatchNorm that goes back into it: what stays of the graph.
BACK: dict[str, tuple[Callable[[Any, Tensor], Tensor], dict[str, Any]]] = {
    "average pooling": (lambda n, y: n.bn(F.avg_pool2d(y, 2)), {}),
    "average pooling, its padding not counted": (
        lambda n, y: n.bn(n.pool(y)),
        {"pool": nn.AvgPool2d(3, padding=1, count_include_pad=False, ceil_mode=True)},
    ),
    "adaptive average": (lambda n, y: n.bn(n.pool(y)), {"pool": nn.AdaptiveAvgPool2d(2)}),
    "mean, kept": (lambda n, y: n.bn(y.mean((2, 3), keepdim=True)), {}),
    "maximum": (lambda n, y: n.bn(n.pool(y)), {"pool": nn.MaxPool2d(3, 2, padding=1)}),
    "upsampling": (
        lambda n, y: n.bn(F.interpolate(y, scale_factor=2.0, mode="bilinear")),
        {},
    ),
    "reflection": (lambda n, y: n.bn(F.pad(y, (1, 1, 2, 0), mode="reflect")), {}),
    "replication": (lambda n, y: n.bn(n.pad(y)), {"pad": nn.ReplicationPad2d(1)}),
    "permute there and back": (
        lambda n, y: n.bn(y.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)),
        {},
    ),
    "transpose": (lambda n, y: n.bn(y.transpose(2, 3)), {}),
    "slice of the image": (lambda n, y: n.bn(y[:, :, 1:-1, ::2]), {}),
    "unsqueeze and squeeze": (lambda n, y: n.bn(y.unsqueeze(1).squeeze(1)), {}),
    "reshape to tokens": (
        lambda n, y: n.bn1(y.reshape(y.shape[0], 4, -1)),
        {"bn1": nn.BatchNorm1d(4)},
    ),
    "flatten": (lambda n, y: n.bn1(y.flatten(2)), {"bn1": nn.BatchNorm1d(4)}),
    "clone": (lambda n, y: n.bn(y.clone().contiguous()), {}),
    "identity": (lambda n, y: n.bn(n.id(y)), {"id": nn.Identity()}),
}


@pytest.mark.parametrize("name", BACK)
def test_back_into_the_layer_before(name: str) -> None:
    forward, parts = BACK[name]
    layers = {"bn": norm()} if "bn1" not in parts else {}
    model = ready(Lambda(lambda n, x: forward(n, n.conv(x)), conv=conv(), **layers, **parts))
    result = fold_affine(model, IMAGE)
    assert norms_left(result.module) == 0
    assert result.skipped == ()
    left = calls(result.module)
    assert "ChannelShift" not in left
    assert "ChannelScale" not in left


def test_changes_tell_where_each_part_went() -> None:
    model = ready(Chain(a=conv(), bn=norm(), act=nn.ReLU(), b=conv()))
    (change,) = fold_affine(model, IMAGE).changes
    assert change.what == "BatchNorm2d 'bn': scale into Conv2d 'a'; shift into Conv2d 'a'"
    model = ready(Chain(act=nn.SiLU(), bn=norm(), b=conv(kernel=1)))
    (change,) = fold_affine(model, IMAGE).changes
    assert change.what == "BatchNorm2d 'bn': shift into Conv2d 'b'; scale into Conv2d 'b'"


def test_add_of_two_convolutions() -> None:
    model = ready(
        Lambda(lambda n, x: n.bn(n.a(x) + n.b(x)).tanh(), a=conv(), b=conv(bias=False), bn=norm())
    )
    result = fold_affine(model, IMAGE)
    assert calls(result.module) == ["Conv2d", "Conv2d", "add", "tanh"]
    assert result.module.b.bias is None or not result.module.b.bias.any()


def test_difference_of_two_convolutions() -> None:
    model = ready(
        Lambda(lambda n, x: n.bn(torch.sub(n.a(x), n.b(x))).tanh(), a=conv(), b=conv(), bn=norm())
    )
    assert calls(fold_affine(model, IMAGE).module) == ["Conv2d", "Conv2d", "sub", "tanh"]


def test_concatenation_is_split_by_channels() -> None:
    model = ready(
        Lambda(
            lambda n, x: n.bn(torch.cat([n.a(x), n.b(x), n.a2(x)], 1)).tanh(),
            a=conv(4, 3), b=conv(4, 5), a2=conv(4, 3), bn=norm(11),
        )
    )  # fmt: skip
    assert calls(fold_affine(model, IMAGE).module) == ["Conv2d"] * 3 + ["cat", "tanh"]


def test_concatenation_over_another_axis() -> None:
    model = ready(
        Lambda(lambda n, x: n.bn(torch.cat([n.a(x), n.b(x)], 2)).tanh(),
               a=conv(), b=conv(), bn=norm())
    )  # fmt: skip
    assert norms_left(fold_affine(model, IMAGE).module) == 0


@pytest.mark.parametrize("method", ["chunk", "split", "sizes", "slice", "torch"])
def test_parts_of_a_layer(method: str) -> None:
    """A BatchNorm of some channels goes into these; the others stay."""

    def forward(n: Any, x: Tensor) -> Tensor:
        y = n.conv(x)
        first, second = {
            "chunk": lambda: y.chunk(2, 1),
            "split": lambda: y.split(4, dim=1),
            "sizes": lambda: torch.split(y, [4, 4], dim=1),
            "slice": lambda: (y[:, :4], y[:, 4:]),
            "torch": lambda: torch.chunk(y, 2, dim=-3),
        }[method]()
        return n.bn(first) * second.sigmoid()

    model = ready(Lambda(forward, conv=conv(4, 8), bn=norm()))
    assert norms_left(fold_affine(model, IMAGE).module) == 0


@pytest.mark.parametrize("act", [nn.ReLU(), nn.LeakyReLU(0.2), nn.PReLU(4), nn.ReLU(inplace=True)])
def test_a_positive_scale_passes_an_activation_and_the_shift_goes_on(act: nn.Module) -> None:
    """Conv → ReLU → BN → linear: the scale goes back and the shift forward."""
    model = ready(
        Lambda(
            lambda n, x: n.fc(n.bn(n.act(n.conv(x))).mean((2, 3))),
            conv=conv(), act=act, bn=norm(), fc=nn.Linear(4, 3),
        )
    )  # fmt: skip
    result = fold_affine(model, IMAGE)
    assert norms_left(result.module) == 0
    assert result.changes[0].what == (
        "BatchNorm2d 'bn': scale into Conv2d 'conv'; shift into Linear 'fc'"
    )


def test_shift_alone_stays_before_a_relu() -> None:
    """BN → ReLU → conv with s > 0 is + t/s → ReLU → scaled conv."""
    model = ready(Lambda(lambda n, x: n.conv(F.relu(n.bn(x.sin()))), bn=norm(), conv=conv()))
    result = fold_affine(model, IMAGE)
    assert calls(result.module) == ["sin", "ChannelShift", "relu", "Conv2d"]
    assert result.module.bn_shift.shift.shape == (4, 1, 1)
    assert result.changes[0].what.endswith("scale into Conv2d 'conv'; 'bn_shift' only adds")
    assert "its shift stays: its shift cannot go back: " in reasons(result)


def test_scale_alone_stays_where_only_the_shift_can_go() -> None:
    """GELU → BN → add of the input → linear: the shift goes through the add, the scale cannot."""
    model = ready(
        Lambda(
            lambda n, x: n.head(n.bn(F.gelu(n.a(x))) + x),
            a=conv(kernel=1), bn=norm(), head=conv(kernel=1),
        )
    )  # fmt: skip
    result = fold_affine(model, IMAGE)
    assert calls(result.module) == ["Conv2d", "gelu", "ChannelScale", "add", "Conv2d"]


def test_several_readers_take_it_together() -> None:
    model = ready(
        Lambda(
            lambda n, x: n.a(y := n.bn(x.sin())) * n.b(y),
            bn=norm(), a=conv(kernel=1), b=conv(kernel=1),
        )
    )  # fmt: skip
    assert calls(fold_affine(model, IMAGE).module) == ["sin", "Conv2d", "Conv2d", "mul"]


def test_a_preactivation_residual_stream() -> None:
    """The shift of a BatchNorm on a stream goes into the branch before, and out of the next."""

    def forward(n: Any, x: Tensor) -> Tensor:
        x = n.stem(x)
        for bn, branch in ((n.bn1, n.conv1), (n.bn2, n.conv2), (n.bn3, n.conv3)):
            x = x + branch(F.relu(bn(x)))
        return n.head(x.mean((2, 3)))

    layers = {f"conv{i}": conv(padding=1) for i in (1, 2, 3)}
    norms = {f"bn{i}": norm() for i in (1, 2, 3)}
    model = ready(Lambda(forward, stem=conv(), head=nn.Linear(4, 2), **layers, **norms))
    result = fold_affine(model, IMAGE)
    assert norms_left(result.module) == 0
    assert result.skipped == ()


def test_a_scale_takes_the_short_way_where_the_other_is_a_whole_stream() -> None:
    """Else every layer of a residual stream would be scaled by every BatchNorm that reads it."""

    def forward(n: Any, x: Tensor) -> Tensor:
        x = n.stem(x)
        for i in range(4):
            x = x + getattr(n, f"b{i}")(F.relu(getattr(n, f"a{i}")(getattr(n, f"bn{i}")(x))))
        return n.head(x)

    names = [f"{kind}{i}" for i in range(4) for kind in "ab"]
    layers = {name: conv(kernel=1) for name in names}
    norms = {f"bn{i}": norm() for i in range(4)}
    model = ready(Lambda(forward, stem=conv(), head=conv(kernel=1), **layers, **norms))
    result = fold_affine(model, IMAGE)
    assert norms_left(result.module) == 0
    assert [change.what for change in result.changes] == [
        f"BatchNorm2d 'bn{i}': shift into Conv2d 'a{i}'; scale into Conv2d 'a{i}'" for i in range(4)
    ]
    assert torch.equal(result.module.stem.weight, model.stem.weight)
    with torch.no_grad():  # what cannot be divided by zero goes the long way
        model.bn0.weight[1] = 0.0
    assert norms_left(fold_affine(model, IMAGE).module) <= 1


def test_dense_features_that_several_batchnorms_read() -> None:
    def forward(n: Any, x: Tensor) -> Tensor:
        a = n.a(x)
        b = n.b(F.relu(n.bn1(a)))
        c = n.c(F.relu(n.bn2(torch.cat([a, b], 1))))
        return n.d(F.relu(n.bn3(torch.cat([a, b, c], 1))))

    model = ready(
        Lambda(forward, a=conv(4, 4), b=conv(4, 2, 1), c=conv(6, 2, 1), d=conv(8, 2, 1),
               bn1=norm(4), bn2=norm(6), bn3=norm(8))
    )  # fmt: skip
    result = fold_affine(model, IMAGE)
    assert norms_left(result.module) == 0
    assert calls(result.module).count("ChannelShift") == 2


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("padding", [0, 1])
def test_forward_into_a_convolution(groups: int, padding: int) -> None:
    model = ready(Chain(act=nn.SiLU(), bn=norm(), conv=conv(4, 8, padding=padding, groups=groups)))
    result = fold_affine(model, IMAGE)
    assert norms_left(result.module) == 0
    assert ("ChannelShift" in calls(result.module)) == bool(padding)


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
def test_forward_into_a_convolution_that_pads_with_values(mode: str) -> None:
    model = ready(Chain(act=nn.SiLU(), bn=norm(), conv=conv(padding=1, padding_mode=mode)))
    assert calls(fold_affine(model, IMAGE).module) == ["SiLU", "Conv2d"]


@pytest.mark.parametrize("groups", [1, 2])
def test_only_the_scale_goes_forward_into_a_transposed_convolution(groups: int) -> None:
    model = ready(Chain(act=nn.SiLU(), bn=norm(), up=nn.ConvTranspose2d(4, 6, 3, 2, groups=groups)))
    assert calls(fold_affine(model, IMAGE).module) == ["SiLU", "ChannelShift", "ConvTranspose2d"]


def test_forward_through_the_mean_into_the_head() -> None:
    model = ready(
        Lambda(lambda n, x: n.fc(n.drop(n.pool(n.bn(x.sin())).flatten(1))), bn=norm(),
               pool=nn.AdaptiveAvgPool2d(1), drop=nn.Dropout(), fc=nn.Linear(4, 3))
    )  # fmt: skip
    result = fold_affine(model, IMAGE)
    assert calls(result.module) == ["sin", "AdaptiveAvgPool2d", "flatten", "Linear"]


def test_forward_into_a_linear_layer_behind_the_whole_image() -> None:
    """Each channel is one column for every place of the image."""
    model = ready(
        Lambda(lambda n, x: n.fc(n.bn(x.sin()).flatten(1)), bn=norm(), fc=nn.Linear(4 * 72, 3))
    )
    assert calls(fold_affine(model, IMAGE).module) == ["sin", "flatten", "Linear"]


def test_pixel_shuffle() -> None:
    model = ready(Chain(conv=conv(4, 16), up=nn.PixelShuffle(2), bn=norm(), act=nn.Tanh()))
    assert calls(fold_affine(model, IMAGE).module) == ["Conv2d", "PixelShuffle", "Tanh"]
    model = ready(Chain(act=nn.SiLU(), bn=norm(), d=nn.PixelUnshuffle(2), c=conv(16, 2, 1)))
    image = IMAGE[:, :, :8]
    assert calls(fold_affine(model, image).module) == ["SiLU", "PixelUnshuffle", "Conv2d"]


# --- borders -----------------------------------------------------------------------------------


def test_maps_of_borders() -> None:
    """The shift before a convolution with zero padding: one map behind it, if that is cheaper."""
    small = {"act": nn.SiLU(), "bn": norm(), "conv": conv(4, 3, stride=2, padding=1, dilation=2)}
    large = {"act": nn.SiLU(), "bn": norm(), "conv": conv(4, 8, padding=1)}
    without = ["SiLU", "ChannelShift", "Conv2d"]
    for layers, cost in ((small, ["SiLU", "Conv2d", "ChannelShift"]), (large, without)):
        model = ready(Chain(**layers))
        assert calls(fold_affine(model, IMAGE).module) == without
        result = fold_affine(model, IMAGE, border_maps="cost")
        assert calls(result.module) == cost
        if cost == without:
            assert "would cost more than the addition that it saves" in reasons(result)
        result = fold_affine(model, IMAGE, border_maps="always")
        assert calls(result.module) == ["SiLU", "Conv2d", "ChannelShift"]
        assert result.module.conv_border.shift.dim() == 3
        unknown = fold_affine(model, IMAGE, shapes=False, border_maps="always")
        assert calls(unknown.module) == without


@pytest.mark.parametrize("how", ["function", "named", "same"])
def test_maps_of_borders_of_functions_and_of_padding_that_is_computed(how: str) -> None:
    """F.conv2d with its operands as arguments, and timm's convolution that pads as TensorFlow's."""
    import_torchvision()
    from timm.layers.conv2d_same import Conv2dSame

    forwards: dict[str, Callable[[Any, Tensor], Tensor]] = {
        "function": lambda n, y: F.conv2d(y, n.w, None, 2, 1, 1, 2),
        "named": lambda n, y: F.conv2d(y, n.w, bias=n.b, stride=(2, 1), padding=(2, 1), groups=2),
        "same": lambda n, y: n.conv(y),
    }
    model = ready(
        Lambda(lambda n, x: forwards[how](n, n.bn(x.sin())), bn=norm(), w=values(6, 2, 3, 3),
               b=values(6), conv=Conv2dSame(4, 6, 3, 2, groups=2))
    )  # fmt: skip
    name = "Conv2dSame" if how == "same" else "conv2d"
    assert calls(fold_affine(model, IMAGE).module) == ["sin", "ChannelShift", name]
    result = fold_affine(model, IMAGE, border_maps="always")
    assert calls(result.module) == ["sin", name, "ChannelShift"]


def test_a_map_of_borders_follows_a_batchnorm_behind_it(tmp_path: Any) -> None:
    layers = {"act": nn.SiLU(), "a": norm(), "conv": conv(4, 4, padding=1, groups=2), "b": norm()}
    model = ready(Chain(**layers))
    module = fold_affine(model, IMAGE, border_maps="always").module
    assert calls(module) == ["SiLU", "Conv2d", "ChannelShift"]
    ds.save(module, tmp_path)
    loaded = ds.load(tmp_path, Chain(**layers).double())
    assert torch.equal(loaded(IMAGE), module(IMAGE))
    with pytest.raises(ds.errors.PassError, match="border_maps is 'sometimes'"):
        ds.apply(model, ds.FoldAffine(border_maps="sometimes"))


# --- what is no BatchNorm ----------------------------------------------------------------------


def test_layer_scale_and_its_kin() -> None:
    def forward(n: Any, x: Tensor) -> Tensor:
        y = n.fc2(F.gelu(n.fc1(n.ln(x))))
        return n.out(n.drop(x + n.gamma * y) * 0.5 / 3 - n.offset)

    model = ready(
        Lambda(forward, ln=nn.LayerNorm(6), fc1=nn.Linear(6, 8), fc2=nn.Linear(8, 6),
               gamma=nn.Parameter(values(6, seed=1)), offset=values(1, 1, 6, seed=2),
               drop=ClassicDropout(0.3), out=nn.Linear(6, 2))
    )  # fmt: skip
    result = fold_affine(model, TOKENS)
    assert calls(result.module) == ["LayerNorm", "Linear", "gelu", "Linear", "add", "Linear"]
    assert "gamma" not in result.module.state_dict()


def test_input_normalisation() -> None:
    """Without zero padding it goes into the stem; with it, the shift stays the first operation."""
    for padding, left in ((0, ["Conv2d"]), (1, ["ChannelShift", "Conv2d"])):
        model = ready(
            Lambda(lambda n, x: n.conv((x - n.mean) / n.std), conv=conv(padding=padding),
                   mean=values(4, 1, 1, seed=1), std=values(4, 1, 1, seed=2))
        )  # fmt: skip
        result = fold_affine(model, IMAGE)
        assert [name.replace("sub", "ChannelShift") for name in calls(result.module)] == left


@pytest.mark.parametrize("layer", [nn.GroupNorm(2, 4), nn.InstanceNorm2d(4, affine=True)])
def test_normalisations_take_it_into_their_own_weights(layer: nn.Module) -> None:
    model = ready(Chain(layer=layer, bn=norm(), act=nn.Tanh()))
    assert calls(fold_affine(model, IMAGE).module) == [type(layer).__name__, "Tanh"]


def test_layer_norm_takes_it_into_its_own_weights() -> None:
    model = ready(
        Lambda(lambda n, x: n.bn(n.ln(x).transpose(1, 2)), ln=nn.LayerNorm(6),
               bn=nn.BatchNorm1d(6))
    )  # fmt: skip
    assert calls(fold_affine(model, TOKENS).module) == ["LayerNorm", "transpose"]


def test_batchnorm_takes_in_what_it_can() -> None:
    """The scale of one goes through the ReLU into the next, which stays."""
    model = ready(Lambda(lambda n, x: n.b(F.relu(n.a(x.sin()))).cos(), a=norm(), b=norm()))
    result = fold_affine(model, IMAGE)
    assert calls(result.module) == ["sin", "ChannelShift", "relu", "BatchNorm2d", "cos"]


@pytest.mark.parametrize("training", [None, False])
@pytest.mark.parametrize("rank", [2, 3, 4])
def test_a_batchnorm_function_takes_in_what_it_can(training: bool | None, rank: int) -> None:
    """It becomes a layer, which has a place for another weight and bias."""

    def forward(n: Any, x: Tensor) -> Tensor:
        y = F.relu(n.a(x.sin()))
        off = n.training if training is None else training
        return F.batch_norm(y, n.mean, n.var, None, n.b, off).cos()

    first = nn.BatchNorm2d(4) if rank == 4 else nn.BatchNorm1d(4)
    model = ready(Lambda(forward, a=first, mean=values(4), var=values(4, seed=1),
                         b=nn.Parameter(values(4, seed=2))))  # fmt: skip
    image = IMAGE.flatten(2) if rank == 3 else IMAGE if rank == 4 else IMAGE[:, :, 0, 0]
    result = fold_affine(model, image)
    kind = "BatchNorm2d" if rank == 4 else "BatchNorm1d"
    assert calls(result.module) == ["sin", "ChannelShift", "relu", kind, "cos"]
    assert not {"mean", "var", "b"} & set(result.module.state_dict())
    result.module.train()  # an inference graph: nothing follows the mode
    assert not result.module.batch_norm_folded.weight.requires_grad


# --- the API -----------------------------------------------------------------------------------


def test_without_example_inputs_images_are_proved_all_the_same() -> None:
    model = ready(Chain(a=conv(), act=nn.ReLU(), pool=nn.MaxPool2d(2), bn=norm(), b=conv(4, 2, 1)))
    assert norms_left(fold_affine(model, IMAGE, shapes=False).module) == 0


def test_the_remaining_layers_are_like_the_batchnorm_was() -> None:
    model = ready(Lambda(lambda n, x: n.conv(F.relu(n.bn(x.sin()))), bn=norm(), conv=conv()))
    model.bn.requires_grad_(False)
    module = fold_affine(model, IMAGE).module
    assert isinstance(module.bn_shift, ChannelShift)
    assert not module.bn_shift.shift.requires_grad
    assert module.conv.weight.requires_grad
    assert "ChannelShift((4, 1, 1))" in repr(module)
    assert repr(ChannelScale(torch.ones(3))) == "ChannelScale((3,))"


def test_a_saved_surgery_is_rebuilt_on_a_model_with_other_weights(tmp_path: Any) -> None:
    def build(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        layers = {"a": conv(), "act": nn.ReLU(), "bn": norm(), "b": conv(padding=1), "bn2": norm(),
                  "gelu": nn.GELU(), "bn3": norm(), "relu": nn.ReLU(), "c": conv()}  # fmt: skip
        return ready(Chain(**layers), seed)

    module = fold_affine(build(0), IMAGE).module
    ds.save(module, tmp_path)
    other = build(1)
    with torch.no_grad():
        other.bn3.weight.neg_()  # what was proved of the saved one does not hold for this one
        loaded = ds.load(tmp_path, other)
        assert torch.equal(loaded(IMAGE), module(IMAGE))
    assert loaded.code == module.code
    assert list(loaded.state_dict()) == list(module.state_dict())


def test_a_saved_surgery_needs_its_network() -> None:
    item = ds.FoldAffine.from_json(
        {"steps": [{"step": "rewrite", "node": "nowhere", "how": "gone"}]}
    )
    with pytest.raises(ds.errors.PassError, match="is to change nowhere, and there is no such"):
        ds.apply(Chain(a=conv()), item)
