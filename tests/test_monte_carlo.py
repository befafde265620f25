"""Monte-Carlo dropout: noise that stays, in torch and in ONNX, and what repeated runs tell."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import dropsurgery as ds
from benchmarks import mc_onnx
from dropsurgery.errors import ArgumentError, ArgumentTypeError, ExportError, PassError
from dropsurgery.layers import MonteCarloDropout, ScaledDotProductAttention
from tests.helpers import randomize
from tests.test_dropout import Everything, X


class Net(nn.Module):
    """Two dropouts on one tensor, whose draws must not become one, channels and rows."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.one, self.two = nn.Dropout(0.3), nn.Dropout(0.3)
        self.channels, self.path = nn.Dropout2d(0.5), ds.DropPath(0.2)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x))
        x = self.one(x) - 2 * self.two(x) + self.path(self.channels(F.relu(x)))
        return self.head(x.mean((2, 3)))


def monte_carlo(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    model = randomize(Net()).eval()
    return ds.apply(model, ds.ConvertDropout("monte-carlo", **options)).module


def session(path: Path) -> Any:
    onnxruntime.set_seed(mc_onnx.SEED)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(str(path), options)


SMALL = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(5))


# The layer


@pytest.mark.parametrize("noise", ["bernoulli", "gaussian"])
@pytest.mark.parametrize("p", [0.1, 0.5, 0.8])
def test_the_layer_draws_in_both_modes_with_the_moments_of_dropout(noise: Any, p: float) -> None:
    torch.manual_seed(0)
    layer = MonteCarloDropout(p, noise)
    x = torch.full((100_000,), 3.0, dtype=torch.float64)
    for y in (layer.train()(x) / 3, layer.eval()(x) / 3):
        variance = p / (1 - p)
        assert abs(y.mean() - 1) < 4 * math.sqrt(variance / len(x))
        assert y.var().item() == pytest.approx(variance, rel=0.05)


def test_units_share_a_draw() -> None:
    x = torch.ones(3, 4, 5, 6)
    counts = {
        units: len(MonteCarloDropout(0.5, "gaussian", units)(x).unique())  # type: ignore[arg-type]
        for units in ("element", "channel", "row", "batch")
    }
    assert counts == {"element": 360, "channel": 12, "row": 3, "batch": 1}


def test_half_precision_keeps_fine_rates_and_gradients_pass() -> None:
    torch.manual_seed(0)
    x = torch.ones(400_000, dtype=torch.bfloat16, requires_grad=True)
    y = MonteCarloDropout(0.002)(x)
    assert y.dtype == torch.bfloat16
    dropped = (y == 0).float().mean().item()
    assert dropped == pytest.approx(0.002, abs=4 * math.sqrt(0.002 / 400_000))
    y.float().sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad == 0, y == 0)


def test_bad_arguments_of_the_layer() -> None:
    with pytest.raises(ArgumentError, match=r"p must lie in \[0, 1\)"):
        MonteCarloDropout(1.0)
    with pytest.raises(ArgumentError, match="unknown noise 'laplace'"):
        MonteCarloDropout(0.5, "laplace")  # type: ignore[arg-type]
    assert MonteCarloDropout(0.0)(X) is X


# The conversion


@pytest.mark.parametrize("noise", ["bernoulli", "gaussian"])
def test_noise_stays_in_eval_everywhere(noise: Any) -> None:
    model = Everything().eval()
    result = ds.apply(model, ds.ConvertDropout("monte-carlo", noise=noise))
    net = result.module.eval()
    assert not torch.equal(net(X), net(X))
    assert len(result.changes) == 13
    assert all("alpha dropout also adds" in skip.reason for skip in result.skipped)
    # Inside the transformer layer, too, whose fused kernel would not draw.
    encoder = net.encoder
    x = torch.randn(2, 5, 4)
    with torch.no_grad():
        assert not torch.equal(encoder(x), encoder(x))
        original = model.encoder(x)
    restored = ds.apply(net, ds.ConvertDropout("original")).module.encoder
    with torch.no_grad():
        assert torch.equal(restored(x), original)
    assert {drop.runs for drop in ds.find_drops(net) if "alpha" not in drop.path} == {"always"}


def test_functions_that_are_always_on_become_layers_that_export() -> None:
    class AlwaysOn(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            x = F.dropout(x, 0.5)
            return F.scaled_dot_product_attention(x, x, x, dropout_p=0.25)

    model = AlwaysOn().eval()
    result = ds.apply(model, ds.ConvertDropout("monte-carlo"))
    assert [type(m).__name__ for m in result.module.children()] == [
        "MonteCarloDropout", "MonteCarloAttention",
    ]  # fmt: skip
    back = ds.apply(result.module, ds.ConvertDropout("original")).module
    assert back.code == ds.trace(model).code
    assert not list(back.children())


def test_attention_has_the_expectation_and_variance_of_torchs() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 4, 8, dtype=torch.float64) for _ in range(3))
    plain = ScaledDotProductAttention(0.3).train()
    layer = ds.layers.MonteCarloAttention(0.3).eval()
    first = torch.stack([plain(q, k, v) for _ in range(3000)])
    second = torch.stack([layer(q, k, v) for _ in range(3000)])
    assert mc_onnx.compare(first, second).ok


# ONNX


@pytest.mark.parametrize("noise", ["bernoulli", "gaussian"])
def test_a_session_draws_as_torch_does(noise: Any, tmp_path: Path) -> None:
    net = monte_carlo(noise=noise)
    path = ds.export_onnx(net, tmp_path / "net.onnx", SMALL)
    run = mc_onnx.session(path)
    with torch.no_grad():
        reference = mc_onnx.draws_of(net, SMALL, 1500)
        draws = mc_onnx.draws_of(run, SMALL, 1500)
    assert mc_onnx.compare(reference, draws).ok
    assert not torch.equal(run(SMALL), run(SMALL))


class Attends(nn.Module):
    """Attention as a function, as a layer, and inside a transformer layer that stays whole."""

    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.2)
        self.attention = nn.MultiheadAttention(4, 2, dropout=0.3, batch_first=True)
        self.encoder = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.2, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.drop(x)
        x = F.scaled_dot_product_attention(x, x, x, dropout_p=0.3 if self.training else 0.0)
        x = self.attention(x, x, x)[0]
        return self.head(self.encoder(x).mean(1))


def test_attention_draws_in_a_session_as_in_torch(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = ds.apply(Attends().eval(), ds.ConvertDropout("monte-carlo")).module
    x = torch.randn(2, 5, 4)
    path = ds.export_onnx(net, tmp_path / "net.onnx", x)
    assert [n.op_type for n in onnx.load(path).graph.node].count("RandomUniformLike") == 7
    with torch.no_grad():
        reference = mc_onnx.draws_of(net, x, 1500)
        draws = mc_onnx.draws_of(mc_onnx.session(path), x, 1500)
    assert mc_onnx.compare(reference, draws).ok
    # In training mode torch's own layers draw the same distribution.
    with torch.no_grad():
        own = mc_onnx.draws_of(net_of(net).train(), x, 1500)
    assert mc_onnx.compare(reference, own).ok


def test_slim_keeps_noise_that_is_meant_for_eval() -> None:
    net = ds.apply(Attends().eval(), ds.ConvertDropout("monte-carlo")).module
    slim = ds.slim(net)
    kinds = [type(m).__name__ for m in slim.modules()]
    assert kinds.count("MonteCarloDropout") == 4
    assert kinds.count("MonteCarloMultiheadAttention") == 2
    x = torch.randn(2, 5, 4)
    assert not torch.equal(slim(x), slim(x))
    off = ds.apply(net, ds.ConvertDropout("identity")).module
    assert torch.equal(off(x), off(x))


def net_of(net: Any) -> nn.Module:
    return ds.apply(net, ds.ConvertDropout("original")).module


@pytest.mark.parametrize("fault", ["frozen", "dropout nodes", "one dropout less"])
def test_the_statistical_test_fails_where_it_must(fault: str, tmp_path: Path) -> None:
    net = monte_carlo()
    path = ds.export_onnx(net, tmp_path / "net.onnx", SMALL)
    if fault == "frozen":
        path = mc_onnx.frozen(path, mc_onnx.ROWS * len(SMALL))
    elif fault == "dropout nodes":
        path = mc_onnx.with_dropout_nodes(path, 0.3)
    else:
        less = ds.apply(net, ds.ConvertDropout("identity", where="two")).module
        path = ds.export_onnx(less, tmp_path / "less.onnx", SMALL)
    with torch.no_grad():
        reference = mc_onnx.draws_of(net, SMALL, 1500)
        draws = mc_onnx.draws_of(mc_onnx.session(path), SMALL, 1500)
    assert not mc_onnx.compare(reference, draws).ok


def test_every_draw_is_in_the_file_and_other_randomness_is_still_refused(tmp_path: Path) -> None:
    path = ds.export_onnx(monte_carlo(), tmp_path / "net.onnx", SMALL)
    model = onnx.load(path)
    assert [n.op_type for n in model.graph.node].count("RandomUniformLike") == 4
    record = {entry.key: entry.value for entry in model.metadata_props}
    assert json.loads(record["dropsurgery.noise"]) == {"masks": {}, "shared": False}

    class Draws(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * torch.rand_like(x)

    mixed = nn.Sequential(MonteCarloDropout(0.5), Draws()).eval()
    with pytest.raises(ExportError, match="draws random numbers in eval mode"):
        ds.export_onnx(mixed, tmp_path / "mixed.onnx", SMALL)


def test_a_draw_for_a_constant_would_be_frozen_and_is_refused(tmp_path: Path) -> None:
    class OnWeight(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3, 3))
            self.drop = MonteCarloDropout(0.5)

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.drop(self.weight))

    with pytest.raises(ExportError, match="draws"):
        ds.export_onnx(OnWeight().eval(), tmp_path / "net.onnx", torch.ones(2, 3))


def test_masks_as_inputs_are_reproducible_bit_by_bit(tmp_path: Path) -> None:
    net = monte_carlo(noise="input")
    masks = ds.draw_masks(net, SMALL, generator=torch.Generator().manual_seed(1))
    assert [tuple(mask.shape) for mask in masks] == [
        (2, 8, 4, 4), (2, 8, 4, 4), (2, 8, 1, 1), (2, 1, 1, 1),
    ]  # fmt: skip
    again = ds.draw_masks(net, SMALL, generator=torch.Generator().manual_seed(1))
    assert all(torch.equal(a, b) for a, b in zip(masks, again, strict=True))
    assert not is_random_with(net, masks)
    path = ds.export_onnx(net, tmp_path / "net.onnx", (SMALL, *masks))
    run = session(path)
    names = [value.name for value in run.get_inputs()]
    assert names == ["x", "mask", "mask_1", "mask_2", "mask_3"]
    feeds = {name: t.numpy() for name, t in zip(names, (SMALL, *masks), strict=True)}
    first, second = run.run(None, feeds)[0], run.run(None, feeds)[0]
    assert (first == second).all()
    assert bool(ds.verify(net, path).ok)
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(first), net(SMALL, *masks))
    # Masks of ones are the network without dropout.
    plain = randomize_net()
    ones = [torch.ones_like(mask) for mask in masks]
    assert torch.equal(net(SMALL, *ones), plain(SMALL))


def randomize_net() -> nn.Module:
    torch.manual_seed(0)
    return randomize(Net()).eval()


def is_random_with(net: nn.Module, masks: tuple[Tensor, ...]) -> bool:
    return not torch.equal(net(SMALL, *masks), net(SMALL, *masks))


def test_masks_as_inputs_are_taken_back_and_saved(tmp_path: Path) -> None:
    net = monte_carlo(noise="input")
    back = ds.apply(net, ds.ConvertDropout("original")).module
    assert back.code == ds.trace(Net()).code
    assert repr(back) == repr(ds.trace(Net().eval()))
    loaded = ds.load(ds.save(net, tmp_path), Net())  # type: ignore[arg-type]
    masks = ds.draw_masks(loaded, SMALL)
    assert torch.equal(loaded(SMALL, *masks), net(SMALL, *masks))


def test_masks_where_there_are_none_or_cannot_be() -> None:
    with pytest.raises(PassError, match="takes no masks as inputs"):
        ds.draw_masks(Net(), SMALL)
    with pytest.raises(ArgumentError, match="unknown noise"):
        ds.draw_masks(monte_carlo(noise="input"), SMALL, noise="uniform")  # type: ignore[arg-type]
    result = ds.apply(Everything(), ds.ConvertDropout("monte-carlo", noise="input"))
    reasons = [skip.reason for skip in result.skipped]
    assert sum("cannot be an input" in reason for reason in reasons) == 6


# mc_predict


class Known(nn.Module):
    """Logits whose distribution is known: (3, 0) or (0, 3) with probability 1/2 each."""

    def __init__(self) -> None:
        super().__init__()
        self.draw = MonteCarloDropout(0.5, units="row")

    def forward(self, x: Tensor) -> Tensor:
        y = self.draw(x.new_ones(len(x), 1)) * 1.5
        return torch.cat([y, 3.0 - y], 1)


@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_moments_entropy_and_information_of_a_known_distribution(batch_size: int) -> None:
    torch.manual_seed(0)
    count = 1000
    found = ds.mc_predict(Known().eval(), torch.zeros(3, 2), count, batch_size=batch_size)
    assert found.mean.shape == (3, 2)
    assert found.mean.dtype == torch.float64
    assert (found.mean - 1.5).abs().max() < 4 * 1.5 / math.sqrt(count)
    assert torch.allclose(found.variance, torch.tensor(2.25).double(), rtol=0.05)
    chance = 1 / (1 + math.exp(-3))
    single = -chance * math.log(chance) - (1 - chance) * math.log(1 - chance)
    assert found.entropy is not None
    assert found.mutual_information is not None
    assert torch.allclose(found.entropy, torch.tensor(math.log(2)).double(), atol=0.02)
    assert torch.allclose(
        found.mutual_information, torch.tensor(math.log(2) - single).double(), atol=0.02
    )


def test_moments_are_those_of_the_samples() -> None:
    net = monte_carlo(noise="input")
    generator = torch.Generator().manual_seed(3)
    found = ds.mc_predict(net, SMALL, 7, batch_size=2, generator=generator)
    generator.manual_seed(3)
    with torch.no_grad():
        runs = [net(SMALL, *ds.draw_masks(net, SMALL, generator=generator)) for _ in range(7)]
    samples = torch.stack(runs).double()
    torch.testing.assert_close(found.mean, samples.mean(0))
    torch.testing.assert_close(found.variance, samples.var(0))
    chances = samples.softmax(2)
    assert found.probabilities is not None
    torch.testing.assert_close(found.probabilities, chances.mean(0))
    of_each = torch.special.entr(chances).sum(2).mean(0)
    assert found.entropy is not None
    assert found.mutual_information is not None
    torch.testing.assert_close(found.entropy - of_each, found.mutual_information)
    seeded = ds.mc_predict(net, SMALL, 7, generator=generator.manual_seed(3))
    assert torch.equal(
        seeded.mean, ds.mc_predict(net, SMALL, 7, generator=generator.manual_seed(3)).mean
    )


@pytest.mark.parametrize("noise", ["bernoulli", "input"])
def test_sessions_and_modules_predict_alike(noise: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = monte_carlo(noise=noise)
    masks = ds.draw_masks(net, SMALL) if noise == "input" else ()
    path = ds.export_onnx(net, tmp_path / "net.onnx", (SMALL, *masks))
    count = 2000
    left = ds.mc_predict(session(path), {"x": SMALL}, count, batch_size=256)
    right = ds.mc_predict(net, SMALL, count, batch_size=256)
    error = ((left.variance + right.variance) / count).sqrt()
    assert ((left.mean - right.mean).abs() < 4 * error).all()
    assert torch.allclose(left.variance, right.variance, rtol=0.25)
    assert left.entropy is not None
    assert right.entropy is not None
    assert torch.allclose(left.entropy, right.entropy, atol=0.02)


def test_rows_that_share_draws_are_not_put_side_by_side() -> None:
    calls: list[int] = []

    class Counts(nn.Module):
        def __init__(self, units: Any) -> None:
            super().__init__()
            self.drop = MonteCarloDropout(0.5, units=units)

        def forward(self, x: Tensor) -> Tensor:
            calls.append(len(x))
            return self.drop(x)

    ds.mc_predict(Counts("batch").eval(), torch.ones(2, 3), 6, activation=None)
    assert calls == [2] * 6
    calls.clear()
    found = ds.mc_predict(Counts("row").eval(), torch.ones(2, 3), 6, activation=None, batch_size=8)
    assert calls == [8, 4]
    assert found.entropy is None
    calls.clear()
    ds.mc_predict(Counts("row").eval(), torch.ones(5, 3), 2, activation="sigmoid", batch_size=3)
    assert calls == [3, 3, 2, 2]


def test_what_cannot_be_predicted() -> None:
    with pytest.raises(ArgumentError, match="gave the same outputs bit for bit"):
        ds.mc_predict(Net().eval(), SMALL)
    with pytest.raises(ArgumentError, match="the model is in training mode"):
        ds.mc_predict(Net(), SMALL)
    with pytest.raises(ArgumentTypeError, match="runs modules and onnxruntime sessions, got str"):
        ds.mc_predict("net.onnx", SMALL)
    with pytest.raises(ArgumentError, match="samples is 1"):
        ds.mc_predict(Known().eval(), SMALL, 1)
    with pytest.raises(ArgumentTypeError, match="batch_size is a whole number"):
        ds.mc_predict(Known().eval(), SMALL, batch_size=1.5)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="unknown activation 'tanh'"):
        ds.mc_predict(Known().eval(), SMALL, activation="tanh")  # type: ignore[arg-type]
    with pytest.raises(ArgumentTypeError, match="tensors with a batch axis"):
        ds.mc_predict(Known().eval(), torch.tensor(1.0))
    with pytest.raises(ArgumentError, match=r"batches of \[2, 3\]"):
        ds.mc_predict(Known().eval(), (torch.ones(2), torch.ones(3)))
    with pytest.raises(ArgumentError, match="there is no output 4 in a tuple"):
        ds.mc_predict(nn.LSTM(3, 3).eval(), torch.ones(2, 2, 3), output=4)
    with pytest.raises(ArgumentError, match="without a class axis"):
        ds.mc_predict(nn.Sequential(MonteCarloDropout(), nn.Flatten(0)).eval(), torch.ones(2, 1))
