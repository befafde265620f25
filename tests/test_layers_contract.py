"""What every drop layer promises: eval, seeds, dtypes, rates, the compiler, bad input."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from dropsurgery import layers
from dropsurgery.errors import ArgumentError, ArgumentTypeError
from dropsurgery.graph.drops import is_classic, is_drop, rate, set_rate
from dropsurgery.graph.ops import Kind, module_kind
from tests.drop_helpers import (
    LAYERS,
    assert_mean,
    assert_uncorrelated,
    assert_variance,
    seeded,
)

every_layer = pytest.mark.parametrize("name", LAYERS)


def make(name: str, p: float = 0.4, seed: int | None = None) -> tuple[nn.Module, Tensor]:
    build, shape = LAYERS[name]
    layer = build(p)
    if seed is not None:
        layer.generator = seeded(seed)  # type: ignore[assignment]
    return layer, torch.rand(shape, generator=seeded(1)) + 0.5


@every_layer
def test_eval_and_rate_zero_return_the_input_itself(name: str) -> None:
    layer, x = make(name)
    if name != "ClassicDropout":
        assert layer.eval()(x) is x
    set_rate(layer, 0.0)
    assert layer.train()(x) is x
    set_rate(layer, 0.4)
    assert not torch.equal(layer.train()(x), x)


@every_layer
def test_a_generator_decides_and_the_global_one_is_left_alone(name: str) -> None:
    layer, x = make(name, seed=5)
    before = torch.get_rng_state()
    first, second = layer(x), layer(x)
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(first, second)
    layer.generator.manual_seed(5)  # type: ignore[union-attr]
    assert torch.equal(layer(x), first)

    layer.generator = None  # type: ignore[assignment]
    torch.manual_seed(7)
    first = layer(x)
    torch.manual_seed(7)
    assert torch.equal(layer(x), first)


@every_layer
def test_copies_and_pickles_carry_the_generator(name: str) -> None:
    layer, x = make(name, seed=5)
    twins = [copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))]
    expected = layer(x)
    for twin in twins:
        assert torch.equal(twin(x), expected)


@every_layer
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_dtype_stays(name: str, dtype: torch.dtype) -> None:
    layer, x = make(name)
    y = layer(x.to(dtype))
    assert y.dtype == dtype
    assert y.isfinite().all()


@every_layer
def test_under_autocast(name: str) -> None:
    layer, x = make(name)
    inner = nn.Linear(x.shape[-1], x.shape[-1])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(inner(x))
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert inner.weight.grad is not None


@every_layer
def test_the_gradient_is_the_factor_of_each_element(name: str) -> None:
    layer, x = make(name)
    x = x.double().requires_grad_()
    y = layer(x)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(gradient, (y / x).detach(), rtol=1e-12, atol=0.0)
    assert (gradient == 0).any() or name in ("GaussianDropout", "UniformDropout")


@every_layer
def test_channels_last_stays(name: str) -> None:
    layer, x = make(name)
    if x.ndim == 4:
        y = layer(x.contiguous(memory_format=torch.channels_last))
        assert y.is_contiguous(memory_format=torch.channels_last)


@every_layer
def test_rates_and_kinds_are_known_to_the_graph(name: str) -> None:
    layer, _ = make(name, 0.25)
    assert rate(layer) == 0.25
    set_rate(layer, 0.5)
    assert layer.p == 0.5
    assert is_drop(layer) != is_classic(layer)
    assert module_kind(layer) is (Kind.LINEAR if is_classic(layer) else Kind.DROP)
    assert "=0.5" in repr(layer) or "beta=1.732" in repr(layer)


@every_layer
def test_compiled_without_a_break_and_once_for_all_rates(name: str) -> None:
    layer, x = make(name)
    torch._dynamo.reset()
    counters.clear()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = x.repeat(16, *[1] * (x.ndim - 1))
    for p in (0.1, 0.3, 0.5, 0.7, 0.9, 0.2):
        set_rate(layer, p)
        y = compiled(x)
        # The rate is the new one, roughly: the statistics have their own tests.
        factor = y / x
        if name in ("GaussianDropout", "UniformDropout"):
            assert abs(float(factor.var()) / (p / (1 - p)) - 1) < 0.5
        elif name == "Cutout":
            assert abs(float((factor == 0).flatten(1).any(1).float().mean()) - p) < 0.2
        else:
            assert abs(float((factor == 0).float().mean()) - p) < 0.15
    assert counters["stats"]["unique_graphs"] <= 2
    assert not counters["graph_break"]


@every_layer
@pytest.mark.parametrize("p", [-0.1, 1.5, float("nan")])
def test_rates_outside_the_unit_interval(name: str, p: float) -> None:
    with pytest.raises(ArgumentError, match=r"p must lie in \[0, 1"):
        LAYERS[name][0](p)


@pytest.mark.parametrize("name", [n for n in LAYERS if n != "Cutout"])
def test_a_rate_of_one(name: str) -> None:
    with pytest.raises(ArgumentError, match=r"must lie in .0, 1.|infinite variance at p = 1"):
        LAYERS[name][0](1.0)


@every_layer
def test_bad_arguments(name: str) -> None:
    layer, x = make(name)
    with pytest.raises(ArgumentTypeError, match=r"p must be a number, got 'half'"):
        LAYERS[name][0]("half")  # type: ignore[arg-type]
    with pytest.raises(ArgumentTypeError, match=r"generator must be a torch.Generator or None"):
        type(layer)(generator=5)
    with pytest.raises(ArgumentError, match=r"needs a floating-point tensor, got torch.int64"):
        layer(x.long())


@pytest.mark.parametrize("name", ["ClassicDropout", "GaussianDropout", "UniformDropout"])
def test_units(name: str) -> None:
    build = getattr(layers, name)
    x = torch.ones(4, 3, 2, 2, dtype=torch.float64)
    free = {"element": 48, "channel": 12, "row": 4, "batch": 1}
    for units, count in free.items():
        layer = build(0.5, units)
        torch.manual_seed(0)
        y = layer(x)
        assert len(y.unique()) == min(count, 2 if name == "ClassicDropout" else count)
        if units != "element":
            assert torch.equal(y, y[..., :1, :1].expand_as(y))
    with pytest.raises(ArgumentError, match=r"unknown units 'chanel'"):
        build(0.5, "chanel")


def test_set_generator_reaches_every_layer() -> None:
    net = nn.Sequential(layers.Dropout(0.5), nn.Sequential(layers.DropBlock2d(0.5)), nn.ReLU())
    generator = seeded(0)
    layers.set_generator(net, generator)
    assert net[0].generator is generator
    assert net[1][0].generator is generator
    layers.set_generator(net, None)
    assert net[0].generator is None
    with pytest.raises(ArgumentTypeError, match=r"generator must be a torch.Generator"):
        layers.set_generator(net, 3)  # type: ignore[arg-type]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@every_layer
def test_on_a_gpu(name: str) -> None:
    layer, x = make(name)
    y = layer(x.cuda())
    assert y.is_cuda
    layer.generator = seeded(0)  # type: ignore[assignment]
    with pytest.raises(ArgumentError, match=r"the generator is on cpu"):
        layer(x.cuda())


def test_a_generator_on_another_device() -> None:
    layer = layers.Dropout(0.5, generator=seeded(0))
    with pytest.raises(ArgumentError, match=r"the generator is on cpu and the input on meta"):
        layer(torch.empty(3, device="meta"))


# The comparison with theory can fail


def test_the_statistical_assertions_can_fail() -> None:
    draws = torch.randn(4_000, generator=seeded(0))
    assert_mean(draws, 0.0)
    assert_variance(draws, 1.0)
    assert_uncorrelated(draws[:2_000], draws[2_000:])
    with pytest.raises(AssertionError, match=r"standard errors away"):
        assert_mean(draws, 0.1)
    with pytest.raises(AssertionError, match=r"standard errors away"):
        assert_variance(draws, 1.2)
    with pytest.raises(AssertionError):
        assert_uncorrelated(draws[:2_000], draws[2_000:] + 0.2 * draws[:2_000])
    with pytest.raises(AssertionError, match=r"standard errors away"):
        assert_mean(torch.ones(10), 1.1)
