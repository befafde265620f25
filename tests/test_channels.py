"""Ranks and channel axes proved without running the network."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F

from dropsurgery.graph.channels import Shapes, traced_shape
from dropsurgery.graph.trace import trace
from dropsurgery.passes.base import apply
from dropsurgery.passes.fold_batchnorm import FoldBatchNorm
from tests.fold_helpers import Lambda, assert_all_folded, fold, norms_left, ready


def rank_of_output(model: nn.Module) -> int | None:
    module = trace(model.eval())
    (output,) = (node for node in module.graph.nodes if node.op == "output")
    return Shapes(module, module.graph).rank(output.args[0])


def rank_after(function: Callable[[Tensor], Tensor]) -> int | None:
    """Of `function` applied to the output of a 2-d convolution."""
    return rank_of_output(Lambda(lambda self, x: function(self.conv(x)), conv=nn.Conv2d(3, 4, 3)))


KNOWN = [
    (lambda y: y, 4),
    (lambda y: F.relu(y, inplace=True) * 2 + 1, 4),
    (lambda y: y + y.mean((2, 3), keepdim=True), 4),
    (lambda y: y.mean((2, 3)), 2),
    (lambda y: y.mean([-1, -2]), 2),
    (lambda y: torch.mean(y, dim=-1, keepdim=True), 4),
    (lambda y: y.sum(), 0),
    (lambda y: y.flatten(1), 2),
    (lambda y: torch.flatten(y, 2), 3),
    (lambda y: torch.flatten(y, 1, 2), 3),
    (lambda y: y.view(y.size(0), -1), 2),
    (lambda y: y.reshape(-1), 1),
    (lambda y: y.view((2, -1, 3)), 3),
    (lambda y: torch.reshape(y, (-1, 4)), 2),
    (lambda y: torch.cat([y, y], 1), 4),
    (lambda y: y.permute(0, 2, 3, 1), 4),
    (lambda y: y.transpose(1, 2), 4),
    (lambda y: y.unsqueeze(0), 5),
    (lambda y: y[:, 0], 3),
    (lambda y: y[:, None, ..., 0], 4),
    (lambda y: y[0], 3),
    (lambda y: F.max_pool2d(y, 2).squeeze(1), 4),  # 4 channels: nothing to squeeze
    (lambda y: y.mean(1, keepdim=True).squeeze(1), 3),
    (lambda y: F.adaptive_avg_pool2d(y, 1), 4),
    (lambda y: F.softmax(F.interpolate(y, scale_factor=2.0), dim=1), 4),
    (lambda y: y.bmm(y), 3),
    (lambda y: y.squeeze().reshape_as(y.flatten(1)), 2),
]


@pytest.mark.parametrize("index", range(len(KNOWN)))
def test_ranks_that_are_known(index: int) -> None:
    function, rank = KNOWN[index]
    assert rank_after(function) == rank


UNKNOWN = [
    lambda y: y.squeeze(),
    lambda y: y.squeeze(-1),  # goes only where it is 1
    lambda y: y.mean(axis=(2, 3)),  # numpy's name is in no rule
    lambda y: y.var(1, False),
    lambda y: y.view(y.shape),
    lambda y: y.view(*[y.size(0)]),  # one node could be a whole torch.Size
    lambda y: y.mean(()),
    lambda y: torch.einsum("nchw->nc", y),
    lambda y: F.max_pool2d(y, 2, return_indices=True)[0],
    lambda y: torch.clamp(y, min=y.sum()),
    lambda y: y.max(1)[0],
]


@pytest.mark.parametrize("index", range(len(UNKNOWN)))
def test_ranks_that_are_not_known(index: int) -> None:
    assert rank_after(UNKNOWN[index]) is None


def mlp(first: int, second: int) -> nn.Module:
    return nn.Sequential(
        nn.Linear(5, first),
        nn.BatchNorm1d(first),
        nn.ReLU(),
        nn.Linear(first, second),
        nn.BatchNorm1d(second),
    )


def test_mlp_is_proved_by_contradiction() -> None:
    """Rank 3 would need axis 1 to have 8 and 6 entries."""
    assert rank_of_output(mlp(8, 6)) == 2
    assert_all_folded(fold(ready(mlp(8, 6)), torch.randn(3, 5, dtype=torch.float64)))


def test_mlp_of_equal_widths_is_not_proved() -> None:
    """(N, 8, 5) runs through it, and its BatchNorms normalise axis 1."""
    assert rank_of_output(mlp(8, 8)) is None
    fold(ready(mlp(8, 8)), torch.randn(3, 8, 5, dtype=torch.float64), tolerance=0.0)
    assert norms_left(apply(mlp(8, 8).eval(), FoldBatchNorm()).module) == 2


def test_residual_mlp() -> None:
    def forward(self: nn.Module, x: Tensor) -> Tensor:
        return self.narrow(x + self.body(x))

    model = Lambda(forward, body=mlp(8, 5), narrow=nn.Linear(5, 5))
    assert rank_of_output(model) == 2
    assert_all_folded(fold(ready(model), torch.randn(3, 5, dtype=torch.float64)))


def test_an_operation_without_a_rule_ends_a_proof() -> None:
    def forward(self: nn.Module, x: Tensor) -> Tensor:
        return self.second(torch.cumsum(self.first(x), 0))

    parts = {
        "first": nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8)),
        "second": nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(6)),
    }
    assert rank_of_output(Lambda(forward, **parts)) is None


def test_proof_behind_an_operation_without_a_rule() -> None:
    """What follows it is enough: its own rank is assumed in turn."""

    def forward(self: nn.Module, x: Tensor) -> Tensor:
        return self.body(torch.cumsum(x, 0))

    assert rank_of_output(Lambda(forward, body=mlp(8, 6))) == 2


def test_parts_of_a_tuple_need_not_be_of_one_rank() -> None:
    """The second part is proved to be of rank 2; that says nothing about the first."""

    class Pair(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x, x.mean(1)

    def forward(self: nn.Module, x: Tensor) -> Tensor:
        tokens, pooled = self.pair(x)
        return self.bn(self.fc(tokens)).mean(1) + self.body(pooled).sum(1, keepdim=True)

    parts = {"pair": Pair(), "fc": nn.Linear(5, 6), "bn": nn.BatchNorm1d(6), "body": mlp(8, 7)}
    model = ready(Lambda(forward, **parts))
    module = trace(model, leaf_modules=(Pair,))
    result = apply(module, FoldBatchNorm())
    assert {skip.node for skip in result.skipped} == {"bn"}
    x = torch.randn(3, 6, 5, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(result.module(x), model(x), rtol=1e-12, atol=1e-12)


def test_broadcasting_is_not_mistaken_for_equal_sizes() -> None:
    """(N, 1, 5) + (N, 8, 5): axis 1 has one entry before the add and 8 behind it."""

    def forward(self: nn.Module, x: Tensor) -> Tensor:
        y = self.one(self.a(x))
        return self.b(self.c(y + x))

    parts = {"a": nn.Linear(5, 5), "one": nn.BatchNorm1d(1), "c": nn.Linear(5, 5)}
    model = ready(Lambda(forward, **parts, b=nn.BatchNorm1d(8)))

    def widen(self: nn.Module, x: Tensor) -> Tensor:
        return self.inner(x.mean(1, keepdim=True)) + x.sum() * 0

    fold(ready(Lambda(widen, inner=nn.Sequential(nn.Linear(5, 5), nn.BatchNorm1d(1)))),
         torch.randn(2, 4, 5, dtype=torch.float64), tolerance=0.0)  # fmt: skip
    assert rank_of_output(model) == 3  # 1 and 8 features leave no room for rank 2


def test_convolutions_of_unknown_rank_are_taken_to_be_batched() -> None:
    def functional(self: nn.Module, x: Tensor) -> Tensor:
        return F.batch_norm(self.conv(x), self.mean, self.var)

    parts = {"mean": torch.randn(4), "var": torch.rand(4) + 0.5}
    model = Lambda(functional, conv=nn.Conv2d(3, 4, 1), **parts).double().eval()
    assert_all_folded(fold(model, torch.randn(2, 3, 5, 4, dtype=torch.float64)))
    unbatched = torch.randn(3, 4, 5, dtype=torch.float64)
    result = fold(model, unbatched, shapes=True, tolerance=0.0)
    assert "are on axis 0" in str(result)


def test_a_graph_that_contradicts_a_batch_proves_nothing() -> None:
    """One part of the graph shows that nothing is batched; the other must not assume it."""

    def forward(self: nn.Module, x: Tensor) -> Tensor:
        flat = self.plane(self.wide(torch.cumsum(x, 1)))
        return flat.mean() + F.batch_norm(self.conv(x), self.mean, self.var)

    model = Lambda(
        forward,
        wide=nn.Conv3d(3, 4, 1),
        plane=nn.BatchNorm2d(5),
        conv=nn.Conv3d(3, 5, 1),
        mean=torch.randn(5),
        var=torch.rand(5) + 0.5,
    )
    result = fold(ready(model), torch.randn(3, 5, 4, 4, dtype=torch.float64), tolerance=0.0)
    assert "the rank of the output of Conv3d 'conv' is not known" in str(result).replace("\n", " ")


@pytest.mark.parametrize(
    "name", ["densenet121", "mnasnet0_5", "shufflenet_v2_x0_5", "swin_t", "vit_b_16"]
)
def test_inferred_shapes_agree_with_traced_ones(name: str) -> None:
    """Where a rule answers, torch's own shape propagation says the same."""
    with torch.device("meta"):
        model = torchvision.models.get_model(name)
    module = trace(model.eval())
    inferred = Shapes(module, module.graph)._known()
    known = {node.name: shape for node, shape in inferred.items() if shape is not None}
    assert known
    record = trace(module, example_inputs=(torch.empty(2, 3, 224, 224, device="meta"),))
    compared = 0
    for node in record.graph.nodes:
        shape, actual = known.get(node.name), traced_shape(node)
        if shape is None or actual is None:
            continue
        compared += 1
        assert len(shape) == len(actual), node.name
        sizes = zip(shape, actual, strict=True)
        assert all(size in (None, true) for size, true in sizes), node.name
    assert compared >= 10
