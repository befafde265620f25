"""Random graphs of operations that affine maps travel through, and of some that stop them.

A graph is a list of steps, plain data that Hypothesis can shrink: each reads one or two of the
values before it, whichever of these have the shape that it takes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

SIDE, CHANNELS = 8, 4


@dataclass(frozen=True)
class Step:
    """One operation.

    Attributes:
        name: a key of `OPERATIONS`.
        first: which of the values before it is read, counted from the last one.
        second: the other operand, where there are two.
        repeat: whether the layers are those of the step of the same name before it.
    """

    name: str
    first: int = 0
    second: int = 1
    repeat: bool = False


def _norm(c: int) -> nn.Module:
    return nn.BatchNorm2d(c)


def _vector(c: int) -> nn.Module:
    holder = nn.Module()
    holder.value = nn.Parameter(torch.rand(c, 1, 1) + 0.5)
    return holder


def _table(c: int) -> nn.Module:
    holder = nn.Module()
    holder.value = nn.Parameter(torch.rand(1, c, SIDE, SIDE))
    return holder


def _stored(*sizes: int) -> nn.Module:
    holder = nn.Module()
    holder.value = nn.Parameter(torch.rand(sizes))
    return holder


def _with_token(n: nn.Module, x: Tensor) -> Tensor:
    """Join a token in front, mix the channels with a matrix, and take the token off again."""
    y = torch.cat([n[0].value.expand(x.shape[0], -1, -1), x.flatten(2).transpose(1, 2)], 1)
    return (y @ n[1].value)[:, 1:].transpose(1, 2).reshape(x.shape)


def _looked_up(layer: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Add a row of a table for every place of the image."""
    rows = layer(torch.ones_like(x[:, 0]).cumsum(1).long() % 2)
    return x + rows.permute(0, 3, 1, 2)


def _attend(n: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    q, v = (value.flatten(2).transpose(1, 2) for value in (y, x))
    z = F.scaled_dot_product_attention(n[0](q), n[1](q), n[2](v))
    return z.transpose(1, 2).reshape(x.shape)


def _tokens(layer: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return layer(x.flatten(2).transpose(1, 2)).transpose(1, 2).reshape(x.shape)


# Name: what makes the layer, and what is computed of it and of the operands.
OPERATIONS: dict[str, tuple[Callable[[int], nn.Module] | None, Callable[..., Tensor]]] = {
    "bn": (_norm, lambda n, x, y: n(x)),
    "negative bn": (_norm, lambda n, x, y: n(x)),
    "zero bn": (_norm, lambda n, x, y: n(x)),
    "valid": (lambda c: nn.Conv2d(c, c, 3), lambda n, x, y: F.pad(n(x), (1, 1, 1, 1))),
    "same": (lambda c: nn.Conv2d(c, c, 3, padding=1), lambda n, x, y: n(x)),
    "reflect": (
        lambda c: nn.Conv2d(c, c, 3, padding=1, padding_mode="reflect", bias=False),
        lambda n, x, y: n(x),
    ),
    "point": (lambda c: nn.Conv2d(c, c, 1), lambda n, x, y: n(x)),
    "groups": (lambda c: nn.Conv2d(c, c, 1, groups=2), lambda n, x, y: n(x)),
    "depthwise": (lambda c: nn.Conv2d(c, c, 3, padding=1, groups=c), lambda n, x, y: n(x)),
    "transposed": (
        lambda c: nn.ConvTranspose2d(c, c, 3, padding=1, groups=2),
        lambda n, x, y: n(x),
    ),
    "linear": (lambda c: nn.Linear(c, c), lambda n, x, y: _tokens(n, x)),
    "layer norm": (lambda c: nn.LayerNorm(c), lambda n, x, y: _tokens(n, x)),
    "group norm": (lambda c: nn.GroupNorm(2, c), lambda n, x, y: n(x)),
    "relu": (None, lambda n, x, y: F.relu(x)),
    "relu_": (lambda c: nn.ReLU(inplace=True), lambda n, x, y: n(x)),
    "leaky": (None, lambda n, x, y: F.leaky_relu(x, 0.2)),
    "prelu": (lambda c: nn.PReLU(c), lambda n, x, y: n(x)),
    "gelu": (None, lambda n, x, y: F.gelu(x)),
    "max": (None, lambda n, x, y: F.max_pool2d(x, 3, 1, 1)),
    "average": (None, lambda n, x, y: F.avg_pool2d(x, 3, 1, 1)),
    "average, not counted": (
        lambda c: nn.AvgPool2d(3, 1, 1, count_include_pad=False),
        lambda n, x, y: n(x),
    ),
    "upsample": (None, lambda n, x, y: F.interpolate(x[:, :, ::2, ::2], scale_factor=2.0)),
    "mirror": (None, lambda n, x, y: F.pad(x, (1, 0, 1, 0), mode="reflect")[:, :, 1:, 1:]),
    "shuffle": (
        lambda c: nn.Conv2d(c, 4 * c, 1),
        lambda n, x, y: F.pixel_shuffle(n(x)[:, :, ::2, ::2], 2),
    ),
    "add": (None, lambda n, x, y: x + y),
    "sub": (None, lambda n, x, y: x - y),
    "iadd": (None, lambda n, x, y: x.clone().add_(y)),
    "gate": (None, lambda n, x, y: x * y.mean((2, 3), keepdim=True).sigmoid()),
    "cat": (lambda c: nn.Conv2d(2 * c, c, 1), lambda n, x, y: n(torch.cat([x, y], 1))),
    "cat and norm": (
        lambda c: nn.Sequential(nn.BatchNorm2d(2 * c), nn.ReLU(), nn.Conv2d(2 * c, c, 1)),
        lambda n, x, y: n(torch.cat([x, y], 1)),
    ),
    "chunk": (
        lambda c: nn.Sequential(nn.Conv2d(c, c, 1), nn.BatchNorm2d(c // 2)),
        lambda n, x, y: torch.cat([n[1](n[0](x).chunk(2, 1)[0]), x[:, : x.shape[1] // 2]], 1),
    ),
    "layer scale": (_vector, lambda n, x, y: x * n.value),
    "offset": (_vector, lambda n, x, y: x - n.value),
    "position": (_table, lambda n, x, y: x + n.value),
    "gain": (_table, lambda n, x, y: x * n.value),
    "matrix": (lambda c: _stored(c, c), lambda n, x, y: _tokens(lambda t: t @ n.value, x)),
    "addmm": (
        lambda c: nn.ModuleList([_stored(c, c), _stored(c)]),
        lambda n, x, y: _tokens(
            lambda t: torch.addmm(n[1].value, t.flatten(0, 1), n[0].value).reshape(t.shape), x
        ),
    ),
    "rows": (
        lambda c: _stored(c, c),
        lambda n, x, y: torch.matmul(n.value, x.flatten(2)).reshape(x.shape),
    ),
    "token": (
        lambda c: nn.ModuleList([_stored(1, 1, c), _stored(c, c)]),
        lambda n, x, y: _with_token(n, x),
    ),
    "embedding": (lambda c: nn.Embedding(2, c, padding_idx=0), lambda n, x, y: _looked_up(n, x)),
    "table": (
        lambda c: _stored(2, c),
        lambda n, x, y: _looked_up(lambda ids: F.embedding(ids, n.value), x),
    ),
    "attention": (
        lambda c: nn.ModuleList([nn.Linear(c, c) for _ in range(3)]),
        lambda n, x, y: _attend(n, x, y),
    ),
    "half": (None, lambda n, x, y: x * 0.5),
    "one more": (None, lambda n, x, y: 1.0 + x),
    "permute": (None, lambda n, x, y: x.permute(0, 2, 3, 1).permute(0, 3, 2, 1)),
    "dropout": (lambda c: nn.Dropout(0.3), lambda n, x, y: n(x)),
    "channel first": (
        lambda c: nn.BatchNorm1d(c),
        lambda n, x, y: n(x.flatten(2)).reshape(x.shape),
    ),
    "token norm": (
        lambda c: nn.BatchNorm1d(c),
        lambda n, x, y: (
            n(x.flatten(2).transpose(1, 2).flatten(0, 1))
            .reshape(x.shape[0], -1, x.shape[1])
            .transpose(1, 2)
            .reshape(x.shape)
        ),
    ),
}


class RandomGraph(nn.Module):
    """What a list of steps specifies; all values are (N, 4, 8, 8)."""

    def __init__(self, steps: tuple[Step, ...], seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.steps = steps
        self.layers = nn.ModuleList()
        made: dict[str, nn.Module] = {}
        for step in steps:
            maker = OPERATIONS[step.name][0]
            if maker is not None and not (step.repeat and step.name in made):
                made[step.name] = maker(CHANNELS)
            self.layers.append(made[step.name] if maker is not None else nn.Identity())
        self.head = nn.Linear(CHANNELS, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        values = [x]
        for step, layer in zip(self.steps, self.layers, strict=True):
            first, second = (
                values[-1 - index % len(values)] for index in (step.first, step.second)
            )
            if step.name == "relu_":
                first = first * 1.0  # what is written in place is nobody else's
            values.append(OPERATIONS[step.name][1](layer, first, second))
        return values[-1], self.head(values[-1].mean((2, 3)))


def randomized(model: RandomGraph, seed: int) -> RandomGraph:
    """Return the graph in float64 and eval mode with random statistics, some scales < 0 or 0."""
    from tests.helpers import randomize

    randomize(model.double().eval(), seed)
    with torch.no_grad():
        for step, layer in zip(model.steps, model.layers, strict=True):
            if step.name == "negative bn":
                layer.weight[1].neg_()
            elif step.name == "zero bn":
                layer.weight[2] = 0.0
    return model


def graphs(longest: int = 12) -> st.SearchStrategy[tuple[Step, ...]]:
    """Return random graphs of up to `longest` steps."""
    step = st.builds(
        Step,
        name=st.sampled_from(sorted(OPERATIONS)),
        first=st.sampled_from([0, 0, 0, 0, 1, 2, 3]),
        second=st.integers(0, 4),
        repeat=st.booleans(),
    )
    return st.lists(step, min_size=1, max_size=longest).map(tuple)
