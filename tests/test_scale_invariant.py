"""Parameters whose scale a normalisation hides: the proof against scaling each and looking."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F

import dropsurgery as ds
from dropsurgery.errors import ArgumentError, ArgumentTypeError
from tests.helpers import randomize


def outputs(model: nn.Module, x: Tensor) -> Tensor:
    torch.manual_seed(0)
    with torch.no_grad():
        return model(x)


def brute(
    model: nn.Module,
    x: Tensor,
    *,
    training: bool = True,
    eps: float = 1e-20,
    names: set[str] | None = None,
) -> set[str]:
    """Return the parameters that may be scaled by 3 without a change of the float64 outputs."""
    model = copy.deepcopy(model).double().train(training)
    for layer in model.modules():
        if isinstance(getattr(layer, "eps", None), float):
            layer.eps = eps
    found = set()
    for name, _ in model.named_parameters():
        if names is not None and name not in names:
            continue
        # Running statistics follow the weights; each comparison starts from the same ones.
        states = [copy.deepcopy(model) for _ in range(2)]
        with torch.no_grad():
            dict(states[1].named_parameters())[name].mul_(3.0)
        before, after = (outputs(state, x.double()) for state in states)
        scale = before.abs().max().clamp(min=1e-3)
        if (before - after).abs().max() / scale < 1e-9:
            found.add(name)
    return found


class Many(nn.Module):
    """Every way to a BatchNorm that the proof knows, and near misses."""

    def __init__(self) -> None:
        super().__init__()
        self.plain = nn.Conv2d(3, 4, 3, bias=False)
        self.norm1 = nn.BatchNorm2d(4)
        self.biased, self.norm2 = nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)
        self.relu_then = nn.Conv2d(4, 4, 3, bias=False)
        self.relu_biased = nn.Conv2d(4, 4, 3)
        self.norm3, self.norm4 = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.two, self.one = nn.Conv2d(4, 6, 1, bias=False), nn.Conv2d(6, 4, 1, bias=False)
        self.norm5 = nn.BatchNorm2d(4)
        self.left, self.right = nn.Conv2d(4, 2, 1, bias=False), nn.Conv2d(4, 2, 1)
        self.norm6 = nn.BatchNorm2d(4)
        self.group, self.groups = nn.Conv2d(4, 4, 1, bias=False), nn.GroupNorm(2, 4)
        self.group_biased = nn.Conv2d(4, 4, 1)
        self.instance_biased, self.instance = nn.Conv2d(4, 4, 1), nn.InstanceNorm2d(4)
        self.layer, self.last = nn.Linear(4, 4, bias=False), nn.LayerNorm(4)
        self.layer_biased, self.rms = nn.Linear(4, 4), nn.RMSNorm(4)
        self.drop, self.pool = nn.Dropout(0.2), nn.MaxPool2d(2)
        self.flat, self.norm7 = nn.Linear(4, 5), nn.BatchNorm1d(5)
        self.head = nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm1(self.plain(x)))
        x = F.relu(self.norm2(self.pool(self.biased(x))))
        x = self.norm3(F.leaky_relu(self.drop(self.relu_then(x)), 0.1))
        x = self.norm4(F.relu(self.relu_biased(x))) + 1
        x = self.norm5(self.one(F.relu(self.two(x))))
        x = self.norm6(F.relu(torch.cat([self.left(x), self.right(x)], 1)))
        x = self.groups(self.group(x)) + self.groups(self.group_biased(x))
        x = self.instance(self.instance_biased(x))
        x = x.permute(0, 2, 3, 1)
        x = F.layer_norm(F.leaky_relu(self.layer(x)), (4,), eps=1e-20) + self.last(
            self.layer_biased(x)
        )
        x = self.rms(x * 2).mean((1, 2))
        return self.head(self.norm7(self.flat(x)))


def test_the_proof_agrees_with_scaling_each() -> None:
    torch.manual_seed(0)
    model = randomize(Many())
    x = torch.randn(6, 3, 16, 16)
    found = ds.find_scale_invariant(model)
    names = set(found.names)
    oracle = brute(model, x)
    assert names <= oracle, names - oracle
    assert names == {
        "plain.weight", "biased.weight", "biased.bias", "relu_then.weight", "two.weight",
        "one.weight", "left.weight", "group.weight", "instance_biased.weight",
        "instance_biased.bias", "layer.weight", "rms.weight", "flat.weight", "flat.bias",
    }  # fmt: skip
    # What scaling finds beyond the proof: that the sum goes through an RMSNorm is not followed.
    assert oracle - names <= {"last.weight", "last.bias", "groups.weight", "groups.bias"}
    reasons = {one.name: one.reason for one in found.visible}
    assert reasons["relu_biased.weight"] == "'relu_2' sees it"
    assert all(one.reason for one in found.visible)


def test_the_mode_is_told() -> None:
    torch.manual_seed(0)
    model = randomize(Many())
    x = torch.randn(6, 3, 16, 16)
    in_both = {one.name for one in ds.find_scale_invariant(model) if not one.batch}
    assert in_both == {
        "group.weight", "instance_biased.weight", "instance_biased.bias", "layer.weight",
    }  # fmt: skip
    assert in_both <= brute(model, x, training=False)
    assert "plain.weight" not in brute(model, x, training=False)


def test_eps_is_what_is_left() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4, eps=1e-2))
    x = torch.randn(4, 3, 8, 8)
    assert ds.find_scale_invariant(model).names == ("0.weight",)
    assert "0.weight" not in brute(model, x, eps=1e-2)
    assert "0.weight" in brute(model, x)


@pytest.mark.parametrize(
    "case",
    [
        "frozen",
        "own train",
        "axis",
        "shared",
        "read",
        "residual",
        "hook",
        "gate",
        "padding",
    ],
)
def test_near_misses(case: str) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)
            self.norm = nn.BatchNorm1d(4)
            self.conv = nn.Conv1d(4, 4, 3, padding=1)

        def train(self, mode: bool = True) -> Net:
            super().train(mode)
            if case == "own train":
                self.norm.eval()
            return self

        def forward(self, x: Tensor) -> Tensor:
            if case == "axis":  # the bias lies on axis 2, the BatchNorm's channels on axis 1
                return self.norm(self.linear(x[:, :, None].expand(-1, 4, 4) * x[:, None]))
            if case == "padding":
                return self.norm(self.conv(self.linear(x)[:, :, None].expand(-1, 4, 5)))
            y = self.linear(x)
            if case == "shared":
                y = self.linear(torch.tanh(y))
            elif case == "read":
                return self.norm(y) * self.linear.weight.mean()
            elif case == "residual":
                y = y + x
            elif case == "gate":
                y = y * torch.sigmoid(y)
            return self.norm(y)

    torch.manual_seed(0)
    model = Net().train()
    if case == "frozen":
        model.norm.eval()
    elif case == "hook":
        model.linear.register_forward_hook(lambda module, args, out: torch.tanh(out))
    names = set(ds.find_scale_invariant(model).names)
    assert not {name for name in names if name.startswith("linear")}
    if case != "frozen":
        assert not {n for n in brute(model, torch.randn(8, 4)) if n == "linear.weight"}


def test_two_uses_that_are_both_divided_out() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1, bias=False)
            self.a, self.b = nn.BatchNorm2d(3), nn.BatchNorm2d(3)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.conv(self.a(self.conv(x))))

    model = Twice()
    found = ds.find_scale_invariant(model)
    assert found.names == ("conv.weight",)
    assert found.invariant[0].norms == ("a", "b")
    assert "conv.weight" in brute(model, torch.randn(4, 3, 5, 5))


def test_networks_of_torchvision_and_timm() -> None:
    resnet = torchvision.models.resnet18()
    names = ds.find_scale_invariant(resnet).names
    assert len(names) == 20
    assert all("conv" in name or "downsample.0" in name for name in names)
    model = timm.create_model("efficientnet_b0")
    found = ds.find_scale_invariant(model)
    assert len(found) > 40
    assert "divided out by" in str(found)
    small = randomize(torchvision.models.mobilenet_v3_small(dropout=0.0))
    names = set(ds.find_scale_invariant(small).names)
    assert len(names) == 34
    some = set(sorted(names)[::12])
    assert brute(small, torch.randn(4, 3, 64, 64), names=some) == some


# Weight decay


def test_groups_leave_out_norms_biases_and_what_has_no_scale() -> None:
    model = Many()
    decayed, spared = ds.weight_decay_groups(model, 0.05)
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.05, 0.0)
    assert len(decayed["params"]) + len(spared["params"]) == len(list(model.parameters()))
    assert all(name.endswith("weight") for name in decayed["names"])
    assert not [n for n in decayed["names"] if "norm" in n or "groups" in n or "rms" in n]
    less, more = ds.weight_decay_groups(model, 0.05, scale_invariant=False)
    assert set(decayed["names"]) - set(less["names"]) == {
        n for n in ds.find_scale_invariant(model).names if n.endswith("weight") and "rms" not in n
    }
    assert "plain.weight" in more["names"]
    every = ds.weight_decay_groups(model, 0.05, norms=True, biases=True)
    assert len(every) == 1
    chosen = ds.weight_decay_groups(model, 0.05, where=("head.*", "flat.*"))[1]
    assert "head.weight" in chosen["names"]
    torch.optim.AdamW(ds.weight_decay_groups(model, 0.05), lr=1e-3)


def test_frozen_and_attention_parameters() -> None:
    model = nn.TransformerEncoderLayer(4, 2, 8)
    model.linear1.requires_grad_(False)
    decayed, spared = ds.weight_decay_groups(model, 0.1)
    assert decayed["names"] == [
        "self_attn.in_proj_weight", "self_attn.out_proj.weight", "linear2.weight",
    ]  # fmt: skip
    assert "self_attn.in_proj_bias" in spared["names"]
    assert not [n for n in (*decayed["names"], *spared["names"]) if n.startswith("linear1")]


def test_decay_of_a_scale_changes_nothing_but_the_learning_rate() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4))
    x = torch.randn(4, 3, 8, 8)
    before = outputs(copy.deepcopy(model), x)
    with torch.no_grad():
        model[0].weight.mul_(0.5)
    torch.testing.assert_close(outputs(model, x), before, rtol=1e-3, atol=1e-3)


def test_bad_arguments() -> None:
    model = nn.Linear(2, 2)
    with pytest.raises(ArgumentError, match="weight_decay is -1"):
        ds.weight_decay_groups(model, -1)
    with pytest.raises(ArgumentTypeError, match="weight_decay is a number"):
        ds.weight_decay_groups(model, "0.1")  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="matches none of the 2 parameters"):
        ds.weight_decay_groups(model, 0.1, where="conv*")
    with pytest.raises(ArgumentTypeError, match="where chooses parameters by a pattern"):
        ds.weight_decay_groups(model, 0.1, where=3)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="no parameters to train"):
        ds.weight_decay_groups(nn.ReLU(), 0.1)
    for call in (ds.find_scale_invariant, lambda m: ds.L1Penalty(m, 0.1)):
        with pytest.raises(ArgumentTypeError, match="got str"):
            call("net")  # type: ignore[arg-type]


# L1


def test_the_penalty_has_the_gradient_of_the_l1_norm() -> None:
    model = nn.Linear(3, 2)
    penalty = ds.L1Penalty(model, 0.5)
    value = penalty()
    assert value.item() == pytest.approx(0.5 * model.weight.abs().sum().item())
    value.backward()
    assert torch.equal(model.weight.grad, 0.5 * model.weight.sign())
    assert model.bias.grad is None
    assert repr(penalty) == "L1Penalty(strength=0.5, 1 parameters)"


def test_shrinking_finds_the_weights_that_matter_and_zeroes_the_rest() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400, 20, generator=generator)
    y = x[:, :3] @ torch.tensor([2.0, -1.0, 0.5])
    model = nn.Linear(20, 1)
    penalty = ds.L1Penalty(model, 0.05, where="weight")
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    for _ in range(300):
        optimizer.zero_grad()
        (model(x)[:, 0] - y).square().mean().backward()
        optimizer.step()
        penalty.shrink(0.05)
    found = penalty.zeros()
    assert found.counts == (("weight", 17, 20),)
    assert found.share == pytest.approx(0.85)
    assert "85.0% of the entries are zero (w = 0)" in str(found)
    # The loss term alone brings them near zero and not onto it.
    plain = nn.Linear(20, 1)
    term = ds.L1Penalty(plain, 0.05, where="weight")
    optimizer = torch.optim.SGD(plain.parameters(), 0.05)
    for _ in range(300):
        optimizer.zero_grad()
        ((plain(x)[:, 0] - y).square().mean() + term()).backward()
        optimizer.step()
    assert term.zeros().share == 0.0
    assert term.zeros(0.01).share == pytest.approx(0.85)
    assert "|w| ≤ 0.01" in str(term.zeros(0.01))


def test_bad_arguments_of_the_penalty() -> None:
    with pytest.raises(ArgumentError, match=r"strength is -0\.1"):
        ds.L1Penalty(nn.Linear(2, 2), -0.1)
    with pytest.raises(ArgumentError, match="matches none of the 2 parameters"):
        ds.L1Penalty(nn.Linear(2, 2), 0.1, where="*gamma")
    with pytest.raises(ArgumentTypeError, match="lr is a number"):
        ds.L1Penalty(nn.Linear(2, 2), 0.1).shrink("fast")  # type: ignore[arg-type]
