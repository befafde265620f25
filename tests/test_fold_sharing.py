"""FoldBatchNorm where modules are called twice and parameters are tied."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dropsurgery.graph.trace import trace
from dropsurgery.passes.base import apply, run
from dropsurgery.passes.fold_batchnorm import FoldBatchNorm
from tests.fold_helpers import Chain, Lambda, assert_all_folded, fold, norms_left, ready, reasons

X = torch.randn(2, 4, 7, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def conv() -> nn.Module:
    return nn.Conv2d(4, 4, 3, padding=1)


def norm() -> nn.Module:
    return nn.BatchNorm2d(4)


def test_block_called_twice_is_folded_once() -> None:
    """fx.fuse folds twice here: off by 15."""

    def forward(self: nn.Module, x: Tensor) -> Tensor:
        return self.block(F.relu(self.block(x)))

    model = ready(Lambda(forward, block=Chain(conv=conv(), bn=norm())))
    result = fold(model, X)
    assert_all_folded(result)
    assert set(result.module.state_dict()) == {"block.conv.weight", "block.conv.bias"}
    assert len(result.changes) == 2


def test_shared_conv_with_batchnorm_on_one_path() -> None:
    """fx.fuse is off by 4.9 here, torch.ao by 8.8 (pytorch#104593)."""

    def forward(self: nn.Module, x: Tensor) -> Tensor:
        return self.bn(self.conv(x)) + self.conv(x.flip(0)).relu()

    model = ready(Lambda(forward, conv=conv(), bn=norm()))
    result = fold(model, X)
    assert_all_folded(result)
    assert result.changes[0].what == (
        "BatchNorm2d 'bn' folded into Conv2d 'conv'; this call has a copy of its own, 'conv_folded'"
    )
    assert torch.equal(result.module.conv.weight, model.conv.weight)


def test_shared_conv_with_a_batchnorm_of_its_own_on_each_path() -> None:
    """RetinaNet-like heads: one convolution, one BatchNorm a level."""

    def forward(self: nn.Module, x: Tensor) -> Tensor:
        return self.a(self.conv(x)) + self.b(self.conv(x * 2)) + self.a(self.conv(x * 3))

    model = ready(Lambda(forward, conv=conv(), a=norm(), b=norm(), conv_folded=nn.Identity()))
    result = fold(model, X)
    assert_all_folded(result)
    keys = {f"{name}.{key}" for name in ("conv", "conv_folded_1") for key in ("weight", "bias")}
    assert set(result.module.state_dict()) == keys
    calls = [n.target for n in result.module.graph.nodes if n.op == "call_module"]
    assert calls == ["conv", "conv_folded_1", "conv"]


def test_one_object_at_two_paths() -> None:
    shared = conv()
    model = ready(nn.Sequential(shared, norm(), nn.ReLU(), shared, norm()))
    result = fold(model, X)
    assert_all_folded(result)
    module = result.module
    targets = [n.target for n in module.graph.nodes if n.op == "call_module"]
    assert targets == ["0", "2", "0_folded"]
    # "3" is the same object as "0" and stays it.
    assert module.get_submodule("0") is module.get_submodule("3")


def test_one_batchnorm_at_two_paths_leaves_both() -> None:
    shared = norm()
    result = fold(ready(nn.Sequential(conv(), shared, nn.ReLU(), conv(), shared)), X)
    assert_all_folded(result)
    assert set(dict(result.module.named_modules())) == {"", "0", "2", "3"}


def test_batchnorm_that_is_still_called_stays() -> None:
    def forward(self: nn.Module, x: Tensor) -> Tensor:
        return self.bn(self.conv(x)) + self.bn(x)

    result = fold(ready(Lambda(forward, conv=conv(), bn=norm())), X)
    assert norms_left(result.module) == 1
    assert "bn.running_var" in result.module.state_dict()


def test_batchnorm_act_that_is_still_called_stays() -> None:
    from timm.layers import BatchNormAct2d

    def forward(self: nn.Module, x: Tensor) -> Tensor:
        return self.bn(self.conv(x)) + self.bn(x)

    result = fold(ready(Lambda(forward, conv=conv(), bn=BatchNormAct2d(4))), X)
    assert norms_left(result.module) == 1
    calls = [n.target for n in result.module.graph.nodes if n.op == "call_module"]
    assert calls == ["conv", "bn.act", "bn"]


def test_tied_weights_part_ways() -> None:
    first, second = conv(), conv()
    second.weight = first.weight
    model = ready(nn.Sequential(first, norm(), second))
    result = fold(model, X)
    assert_all_folded(result)
    assert result.changes[0].what.endswith("; its weight is no longer tied to that of '2'")
    assert result.module.get_submodule("2").weight is second.weight


def test_tied_weights_that_are_both_folded() -> None:
    first, second = conv(), conv()
    second.weight, second.bias = first.weight, first.bias
    model = ready(nn.Sequential(first, norm(), second, norm()))
    assert_all_folded(fold(model, X))


def test_weight_tied_to_an_embedding() -> None:
    def forward(self: nn.Module, x: Tensor) -> Tensor:
        hidden = self.embed(x).mean(1).view(-1, 5)
        return self.bn(self.out(hidden))

    model = Lambda(forward, embed=nn.Embedding(6, 5), out=nn.Linear(5, 6), bn=nn.BatchNorm1d(6))
    model.out.weight = model.embed.weight
    result = fold(ready(model), torch.tensor([[1, 2, 3], [3, 4, 5]]))
    assert_all_folded(result)
    assert torch.equal(result.module.embed.weight, model.embed.weight)


def test_weight_that_is_read_elsewhere() -> None:
    def forward(self: nn.Module, x: Tensor) -> Tensor:
        return self.bn(self.conv(x)) + self.conv.weight.mean()

    result = fold(ready(Lambda(forward, conv=conv(), bn=norm())), X, tolerance=0.0)
    assert reasons(result).endswith("the weight or bias of Conv2d 'conv' is also read by mean")
    assert result.changes == ()


def test_weight_that_is_written_in_place() -> None:
    def forward(self: nn.Module, x: Tensor) -> Tensor:
        self.conv.weight.mul_(0.5)
        return self.bn(self.conv(x))

    model = ready(Lambda(forward, conv=conv(), bn=norm()))
    result = apply(model, FoldBatchNorm())
    assert "is also read by mul_" in reasons(result)


def test_functional_weight_with_two_readers() -> None:
    def forward(self: nn.Module, x: Tensor) -> Tensor:
        return self.bn(F.conv2d(x, self.w)) + F.conv2d(x.flip(0), self.w)

    weight = nn.Parameter(torch.randn(4, 4, 3, 3))
    result = fold(ready(Lambda(forward, w=weight, bn=norm())), X, tolerance=0.0)
    assert "the weight or bias of conv2d 'conv2d' is also read by conv2d_1" in reasons(result)


def test_functional_weight_of_a_module_that_is_called() -> None:
    def forward(self: nn.Module, x: Tensor) -> Tensor:
        return self.bn(F.conv2d(x, self.conv.weight, padding=1)) + self.conv(x)

    result = fold(ready(Lambda(forward, conv=conv(), bn=norm())), X, tolerance=0.0)
    assert "the module 'conv', which is called too, owns the weight" in reasons(result)


def test_functional_weight_of_a_module_that_is_not_called() -> None:
    def forward(self: nn.Module, x: Tensor) -> Tensor:
        y = F.conv2d(x, self.conv.weight, self.conv.bias, padding=1)
        bn = self.bn
        return F.batch_norm(y, bn.running_mean, bn.running_var, bn.weight, bn.bias)

    result = fold(ready(Lambda(forward, conv=conv(), bn=norm())), X)
    assert_all_folded(result)  # the whole BatchNorm is gone, with its num_batches_tracked
    assert set(result.module.state_dict()) == {"conv.weight", "conv.bias"}


def test_weight_that_is_also_the_input() -> None:
    def forward(self: nn.Module, x: Tensor) -> Tensor:
        y = F.linear(self.w, self.w)
        return F.batch_norm(y, self.mean, self.var) + x.mean()

    parts = {"w": torch.randn(5, 5), "mean": torch.randn(5), "var": torch.rand(5) + 0.5}
    model = Lambda(forward, **parts).double().eval()
    result = fold(model, X, tolerance=0.0)
    assert "is its input, too" in reasons(result)


def test_convolution_inside_a_layer_that_stays_whole() -> None:
    """The leaf runs the shared convolution, and must go on doing what it did."""
    shared = conv()

    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = shared

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x).relu()

    model = ready(nn.Sequential(shared, norm(), Whole()))
    module = trace(model, leaf_modules=(Whole,))
    run(FoldBatchNorm(), module)
    assert norms_left(module) == 0
    with torch.no_grad():
        torch.testing.assert_close(module(X), model(X), rtol=1e-12, atol=1e-12)
    assert torch.equal(module.get_submodule("2.inner").weight, shared.weight)


def test_original_and_result_share_what_was_not_rewritten() -> None:
    model = ready(nn.Sequential(conv(), norm(), conv()))
    before = copy.deepcopy(model.state_dict())
    result = apply(model, FoldBatchNorm())
    assert result.module.get_submodule("2").weight is model[2].weight
    assert result.module.get_submodule("0").weight is not model[0].weight
    with torch.no_grad():
        result.module.get_submodule("0").weight.zero_()
    assert torch.equal(model[0].weight, before["0.weight"])


def test_functional_weight_that_is_tied_to_a_module() -> None:
    def forward(self: nn.Module, x: Tensor) -> Tensor:
        return self.bn(F.conv2d(x, self.w, padding=1)) + self.conv(x)

    model = Lambda(forward, conv=conv(), bn=norm())
    model.w = model.conv.weight
    result = fold(ready(model), X)
    assert_all_folded(result)
    assert result.changes[0].what.endswith("; its weight is no longer tied to that of 'conv'")
    assert torch.equal(result.module.conv.weight, model.conv.weight)
