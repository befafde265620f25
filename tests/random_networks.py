"""Random residual networks whose residual sites are known.

A network is drawn as a specification, plain data that Hypothesis can shrink; `Net` interprets it.
`known` runs it and returns every add that ran, with what the specification says of it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.helpers import randomize
from tests.random_ops import (
    MEMORY,
    PLAIN,
    SPELLINGS,
    Adder,
    Extra,
    Known,
    Operation,
    Shape,
    Spelling,
    Tape,
    join,
    names,
    pointwise,
    term,
)

# What is specified


@dataclass(frozen=True)
class Op:
    """One operation, a site in none of its adds."""

    name: str
    how: Spelling = PLAIN
    inline: bool = False


@dataclass(frozen=True)
class Branch:
    """Operations around a layer that mixes channels, and may change size and channels."""

    act: str
    before: tuple[Op, ...] = ()
    after: tuple[Op, ...] = ()
    down: bool = False
    widen: bool = False


@dataclass(frozen=True)
class Residual:
    """skip(x) + branch(inner(x)): one site, nested where `inner` holds sites.

    Attributes:
        projection: how the skip is brought to the branch's shape, where that is another.
        layout: the add is done on permuted or flattened operands, or on half of the channels;
            "first": with another axis before the batch; "rows": with one merged with the batch.
        skip_first: the skip is computed before the branch.
        inline: the forward stands in that of the module around it.
    """

    branch: Branch
    skip: tuple[Op, ...] = ()
    inner: tuple[Element, ...] = ()
    how: Spelling = PLAIN
    projection: Literal["point", "pool", "max", "slice"] = "point"
    layout: Literal["plain", "permuted", "flat", "half", "first", "rows"] = "plain"
    skip_first: bool = True
    inline: bool = False


@dataclass(frozen=True)
class Parallel:
    """x + a(x) + b(x), a site a branch; or, `summed`, x + (a(x) + b(x)), which is one."""

    branches: tuple[Branch, ...]
    hows: tuple[Spelling, ...]
    summed: bool = False
    inline: bool = False


@dataclass(frozen=True)
class Twice:
    """One module at two paths, called from both."""

    element: Element
    inline: bool = False


Element = Op | Residual | Parallel | Twice


@dataclass(frozen=True)
class Network:
    """Elements in a row, on images or tokens; the weights are drawn from `seed`."""

    image: bool
    elements: tuple[Element, ...]
    seed: int = 0


def holds_sites(element: Element) -> bool:
    if isinstance(element, Twice):
        return holds_sites(element.element)
    return not isinstance(element, Op)


# What it computes


class Chain(nn.ModuleList):
    """Elements in a row. `shape` is what they end with."""

    def __init__(self, elements: tuple[Element, ...], shape: Shape) -> None:
        super().__init__()
        for element in elements:
            built = build(element, shape)
            self.append(built)
            shape = replace(built.shape, steady=shape.steady)
        self.shape = shape

    def run(self, x: Tensor, extra: Extra) -> Tensor:
        for element in self:
            x = element.run(x, extra) if element.spec.inline else element(x, extra)
        return x


def build(element: Element, shape: Shape) -> nn.Module:
    if isinstance(element, Op):
        return OneOp(element, shape)
    kinds = {Residual: ResidualBlock, Parallel: ParallelBlock, Twice: TwiceBlock}
    return kinds[type(element)](element, shape)


class Built(nn.Module):
    """An element; where it is inline, `run` is called in place of the module."""

    def run(self, x: Tensor, extra: Extra) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor, extra: Extra) -> Tensor:
        return self.run(x, extra)


class OneOp(Built):
    def __init__(self, spec: Op, shape: Shape) -> None:
        super().__init__()
        self.spec, self.shape = spec, shape
        self.operation = Operation(spec.name, spec.how, shape)

    def run(self, x: Tensor, extra: Extra) -> Tensor:
        return self.operation(x, extra)


class BranchLayers(nn.Module):
    """Before, mixing layer, activation, after."""

    def __init__(self, spec: Branch, shape: Shape) -> None:
        super().__init__()
        self.before = Chain(spec.before, shape)
        down = spec.down and not shape.steady and shape.size > 2
        widen = spec.widen and not shape.steady and shape.channels < 8
        channels = shape.channels * 2 if widen else shape.channels
        self.stride = 2 if down else 1
        self.mix: nn.Module = nn.Linear(shape.channels, channels)
        if shape.image:
            self.mix = nn.Conv2d(shape.channels, channels, 3, self.stride, 1)
        self.shape = replace(shape, channels=channels, size=shape.size // self.stride)
        self.after = Chain((Op(spec.act), *spec.after), self.shape)

    def forward(self, x: Tensor, extra: Extra) -> Tensor:
        x = self.mix(self.before.run(x, extra))
        if self.stride > 1 and not self.shape.image:
            x = x[:, ::2]
        return self.after.run(x, extra)


class Projection(nn.Module):
    """From one shape to another by what a skip may do."""

    def __init__(self, how: str, before: Shape, after: Shape) -> None:
        super().__init__()
        self.how, self.before, self.stride = how, before, before.size // after.size
        self.same = (before.channels, before.size) == (after.channels, after.size)
        self.point: nn.Module = nn.Identity()
        if before.channels != after.channels or how == "point":
            self.point = pointwise(before, after.channels)
        pool = nn.AvgPool2d if how == "pool" else nn.MaxPool2d
        self.pool = pool(self.stride)

    def forward(self, x: Tensor) -> Tensor:
        if self.stride > 1:
            if not self.before.image:
                x = x[:, :: self.stride]
            elif self.how in ("pool", "max"):
                x = self.pool(x)
            else:
                x = x[:, :, :: self.stride, :: self.stride]
        return self.point(x)


class ResidualBlock(Built):
    def __init__(self, spec: Residual, shape: Shape) -> None:
        super().__init__()
        self.spec, self.given = spec, shape
        self.halved = spec.layout == "half" and shape.channels > 2
        within = replace(shape, channels=shape.channels // 2, steady=True) if self.halved else shape
        self.inner = Chain(spec.inner, within)
        self.branch = BranchLayers(spec.branch, self.inner.shape)
        self.skip = Chain(spec.skip, within)
        self.project = Projection(spec.projection, within, self.branch.shape)
        self.shape = shape if self.halved else replace(self.branch.shape, steady=shape.steady)
        self.adder = Adder(spec.how)
        views = all(op.name in names("views", shape.image) for op in spec.skip)
        self.kind = "identity" if views and self.project.same else "projection"
        self.what = "nested" if any(map(holds_sites, spec.inner)) else "site"

    def run(self, x: Tensor, extra: Extra) -> Tensor:
        if not self.halved:
            return self._residual(x, extra)
        first, second = x.chunk(2, self.shape.axis)
        return torch.cat([self._residual(first, extra), second], self.shape.axis)

    def _residual(self, x: Tensor, extra: Extra) -> Tensor:
        if self.spec.skip_first:
            skip = self._skip(x, extra)
            branch = self.branch(self.inner.run(x, extra), extra)
        else:
            branch = self.branch(self.inner.run(x, extra), extra)
            skip = self._skip(x, extra)
        layout, image = self.spec.layout, self.shape.image
        if layout == "permuted":
            order = (0, 2, 3, 1) if image else (0, 2, 1)
            back = (0, 3, 1, 2) if image else (0, 2, 1)
            return self._add(skip.permute(order), branch.permute(order)).permute(back)
        if layout == "first":
            turned = (operand.transpose(0, 1) for operand in (skip, branch))
            return self._add(*turned, batch=1).transpose(0, 1)
        if layout == "rows":
            first = self.branch.shape.channels if image else self.branch.shape.size
            rows = (operand.flatten(0, 1) for operand in (skip, branch))
            return self._add(*rows, batch=None).unflatten(0, (-1, first))
        if layout == "flat":
            shape = self.branch.shape
            sizes = (shape.size, shape.channels)
            sizes = (shape.channels, shape.size, shape.size) if image else sizes
            return self._add(skip.flatten(1), branch.flatten(1)).unflatten(1, sizes)
        return self._add(skip, branch)

    def _skip(self, x: Tensor, extra: Extra) -> Tensor:
        x = self.skip.run(x, extra)
        return x if self.project.same else self.project(x)

    def _add(self, skip: Tensor, branch: Tensor, *, batch: int | None = 0) -> Tensor:
        if self.spec.how.module:
            return self.adder(skip, branch, self.what, self.kind, batch)
        return join(skip, branch, self.spec.how, self.what, self.kind, batch)


class ParallelBlock(Built):
    def __init__(self, spec: Parallel, shape: Shape) -> None:
        super().__init__()
        self.spec, self.shape = spec, shape
        steady = replace(shape, steady=True)
        self.branches = nn.ModuleList(BranchLayers(branch, steady) for branch in spec.branches)

    def run(self, x: Tensor, extra: Extra) -> Tensor:
        how, *hows = self.spec.hows
        if self.spec.summed:
            total = self.branches[0](x, extra)
            for branch, other in zip(self.branches[1:], hows, strict=True):
                total = term(total, branch(x, extra), other, "neither operand is a skip")
            return join(x, total, how, "site", "identity")
        # Nothing in place: every branch reads x.
        out = x
        for branch, one in zip(self.branches, self.spec.hows, strict=True):
            pure = replace(one, add="operator") if one.add in ("iadd", "add_") else one
            out = join(out, branch(x, extra), pure, "site", "identity")
        return out


class TwiceBlock(Built):
    def __init__(self, spec: Twice, shape: Shape) -> None:
        super().__init__()
        self.spec, self.shape = spec, shape
        self.chain = Chain((spec.element,), replace(shape, steady=True))
        self.again = self.chain

    def run(self, x: Tensor, extra: Extra) -> Tensor:
        return self.again.run(self.chain.run(x, extra), extra)


class Net(nn.Module):
    """The network of a specification, with random weights and statistics."""

    def __init__(self, spec: Network) -> None:
        super().__init__()
        torch.manual_seed(spec.seed)
        self.chain = Chain(spec.elements, Shape(spec.image))
        randomize(self, spec.seed)

    def forward(self, x: Tensor, memory: Tensor, terms: Tensor) -> Tensor:
        return self.chain.run(x, (memory, terms))


def inputs(spec: Network) -> tuple[Tensor, Tensor, Tensor]:
    """Return new inputs, the same every time; a network may write to them."""
    generator = torch.Generator().manual_seed(spec.seed)
    shape = (3, 4, 4, 4) if spec.image else (3, 4, 4)
    x = torch.randn(shape, generator=generator)
    memory, terms = torch.randn(2, 3, MEMORY, MEMORY, generator=generator)
    return x, memory, terms


def known(net: Net, spec: Network) -> list[Known]:
    """Run the network in the mode it is in, and return every add of its forward in order."""
    with Tape(net).watch() as tape, torch.no_grad():
        net(*inputs(spec))
    return tape.adds


def dropped(net: Net, spec: Network, survival: float, include: tuple[str, ...]) -> Tensor:
    """Run the network with the branch of every site dropped at random."""
    with Tape(net, survival, include).watch(), torch.no_grad():
        return net(*inputs(spec))


# How it is drawn


def spellings() -> st.SearchStrategy[Spelling]:
    return st.builds(Spelling, st.sampled_from(sorted(SPELLINGS)), st.booleans(), st.booleans())


def ops(image: bool, group: Literal["views", "skip", "any"]) -> st.SearchStrategy[Op]:
    return st.builds(Op, st.sampled_from(names(group, image)), spellings(), st.booleans())


def branches(image: bool, acts: Literal["hard", "norms"] = "hard") -> st.SearchStrategy[Branch]:
    some = st.lists(ops(image, "any"), max_size=2).map(tuple)
    act = st.sampled_from(names(acts, image))
    return st.builds(Branch, act, some, some, st.booleans(), st.booleans())


@st.composite
def residuals(draw: st.DrawFn, image: bool, inner: tuple[Element, ...] = ()) -> Residual:
    """A block whose skip does what skips do.

    A branch that is affine but for a normalisation could be a skip too, so its skip is x itself.
    """
    layout = draw(st.sampled_from(["plain", "permuted", "flat", "half", "first", "rows"]))
    if not inner and draw(st.booleans()):
        branch = replace(draw(branches(image, "norms")), down=False, widen=False)
        return Residual(branch, how=draw(spellings()), layout=layout, inline=draw(st.booleans()))
    one = ops(image, "views") | ops(image, "skip")
    return Residual(
        draw(branches(image)),
        tuple(draw(st.lists(one, max_size=2))),
        inner,
        draw(spellings()),
        draw(st.sampled_from(["point", "pool", "max", "slice"])),
        layout,
        draw(st.booleans()),
        draw(st.booleans()),
    )


@st.composite
def parallels(draw: st.DrawFn, image: bool) -> Parallel:
    several = draw(st.lists(branches(image), min_size=2, max_size=3))
    hows = draw(st.lists(spellings(), min_size=len(several), max_size=len(several)))
    return Parallel(tuple(several), tuple(hows), draw(st.booleans()), draw(st.booleans()))


def elements(image: bool, depth: int) -> st.SearchStrategy[Element]:
    """Blocks and operations; with `depth`, long skips around them and modules called twice."""
    kinds: list[st.SearchStrategy[Element]] = [
        ops(image, "any"),
        residuals(image),
        parallels(image),
    ]
    if depth:
        inner = st.lists(elements(image, depth - 1), min_size=1, max_size=2).map(tuple)
        kinds.append(inner.flatmap(lambda held: residuals(image, held)))
        kinds.append(st.builds(Twice, elements(image, depth - 1), st.booleans()))
    return st.one_of(kinds)


@st.composite
def networks(draw: st.DrawFn) -> Network:
    image = draw(st.booleans())
    row = draw(st.lists(elements(image, 2), min_size=1, max_size=4))
    return Network(image, tuple(row), draw(st.integers(0, 999)))
