"""Where the batch is: claims of the analysis against what running networks shows."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

import dropsurgery as ds
from dropsurgery.graph.batch import BatchAxis, batch_axes

AXIS0 = BatchAxis("axis", 0)


class Of(nn.Module):
    """A network whose forward is a function of itself and x."""

    def __init__(self, run: Callable[[nn.Module, Tensor], Tensor], **layers: nn.Module) -> None:
        super().__init__()
        self.run = run
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
    return {node: a if a == b else BatchAxis("mixed") for node, (a, b) in claims.items()}


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
        if all(a.nonzero().flatten().tolist() == [i] for i, a in enumerate(along)):
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
    q, k, v = module.qkv(x).reshape(B, N, 3, 2, C // 2).permute(2, 0, 3, 1, 4).unbind(0)
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
    """A claim holds; new tensors with one row a sample are said to have the batch there."""
    spread = real.kind == "none" and claim.kind == "axis"
    assert claim.kind == "unknown" or claim == real or spread, f"{node.format_node()}: {real}"
