"""Drop path that does not compute what it drops, against the same draws computed and masked."""

from __future__ import annotations

import copy
import pickle
import re
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import torchvision
from torch import Tensor, fx, nn
from torch.nn import functional as F

import dropsurgery as ds
from benchmarks.train_networks import dinov2
from dropsurgery.errors import ArgumentError
from dropsurgery.layers.compiled_rows import take_window
from dropsurgery.layers.rows import Rows
from tests.helpers import randomize
from tests.saved_work_helpers import (
    FORMS,
    Recorder,
    as_drawn,
    as_mask,
    as_traced,
    as_windows,
    assert_runs_as_masked,
    indexed,
    quiet,
)

WORKING = ("subset", "batch")


def insert(model: nn.Module, mode: str, final: float = 0.4, **options: Any) -> fx.GraphModule:
    torch.manual_seed(3)
    options = {"break_even": 0.0, **options}
    return ds.apply(
        model, ds.InsertDropPath(ds.survival.linear(final), mode=mode, **options)
    ).module


def lowered(module: fx.GraphModule) -> int:
    """Return how many branches the running code takes apart."""
    return len(re.findall(r"= \w+_(?:draw_rows|run_or_skip)(?:_\d+)?\(", module.running_code))


# Small blocks, each with its own trap


class Mlp(nn.Module):
    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.fc = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.fc(x))


class InPlaceAfter(Mlp):
    """The trap of skipping: relu_ after the add writes into what a dropped block hands on."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu_(x + torch.tanh(self.fc(x)))


class InPlaceBefore(Mlp):
    """The branch starts by overwriting the skip, which reads the overwritten values."""

    def forward(self, x: Tensor) -> Tensor:
        x = x * 1.5
        y = torch.tanh(self.fc(x.mul_(0.5)))
        return x + y


class InPlaceInside(Mlp):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(F.relu(self.fc(x), inplace=True)).mul(3.0).sub_(2.0)


class AddInPlace(Mlp):
    """skip.add_(branch): whoever reads the skip later reads the sum."""

    def forward(self, x: Tensor) -> Tensor:
        skip = x * 1.0
        total = skip.add_(torch.tanh(self.fc(x)))
        return total + 0.5 * skip


class AddIntoBranch(Mlp):
    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.fc(x))
        y.add_(x)
        return y


class Projected(Mlp):
    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        before = torch.sigmoid(x)
        return self.down(before) + torch.tanh(self.fc(before))


class IdentitySkip(Mlp):
    """What the branch reads and what the add reads are two nodes, and one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.shortcut = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.fc(x)) + self.shortcut(x)


class ReadLater(Mlp):
    """The fork is read again behind the add, and by two branches."""

    def forward(self, x: Tensor) -> Tensor:
        y = (x + torch.tanh(self.fc(x))) * torch.sigmoid(x)
        return x + torch.sin(self.fc(x)) + y.mean()


class WrittenLater(Mlp):
    """The fork is written to once its branch has read it: its readers may not share a view."""

    def forward(self, x: Tensor) -> Tensor:
        x = x * 1.5
        y = x + torch.tanh(self.fc(x + 1.0))
        return y * x.mul_(0.5)


class Gained(Mlp):
    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.randn(6))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.gain * torch.tanh(self.fc(x))


class Sizes(Mlp):
    """The branch asks the fork, outside of itself, how many samples there are."""

    def forward(self, x: Tensor) -> Tensor:
        batch, width = x.shape
        half = width // 2
        y = torch.tanh(self.fc(x)).view(batch, 2, half)
        ones = x.new_ones(batch, 2, half)
        y = (y * ones).reshape(batch, width)
        return (x + y).view(batch, width)


class Escapes(Mlp):
    """A value of the branch is used elsewhere: only what follows it is the branch's own."""

    def forward(self, x: Tensor) -> Tensor:
        shared = torch.tanh(self.fc(x))
        return (x + torch.sigmoid(self.fc(shared))) * shared.mean()


class Inner(nn.Module):
    """A branch that holds residual blocks itself, with a ReLU between them or not."""

    def __init__(self, first: Callable[[], nn.Module] = Mlp) -> None:
        super().__init__()
        self.first, self.second, self.fc = first(), InPlaceAfter(), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc(self.second(self.first(torch.tanh(x))))


BLOCKS = [
    Mlp, InPlaceAfter, InPlaceBefore, InPlaceInside, AddInPlace, AddIntoBranch, Projected,
    IdentitySkip, ReadLater, WrittenLater, Gained, Sizes, Escapes,
]  # fmt: skip


class Stack(nn.Sequential):
    def __init__(self, block: Callable[[], nn.Module], depth: int = 3) -> None:
        super().__init__(*(block() for _ in range(depth)))


@pytest.mark.parametrize("mode", WORKING)
@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("batch", [1, 2, 7])
@pytest.mark.parametrize("form", FORMS)
def test_blocks_run_as_masked(
    block: Callable[[], nn.Module],
    mode: str,
    batch: int,
    form: Callable[[pytest.MonkeyPatch], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(0)
    form(monkeypatch)
    net = insert(Stack(block).double(), mode)
    assert lowered(net) == (6 if block is ReadLater else 3)
    assert_runs_as_masked(net, (torch.randn(batch, 6, dtype=torch.float64),), monkeypatch)


def inner_by_hand(block: Inner, x: Tensor, drawn: list[Any], modes: tuple[str, str]) -> Tensor:
    """Return what `Inner` gives for draws in the order outer, first, second."""

    def run(value: Tensor, branch: Callable[[Tensor], Tensor], mode: str) -> Tensor:
        draw = drawn.pop(0)
        if mode == "batch":
            return value + 2.0 * branch(value) if draw else value
        if draw.mask is not None:
            return value + draw.mask[:, None] * branch(value)
        chosen = draw.index if draw.index is not None else indexed(draw, len(value)).index
        index = chosen if draw.last else chosen[:-1]
        result = branch(value[chosen])[: len(index)]
        return value.index_add(0, index, result, alpha=draw.scale)

    def branch(value: Tensor) -> Tensor:
        value = run(torch.tanh(value), lambda v: torch.tanh(block.first.fc(v)), modes[1])
        value = torch.relu(value) if isinstance(block.first, InPlaceAfter) else value
        value = torch.relu(run(value, lambda v: torch.tanh(block.second.fc(v)), modes[1]))
        return block.fc(value)

    return run(x, branch, modes[0])


@pytest.mark.parametrize("first", [Mlp, InPlaceAfter])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("outer", WORKING)
@pytest.mark.parametrize("inner", WORKING)
def test_residuals_inside_a_branch(
    inner: str,
    outer: str,
    form: Callable[[pytest.MonkeyPatch], None],
    first: Callable[[], nn.Module],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    form(monkeypatch)
    block = Inner(first).double()
    insertion = ds.InsertDropPath(
        ds.survival.constant(0.5), mode=outer, include=("nested",), break_even=0.0
    )
    net = ds.apply(block, insertion).module.train()
    for path in ("first.drop_path", "second.drop_path"):
        net.get_submodule(path).mode = inner
    net.recompile()
    drawn: list[Any] = []
    for name in ("rows", "survives"):
        draw = getattr(ds.DropPath, name)

        def recorded(*args: Any, draw: Any = draw) -> Any:
            drawn.append(draw(*args))
            return drawn[-1]

        monkeypatch.setattr(ds.DropPath, name, recorded)
    kinds = set()
    for seed in range(12):
        torch.manual_seed(seed)
        drawn.clear()
        x = torch.randn(9, 6, dtype=torch.float64, requires_grad=True)
        output = net(x)
        kinds.add(len(drawn))
        (gradient,) = torch.autograd.grad(output.square().sum(), x)
        expected = inner_by_hand(block, x, list(drawn), (outer, inner))
        (expected_gradient,) = torch.autograd.grad(expected.square().sum(), x)
        torch.testing.assert_close(output, expected, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(gradient, expected_gradient, rtol=1e-12, atol=1e-12)
    assert kinds == ({1, 3} if outer == "batch" else {3})


class Masked(nn.Module):
    """Attention whose mask is an input of the network, and a table that is none.

    The mask has as many tokens as there are samples: no size tells which axis is which.
    """

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(6, 18), nn.Linear(6, 6)
        self.table = nn.Parameter(torch.randn(5, 6))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        for _ in range(2):
            q, k, v = self.qkv(x + self.table).chunk(3, dim=-1)
            weights = (q @ k.transpose(1, 2) + mask[:, None, :]).softmax(-1)
            x = x + self.out(weights @ v)
        return x


@pytest.mark.parametrize("mode", WORKING)
@pytest.mark.parametrize("form", FORMS)
def test_other_inputs_are_gathered_where_they_hold_the_batch(
    form: Callable[[pytest.MonkeyPatch], None], mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    form(monkeypatch)
    x, mask = torch.randn(5, 5, 6).double(), torch.randn(5, 5).double()
    model = Masked().double()
    insertion = ds.InsertDropPath(ds.survival.constant(0.5), mode=mode)
    net = ds.apply(model, insertion, example_inputs=(x, mask)).module
    assert lowered(net) == 2
    assert_runs_as_masked(net, (x, mask), monkeypatch)


@pytest.mark.parametrize(
    ("mode", "form"), [("subset", as_windows), ("subset", as_traced), ("batch", as_drawn)]
)
@pytest.mark.parametrize(
    "name",
    ["resnet18", "regnet_y_400mf", "mobilenet_v2", "efficientnet_b0", "swin_t", "convnext_tiny"],
)
def test_torchvision_runs_as_masked(
    name: str,
    mode: str,
    form: Callable[[pytest.MonkeyPatch], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    form(monkeypatch)
    model = randomize(getattr(torchvision.models, name)(num_classes=5)).double()
    net = insert(model, mode)
    keys = list(model.state_dict())
    assert list(net.state_dict()) == keys
    x = torch.randn(3, 3, 64, 64, dtype=torch.float64)
    assert_runs_as_masked(net, (x,), monkeypatch)
    net.eval()
    model.eval()
    with torch.no_grad():
        assert torch.equal(net(x), model(x))


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "resnetv2_50", "hrnet_w18_small"])
def test_timm_runs_as_masked(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    size = {"img_size": 64} if "vit" in name else {}
    model = randomize(timm.create_model(name, num_classes=5, **size)).double()
    net = insert(model, "subset")
    x = torch.randn(3, 3, 64, 64, dtype=torch.float64)
    assert_runs_as_masked(net, (x,), monkeypatch)


def test_the_oracle_can_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    net = insert(Stack(Mlp).double(), "subset")
    forgets = ds.DropPath.rows

    def wrong(layer: ds.DropPath, *arguments: Any) -> Rows | None:
        rows = forgets(layer, *arguments)
        return None if rows is None else rows._replace(scale=1.0)

    recorder = Recorder(quiet(net), monkeypatch)
    x = torch.randn(8, 6).double()
    output = net(x)
    assert torch.allclose(output, recorder.run_flat(x))
    monkeypatch.setattr(ds.DropPath, "rows", wrong)
    assert not torch.allclose(net(x), recorder.run_flat(x))


def backward_steps(value: Tensor) -> list[str]:
    """Return the names of the autograd nodes behind a tensor."""
    pending, seen = [value.grad_fn], set()
    while pending:
        node = pending.pop()
        if node is not None and node not in seen:
            seen.add(node)
            pending += [following for following, _ in node.next_functions]
    return [type(node).__name__ for node in seen]


@pytest.mark.parametrize(
    ("block", "joined"),
    [(Mlp, 3), (IdentitySkip, 3), (ReadLater, 6), (WrittenLater, 0)],
)
def test_gradients_of_rows_are_added_in_one_go(
    block: Callable[[], nn.Module], joined: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    as_windows(monkeypatch)
    net = insert(Stack(block), "subset").train()
    net.requires_grad_()
    for seed in range(4):  # windows with and without a turn around the end
        torch.manual_seed(seed)
        steps = backward_steps(net(torch.randn(8, 6, requires_grad=True)))
        assert steps.count("_SplitRowsBackward") == joined
        assert ("SliceBackward0" in steps) == (joined == 0)


# What runs, and what does not


def test_a_dropped_branch_does_not_run() -> None:
    net = ds.retrofit(torchvision.models.resnet18(), 0.5, mode="batch").train()
    torch.manual_seed(1)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    dropped = set()
    for path, layer in net.named_modules():
        if isinstance(layer, ds.DropPath):
            kept = bool(torch.rand(()) < 0.5)
            layer.survives = lambda kept=kept: kept  # type: ignore[method-assign]
            if not kept:
                dropped.add(path.rpartition(".")[0])
    assert 0 < len(dropped) < 8
    net(torch.randn(4, 3, 64, 64)).sum().backward()
    for path in dropped:
        block = net.get_submodule(path)
        # As in the paper: the statistics of a block that did not run stay as they were.
        assert torch.equal(block.bn1.running_mean, before[f"{path}.bn1.running_mean"])
        assert block.conv1.weight.grad is None
    assert net.get_submodule("layer1.0").conv1.weight.grad is not None or "layer1.0" in dropped


def test_only_the_chosen_rows_run() -> None:
    net = insert(Stack(Mlp), "subset", final=0.5).train()
    seen: list[int] = []
    for block in net.children():
        block.fc.register_forward_hook(lambda m, args, out: seen.append(len(args[0])))  # type: ignore
    torch.manual_seed(0)
    counts = []
    for _ in range(100):
        net(torch.randn(64, 6))
        counts.append(tuple(seen))
        seen.clear()
    first, second, third = map(set, zip(*counts, strict=True))
    assert first == {53, 54}  # 64 · 5/6
    assert second == {42, 43}  # 64 · 4/6
    assert third == {32}  # 64 · 1/2
    # BatchNorm needs two rows: of two the last one is masked, not left out.
    net(torch.randn(3, 6))
    assert seen in ([3, 2, 2], [2, 2, 2])
    seen.clear()
    net.eval()(torch.randn(64, 6))
    assert seen == [64, 64, 64]


def test_rows_of_small_tensors_are_indices() -> None:
    layer = ds.DropPath(0.5, "subset").train()
    drawn = []
    for width in (1 << 15, (1 << 15) + 1):
        torch.manual_seed(4)
        drawn.append(layer.rows(torch.zeros(8, width)) or Rows())
    few, many = drawn
    assert few.window is None
    assert many.index is None
    assert few.index is not None
    assert many.window is not None
    first, count = many.window
    assert few.index.tolist() == [(first + i) % 8 for i in range(count)]


def test_batchnorm_in_a_subset_sees_the_subset() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn = nn.BatchNorm1d(6, momentum=1.0)

        def forward(self, x: Tensor) -> Tensor:
            return x + torch.relu(self.bn(x))

    net = insert(nn.Sequential(Block()), "subset", final=0.5).train()
    chosen: list[Tensor] = []
    net.get_submodule("0.bn").register_forward_hook(lambda m, args, out: chosen.append(args[0]))
    net(torch.randn(10, 6))
    assert len(chosen[0]) == 5
    torch.testing.assert_close(net.get_submodule("0.bn").running_mean, chosen[0].mean(0))


def test_the_graph_that_people_see_stays_flat() -> None:
    model = torchvision.models.resnet18()
    plain = ds.trace(model)
    row, subset = insert(model, "row"), insert(model, "subset")
    assert subset.code == row.code
    assert "draw_rows" in subset.running_code
    assert row.running_code == row.code
    removed = ds.apply(subset, ds.RemoveDropPath()).module
    assert removed.code == plain.code == removed.running_code
    slim = ds.slim(subset)
    assert not any(isinstance(m, ds.DropPath) for m in slim.modules())


@pytest.mark.parametrize("mode", WORKING)
def test_copies_pickles_and_saved_surgeries_run_alike(mode: str, tmp_path: Any) -> None:
    net = insert(Stack(InPlaceAfter), mode, final=0.5).train()
    x = torch.randn(8, 6)
    torch.manual_seed(5)
    expected = net(x)
    copied = copy.deepcopy(net)
    pickled = pickle.loads(pickle.dumps(net))
    loaded = ds.load(ds.save(net, tmp_path), Stack(InPlaceAfter))
    for other in (copied, pickled, loaded):
        assert lowered(other) == 3
        torch.manual_seed(5)
        assert torch.equal(other(x), expected)


def test_a_second_insertion_changes_the_mode() -> None:
    net = insert(Stack(Mlp), "row")
    subset = insert(net, "subset")
    assert lowered(net) == 0
    assert lowered(subset) == 3
    assert lowered(insert(subset, "row")) == 0
    native = torchvision.models.convnext_tiny()
    assert lowered(insert(native, "subset")) == 18


def test_what_can_only_be_masked_is_said() -> None:
    class Weird(Mlp):
        def forward(self, x: Tensor) -> Tensor:
            return torch.add(x, torch.tanh(self.fc(x)), alpha=2)

    result = ds.apply(Stack(Weird), ds.InsertDropPath(ds.survival.linear(0.5), mode="subset"))
    assert all("mode 'row' (computed and masked: 'add" in c.what for c in result.changes)
    assert lowered(result.module) == 0
    result = ds.apply(Stack(Mlp), ds.InsertDropPath(ds.survival.linear(0.99), mode="subset"))
    assert "masked: it drops less than the break-even 0.1" in result.changes[0].what


def test_the_break_even() -> None:
    layer = ds.DropPath(0.1, "subset")
    assert [layer.count(batch) for batch in (128, 64, 16, 9, 2, 1)] == [116, 58, 15, 9, 2, 1]
    layer.drop_prob = 0.09
    assert [layer.count(batch) for batch in (128, 16, 1)] == [128, 16, 1]
    always = ds.DropPath(0.3, "subset", break_even=0.0)
    assert [always.count(batch) for batch in (10, 2, 1)] == [7, 2, 1]
    assert [always.run(batch) for batch in (10, 4, 2, 1)] == pytest.approx([7, 2.8, 2, 1])
    assert ds.DropPath(0.6, "subset", break_even=0.7).count(64) == 64


def test_the_break_even_of_convolutions_of_one_pixel(monkeypatch: pytest.MonkeyPatch) -> None:
    """With one thread torch leaves oneDNN below 16 samples."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    layer = ds.DropPath(0.25, "subset")
    assert [layer.count(batch, True) for batch in (24, 20, 16, 15)] == [18, 20, 16, 12]
    assert layer.run(20, True) == 20
    assert layer.count(20) == 15
    layer.drop_prob = 0.45
    assert layer.count(20, True) == 11
    always = ds.DropPath(0.1, "subset", break_even=0.0)
    assert always.count(16, True) == 15
    layer.drop_prob = 0.25
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert layer.count(20, True) == 15


@pytest.mark.parametrize("kernel", [1, 3])
def test_convolutions_of_one_pixel_are_found(kernel: int, monkeypatch: pytest.MonkeyPatch) -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, kernel, padding=kernel // 2)

        def forward(self, x: Tensor) -> Tensor:
            return x + torch.relu(self.conv(x))

    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    insertion = ds.InsertDropPath(ds.survival.constant(0.8), mode="subset")
    net = ds.apply(Block(), insertion).module.train()
    seen: list[int] = []
    net.get_submodule("conv").register_forward_hook(lambda m, args, out: seen.append(len(args[0])))
    for batch in (10, 16, 64):
        net(torch.randn(batch, 3, 4, 4))
    assert seen[0] == 8
    assert seen[1] == 16 if kernel == 1 else seen[1] in (12, 13)
    assert seen[2] in (51, 52)
    site = ds.expected_compute(net, (torch.randn(16, 3, 4, 4),)).sites[0]
    reason = "masked: below the break-even" if kernel == 1 else ""
    assert (site.run, site.reason) == (pytest.approx(1.0 if kernel == 1 else 0.8), reason)


def test_bad_break_even() -> None:
    with pytest.raises(ArgumentError, match=r"break_even must lie in \[0, 1\], got 2"):
        ds.InsertDropPath(ds.survival.linear(0.5), mode="subset", break_even=2)


# Statistics


@pytest.mark.parametrize("batch", [1, 2, 3, 7, 32])
@pytest.mark.parametrize("drop_prob", [0.1, 0.37, 0.5])
@pytest.mark.parametrize("mode", ["row", "subset"])
def test_draws_match_theory(mode: str, drop_prob: float, batch: int) -> None:
    torch.manual_seed(batch)
    layer = ds.DropPath(drop_prob, mode, break_even=0.0).train()  # type: ignore[arg-type]
    x, keep = torch.zeros(batch, 1), 1.0 - drop_prob
    draws = 20_000 // 4 if batch == 32 else 20_000
    masks = torch.stack([as_mask(layer.rows(x), batch) for _ in range(draws)])  # type: ignore
    kept = (masks > 0).double()
    error = (keep * drop_prob / draws) ** 0.5
    assert ((kept.mean(0) - keep).abs() < 4.5 * error).all()
    assert ((masks.mean(0) - 1.0).abs() < 4.5 * error / keep).all()
    # A Bernoulli's variance, scaled; its sampling error from the fourth central moment.
    variance = drop_prob / keep
    fourth = keep * (1 / keep - 1) ** 4 + drop_prob
    spread = ((fourth - variance**2) / draws) ** 0.5
    assert ((masks.var(0) - variance).abs() < 4.5 * spread + 25 * variance / draws).all()
    if mode == "subset" and layer.count(batch) < batch:
        counts = kept.sum(1)
        most = layer.count(batch)
        assert set(counts.tolist()) <= {most - 1, most}


def test_whole_batches_survive_at_their_rate() -> None:
    torch.manual_seed(0)
    layer = ds.DropPath(0.3, "batch").train()
    kept = sum(layer.survives() for _ in range(20_000)) / 20_000
    assert abs(kept - 0.7) < 4 * (0.21 / 20_000) ** 0.5
    assert layer.eval().survives()


@pytest.mark.parametrize("p", [0.0, 1.0])
def test_rates_at_the_ends(p: float) -> None:
    net = insert(Stack(Mlp), "subset").train()
    for layer in net.modules():
        if isinstance(layer, ds.DropPath):
            layer.drop_prob = p
    x = torch.randn(8, 6)
    output = net(x)
    if p == 1.0:
        assert torch.equal(output, x)
    else:
        with torch.no_grad():
            torch.testing.assert_close(output, net.eval()(x))


class Normalized(nn.Module):
    def __init__(self, last: nn.Module | None = None) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(2, 2, 3, padding=1), nn.Conv2d(2, 2, 3, padding=1)
        self.last = last or nn.BatchNorm2d(2)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.last(self.two(torch.tanh(self.one(x))))


@pytest.mark.parametrize(
    ("last", "over"),
    [
        (nn.BatchNorm2d(2), True),
        (nn.Conv2d(2, 2, 1), True),
        (nn.Linear(4, 4), True),
        (nn.Sigmoid(), False),
    ],
)
def test_a_masked_sum_is_written_over_its_branch(
    last: nn.Module, over: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unless the backward asks for the branch, as that of a sigmoid does, or a hook may."""
    monkeypatch.setattr("dropsurgery.layers.rows.SMALL", 0)
    net = insert(nn.Sequential(Normalized(last), nn.Identity()).double(), "subset", break_even=1.0)
    x = torch.randn(9, 2, 4, 4, dtype=torch.float64)
    with monkeypatch.context() as patch:
        assert_runs_as_masked(net, (x,), patch)
    made: list[Tensor] = []
    forward = type(last).forward

    def watched(layer: nn.Module, value: Tensor) -> Tensor:
        made.append(forward(layer, value))
        return made[-1]

    monkeypatch.setattr(type(last), "forward", watched)
    assert (net.train()(x).data_ptr() == made[-1].data_ptr()) == over
    seen: list[Tensor] = []
    net.get_submodule("0.last").register_forward_hook(lambda m, args, out: seen.append(out))
    assert net(x).data_ptr() != seen[0].data_ptr()


@pytest.mark.parametrize("name", ["resnet18", "regnet_y_400mf", "mobilenet_v2"])
def test_known_networks_are_masked_over_their_branches(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dropsurgery.layers.rows.SMALL", 0)
    model = randomize(getattr(torchvision.models, name)(num_classes=5)).double()
    net = insert(model, "subset", break_even=1.0)
    assert "_add_over" in net.running_code
    x = torch.randn(3, 3, 64, 64, dtype=torch.float64)
    with monkeypatch.context() as patch:
        assert_runs_as_masked(net, (x,), patch)
    net.float().train()
    for format in (torch.contiguous_format, torch.channels_last):
        net.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = net(x.float().to(memory_format=format)).float().sum()
        loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())


@pytest.mark.parametrize("block", [Normalized, Mlp])
def test_the_reference_of_the_benchmark_draws_and_adds_in_its_own_way(
    block: Callable[[], nn.Module],
) -> None:
    shape = (10, 6) if block is Mlp else (10, 2, 4, 4)
    net = dinov2(insert(nn.Sequential(block()).double(), "subset", 0.5)).train()
    x = torch.randn(shape, dtype=torch.float64)
    y = net(x)
    assert sum(torch.equal(own, before) for own, before in zip(y, x, strict=True)) == 5
    y.sum().backward()
    assert all(p.grad is not None for p in net.parameters())


# Samples that are turned around between two blocks


class Rectified(Mlp):
    def __init__(self, after: nn.Module | None = None) -> None:
        super().__init__()
        self.after = after or nn.ReLU(inplace=True)
        self.shortcut = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.after(torch.tanh(self.fc(x)) + self.shortcut(x))


def without_branches(module: fx.GraphModule) -> fx.GraphModule:
    """Let every branch be zero: each block then returns what it gets, where that is positive."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
    return module


def turned(module: fx.GraphModule) -> int:
    """Return how many sums may be written for the next branch."""
    return len(re.findall(r"= \w+_first(?:_\d+)?\(", module.running_code))


@pytest.mark.parametrize("form", [as_windows, as_traced])
def test_sums_are_turned_around_behind_a_relu_only(
    form: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert turned(insert(Stack(Rectified), "subset")) == 2
    assert turned(insert(Stack(InPlaceAfter), "subset")) == 2
    assert turned(insert(Stack(lambda: Rectified(nn.Tanh())), "subset")) == 0
    assert turned(insert(Stack(Mlp), "subset")) == 0
    assert turned(insert(Stack(Rectified), "batch")) == 0
    form(monkeypatch)
    torch.manual_seed(0)
    net = insert(Stack(Rectified).double(), "subset")
    assert_runs_as_masked(net, (torch.randn(9, 6, dtype=torch.float64),), monkeypatch)


@pytest.mark.parametrize("form", [as_windows, as_traced])
def test_a_hook_on_the_relu_sees_the_samples_as_they_stand(
    form: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    form(monkeypatch)
    net = without_branches(insert(Stack(Rectified), "subset")).train()
    relu = net.get_submodule("0.after")
    seen: list[Tensor] = []
    hook = relu.register_forward_hook(lambda m, args, out: seen.append(out.detach().clone()))
    x = torch.rand(9, 6)
    for _ in range(5):
        assert torch.equal(net(x), x)
    assert all(torch.equal(value, x) for value in seen)
    hook.remove()
    calls: list[Tensor] = []
    monkeypatch.setattr(nn.ReLU, "forward", lambda self, v: calls.append(v.clone()) or v.relu())
    for _ in range(5):
        assert torch.equal(net(x), x)
    # What is told apart is there: the samples stand otherwise, or two of three are not called.
    assert len(calls) == 5 if form is as_traced else not all(torch.equal(v, x) for v in calls)


@pytest.mark.parametrize("form", [as_windows, as_traced])
def test_another_module_in_the_place_of_the_relu_is_run(
    form: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    form(monkeypatch)
    net = without_branches(insert(Stack(Rectified), "subset")).train()
    seen: list[Tensor] = []

    class Seeing(nn.ReLU):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(x.clone())
            return x.relu()

    net.get_submodule("0").after = Seeing()
    x = torch.rand(9, 6)
    for _ in range(5):
        assert torch.equal(net(x), x)
    assert len(seen) == 5
    assert all(torch.equal(value, x) for value in seen)


class Narrowed(nn.Module):
    """A block with a projection on its skip."""

    def __init__(self, down: Callable[[], nn.Module] | None = None) -> None:
        super().__init__()
        self.one = nn.Conv2d(2, 2, 3, padding=1)
        self.two = nn.Conv2d(2, 2, 3, padding=1)
        projection = nn.Conv2d(2, 2, 1, bias=False), nn.BatchNorm2d(2)
        self.down = down() if down else nn.Sequential(nn.AvgPool2d(1), *projection)

    def forward(self, x: Tensor) -> Tensor:
        y = self.two(torch.tanh(self.one(x)))
        return F.relu(y + self.down(x), inplace=True)


def narrowed(*downs: Callable[[], nn.Module] | None) -> nn.Module:
    torch.manual_seed(0)
    return randomize(nn.Sequential(*(Narrowed(down) for down in downs))).double()


def test_sums_before_a_projection_are_turned_around_if_compiled(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    taken: list[int] = []

    def counted(x: Tensor, *rest: Any) -> Tensor:
        taken.append(len(x))
        return take_window(x, *rest)

    monkeypatch.setattr("dropsurgery.layers.rows.take_window", counted)
    net = insert(narrowed(nn.Identity, None, None, nn.Identity), "subset")
    assert turned(net) == 3
    x = torch.randn(9, 2, 4, 4, dtype=torch.float64)
    with monkeypatch.context() as patch:
        as_windows(patch)
        assert_runs_as_masked(net, (x,), patch)
    assert not taken
    as_traced(monkeypatch)
    assert_runs_as_masked(net, (x,), monkeypatch)
    assert taken == [9]  # of the first block alone


@pytest.mark.parametrize("down", [nn.Dropout2d, nn.Sigmoid, lambda: nn.GroupNorm(1, 2)])
def test_other_skips_are_left_in_their_order(
    down: Callable[[], nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    net = insert(narrowed(nn.Identity, down), "subset")
    assert turned(net) == 0
    as_traced(monkeypatch)
    assert_runs_as_masked(net, (torch.randn(9, 2, 4, 4, dtype=torch.float64),), monkeypatch)


def test_a_hook_on_a_projection_sees_the_samples_as_they_stand(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    as_traced(monkeypatch)
    net = insert(narrowed(nn.Identity, None), "subset").train()
    for block in net.children():
        nn.init.zeros_(block.two.weight)
        nn.init.zeros_(block.two.bias)
    x = torch.rand(9, 2, 4, 4, dtype=torch.float64)
    calls: list[Tensor] = []
    batch_norm = nn.BatchNorm2d.forward

    def watched(layer: nn.BatchNorm2d, value: Tensor) -> Tensor:
        calls.append(value)
        return batch_norm(layer, value)

    monkeypatch.setattr(nn.BatchNorm2d, "forward", watched)
    pooled = net.get_submodule("1.down.0")
    hook = pooled.register_forward_hook(lambda m, args, out: None)
    for _ in range(5):
        net(x)
    assert len(calls) == 5
    assert all(torch.equal(value, calls[0]) for value in calls)
    hook.remove()
    for _ in range(5):
        net(x)
    # What is told apart is there: without a hook the samples stand otherwise.
    assert not all(torch.equal(value, calls[0]) for value in calls)


def test_rows_behind_a_relu_are_not_kept_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    as_windows(monkeypatch)
    net = insert(nn.Sequential(*(Rectified() for _ in range(6))), "subset").train()
    own = {p.untyped_storage().data_ptr() for p in net.parameters()}
    for seed in range(6):
        torch.manual_seed(seed)
        kept: dict[int, Tensor] = {}

        def pack(x: Tensor, kept: dict[int, Tensor] = kept) -> Tensor:
            kept.setdefault(x.untyped_storage().data_ptr(), x)
            return x

        x = torch.randn(10, 6, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            net(x).sum()
        sizes = [t.untyped_storage().nbytes() // 24 for key, t in kept.items() if key not in own]
        # Of each block the result of the ReLU, of all samples, and of tanh, of the chosen ones;
        # of the first one's rows, which follow no ReLU, a copy, or the input that they are part of.
        assert len(sizes) == 13
        assert sizes.count(10) in (6, 7)
