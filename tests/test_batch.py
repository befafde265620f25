"""Where the batch is: claims of the analysis against what running networks shows."""

from __future__ import annotations

import copy
import operator
import random
import sys
from collections import Counter
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

import dropsurgery as ds
from dropsurgery.errors import TraceError
from dropsurgery.graph.batch import BatchAxis, batch_axes

CHAINS = 40
AXIS0 = BatchAxis("axis", 0)


class Of(nn.Module):
    """A network whose forward is a function of itself and x."""

    def __init__(self, run: Callable[[nn.Module, Tensor], Tensor], **layers: nn.Module) -> None:
        super().__init__()
        self.run: Callable[[nn.Module, Tensor], Tensor] = run
        for name, layer in layers.items():
            self.add_module(name, layer)
        self.weight = nn.Parameter(torch.randn(6, 6))
        self.token = nn.Parameter(torch.randn(1, 1, 6))
        self.table = nn.Parameter(torch.randn(1, 4, 6))

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


def measured(module: fx.GraphModule, shape: tuple[int, ...]) -> dict[fx.Node, BatchAxis]:
    """Run a graph at two batch sizes, changing one sample at a time, and say where the batch is.

    An axis is the batch where its size is the batch size, at both, and where changing sample i
    changes entry i along it and no other.
    """
    claims: dict[fx.Node, list[BatchAxis]] = {}
    for size in (3, 4):
        x = torch.randn(size, *shape, generator=torch.Generator().manual_seed(size))
        before = values(module, x)
        after = []
        for sample in range(size):
            changed = x.clone()
            changed[sample] = torch.randn(shape, generator=torch.Generator().manual_seed(9))
            after.append(values(module, changed))
        for node, value in before.items():
            others = [run[node] for run in after]
            claims.setdefault(node, []).append(_where(value, others, size))
    return {node: _both(*pair) for node, pair in claims.items()}


def _both(first: BatchAxis, second: BatchAxis) -> BatchAxis:
    """Return what two batch sizes show together; a value may be the same for some samples."""
    if first.kind == "none":
        return second
    return first if second in (first, BatchAxis("none")) else BatchAxis("mixed")


def values(module: fx.GraphModule, x: Tensor) -> dict[fx.Node, Tensor]:
    found = {}

    class Keep(fx.Interpreter):
        def run_node(self, n: fx.Node) -> object:
            result = super().run_node(n)
            if isinstance(result, Tensor):
                found[n] = result.detach().clone()
            return result

    with torch.no_grad():
        Keep(module).run(x)
    return found


def _where(value: Tensor, others: list[Tensor], size: int) -> BatchAxis:
    differs = [(value != other) for other in others]
    if not any(bool(d.any()) for d in differs):
        return BatchAxis("none")
    for axis, entries in enumerate(value.shape):
        if entries != size:
            continue
        along = [d.movedim(axis, 0).flatten(1).any(1) if d.dim() > 1 else d for d in differs]
        if all(set(a.nonzero().flatten().tolist()) <= {i} for i, a in enumerate(along)):
            return BatchAxis("axis", axis)
    return BatchAxis("mixed")


def heads(x: Tensor) -> Tensor:
    B, N, C = x.shape
    return x.reshape(B, N, 2, C // 2).permute(0, 2, 1, 3).transpose(1, 2).reshape(B, N, C)


def windows(x: Tensor, size: int = 2) -> Tensor:
    B, H, W, C = x.shape
    x = x.view(B, H // size, size, W // size, size, C)
    return x.permute(0, 1, 3, 2, 4, 5).contiguous().view(-1, size, size, C)


def merged(x: Tensor, H: int, W: int, size: int = 2) -> Tensor:
    B = x.shape[0] // (H * W // size // size)
    x = x.view(B, H // size, W // size, size, size, -1)
    return x.permute(0, 1, 3, 2, 4, 5).contiguous().view(B, H, W, -1)


def attend(module: nn.Module, x: Tensor) -> Tensor:
    B, N, C = x.shape
    qkv = module.get_submodule("qkv")(x)
    q, k, v = qkv.reshape(B, N, 3, 2, C // 2).permute(2, 0, 3, 1, 4).unbind(0)
    scores = (q @ k.transpose(-2, -1)).softmax(dim=-1)
    return (scores @ v).transpose(1, 2).reshape(B, N, C)


def mha(batch_first: bool) -> nn.MultiheadAttention:
    return nn.MultiheadAttention(6, 2, batch_first=batch_first)


TOKENS, IMAGE = (4, 6), (6, 4, 4)
# Shape of a sample, the forward, layers, and what is to be said of its result; None where the
# analysis may leave it open.
CASES: dict[str, tuple[tuple[int, ...], Callable[..., Tensor], dict[str, nn.Module],
                       BatchAxis | None]] = {
    "relu": (TOKENS, lambda m, x: x.relu(), {}, AXIS0),
    "conv": (IMAGE, lambda m, x: m.c(x), {"c": nn.Conv2d(6, 6, 3, padding=1)}, AXIS0),
    "heads": (TOKENS, lambda m, x: heads(x), {}, AXIS0),
    "attention": (TOKENS, attend, {"qkv": nn.Linear(6, 18)}, AXIS0),
    "fused attention": (TOKENS, lambda m, x: F.scaled_dot_product_attention(
        *(x.unflatten(-1, (2, 3)).transpose(1, 2),) * 3).transpose(1, 2).flatten(2), {}, None),
    "tokens of an image": (IMAGE, lambda m, x: m.c(x).flatten(2).transpose(1, 2),
                           {"c": nn.Conv2d(6, 6, 1)}, AXIS0),
    "tokens first": (TOKENS, lambda m, x: x.transpose(0, 1), {}, BatchAxis("axis", 1)),
    "tokens first, and a layer": (TOKENS, lambda m, x: m.l(x.permute(1, 0, 2)),
                                  {"l": nn.Linear(6, 6)}, BatchAxis("axis", 1)),
    "permuted there and back": (TOKENS, lambda m, x: x.permute(1, 2, 0).permute(2, 0, 1), {},
                                AXIS0),
    "permuted three times": (TOKENS, lambda m, x: x.permute(2, 0, 1).permute(2, 0, 1), {},
                             BatchAxis("axis", 2)),
    "turned around": (TOKENS, lambda m, x: x.permute(0, 1, 2).T if False else x.permute(2, 1, 0),
                      {}, BatchAxis("axis", 2)),
    "T of a matrix": ((6,), lambda m, x: x.reshape(x.shape[0], 6).T, {}, BatchAxis("axis", 1)),
    "mT": (TOKENS, lambda m, x: x.permute(0, 1, 2).mT, {}, AXIS0),
    "flattened with the tokens": (TOKENS, lambda m, x: x.flatten(0, 1), {}, BatchAxis("mixed")),
    "flattened and found again": (TOKENS, lambda m, x: m.l(x.flatten(0, 1)).view(
        x.shape[0], x.shape[1], 6), {"l": nn.Linear(6, 6)}, AXIS0),
    "reshaped to rows": (IMAGE, lambda m, x: m.c(x).permute(0, 2, 3, 1).reshape(-1, 6),
                         {"c": nn.Conv2d(6, 6, 1)}, BatchAxis("mixed")),
    "windows": (IMAGE, lambda m, x: windows(m.c(x).permute(0, 2, 3, 1)),
                {"c": nn.Conv2d(6, 6, 1)}, BatchAxis("mixed")),
    "windows and back": (IMAGE, lambda m, x: merged(windows(m.c(x).permute(0, 2, 3, 1)), 4, 4),
                         {"c": nn.Conv2d(6, 6, 1)}, None),
    "rolled": (IMAGE, lambda m, x: torch.roll(x, (1, 1), (2, 3)), {}, AXIS0),
    "rolled along the batch": (TOKENS, lambda m, x: x.roll(1, 0), {}, BatchAxis("mixed")),
    "rolled as a whole": (TOKENS, lambda m, x: x.roll(1), {}, BatchAxis("mixed")),
    "flipped": (TOKENS, lambda m, x: x.flip(0), {}, BatchAxis("mixed")),
    "flipped tokens": (TOKENS, lambda m, x: x.flip(1), {}, AXIS0),
    "class token": (TOKENS, lambda m, x: torch.cat(
        (m.token.expand(x.shape[0], -1, -1), x), dim=1), {}, AXIS0),
    "a token for each sample": (TOKENS, lambda m, x: m.token.expand(x.shape[0], -1, -1) + 0 * x,
                                {}, None),
    "repeated token": (TOKENS, lambda m, x: torch.cat((m.token.repeat(x.shape[0], 1, 1), x), 1),
                       {}, AXIS0),
    "positions": (IMAGE, lambda m, x: m.c(x).flatten(2).transpose(1, 2)[:, :4] + m.table,
                  {"c": nn.Conv2d(6, 6, 1)}, AXIS0),
    "positions, tokens first": (TOKENS, lambda m, x: x.permute(1, 0, 2) + m.table.transpose(0, 1),
                                {}, BatchAxis("axis", 1)),
    "pooled": (TOKENS, lambda m, x: x.mean(1), {}, AXIS0),
    "mean over all": (TOKENS, lambda m, x: x.mean(), {}, BatchAxis("mixed")),
    "mean over samples": (TOKENS, lambda m, x: x.mean(0), {}, BatchAxis("mixed")),
    "mean over samples, kept": (TOKENS, lambda m, x: x.mean(0, keepdim=True), {},
                                BatchAxis("mixed")),
    "softmax over samples": (TOKENS, lambda m, x: x.softmax(0), {}, BatchAxis("mixed")),
    "first sample": (TOKENS, lambda m, x: x[0], {}, BatchAxis("mixed")),
    "all but one sample": (TOKENS, lambda m, x: x[1:], {}, BatchAxis("mixed")),
    "first token": (TOKENS, lambda m, x: x[:, 0], {}, AXIS0),
    "last channels": (TOKENS, lambda m, x: x[:, :, 2:], {}, AXIS0),
    "a new axis before": (TOKENS, lambda m, x: x[None], {}, BatchAxis("axis", 1)),
    "stacked": (TOKENS, lambda m, x: torch.stack([x, 2 * x]), {}, BatchAxis("axis", 1)),
    "unbound": (TOKENS, lambda m, x: torch.stack(x.unbind(1)[:2] if False else [x[:, 0], x[:, 1]],
                                                 1), {}, AXIS0),
    "chunks": (TOKENS, lambda m, x: x.chunk(2, -1)[0] if False else x.chunk(2, 2)[0], {}, AXIS0),
    "chunks of samples": (TOKENS, lambda m, x: x.chunk(3, 0)[0], {}, BatchAxis("mixed")),
    "joined with itself": (TOKENS, lambda m, x: torch.cat((x, x), 0), {}, BatchAxis("mixed")),
    "Gram matrix of samples": ((6,), lambda m, x: x.reshape(x.shape[0], 6) @ x.reshape(
        x.shape[0], 6).T, {}, BatchAxis("mixed")),
    "all pairs": ((6,), lambda m, x: x.unsqueeze(0) - x.unsqueeze(1), {}, BatchAxis("mixed")),
    "matrix from the left": ((6,), lambda m, x: m.weight @ x.reshape(x.shape[0], 6).t(), {},
                             BatchAxis("axis", 1)),
    "weights of the channels": ((6,), lambda m, x: x.reshape(x.shape[0], 6) @ m.weight, {}, AXIS0),
    "einsum": (TOKENS, lambda m, x: torch.einsum("bnc,cd->dbn", x, m.weight), {},
               BatchAxis("axis", 1)),
    "einsum over samples": (TOKENS, lambda m, x: torch.einsum("bnc,bmc->nm", x, x), {},
                            BatchAxis("mixed")),
    "einsum of pairs": (TOKENS, lambda m, x: torch.einsum("bnc,anc->ban", x, x), {},
                        BatchAxis("mixed")),
    "square view": ((3,), lambda m, x: x.reshape(3, -1), {}, None),
    "a view that is wrong": (TOKENS, lambda m, x: x.permute(1, 0, 2).reshape(
        x.shape[0], -1, 6), {}, None),
    "a view of another order": (TOKENS, lambda m, x: x.reshape(4, x.shape[0], 6), {}, None),
    "MultiheadAttention": (TOKENS, lambda m, x: m.a(x, x, x)[0], {"a": mha(True)}, AXIS0),
    "its weights": (TOKENS, lambda m, x: m.a(x, x, x)[1], {"a": mha(True)}, AXIS0),
    "MultiheadAttention, tokens first": (
        TOKENS, lambda m, x: m.a(*(x.transpose(0, 1),) * 3)[0], {"a": mha(False)},
        BatchAxis("axis", 1)),
    "MultiheadAttention over samples": (TOKENS, lambda m, x: m.a(x, x, x)[0], {"a": mha(False)},
                                        BatchAxis("mixed")),
    "GRU": (TOKENS, lambda m, x: m.r(x)[0], {"r": nn.GRU(6, 6, batch_first=True)}, AXIS0),
    "GRU's state": (TOKENS, lambda m, x: m.r(x)[1], {"r": nn.GRU(6, 6, batch_first=True)},
                    BatchAxis("axis", 1)),
    "LSTM's state": (TOKENS, lambda m, x: m.r(x)[1][0], {"r": nn.LSTM(6, 6, batch_first=True)},
                     BatchAxis("axis", 1)),
    "GRU, tokens first": (TOKENS, lambda m, x: m.r(x.transpose(0, 1))[0], {"r": nn.GRU(6, 6)},
                          BatchAxis("axis", 1)),
    "GRU along the samples": (TOKENS, lambda m, x: m.r(x)[0], {"r": nn.GRU(6, 6)},
                              BatchAxis("mixed")),
    "encoder layer": (TOKENS, lambda m, x: m.e(x), {
        "e": nn.TransformerEncoderLayer(6, 2, 8, batch_first=True)}, AXIS0),
    "padded": (IMAGE, lambda m, x: F.pad(m.c(x), (1, 1, 0, 2)), {"c": nn.Conv2d(6, 6, 1)}, AXIS0),
    "enlarged": (IMAGE, lambda m, x: F.interpolate(m.c(x), scale_factor=2),
                 {"c": nn.Conv2d(6, 6, 1)}, AXIS0),
    "repeated in turn": (TOKENS, lambda m, x: x.repeat_interleave(2, 0), {}, BatchAxis("mixed")),
    "repeated as a whole": (TOKENS, lambda m, x: x.permute(0, 1, 2).repeat(2, 1, 1), {},
                            BatchAxis("mixed")),
    "repeated and one taken": (TOKENS, lambda m, x: x.permute(0, 1, 2).repeat(2, 1, 1).reshape(
        2, x.shape[0], 4, 6)[0], {}, AXIS0),
    "moved axes": (TOKENS, lambda m, x: x.permute(0, 1, 2).movedim(0, -1), {},
                   BatchAxis("axis", 2)),
    "squeezed": (TOKENS, lambda m, x: x[:, :1].squeeze(1), {}, None),
    "normalised": (TOKENS, lambda m, x: m.n(x), {"n": nn.LayerNorm(6)}, AXIS0),
    "largest": (TOKENS, lambda m, x: x.max(1)[0], {}, AXIS0),
    "largest of samples": (TOKENS, lambda m, x: x.max(0)[0], {}, BatchAxis("mixed")),
    "divided and put together": (TOKENS, lambda m, x: x.reshape(
        x.shape[0] * 2, x.shape[1] // 2, 6), {}, None),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_claims_are_what_running_shows(name: str) -> None:
    shape, run, layers, expected = CASES[name]
    torch.manual_seed(0)
    module = ds.trace(Of(run, **layers).eval())
    claims, truth = batch_axes(module, module.graph), measured(module, shape)
    result = next(node for node in reversed(module.graph.nodes) if node.op != "output")
    if expected is not None:
        assert claims[result] == expected
    for node, real in truth.items():
        assert_sound(claims[node], real, node)


def assert_sound(claim: BatchAxis, real: BatchAxis, node: fx.Node) -> None:
    """A claim holds; a value may be computed from the batch and come out the same for all."""
    constant = real.kind == "none" and claim.kind != "none"  # such as a sum over a softmax
    assert claim.kind == "unknown" or claim == real or constant, f"{node.format_node()}: {real}"


# --- random chains of operations -----------------------------------------------------------------


def _random_steps(seed: int, count: int) -> tuple[tuple[int, ...], list[Callable[..., Tensor]]]:
    """Return a sample's shape and operations that fit one another, some of which look at shapes."""
    draw = random.Random(seed)
    shape = draw.choice([(4, 6), (3, 4), (2, 4, 6), (6,), (4, 4, 2)])
    steps: list[Callable[..., Tensor]] = []
    x = torch.randn(3, *shape)
    history = [x]
    for _ in range(count):
        step = _step(draw, x.dim(), len(history))
        try:
            y = step(x, history)
        except (RuntimeError, IndexError, TypeError, ValueError):
            continue
        # Nothing is mixed along an axis of one entry, so that it proves nothing.
        if 1 not in y.shape and 0 < y.numel() < 3000 and y.dim() < 6:
            steps.append(step)
            x = y
            history.append(x)
    return shape, steps


def _step(draw: random.Random, rank: int, known: int) -> Callable[..., Tensor]:
    axes = list(range(rank))
    i, j = draw.choice(axes or [0]), draw.choice(axes or [0])
    low, high = sorted((i, j))
    order = draw.sample(axes, rank)
    earlier = draw.randrange(known)
    n = draw.choice([1, 2, 3])
    back = draw.choice([0, -rank])  # an axis counted from the front, or from the end
    return draw.choice([
        lambda x, _: x.permute(order),
        lambda x, _: x.transpose(i + back, j + back),
        lambda x, _: x.movedim(i, j),
        lambda x, _: x.flatten(low, high),
        lambda x, _: x.reshape(x.shape[0], -1),
        lambda x, _: x.reshape(-1, x.shape[-1]),
        lambda x, _: x.reshape(x.shape[0] * x.shape[1], -1),
        lambda x, _: x.reshape(x.shape[0], x.shape[1] // 2, 2, -1),
        lambda x, h: x.reshape(h[0].shape[0], -1, n),
        lambda x, h: x.reshape(-1, h[0].shape[0], n),
        lambda x, h: x.contiguous().view(h[earlier].shape),
        lambda x, _: x.unflatten(i, (-1, n)),
        lambda x, _: x.unsqueeze(i + back),
        lambda x, _: x.squeeze(i),
        lambda x, _: x.squeeze(),
        lambda x, _: x.roll(1, i),
        lambda x, _: x.flip(i),
        lambda x, _: torch.cat([x, x], i),
        lambda x, h: torch.cat([x, h[earlier]], i),
        lambda x, _: torch.stack([x, x.relu()], i),
        lambda x, _: x.chunk(2, i + back)[0],
        lambda x, _: x.unbind(i)[0],
        lambda x, _: x[1:] if i == 0 else x[:, n:],
        lambda x, _: x[None] if i == 0 else x[..., 0],
        lambda x, _: x[:, None, :1],
        lambda x, _: x.mean(i + back, keepdim=low == high),
        lambda x, _: x.amax((low, high)),
        lambda x, _: x.sum(),
        lambda x, _: x.softmax(i + back),
        lambda x, _: x.cumsum(i),
        lambda x, _: x.repeat_interleave(n, i),
        lambda x, _: x.repeat(*[n if a == i else 1 for a in axes]),
        lambda x, h: x[:, :1].expand(h[0].shape[0], n, *x.shape[2:]) if False else
        x.unsqueeze(0).expand(n, *[-1] * rank),
        lambda x, h: x + h[earlier],
        lambda x, h: x * h[earlier].relu(),
        lambda x, h: x - h[earlier].mean(0),
        lambda x, _: x @ x.transpose(-1, -2),
        lambda x, h: x @ h[earlier],
        lambda x, _: torch.einsum("ab,cb->ac", x, x) if rank == 2 else torch.einsum(
            "abc,dbc->bda" if n == 1 else "abc,abd->acd", x, x),
        lambda x, h: h[0].new_zeros((h[0].shape[0], n)) + x.sum(),
        lambda x, _: torch.arange(x.shape[i]) + x,
        lambda x, _: F.pad(x, (0, n, 0, 0)),
        lambda x, _: F.normalize(x, dim=i),
        lambda x, _: x.topk(1, i)[0],
        lambda x, _: F.layer_norm(x, (6,)),
        lambda x, _: F.scaled_dot_product_attention(x, x, x),
        lambda x, h: F.scaled_dot_product_attention(x, h[earlier], h[earlier]),
    ])  # fmt: skip


class Chain(nn.Module):
    def __init__(self, steps: list[Callable[..., Tensor]]) -> None:
        super().__init__()
        self.steps = steps

    def forward(self, x: Tensor) -> Tensor:
        history = [x]
        for step in self.steps:
            history.append(step(history[-1], history))
        return torch.stack([value.sum() for value in history])


def check_chain(seed: int, *, examples: bool) -> Counter[str]:
    """Hold what is claimed of a random chain to what running it shows; count the claims."""
    shape, steps = _random_steps(seed, 8)
    inputs = torch.randn(3, *shape) if examples else None
    try:
        module = ds.trace(Chain(steps).eval(), example_inputs=inputs)
        truth = measured(module, shape)
    except (TraceError, RuntimeError, IndexError, TypeError, ValueError):
        return Counter()  # it takes batches of three only
    claims = batch_axes(module, module.graph)
    scales = _scales(module, shape)
    for node, real in truth.items():
        claim = claims[node]
        # As in BatchNorm, a mean over the samples may go into a value that has one row for each.
        # What example inputs show is sizes: a flipped batch has as many rows.
        means = any(truth[n].kind == "mixed" and not any(scales[n]) for n in _ancestors(node)
                    if n in truth)  # fmt: skip
        if (means or examples) and claim.kind == "axis":
            assert scales[node][claim.axis or 0], node.format_node()
        else:
            assert_sound(claim, real, node)
    return Counter(claims[node].kind for node in truth)


def _scales(module: fx.GraphModule, shape: tuple[int, ...]) -> dict[fx.Node, list[bool]]:
    """Say of each axis whether its size is the batch size, whatever that is."""
    runs = [values(module, torch.randn(size, *shape)) for size in (3, 4)]
    return {
        node: [pair == (3, 4) for pair in zip(value.shape, runs[1][node].shape, strict=False)]
        for node, value in runs[0].items()
    }


def _ancestors(node: fx.Node) -> set[fx.Node]:
    seen, stack = {node}, [node]
    while stack:
        for value in stack.pop().all_input_nodes:
            if value not in seen:
                seen.add(value)
                stack.append(value)
    return seen


@pytest.mark.parametrize("examples", [False, True])
def test_claims_hold_for_random_chains(examples: bool) -> None:
    total: Counter[str] = Counter()
    for seed in range(CHAINS):
        total += check_chain(seed, examples=examples)
    assert min(total["axis"], total["mixed"]) > CHAINS, total


def test_a_wrong_claim_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def says_axis_0(module: fx.GraphModule, graph: fx.Graph) -> dict[fx.Node, BatchAxis]:
        return dict.fromkeys(graph.nodes, AXIS0)

    monkeypatch.setattr(sys.modules[__name__], "batch_axes", says_axis_0)

    def check_some() -> None:
        for seed in range(20):
            check_chain(seed, examples=False)

    with pytest.raises(AssertionError):
        check_some()


def test_what_example_inputs_show_stays_in_a_copy() -> None:
    module = ds.trace(Of(lambda m, x: unknown(x) + x), example_inputs=torch.randn(5, *TOKENS))
    without = ds.trace(Of(lambda m, x: unknown(x) + x))
    assert "unknown" in {axis.kind for axis in batch_axes(without, without.graph).values()}
    for one in (module, copy.deepcopy(module)):
        add = next(node for node in one.graph.nodes if node.target is operator.add)
        assert batch_axes(one, one.graph)[add] == AXIS0


def unknown(x: Tensor) -> Tensor:
    return torch.special.expit(x)
