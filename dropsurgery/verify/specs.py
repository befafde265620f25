"""What a module's inputs look like: as it was traced with, or as its first layer suggests."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from dropsurgery.errors import VerifyError
from dropsurgery.graph.signature import argument_list, signature
from dropsurgery.verify.cases import BATCH, Spec
from dropsurgery.verify.onnx_reference import OnnxModule

# Usual sizes of images and lengths of sequences, in the order in which they are tried.
SIZES = {1: (16, 64, 256), 2: (64, 224, 32, 28, 299, 384), 3: (16, 32, 112)}
LENGTH = 16


def recorded_specs(module: nn.Module) -> list[Spec] | None:
    """Return the inputs that a traced GraphModule was shown, or that an ONNX file declares."""
    if isinstance(module, OnnxModule):
        return module.specs
    if not isinstance(module, fx.GraphModule):
        return None
    specs: list[Spec] = []
    rows = None
    for node in module.graph.nodes:
        if node.op == "placeholder":
            meta = node.meta.get("tensor_meta")
            if not hasattr(meta, "shape") or not hasattr(meta, "dtype"):
                return None
            shape: tuple[int | str, ...] = tuple(meta.shape)
            rows = shape[0] if shape and rows is None else rows
            if shape and shape[0] == rows:
                shape = (BATCH, *shape[1:])
            specs.append(Spec(str(node.target), meta.dtype, shape))
    return specs or None


def guessed_specs(model: nn.Module) -> list[list[Spec]]:
    """Return what the inputs of a network may look like, most likely first.

    Only arguments without a default are made up. Those whose name tells of a mask get the shape
    of a padding mask and are tried as booleans, integers and floats; the others have one shape.

    Raises:
        VerifyError: the first layer does not tell.
    """
    required = [
        p
        for p in signature(model).parameters.values()
        if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    ]
    shapes = _likely_shapes(model) if required else []
    if not shapes:
        raise VerifyError(
            "the shapes of the inputs cannot be told from the network",
            where=f"{type(model).__name__}: {argument_list(model)}",
            fix="pass inputs=, a tensor or a tuple of forward's arguments",
        )
    floats = [p.dtype for p in model.parameters() if p.is_floating_point()]
    dtype = floats[0] if floats else torch.get_default_dtype()
    masks = (torch.bool, torch.int64, dtype)
    masked = any("mask" in p.name.lower() for p in required)
    return [
        [_spec(p.name, shape, high, dtype, mask) for p in required]
        for shape, high in shapes
        for mask in (masks if masked else masks[:1])
    ]


def _spec(
    name: str, shape: tuple[int, ...], high: int, dtype: torch.dtype, mask: torch.dtype
) -> Spec:
    if "mask" in name.lower():
        # Of tokens (L,), of features (L, D), of an image (C, H, W).
        kept = {1: shape, 2: shape[:1], 3: shape[1:]}.get(len(shape), shape)
        return Spec(name, mask, (BATCH, *kept))
    return Spec(name, torch.int64 if high else dtype, (BATCH, *shape), high or 2)


class _Lookups(TorchFunctionMode):
    """Writes down what is looked up in tables of embeddings, and how many rows these have."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[Tensor, int]] = []

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is F.embedding:
            indices, table, *_ = [*args, *(kwargs or {}).values()]
            self.found.append((indices.detach().cpu().clone(), len(table)))
        return func(*args, **(kwargs or {}))


def bounded(specs: Sequence[Spec], tensors: Sequence[Tensor], run: Callable[[], Any]) -> list[Spec]:
    """Return the inputs with their integers bounded by the table that they are looked up in.

    Args:
        specs: the inputs.
        tensors: an example of each.
        run: runs the network on the example.
    """
    lookups = _Lookups()
    with lookups:
        run()
    found = []
    for spec, tensor in zip(specs, tensors, strict=True):
        rows = [
            count
            for indices, count in lookups.found
            if indices.dtype == tensor.dtype and torch.equal(indices, tensor)
        ]
        integer = not (tensor.is_floating_point() or tensor.dtype == torch.bool)
        found.append(replace(spec, high=min(rows)) if rows and integer else spec)
    return found


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
            # An index that is in every table; `bounded` finds out which one it is looked up in.
            tables = [m.num_embeddings for m in model.modules() if isinstance(m, nn.Embedding)]
            return [((LENGTH,), min(tables))]
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
