"""Operations of random networks: each runs eagerly, writes down its adds, and can be traced.

The record is made while the network runs, from what the specification says of each add. Nothing
of the library is used, so that it can be held against what the library finds.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules import module as global_hooks

MEMORY = 4  # the further inputs are (batch, MEMORY, MEMORY)

# What blocks and layers read beside the stream; and what is read inside blocks alone: were it read
# by plain layers too, adding it again would be a skip from there.
Extra = tuple[Tensor, Tensor]


def _iadd(left: Any, right: Any) -> Any:
    left += right
    return left


SPELLINGS: dict[str, Callable[[Any, Any], Any]] = {
    "operator": operator.add,
    "torch.add": torch.add,
    "method": lambda left, right: left.add(right),
    "iadd": _iadd,
    "add_": lambda left, right: left.add_(right),
    "keywords": lambda left, right: torch.add(input=left, other=right),
    "keywords, other first": lambda left, right: torch.add(other=right, input=left),
    "method, keyword": lambda left, right: left.add(other=right),
    "alpha": lambda left, right: torch.add(left, right, alpha=0.5),
}
_IN_PLACE = ("iadd", "add_")


@dataclass(frozen=True)
class Spelling:
    """How an add is written.

    Attributes:
        add: a key of `SPELLINGS`.
        swapped: the operands change places.
        module: the add stands in the forward of a module of its own.
    """

    add: str = "operator"
    swapped: bool = False
    module: bool = False


PLAIN = Spelling()


@dataclass(frozen=True)
class Known:
    """What is known of one add.

    Attributes:
        path: the module whose forward holds it.
        block: the number of the call of the nearest numbered module around it, or of that module
            where none is numbered; the root's own adds have none.
        what: a site, one that is found on request ("nested", "linear"), or "none" or "size".
        kind: the kind of the site.
        branch_first: the first operand is the branch.
        reason: how the reason begins for which it is no site; a regular expression.
        batch: the axis of the operands that is the batch; None where the batch shares its axis.
    """

    path: str
    block: int | None
    what: Literal["site", "nested", "linear", "none", "size"]
    kind: str = ""
    branch_first: bool = False
    reason: str = ""
    batch: int | None = 0

    @property
    def kind_found(self) -> str:
        return "nested" if self.what == "nested" else self.kind

    def is_site(self, include: tuple[str, ...]) -> bool:
        return self.what == "site" or self.what in include


@dataclass
class Tape:
    """Watches one run of a network: its adds, and drops the branches of its sites if asked.

    Attributes:
        net: the network.
        survival: with what probability a branch survives; None drops nothing.
        include: which adds on request count as sites.
    """

    net: nn.Module
    survival: float | None = None
    include: tuple[str, ...] = ()
    adds: list[Known] = field(default_factory=list)
    frames: list[tuple[str, int]] = field(default_factory=list)
    calls: int = 0

    @contextmanager
    def watch(self) -> Iterator[Tape]:
        paths = {module: path for path, module in self.net.named_modules()}

        def enter(module: nn.Module, _: Any) -> None:
            self.calls += 1
            self.frames.append((paths[module], self.calls))

        def leave(module: nn.Module, _: Any, __: Any) -> None:
            self.frames.pop()

        hooks = (
            global_hooks.register_module_forward_pre_hook(enter),
            global_hooks.register_module_forward_hook(leave),
        )
        _TAPES.append(self)
        try:
            yield self
        finally:
            _TAPES.remove(self)
            for hook in hooks:
                hook.remove()

    def note(self, what: Any, **known: Any) -> Known:
        self.adds.append(Known(self.frames[-1][0], self._block(), what, **known))
        return self.adds[-1]

    def _block(self) -> int | None:
        path, call = self.frames[-1]
        parts = path.split(".")
        while parts and not parts[-1].isdecimal():
            parts.pop()
        calls = [call for known, call in self.frames if known == ".".join(parts)]
        return (calls[-1] if parts and calls else call) if path else None

    def drop(self, branch: Tensor, axis: int) -> Tensor:
        """Stochastic depth by its definition: a draw a sample, the survivors scaled up."""
        assert self.survival is not None
        sizes = [size if number == axis else 1 for number, size in enumerate(branch.shape)]
        mask = torch.empty(sizes).bernoulli_(self.survival)
        return branch * (mask / self.survival if self.survival else mask)


_TAPES: list[Tape] = []


class Adder(nn.Module):
    """An add in a forward of its own."""

    def __init__(self, how: Spelling) -> None:
        super().__init__()
        self.how = how

    def forward(
        self, skip: Tensor, branch: Tensor, what: str, kind: str, batch: int | None = 0
    ) -> Tensor:
        return join(skip, branch, self.how, what, kind, batch)


def join(
    skip: Tensor, branch: Tensor, how: Spelling, what: str, kind: str, batch: int | None = 0
) -> Tensor:
    """Add a branch to a skip; `what`, `kind` and `batch` are what is known of the add.

    Where no axis is the batch, nothing can be dropped for a sample.

    `+=`, which a trace writes as `+`, writes to the branch, which nothing reads again.
    """
    how = replace(how, swapped=True) if how.add == "iadd" else how
    for tape in _TAPES:
        reason = {"nested": "nested: ", "linear": "linear branch: "}.get(what, "")
        known = tape.note(what, kind=kind, branch_first=how.swapped, reason=reason, batch=batch)
        drops = tape.survival is not None and known.is_site(tape.include)
        if drops and batch is not None:
            branch = tape.drop(branch, batch)
    operands = (branch, skip) if how.swapped else (skip, branch)
    return SPELLINGS[how.add](*operands)


def term(left: Any, right: Any, how: Spelling, reason: str, *, pure: bool = False) -> Any:
    """Add two values that are no skip and branch.

    `pure` keeps the order, and writes to neither: one may be a parameter, an input or a number.
    """
    how = replace(how, add="add_") if how.add == "iadd" else how
    for tape in _TAPES:
        tape.note("none", reason=reason)
    if pure and (how.add in _IN_PLACE or how.swapped):
        return torch.add(left, right)
    operands = (right, left) if how.swapped else (left, right)
    return SPELLINGS[how.add](*operands)


def of_sizes(left: Any, right: int) -> Any:
    """Add two Python integers."""
    for tape in _TAPES:
        tape.note("size")
    return left + right


@dataclass(frozen=True)
class Shape:
    """What stands between two operations: (batch, channels, size, size) or (batch, size, channels).

    `steady` operations keep it, so that they can be called again.
    """

    image: bool
    channels: int = 4
    size: int = 4
    steady: bool = False

    @property
    def axis(self) -> int:
        return 1 if self.image else 2

    @property
    def space(self) -> tuple[int, ...]:
        return (2, 3) if self.image else (1,)

    @property
    def spread(self) -> tuple[int, ...]:
        """A vector of channels is viewed like this to broadcast."""
        return (self.channels, 1, 1) if self.image else (self.channels,)


def pointwise(shape: Shape, channels: int) -> nn.Module:
    if shape.image:
        return nn.Conv2d(shape.channels, channels, 1)
    return nn.Linear(shape.channels, channels)


def _part(name: str, shape: Shape) -> nn.Module | nn.Parameter | Tensor:
    """Make what an operation names: layers, parameters, and tables that are no data."""
    c, size = shape.channels, shape.size
    makers: dict[str, Callable[[], Any]] = {
        "mix": lambda: nn.Conv2d(c, c, 3, padding=1) if shape.image else nn.Linear(c, c),
        "point": lambda: pointwise(shape, c),
        "halve": lambda: pointwise(Shape(shape.image, 2 * c), c),
        "part": lambda: pointwise(Shape(shape.image, c // 2), c // 2),
        "bn": lambda: nn.BatchNorm2d(c),
        "norm": lambda: nn.GroupNorm(2, c) if shape.image else nn.LayerNorm(c),
        "relu_": lambda: nn.ReLU(inplace=True),
        "dropout": lambda: nn.Dropout(0.2),
        "avg": lambda: nn.AvgPool2d(3, 1, 1),
        "max": lambda: nn.MaxPool2d(3, 1, 1),
        "scale": lambda: nn.Parameter(torch.rand(shape.spread) + 0.5),
        "table": lambda: torch.rand(c, size, size) if shape.image else torch.rand(size, c),
        "scores": lambda: torch.rand(size, size),
        "memory": lambda: nn.Linear(MEMORY, c),
        "qkv": lambda: nn.Linear(c, 3 * c),
        "mha": lambda: nn.MultiheadAttention(c, 2, batch_first=True),
    }
    made: nn.Module | nn.Parameter | Tensor = makers[name.rstrip("2")]()
    return made


class Operation(nn.Module):
    """One entry of `OPERATIONS`, with the parts that it names."""

    def __init__(self, name: str, how: Spelling, shape: Shape) -> None:
        super().__init__()
        self.name, self.how, self.shape = name, how, shape
        for part in OPERATIONS[name][0].split():
            made = _part(part, shape)
            if isinstance(made, nn.Module | nn.Parameter):
                setattr(self, part, made)
            else:
                self.register_buffer(part, made)

    def forward(self, x: Tensor, extra: Extra) -> Tensor:
        return OPERATIONS[self.name][1](self, x, extra[self.name in _IN_BLOCKS])

    def term(self, left: Any, right: Any, reason: str, *, pure: bool = False) -> Any:
        return term(left, right, self.how, reason, pure=pure)

    def from_memory(self, m: Tensor) -> Tensor:
        """Return channels that broadcast, affine in the memory."""
        channels = self.memory(m.mean(1))
        return channels[:, :, None, None] if self.shape.image else channels.unsqueeze(1)


_NEITHER = "neither operand is a skip"


def _hswish(n: Operation, x: Tensor, m: Tensor) -> Tensor:
    return x * F.relu6(n.term(x, 3.0, "adds a number", pure=True)) / 6.0


def _windows(n: Operation, x: Tensor, m: Tensor) -> Tensor:
    b, c, h, w = x.shape[0], x.shape[1], x.shape[2], x.shape[3]
    x = x.reshape(b, c, 2, h // 2, 2, w // 2).permute(0, 2, 4, 1, 3, 5)
    x = F.gelu(n.point(x.reshape(-1, c, h // 2, w // 2)))
    return x.reshape(b, 2, 2, c, h // 2, w // 2).permute(0, 3, 1, 4, 2, 5).reshape(b, c, h, w)


def _attention(n: Operation, x: Tensor, m: Tensor, extra: str = "") -> Tensor:
    q, k, v = n.qkv(x).chunk(3, -1)
    if extra == "positions":
        q = k = n.term(x, n.memory(m)[:, : n.shape.size], _NEITHER, pure=True)
    scores = q @ k.transpose(1, 2) * 0.5
    if extra == "capped mask":
        scores = scores.tanh()
    if "mask" in extra:
        mask = m[:, : n.shape.size, : n.shape.size]
        scores = n.term(scores, mask, f"{_NEITHER}|inside attention", pure=True)
    if extra == "table":
        scores = n.term(scores, n.scores, "adds the constant", pure=True)
    out = scores.softmax(-1) @ v
    if extra == "values":
        out = n.term(out, n.point(v), "inside attention")
    return n.mix(out)


def _cross(n: Operation, x: Tensor, m: Tensor) -> Tensor:
    keys = n.memory(m)
    return n.mix((x @ keys.transpose(1, 2)).softmax(-1) @ keys)


def _sizes(n: Operation, x: Tensor, m: Tensor) -> Tensor:
    size = of_sizes(x.shape[2 if n.shape.image else 1], 0)
    batch = of_sizes(x.size(0), 0)
    if n.shape.image:
        return x.reshape(batch, n.shape.channels, size, x.shape[3])
    return x.view(batch, size, x.shape[2])


def _res2net(n: Operation, x: Tensor, m: Tensor) -> Tensor:
    first, second = n.point(x).chunk(2, n.shape.axis)
    first = F.relu(n.part(first))
    second = F.relu(n.part2(n.term(first, second, _NEITHER)))
    return torch.cat([first, second], n.shape.axis)


def _shuffle(n: Operation, x: Tensor, m: Tensor) -> Tensor:
    first, second = torch.split(x, n.shape.channels // 2, n.shape.axis)
    return torch.cat([first, F.relu(n.part(second))], n.shape.axis)


def _dense(n: Operation, x: Tensor, m: Tensor) -> Tensor:
    return n.halve(torch.cat([x, F.relu(n.mix(x))], n.shape.axis))


def _dense_and_branch(n: Operation, x: Tensor, m: Tensor) -> Tensor:
    return n.term(_dense(n, x, m), F.relu(n.mix2(x)), _NEITHER)


def _gate(n: Operation, x: Tensor, m: Tensor, gain: float | None = None) -> Tensor:
    gated = x * torch.sigmoid(n.mix(x))
    return n.term(x, gated if gain is None else gated * gain, "gate: ")


def _two(n: Operation, x: Tensor, m: Tensor) -> Tensor:
    return n.term(F.relu(n.mix(x)), n.mix2(F.gelu(n.point(x))), _NEITHER)


def _twice(n: Operation, x: Tensor, m: Tensor) -> Tensor:
    return n.term(x, x, "adds a tensor to itself") * 0.5


def _constants(n: Operation, x: Tensor, m: Tensor) -> Tensor:
    return x * n.term(n.scale, n.scale.abs(), "constant: no operand", pure=True)


def _linear(n: Operation, skip: Tensor, branch: Tensor, kind: str) -> Tensor:
    return join(skip, branch, n.how, "linear", kind)


def _multi(n: Operation, x: Tensor, m: Tensor) -> Tensor:
    return n.term(n.bn(n.mix(x)), n.point(x), "linear branch: ")


_Run = Callable[[Any, Tensor, Tensor], Tensor]

# Name: the parts, and what is computed. Here the values stay what they are.
_VIEWS: dict[str, tuple[str, _Run]] = {
    "clone": ("", lambda n, x, m: x.clone()),
    "dropout": ("dropout", lambda n, x, m: n.dropout(x)),
    "F.dropout": ("", lambda n, x, m: F.dropout(x, 0.3, n.training)),
    "roll": ("", lambda n, x, m: torch.roll(x, 1, n.shape.space[0])),
    "transpose": ("", lambda n, x, m: x.transpose(1, 2).transpose(2, 1)),
    "sizes": ("", _sizes),
    "flatten": ("", lambda n, x, m: x.flatten(1).reshape(x.shape)),
}
# Affine in x.
_AFFINE: dict[str, tuple[str, _Run]] = {
    "point": ("point", lambda n, x, m: n.point(x)),
    "bn": ("bn", lambda n, x, m: n.bn(x)),
    "scale": ("scale", lambda n, x, m: n.scale * x),
    "gain": ("", lambda n, x, m: x * 0.7),
    "div": ("", lambda n, x, m: x / 1.4),
    "avg": ("avg", lambda n, x, m: n.avg(x)),
    "pad": ("", lambda n, x, m: F.pad(x, (1, 1, 1, 1))[:, :, 1:-1, 2:]),
    "bias": ("scale", lambda n, x, m: n.term(x, n.scale, "adds the constant", pure=True)),
    "position": (
        "table scale",
        lambda n, x, m: n.term(x, n.table * n.scale, "adds the constant", pure=True),
    ),
    "number": ("", lambda n, x, m: n.term(x, 1e-3, "adds a number", pure=True)),
    "twice": ("", _twice),
    "constants": ("scale", _constants),
    "linear": ("mix", lambda n, x, m: _linear(n, x, n.mix(x), "identity")),
    "linear pool": (
        "avg scale",
        lambda n, x, m: _linear(n, x, n.scale * (n.avg(x) - x), "identity"),
    ),
    "linear bn": ("bn bn2 mix", lambda n, x, m: _linear(n, n.bn(x), n.bn2(n.mix(x)), "projection")),
    "linear multi": ("bn mix point", _multi),
}
# Not affine, but a skip may do it.
_NORMS: dict[str, tuple[str, _Run]] = {
    "norm": ("norm", lambda n, x, m: n.norm(x)),
    "max": ("max", lambda n, x, m: n.max(x)),
}
# No skip goes through these.
_HARD: dict[str, tuple[str, _Run]] = {
    "relu": ("", lambda n, x, m: F.relu(x)),
    "relu_": ("relu_", lambda n, x, m: n.relu_(x)),
    "x.relu_": ("", lambda n, x, m: x.relu_()),
    "gelu": ("", lambda n, x, m: F.gelu(x)),
    "tanh": ("", lambda n, x, m: x.tanh()),
    "swish": ("", lambda n, x, m: x * torch.sigmoid(x)),
    "hard swish": ("", _hswish),
    "squeeze-excite": (
        "point",
        lambda n, x, m: x * n.point(F.relu(x.mean(n.shape.space, keepdim=True))).sigmoid(),
    ),
    "windows": ("point", _windows),
    "attention": ("qkv mix", _attention),
    "attention, mask": ("qkv mix", lambda n, x, m: _attention(n, x, m, "mask")),
    "attention, table": ("qkv mix scores", lambda n, x, m: _attention(n, x, m, "table")),
    "attention, values": ("qkv mix point", lambda n, x, m: _attention(n, x, m, "values")),
    "multi-head": ("mha", lambda n, x, m: n.mha(x, x, x, need_weights=False)[0]),
    "cross-attention": ("memory mix", _cross),
    "multi-head, memory": (
        "mha memory",
        lambda n, x, m: n.mha(x, n.memory(m), n.memory(m), need_weights=False)[0],
    ),
}
# Not affine; they read the input that is for blocks alone.
_IN_BLOCKS: dict[str, tuple[str, _Run]] = {
    "attention, capped": ("qkv mix", lambda n, x, m: _attention(n, x, m, "capped mask")),
    "attention, positions": (
        "qkv mix memory",
        lambda n, x, m: _attention(n, x, m, "positions"),
    ),
}
# Anywhere on a branch or between blocks, beside something of the above.
_OTHER: dict[str, tuple[str, _Run]] = {
    "gate": ("mix", _gate),
    "gate with gain": ("mix", lambda n, x, m: _gate(n, x, m, 0.5)),
    "two branches": ("mix mix2 point", _two),
    "res2net": ("point part part2", _res2net),
    "shuffle": ("part", _shuffle),
    "dense": ("mix halve", _dense),
    "dense and branch": ("mix mix2 halve", _dense_and_branch),
    "film": ("memory", lambda n, x, m: x * n.from_memory(m).sigmoid()),
    "mask": ("", lambda n, x, m: x * m.mean((1, 2)).reshape(-1, *(1,) * (1 + len(n.shape.space)))),
    "condition": ("memory", lambda n, x, m: n.term(x, n.from_memory(m), _NEITHER, pure=True)),
}
_ANYWHERE = {**_VIEWS, **_AFFINE, **_NORMS, **_HARD, **_OTHER}
OPERATIONS = {**_ANYWHERE, **_IN_BLOCKS}

_IMAGES_ONLY = {"bn", "avg", "pad", "linear pool", "linear bn", "linear multi", "max", "windows"}
_TOKENS_ONLY = {name for name, entry in _HARD.items() if set(entry[0].split()) & {"qkv", "mha"}}
_TOKENS_ONLY |= {"cross-attention", *_IN_BLOCKS}


def _allowed(names: dict[str, Any], image: bool) -> list[str]:
    wrong = _TOKENS_ONLY if image else _IMAGES_ONLY
    return [name for name in names if name not in wrong]


def names(group: Literal["views", "skip", "norms", "hard", "any"], image: bool) -> list[str]:
    """Return the names of the operations of a group that images or tokens can have."""
    groups = {
        "views": _VIEWS,
        "skip": {k: v for k, v in {**_AFFINE, **_NORMS}.items() if not k.startswith("linear")},
        "norms": _NORMS,
        "hard": {**_HARD, **_IN_BLOCKS},
        "any": _ANYWHERE,
    }
    return _allowed(groups[group], image)
