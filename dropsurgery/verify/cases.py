"""Calls of a network, and random tensors for them."""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from dropsurgery.errors import VerifyError

BATCH = "batch"
_OPERATORS: dict[type[ast.operator], Callable[[int, int], int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Div: operator.floordiv,
}


@dataclass(frozen=True)
class Spec:
    """One input: its name, dtype, and shape, in which a name stands for a size that is open.

    Attributes:
        name: the name of forward's argument, or of the ONNX graph's input.
        dtype: the dtype.
        shape: the sizes. A name stands for the same size wherever it appears; it may be a sum or
            product of names and numbers, as exporters write them ("2*length").
        high: integers are drawn from 0 to this, exclusive.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int | str, ...]
    high: int = 2

    @property
    def mask(self) -> bool:
        """Whether the name tells of a mask."""
        return "mask" in self.name.lower()

    @property
    def integer(self) -> bool:
        """Whether it holds whole numbers."""
        return not (
            self.dtype.is_floating_point or self.dtype.is_complex or self.dtype == torch.bool
        )

    @property
    def symbols(self) -> list[str]:
        """The names in the shape, in order."""
        return [name for size in self.shape if isinstance(size, str) for name in _names(size)]

    def sized(self, sizes: Mapping[str, int]) -> list[int]:
        """Return the shape with sizes in the place of names.

        Raises:
            VerifyError: an expression cannot be computed.
        """
        return [size if isinstance(size, int) else self._size(size, sizes) for size in self.shape]

    def _size(self, text: str, sizes: Mapping[str, int]) -> int:
        if text in sizes:
            return sizes[text]
        try:
            size = _evaluated(ast.parse(text, mode="eval").body, sizes)
        except (SyntaxError, KeyError, TypeError, ZeroDivisionError) as error:
            raise VerifyError(
                f"the size {text!r} of input '{self.name}' cannot be computed",
                where=f"{self.name} {self.shape}",
                fix="pass inputs=, a tensor or a tuple of forward's arguments",
            ) from error
        return max(size, 0)


def batch_symbols(specs: Sequence[Spec]) -> list[str]:
    """Return the names of the sizes along axis 0."""
    found = [s.shape[0] for s in specs if s.shape and isinstance(s.shape[0], str)]
    return list(dict.fromkeys(found))


def other_symbols(specs: Sequence[Spec]) -> list[str]:
    """Return the names of all other open sizes."""
    batch = batch_symbols(specs)
    return list(dict.fromkeys(n for s in specs for n in s.symbols if n not in batch))


def _names(text: str) -> list[str]:
    if text.isidentifier():
        return [text]
    try:
        tree = ast.parse(text, mode="eval")
    except SyntaxError:
        return [text]  # a name that is no identifier
    return [node.id for node in ast.walk(tree) if isinstance(node, ast.Name)] or [text]


def _evaluated(node: ast.expr, sizes: Mapping[str, int]) -> int:
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        left, right = _evaluated(node.left, sizes), _evaluated(node.right, sizes)
        return _OPERATORS[type(node.op)](left, right)
    if isinstance(node, ast.Constant) and isinstance(node.value, int):
        return node.value
    if isinstance(node, ast.Name):
        return sizes[node.id]
    raise TypeError(ast.dump(node))


@dataclass(frozen=True)
class Case:
    """One call of the network.

    Attributes:
        label: what it is, with its seed.
        args, kwargs: the arguments of forward.
        optional: whether a reference that cannot run it only leaves it out: a batch size that
            nobody promised to accept.
        faint: whether its numbers are next to zero; see `faint`.
    """

    label: str
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    optional: bool = False
    faint: bool = False


def faint(case: Case) -> Case | None:
    """Return a case with its floats shrunk to next to nothing, or None where it has no floats.

    What a layer adds on its own (a bias, a mean, an epsilon) is lost in float32 beside activations
    that are ten million times larger, as they are at the end of a deep residual network with
    fresh weights. With faint inputs the activations are small, and such terms are what is left.
    """
    if not any(isinstance(t, Tensor) and t.is_floating_point() for t in leaves(case)):
        return None

    def shrink(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or not leaf.is_floating_point():
            return leaf
        # float16 has no numbers much below 2**-20: there the activations would lose their digits.
        return leaf * (2.0**-10 if leaf.dtype == torch.float16 else 2.0**-20)

    args, kwargs = pytree.tree_map(shrink, (case.args, dict(case.kwargs)))
    return Case(f"{case.label}, faint", args, kwargs, optional=True, faint=True)


def random_cases(
    specs: Sequence[Spec],
    seeds: Sequence[int],
    batch_sizes: Sequence[int],
    bind: Callable[[list[Tensor]], tuple[tuple[Any, ...], dict[str, Any]]],
    *,
    optional: bool,
    sizes: Mapping[str, int] | None = None,
) -> Iterator[Case]:
    """Yield one case for each seed and batch size; a fixed batch makes the sizes one.

    Args:
        specs: the inputs.
        seeds: a generator of its own is seeded with each; torch's global one is left alone.
        batch_sizes: used where an input's batch is open.
        bind: turns the tensors into the arguments of forward.
        optional: whether batch sizes other than the first may be refused by the reference.
        sizes: of the open axes beside the batch.
    """
    batch = batch_symbols(specs)
    others = dict(sizes or {})
    told = "".join(f", {name} {size}" for name, size in others.items())
    rows: Sequence[int | None] = batch_sizes if batch else (None,)
    for index, seed in enumerate(seeds):
        generator = torch.Generator().manual_seed(seed)
        for size in rows:
            known = {**others, **dict.fromkeys(batch, size or 1)}
            tensors = [draw(spec, spec.sized(known), index, generator) for spec in specs]
            args, kwargs = bind(tensors)
            label = f"seed {seed}" + (f", batch {size}" if size is not None else "") + told
            yield Case(label, args, kwargs, optional and size != rows[0])


def draw(spec: Spec, shape: Sequence[int], style: int, generator: torch.Generator) -> Tensor:
    """Return a random tensor for an input.

    Args:
        spec: the input.
        shape: its sizes.
        style: see `_field`.
        generator: where the numbers are drawn from.
    """
    if spec.mask and shape:
        return _mask(shape, generator).to(spec.dtype)
    if spec.dtype == torch.bool:
        return torch.rand(shape, generator=generator) < 0.5
    if not spec.dtype.is_floating_point and not spec.dtype.is_complex:
        return torch.randint(spec.high, shape, generator=generator, dtype=spec.dtype)
    if spec.dtype.is_complex:
        return torch.randn(shape, generator=generator, dtype=spec.dtype)
    return _field(shape, style, generator).to(spec.dtype)


def _mask(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Return ones up to a random length along the last axis, zeros behind.

    Whether a one keeps or hides is a matter of convention. At least one of each is in every row,
    since attention to nothing is NaN.
    """
    last = shape[-1]
    lengths = torch.randint(1, max(last, 2), (*shape[:-1], 1), generator=generator)
    return torch.arange(last) < lengths


def _field(shape: Sequence[int], style: int, generator: torch.Generator) -> Tensor:
    """Return standard normal noise, and for every second seed one with large-scale structure.

    White noise averages out on its way through a convolutional network, whose pooled features
    then hardly differ from one input to the next. Slow waves and an offset of each channel, as
    photographs have them, reach the end.
    """
    noise = torch.randn(shape, generator=generator)
    if style % 2 == 0 or len(shape) < 3:
        return noise
    offset = torch.randn([*shape[:2], *(1 for _ in shape[2:])], generator=generator)
    modes = {3: "linear", 4: "bilinear", 5: "trilinear"}
    if len(shape) not in modes:
        return 0.5 * noise + offset
    coarse = torch.randn([*shape[:2], *(min(4, size) for size in shape[2:])], generator=generator)
    waves = F.interpolate(coarse, size=list(shape[2:]), mode=modes[len(shape)], align_corners=False)
    return 0.5 * noise + waves + offset


def leaves(case: Case) -> list[Any]:
    """Return everything that a call passes, out of its containers."""
    return pytree.tree_leaves((case.args, dict(case.kwargs)))


def has_axis(leaf: Any) -> bool:
    """Say whether something is a tensor with an axis 0."""
    return isinstance(leaf, Tensor) and leaf.ndim > 0
