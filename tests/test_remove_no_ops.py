"""RemoveNoOps: what computes nothing new goes, bit for bit; and the near misses."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import dropsurgery as ds
from dropsurgery.errors import PassError
from dropsurgery.passes.base import apply
from dropsurgery.passes.remove_no_ops import RemoveNoOps, Step
from tests.fold_helpers import IMAGE, Lambda, fold, ready, values


def same(model: nn.Module, *inputs: Tensor, shapes: bool = False) -> list[str]:
    """Run the pass, which must keep every bit; return what the graph still does."""
    result = fold(
        model.double().eval(),
        *(inputs or (IMAGE,)),
        item=ds.RemoveNoOps(),
        shapes=shapes,
        tolerance=0.0,
    )
    skipped = ("placeholder", "output", "get_attr")
    return [node.name for node in result.module.graph.nodes if node.op not in skipped]


def code(function: Callable[..., Any], *inputs: Tensor, shapes: bool = False, **parts: Any) -> Any:
    return same(Lambda(function, **parts), *inputs, shapes=shapes)


@pytest.mark.parametrize(
    "function",
    [
        lambda self, x: x.relu() * 1,
        lambda self, x: 1.0 * x.relu(),
        lambda self, x: x.relu() / 1,
        lambda self, x: 0 + x.relu() - 0.0,
        lambda self, x: torch.add(x.relu(), 0).sub(0),
        lambda self, x: x.relu().mul_(1).add_(0),
        lambda self, x: x.relu() ** 1,
        lambda self, x: F.dropout(x.relu(), 0.5, training=False),
        lambda self, x: x.relu().permute(0, 2, 3, 1).permute(0, 3, 1, 2),
        lambda self, x: x.relu().transpose(1, 2).transpose(1, 2),
        lambda self, x: torch.permute(x.relu(), (0, 1, 2, -1)),
        lambda self, x: x.relu().unsqueeze(1).squeeze(1),
    ],
)
def test_arithmetic_and_views_that_do_nothing(function: Callable[..., Any]) -> None:
    assert code(function, shapes=True) == ["relu"]


def test_casts() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        y = x.relu()
        return y.to(y.dtype).float().float().to(torch.float64).to(torch.float64)

    assert code(forward) == ["relu", "float_1", "to_1"]


def test_before_and_after() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        y = self.drop(self.same(self.conv(x)))
        return (y.flatten(1).flatten(1) * 1).relu()

    model = Lambda(
        forward, conv=nn.Conv2d(4, 2, 3), drop=nn.Dropout(0.3), same=nn.Identity()
    ).eval()
    result = apply(model, ds.RemoveNoOps())
    assert result.module.code.strip().splitlines()[1:] == [
        "    conv = self.conv(x);  x = None",
        "    flatten = conv.flatten(1);  conv = None",
        "    relu = flatten.relu();  flatten = None",
        "    return relu",
    ]
    assert [(c.node, c.what) for c in result.changes][:2] == [
        ("same", "Identity 'same' is the identity in eval mode: removed"),
        ("drop", "Dropout 'drop' is the identity in eval mode: removed"),
    ]
    assert list(dict(result.module.named_modules())) == ["", "conv"]


@pytest.mark.parametrize(
    ("function", "stays"),
    [
        (lambda self, x: x.relu() * 2, "mul"),
        (lambda self, x: 0 - x.relu(), "sub"),
        (lambda self, x: 1 / x.exp(), "truediv"),
        (lambda self, x: x.relu().permute(0, 2, 3, 1).permute(0, 2, 3, 1), "permute_1"),
        (lambda self, x: x.relu().transpose(1, 2).transpose(1, 3), "transpose_1"),
        (lambda self, x: x.relu().unsqueeze(1).squeeze(2), "squeeze"),
        (lambda self, x: x.relu().float().double(), "double"),
        (lambda self, x: x.relu().flatten(2), "flatten"),
        (lambda self, x: F.dropout(x.relu(), 0.0, training=True), "dropout"),
        (lambda self, x: x.relu() + self.zero, "add"),
        (lambda self, x: torch.add(x.relu(), 0, alpha=2), "add"),
    ],
)
def test_near_misses(function: Callable[..., Any], stays: str) -> None:
    assert stays in code(function, zero=torch.zeros(1, 2, 4, 9, 8))


def test_integers_become_floating() -> None:
    x = torch.arange(6)
    assert code(lambda self, x: x / 1, x, shapes=True) == ["truediv"]
    assert code(lambda self, x: x + 0.0, x, shapes=True) == ["add"]
    assert code(lambda self, x: x * 1, x) == ["mul"]  # nothing tells what it is


def test_copies_that_are_written_to() -> None:
    def forward(self: Any, x: Tensor) -> Any:
        y = x.relu()
        z = y * 1
        z.add_(3)
        return y + z

    assert "mul" in code(forward, shapes=True)

    def before(self: Any, x: Tensor) -> Any:
        y = x.relu()
        y.add_(3)
        return (y * 1).exp()

    assert "mul" not in code(before, shapes=True)

    def later(self: Any, x: Tensor) -> Any:
        y = x.relu()
        z = y * 1
        self.act(y)
        return z.exp()

    assert "mul" in code(later, shapes=True, act=nn.Hardtanh(-1, 0.1, inplace=True))


def test_outputs_do_not_come_to_share_memory() -> None:
    assert code(lambda self, x: x * 1, shapes=True) == ["mul"]
    assert code(lambda self, x: (x.relu(), x.relu()), shapes=True) == ["relu", "relu_1"]

    def twice(self: Any, x: Tensor) -> Any:
        y = x.relu()
        return y, y + 0

    assert code(twice, shapes=True) == ["relu", "add"]


def test_layout_that_a_view_relies_on() -> None:
    def forward(self: Any, x: Tensor) -> Any:
        return (x.relu()[:, 1:3] * 1).view(x.shape[0], -1).exp()

    assert "mul" in code(forward, shapes=True)


@pytest.mark.parametrize("pool", [nn.MaxPool2d(1), nn.AvgPool2d(1, 1), nn.ZeroPad2d(0)])
def test_pooling_of_single_entries(pool: nn.Module) -> None:
    assert code(lambda self, x: self.pool(x.relu()).exp(), pool=pool) == ["relu", "exp"]


@pytest.mark.parametrize("pool", [nn.MaxPool2d(1, 2), nn.AvgPool2d(1, divisor_override=2),
                                  nn.MaxPool2d(2, 1), nn.ZeroPad2d((0, 0, 0, 1))])  # fmt: skip
def test_pooling_that_does_something(pool: nn.Module) -> None:
    assert len(code(lambda self, x: self.pool(x.relu()).exp(), pool=pool)) == 3


def test_flatten_of_two_axes() -> None:
    x = values(3, 5)
    assert code(lambda self, x: self.flat(self.fc(x)), x, shapes=True,
                fc=nn.Linear(5, 2), flat=nn.Flatten()) == ["fc"]  # fmt: skip
    assert code(lambda self, x: self.fc(x).flatten(1), x, fc=nn.Linear(5, 2)) == ["fc", "flatten"]


def test_reshapes_in_a_row() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        return x.relu().flatten(1).unsqueeze(1).reshape(4, -1).exp()

    assert code(forward) == ["relu", "reshape", "exp"]

    def permuted(self: Any, x: Tensor) -> Tensor:
        return x.relu().permute(0, 2, 3, 1).reshape(4, -1).view(2, -1)

    assert code(permuted) == ["relu", "permute", "reshape", "view"]
    bits = code(lambda self, x: x.relu().view(torch.int64).view(4, -1) + 1)
    assert bits == ["relu", "view", "view_1", "add"]


def test_concatenations_in_a_row() -> None:
    def nested(self: Any, x: Tensor) -> Tensor:
        inner = torch.cat([x.relu(), torch.cat([x.tanh(), x], dim=1)], 1)
        return torch.cat((x.sigmoid(), inner), dim=1)

    assert code(nested) == ["relu", "tanh", "sigmoid", "cat_2"]


@pytest.mark.parametrize(
    "function",
    [
        lambda self, x: torch.cat([torch.cat([x, x], 2), torch.cat([x, x], 2)], 1),  # other axis
        lambda self, x: (lambda y: torch.cat([y, y], 1))(torch.cat([x, x.relu()], 1)),
        lambda self, x: (lambda y: torch.cat([y, x], 1) + y.sum())(torch.cat([x, x.relu()], 1)),
    ],
)
def test_concatenations_that_stay(function: Callable[..., Any]) -> None:
    before = code(function)
    assert sum(name.startswith("cat") for name in before) == 2


def test_a_concatenation_before_a_write_stays() -> None:
    def late(self: Any, x: Tensor) -> Tensor:
        y = x.relu()
        inner = torch.cat([y, x], 1)
        y.add_(1)
        return torch.cat([inner, y], 1)

    assert [name for name in code(late) if name.startswith("cat")] == ["cat", "cat_1"]


def test_concatenations_are_saved_and_loaded(tmp_path: Path) -> None:
    def nested(self: Any, x: Tensor) -> Tensor:
        return torch.cat([torch.cat([x.relu(), x], 1), x.tanh()], 1)

    model = Lambda(nested).eval()
    result = apply(model, RemoveNoOps())
    assert [change.what for change in result.changes if "at once" in change.what]
    ds.save(result.module, tmp_path / "m.pt")
    loaded = ds.load(tmp_path / "m.pt", Lambda(nested).eval())
    assert torch.equal(loaded(IMAGE), model(IMAGE))
    assert sum(node.target is torch.cat for node in loaded.graph.nodes) == 1


def test_equal_operations() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        left = self.conv(x).relu() * x.shape[0]
        return left + self.conv(x).relu().exp() * x.shape[0]

    names = code(forward, conv=nn.Conv2d(4, 4, 1))
    assert names == ["conv", "relu", "getattr_1", "getitem", "mul", "exp", "mul_1", "add"]


def test_operations_that_look_equal() -> None:
    def mutated(self: Any, x: Tensor) -> Tensor:
        y = x.relu()
        a = y.exp()
        y.add_(1)
        return a + y.exp()

    assert code(mutated).count("exp_1") == 1

    def written(self: Any, x: Tensor) -> Tensor:
        a, b = x.exp(), x.exp()
        a.add_(1)
        return a + b

    assert "exp_1" in code(written)

    def arguments(self: Any, x: Tensor) -> Tensor:
        return x.sum(1) + x.sum(2).sum() + x.sum(1, keepdim=True).sum()

    assert len([n for n in code(arguments) if n.startswith("sum")]) == 5


def test_draws_in_training_mode_are_not_shared() -> None:
    model = Lambda(lambda self, x: self.a(x) + self.a(x), a=nn.Dropout(0.5))
    module = apply(model.train(), ds.RemoveNoOps()).module
    assert [node.name for node in module.graph.nodes].count("a_1") == 1


def test_batchnorm_in_training_mode_is_not_shared() -> None:
    model = Lambda(lambda self, x: self.n(x).exp() + self.n(x), n=nn.BatchNorm2d(4)).double()
    module = apply(model.train(), ds.RemoveNoOps()).module
    assert [n.name for n in module.graph.nodes].count("n_1") == 1
    assert same(model.eval()) == ["n", "exp", "add"]


def test_constants_are_computed_once() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        bias = self.table[self.index].permute(1, 0) * 2
        return x.flatten(1)[:, :3] @ bias.softmax(-1)[:3]

    parts = {"table": nn.Parameter(values(5, 7)), "index": torch.tensor([4, 1, 1, 0])}
    model = Lambda(forward, **parts).double().eval()
    result = fold(model, IMAGE, item=ds.RemoveNoOps(), tolerance=0.0)
    assert list(result.module.state_dict()) == ["constant"]
    assert result.module.constant.shape == (3, 4)
    gather = Lambda(lambda self, x: x.flatten(1)[:, :4] + self.table[self.index][:, 0], **parts)
    assert len(same(gather)) == 3
    view = Lambda(lambda self, x: x.flatten(1)[:, :7] + self.table[0], **parts)
    assert "getitem_1" in same(view)


def test_constants_that_stay() -> None:
    def grows(self: Any, x: Tensor) -> Tensor:
        return x.sum() + self.table.repeat(50, 50).exp()

    model = Lambda(grows, table=nn.Parameter(values(5, 7))).double().eval()
    kept = fold(model, IMAGE, item=ds.RemoveNoOps(max_constant=1000), tolerance=0.0)
    assert "exp" in [node.name for node in kept.module.graph.nodes]

    def returned(self: Any, x: Tensor) -> Any:
        return x.relu(), self.table.exp()

    assert "exp" in code(returned, table=nn.Parameter(values(5, 7)))

    def written(self: Any, x: Tensor) -> Tensor:
        self.count.add_(1)
        return x + self.count.exp()

    model = Lambda(written, count=torch.zeros(()))
    assert "exp" in [n.name for n in apply(model, ds.RemoveNoOps()).module.graph.nodes]

    def between(self: Any, x: Tensor) -> Tensor:
        before = x + self.count.view(1)
        self.count.add_(1)
        return before * (x + self.count.view(1))

    names = [n.name for n in apply(Lambda(between, count=torch.zeros(())), ds.RemoveNoOps())
             .module.graph.nodes]  # fmt: skip
    assert [name for name in names if name.startswith("add")] == ["add", "add_", "add_1"]

    def drawn(self: Any, x: Tensor) -> Tensor:
        return x + torch.rand_like(self.table).exp()

    assert "exp" in [
        n.name for n in apply(Lambda(drawn, table=values(1)), ds.RemoveNoOps()).module.graph.nodes
    ]


def test_standardised_weights_are_a_constant() -> None:
    model = ready(timm.create_model("nf_resnet26"))
    x = torch.randn(1, 3, 64, 64).double()
    result = fold(model, x, item=ds.RemoveNoOps(), tolerance=0.0)
    targets = [node.target for node in result.module.graph.nodes]
    assert F.batch_norm not in targets
    assert torch.batch_norm not in targets
    assert sum("depends on no input" in change.what for change in result.changes) >= 26


def test_dead_branches() -> None:
    def forward(self: Any, x: Tensor) -> Any:
        main, aux = self.main(x), self.aux(x)
        return (main, aux) if self.training else main

    model = Lambda(forward, main=nn.Conv2d(4, 2, 1), aux=nn.Conv2d(4, 3, 1)).double().eval()
    result = fold(model, IMAGE, item=ds.RemoveNoOps(), tolerance=0.0)
    assert not [key for key in result.module.state_dict() if key.startswith("aux")]
    assert result.changes[-1].what == "nothing reads aux: erased"
    training = apply(model.train(), ds.RemoveNoOps())
    assert training.changes == ()
    assert "in training mode" in training.skipped[0].reason


def test_assertions_and_unknown_calls_stay() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        torch._assert(x.shape[1] == 4, "channels")
        return x.relu()

    assert "_assert" in code(forward)


def test_save_and_load(tmp_path: Path) -> None:
    def make(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return ready(timm.create_model("swinv2_cr_tiny_ns_224", depths=(1, 1, 1, 1), img_size=64,
                                       embed_dim=24, window_size=2))  # fmt: skip

    model, x = make(0), torch.randn(1, 3, 64, 64).double()
    result = apply(model, ds.RemoveNoOps(), example_inputs=x)
    assert [key for key in result.module.state_dict() if key.endswith("constant")]
    ds.save(result.module, tmp_path)
    again = ds.load(tmp_path, make(1))
    assert torch.equal(again(x), result.module(x))
    assert again.code == result.module.code


def test_steps_that_are_not_there() -> None:
    steps = (Step("erase", "nothing"),)
    with pytest.raises(PassError, match="is to take out nothing, and there is no such node"):
        apply(nn.Conv2d(4, 4, 1), RemoveNoOps(steps=steps))
