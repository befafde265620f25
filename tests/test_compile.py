"""torch.compile: no graph break, no compiling anew from step to step, and the same mathematics."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import timm
import torch
import torchvision
from torch import Tensor, fx, nn
from torch._dynamo.testing import CompileCounterWithBackend

import dropsurgery as ds
from dropsurgery.layers.draws import Draws
from tests.distributed_ranks import Net
from tests.drop_helpers import assert_mean


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def vit() -> nn.Module:
    sizes = {"img_size": 16, "patch_size": 8, "depth": 2, "embed_dim": 16, "num_heads": 2}
    return timm.create_model("vit_tiny_patch16_224", num_classes=4, **sizes)


def swin() -> nn.Module:
    sizes = {"embed_dim": 16, "depths": (1, 2), "num_heads": (1, 2)}
    return timm.create_model(
        "swin_tiny_patch4_window7_224", img_size=64, window_size=4, num_classes=4, **sizes
    )


class Images(nn.Module):
    """A residual network of two blocks, with BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        block = torchvision.models.resnet.BasicBlock
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.blocks = nn.Sequential(block(8, 8), block(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(self.stem(x)).mean((2, 3))


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mlp": (Net, (4,)),
    "images": (Images, (3, 8, 8)),
    "vit": (vit, (3, 16, 16)),
    "swin": (swin, (3, 64, 64)),
}


def frames(
    name: str,
    mode: str,
    *,
    batches: list[int],
    seeded: bool = False,
    ramp: Callable[[int], float] | None = None,
) -> list[int]:
    """Train compiled; return how many frames had been compiled after each step."""
    build, shape = NETWORKS[name]
    torch.manual_seed(0)
    net = ds.retrofit(build(), 0.5, mode=mode).train()
    draws = ds.seed_drop_paths(net, 3) if seeded else None
    schedule = ds.SurvivalSchedule(net, ramp) if ramp else None
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(net, backend=counter, fullgraph=True)
    counts = []
    for batch in batches:
        compiled(torch.randn(batch, *shape)).square().mean().backward()
        for parameter in net.parameters():
            assert parameter.grad is None or bool(parameter.grad.isfinite().all())
        net.zero_grad()
        if schedule is not None:
            schedule.step()
        if draws is not None:
            draws.advance()
        counts.append(counter.frame_count)
    return counts


@pytest.mark.parametrize("seeded", [False, True])
@pytest.mark.parametrize("mode", ["row", "subset"])
@pytest.mark.parametrize("name", ["mlp", "images"])
def test_constant_rates_are_compiled_once(name: str, mode: str, seeded: bool) -> None:
    assert frames(name, mode, batches=[8] * 4, seeded=seeded) == [1] * 4


@pytest.mark.parametrize("seeded", [False, True])
@pytest.mark.parametrize("mode", ["row", "subset"])
@pytest.mark.parametrize("name", ["mlp", "images"])
def test_rates_that_change_are_compiled_once_more(name: str, mode: str, seeded: bool) -> None:
    ramp = lambda step: 0.2 + 0.1 * step  # noqa: E731
    counts = frames(name, mode, batches=[8] * 8, seeded=seeded, ramp=ramp)
    assert counts == [1] + [2] * 7


@pytest.mark.parametrize("name", ["vit", "swin"])
def test_known_networks_over_a_ramp(name: str) -> None:
    """Not dropping, the first rate, any rate, any batch: four, and then no more."""
    batches = [8, 8, 8, 8, 8, 12, 13, 11]
    counts = frames(name, "subset", batches=batches, ramp=ds.ramps.linear(6))
    assert counts == [1, 2, 3, 3, 3, 4, 4, 4]


@pytest.mark.parametrize("mode", ["row", "subset"])
@pytest.mark.parametrize("name", ["mlp", "images"])
def test_batch_sizes_that_change_are_compiled_once_more(name: str, mode: str) -> None:
    counts = frames(name, mode, batches=[8, 8, 6, 7, 9, 12, 11])
    assert counts == [1, 1] + [2] * 5


# Where the graph is broken, dynamo looks for the gradient of a tensor that has none.
@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")
@pytest.mark.parametrize("seeded", [False, True])
def test_batch_mode_breaks_the_graph_where_it_draws(seeded: bool) -> None:
    torch.manual_seed(0)
    net = ds.retrofit(Shares(), 0.5, rule="constant", mode="batch").train()
    draws = ds.seed_drop_paths(net, 3) if seeded else Draws(0)
    compiled = torch.compile(net, backend="eager")
    values = []
    for _ in range(40):
        values.append(float(compiled(torch.zeros(3, 1)).detach().unique()))
        draws.advance()
    assert set(values) == {0.0, 2.0}
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    compiled, counts = torch.compile(net, backend=counter), []
    for _ in range(30):
        compiled(torch.zeros(3, 1))
        draws.advance()
        counts.append(counter.frame_count)
    assert counts[-1] == counts[19]  # dropped and not, each compiled by then
    assert counts[-1] > 1
    with pytest.raises((torch._dynamo.exc.UserError, torch._dynamo.exc.Unsupported)):
        torch.compile(net, backend="eager", fullgraph=True)(torch.zeros(3, 1))


class Shares(nn.Module):
    """A branch of ones on a skip of zeros: the output is the mask."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(1, 1)
        nn.init.zeros_(self.one.weight)
        nn.init.ones_(self.one.bias)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.one(x).relu()


@pytest.mark.parametrize("mode", ["row", "subset"])
def test_compiled_masks_are_of_the_right_mean(mode: str) -> None:
    """Each sample survives with exactly p, for small and odd batches, and rates that move."""
    net = ds.retrofit(Shares(), 0.7, rule="constant", mode=mode).train()
    compiled = torch.compile(net, backend="eager", fullgraph=True)
    layer = next(m for m in net.modules() if isinstance(m, ds.DropPath))
    torch.manual_seed(3)
    for batch, keep in [(7, 0.7), (7, 0.33), (2, 0.9), (10, 0.7), (3, 0.05)]:
        ds.set_survival(net, ds.survival.constant(keep))
        with torch.no_grad():
            values = torch.stack([compiled(torch.zeros(batch, 1))[:, 0] for _ in range(1500)])
        assert set(values.unique().tolist()) <= {0.0, float(torch.tensor(1.0 / keep))}
        assert_mean(values, 1.0)
        kept = (values > 0.0).sum(1)
        if mode == "subset":  # whole samples, but for one that makes up the fraction
            assert int(kept.max()) - int(kept.min()) <= 1
    assert layer.drop_prob == pytest.approx(0.95)


def assert_alike(
    compiled: Callable[..., Any], net: nn.Module, x: Tensor, tolerance: float
) -> Tensor:
    """Compare values and gradients of the compiled and the eager network; return the output."""
    results: list[list[Tensor | None]] = []
    for run in (compiled, net):
        net.zero_grad()
        output = run(x)
        output.square().sum().backward()
        results.append([output, *(parameter.grad for parameter in net.parameters())])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    return output.detach()


def short_mlp() -> nn.Module:
    net = Net()
    net.blocks = net.blocks[:2]
    return net


@pytest.mark.parametrize("build", [short_mlp, Images])
@pytest.mark.parametrize("mode", ["row", "subset"])
def test_seeded_draws_are_the_same_compiled(mode: str, build: Callable[[], nn.Module]) -> None:
    """With seeded draws the compiled network gives what the eager one gives, step after step."""
    torch.manual_seed(0)
    model = build().double()
    net = ds.retrofit(model, 0.5, mode=mode).train()
    for layer in net.modules():  # in training it sees a row that does not count, if compiled
        layer.training &= not isinstance(layer, nn.BatchNorm2d)
    draws = ds.seed_drop_paths(net, 3)
    schedule = ds.SurvivalSchedule(net, lambda step: 0.5 + 0.1 * step)
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    shape = (4,) if build is short_mlp else (3, 8, 8)
    x = torch.randn(64, *shape, dtype=torch.float64)  # the break-even of a full batch
    outputs = []
    for _ in range(3):
        outputs.append(assert_alike(compiled, net, x, 1e-10))
        schedule.step()
        draws.advance()
    assert not torch.allclose(outputs[-1], outputs[-2])  # another step draws otherwise


@pytest.mark.parametrize(("threads", "few"), [(1, True), (2, False)])
def test_convolutions_of_one_pixel_are_not_given_few_samples(
    threads: int, few: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On one thread torch computes fewer than 16 of them more slowly, compiled too."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    net = ds.retrofit(nn.Sequential(Small(nn.Conv2d(4, 4, 1))), 0.8, mode="subset").train()
    counts: list[int] = []

    def backend(module: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        def run(*values: Any) -> Any:
            seen = Seen(module)
            result = seen.run(*values)
            counts.append(seen.count)
            return result

        return run

    for batch in (16, 64, 8):
        torch._dynamo.reset()
        torch.compile(net, backend=backend, fullgraph=True)(torch.randn(batch, 4, 5, 5))
    assert counts == [16 if few else 13, 52, 7]


class Seen(fx.Interpreter):
    """Notes how many samples the convolution gets."""

    count = 0

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if "conv2d" in str(target):
            self.count = len(args[0])
        return super().call_function(target, args, kwargs)


class Small(nn.Module):
    """One branch, so that the real compiler has little to do."""

    def __init__(self, one: nn.Module | None = None) -> None:
        super().__init__()
        self.one = one or nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.one(x).tanh()


def blocks() -> nn.Module:
    """Two branches with a ReLU between their sums."""
    small = [Small(nn.Conv2d(4, 4, 3, padding=1)) for _ in range(2)]
    return nn.Sequential(small[0], nn.ReLU(), small[1], nn.ReLU())


# Importing the compiler's own modules warns.
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")
@pytest.mark.parametrize(("build", "shape"), [(Small, (4,)), (blocks, (4, 5, 5))])
def test_inductor(build: Callable[[], nn.Module], shape: tuple[int, ...]) -> None:
    """The real compiler, with seeded draws: values and gradients are those of the eager network."""
    torch.manual_seed(0)
    net = ds.retrofit(build(), 0.5, mode="subset").train()
    draws = ds.seed_drop_paths(net, 3)
    schedule = ds.SurvivalSchedule(net, lambda step: 0.5 + 0.1 * step)
    compiled = torch.compile(net, fullgraph=True)
    for batch in (16, 16, 13):
        assert_alike(compiled, net, torch.randn(batch, *shape), 1e-5)
        schedule.step()
        draws.advance()
