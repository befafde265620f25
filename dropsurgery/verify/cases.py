"""The inputs of a comparison: seeded random ones, or the caller's own and variations of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from dropsurgery.errors import ArgumentTypeError, VerifyError
from dropsurgery.graph.signature import argument_list, signature

# Usual sizes of images and lengths of sequences, in the order in which they are tried.
SIZES = {1: (16, 64, 256), 2: (64, 224, 32, 28, 299, 384), 3: (16, 32, 112)}
LENGTH = 16


@dataclass(frozen=True)
class Spec:
    """One input: its name, dtype, and shape, where None stands for the batch size.

    Attributes:
        name: the name of forward's argument, or of the ONNX graph's input.
        dtype: the dtype.
        shape: the sizes; None at axis 0 for a batch that is open.
        high: integers are drawn from 0 to this, exclusive.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int | None, ...]
    high: int = 2

    @property
    def open_batch(self) -> bool:
        """Whether the batch size can be chosen."""
        return bool(self.shape) and self.shape[0] is None


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
    if not any(isinstance(t, Tensor) and t.is_floating_point() for t in _leaves(case)):
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
) -> Iterator[Case]:
    """Yield one case for each seed and batch size; a fixed batch makes the sizes one.

    Args:
        specs: the inputs.
        seeds: a generator of its own is seeded with each; torch's global one is left alone.
        batch_sizes: used where an input's batch is open.
        bind: turns the tensors into the arguments of forward.
        optional: whether batch sizes other than the first may be refused by the reference.
    """
    sizes = batch_sizes if any(spec.open_batch for spec in specs) else (None,)
    for index, seed in enumerate(seeds):
        generator = torch.Generator().manual_seed(seed)
        for size in sizes:
            tensors = [_draw(spec, size, index, generator) for spec in specs]
            args, kwargs = bind(tensors)
            label = f"seed {seed}" + (f", batch {size}" if size is not None else "")
            yield Case(label, args, kwargs, optional and size != sizes[0])


def _draw(spec: Spec, batch: int | None, style: int, generator: torch.Generator) -> Tensor:
    shape = [(batch or 1) if size is None else size for size in spec.shape]
    if spec.dtype == torch.bool:
        return torch.rand(shape, generator=generator) < 0.5
    if not spec.dtype.is_floating_point and not spec.dtype.is_complex:
        return torch.randint(spec.high, shape, generator=generator, dtype=spec.dtype)
    if spec.dtype.is_complex:
        return torch.randn(shape, generator=generator, dtype=spec.dtype)
    return _field(shape, style, generator).to(spec.dtype)


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


def given_cases(inputs: Any) -> list[Case]:
    """Read the caller's inputs: a tensor, a tuple or dict of arguments, or a list of such cases.

    Raises:
        ArgumentTypeError: something else was given, or nothing.
    """
    items = inputs if isinstance(inputs, list) else [inputs]
    cases = []
    for index, item in enumerate(items):
        label = f"yours {index}" if len(items) > 1 else "yours"
        if isinstance(item, Tensor):
            cases.append(Case(label, (item,), {}))
        elif isinstance(item, tuple):
            cases.append(Case(label, item, {}))
        elif isinstance(item, Mapping):
            cases.append(Case(label, (), dict(item)))
        else:
            raise ArgumentTypeError(
                f"inputs holds a {type(item).__name__}",
                fix="a tensor, a tuple of forward's arguments, or a list of these",
            )
    if not cases or not any(isinstance(t, Tensor) for c in cases for t in _leaves(c)):
        raise ArgumentTypeError("inputs holds no tensor", fix="pass a tensor, or leave it out")
    return cases


def variations(
    case: Case, seeds: Sequence[int], batch_sizes: Sequence[int] | None
) -> Iterator[Case]:
    """Yield the caller's case with slightly smaller numbers, and in other batch sizes.

    Each float is shrunk by less than one part in 128, which keeps its sign and range and draws its
    rounding anew; batches are put together from the case's own rows.

    Args:
        case: one of the caller's own.
        seeds: as in `random_cases`.
        batch_sizes: None where the candidate's batch is fixed.
    """
    rows = next((leaf.shape[0] for leaf in _leaves(case) if _has_axis(leaf)), None)
    sizes = (rows,) if batch_sizes is None or not rows else batch_sizes
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        for size in sizes:
            picks = None
            if rows and size != rows:
                picks = torch.randint(rows, (size or 1,), generator=generator)

            def vary(
                leaf: Any, picks: Tensor | None = picks, noise: torch.Generator = generator
            ) -> Any:
                if not isinstance(leaf, Tensor):
                    return leaf
                if picks is not None and _has_axis(leaf) and leaf.shape[0] == rows:
                    leaf = leaf[picks.to(leaf.device)]
                if not leaf.is_floating_point():
                    return leaf
                shrink = torch.rand(leaf.shape, generator=noise, dtype=torch.float64) / 128
                return (leaf.double() * (1 - shrink.to(leaf.device))).to(leaf.dtype)

            args, kwargs = pytree.tree_map(vary, (case.args, dict(case.kwargs)))
            label = f"{case.label} varied, seed {seed}"
            if size is not None:
                label += f", batch {size}"
            yield Case(label, args, kwargs, optional=size != rows)


def _leaves(case: Case) -> list[Any]:
    return pytree.tree_leaves((case.args, dict(case.kwargs)))


def _has_axis(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.ndim > 0


def recorded_specs(module: nn.Module) -> list[Spec] | None:
    """Return the inputs that a traced GraphModule was shown, if it was shown any."""
    if not isinstance(module, fx.GraphModule):
        return None
    specs = []
    for node in module.graph.nodes:
        if node.op == "placeholder":
            meta = node.meta.get("tensor_meta")
            if not hasattr(meta, "shape") or not hasattr(meta, "dtype"):
                return None
            shape = tuple(meta.shape)
            specs.append(Spec(str(node.target), meta.dtype, (None, *shape[1:]) if shape else ()))
    return specs or None


def guessed_specs(model: nn.Module) -> list[list[Spec]]:
    """Return what the one input of a network may look like, most likely first.

    Raises:
        VerifyError: it takes several inputs, or its first layer does not tell.
    """
    parameters = signature(model).parameters.values()
    required = [
        p
        for p in parameters
        if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    ]
    shapes = _likely_shapes(model) if len(required) == 1 else []
    if not shapes:
        raise VerifyError(
            "the shapes of the inputs cannot be told from the network",
            where=f"{type(model).__name__}: {argument_list(model)}",
            fix="pass inputs=, a tensor or a tuple of forward's arguments",
        )
    floats = [p.dtype for p in model.parameters() if p.is_floating_point()]
    dtype = floats[0] if floats else torch.get_default_dtype()
    return [
        [Spec(required[0].name, torch.int64 if high else dtype, (None, *shape), high or 2)]
        for shape, high in shapes
    ]


def _likely_shapes(model: nn.Module) -> list[tuple[tuple[int, ...], int]]:
    """Return (shape without batch, size of the vocabulary or 0) by the first layer that tells."""
    for layer in model.modules():
        if isinstance(layer, nn.modules.conv._ConvNd):
            rank = len(layer.kernel_size)
            sizes = [*_image_sizes(model), *((size,) * rank for size in SIZES[rank])]
            return [((layer.in_channels, *size), 0) for size in sizes if len(size) == rank]
        if isinstance(layer, nn.MultiheadAttention):
            return [((LENGTH, layer.embed_dim), 0)]
        if isinstance(layer, nn.Embedding):
            return [((LENGTH,), layer.num_embeddings)]
        if isinstance(layer, nn.Linear):
            return [((layer.in_features,), 0), ((LENGTH, layer.in_features), 0)]
        if isinstance(layer, nn.RNNBase):
            return [((LENGTH, layer.input_size), 0)]
        if isinstance(layer, nn.LayerNorm):
            shape = tuple(layer.normalized_shape)
            return [(shape, 0), ((LENGTH, *shape), 0)]
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            channels = layer.num_features
            return [((channels,), 0), ((channels, LENGTH), 0), ((channels, LENGTH, LENGTH), 0)]
    return []


def _image_sizes(model: nn.Module) -> list[tuple[int, ...]]:
    """Return the image size that the model carries as an attribute, as vision transformers do."""
    for module in model.modules():
        for name in ("image_size", "img_size"):
            value = module.__dict__.get(name)
            if isinstance(value, int):
                return [(value, value)]
            if isinstance(value, tuple | list) and all(isinstance(size, int) for size in value):
                return [tuple(value)]
    return []
