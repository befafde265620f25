"""A network in float64 without a copy of its weights.

`copy.deepcopy(model).double()` needs the memory of the model three times over, misses tensors that
are no parameters, and fails where a forward casts to float32 by itself. Here each operation gets
float64 arguments instead: weights are widened one operation at a time and dropped again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

WIDE = {
    torch.float16: torch.float64,
    torch.bfloat16: torch.float64,
    torch.float32: torch.float64,
    torch.complex64: torch.complex128,
}
_CASTS: dict[Any, Any] = {
    torch.Tensor.float: torch.Tensor.double,
    torch.Tensor.half: torch.Tensor.double,
    torch.Tensor.bfloat16: torch.Tensor.double,
}
_ATOMS = frozenset({bool, int, float, str, type(None), slice, torch.Size, torch.device})
# They answer from the header of a tensor, which need not be widened for it.
_HEADERS = {
    torch.Tensor.size,
    torch.Tensor.dim,
    torch.Tensor.numel,
    torch.Tensor.stride,
    torch.Tensor.is_contiguous,
    torch.Tensor.is_floating_point,
    torch.Tensor.__len__,
}


def widen(value: Any) -> Any:
    """Return a floating tensor, or a dtype, in float64 (complex128); anything else as it is."""
    if isinstance(value, torch.Tensor) and value.dtype in WIDE:
        with torch._C.DisableTorchFunction():
            return value.detach().to(WIDE[value.dtype])
    if isinstance(value, torch.dtype):
        return WIDE.get(value, value)
    return value


class Float64(TorchFunctionMode):
    """While active, every torch operation computes in float64, whatever dtype it is asked for."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func in _HEADERS:
            return func(*args, **kwargs)
        if getattr(func, "__name__", "") == "__get__":
            return _widen_all(func(*args, **kwargs))
        func = _CASTS.get(func, func)
        args = tuple(map(_widen_all, args))
        kwargs = {name: _widen_all(value) for name, value in kwargs.items()}
        if func is F.multi_head_attention_forward:
            args = _laid_out(args)
        return _widen_all(func(*args, **kwargs))


def _widen_all(value: Any) -> Any:
    """Widen what a container holds; most arguments are none, and `tree_map` is slow to say so."""
    kind = type(value)
    if kind in _ATOMS:
        return value
    if kind in (tuple, list):
        return kind(map(_widen_all, value))
    if isinstance(value, torch.Tensor):
        return widen(value)
    return pytree.tree_map(widen, value)


def _laid_out(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return the arguments of an attention with query, key and value laid out as their shapes say.

    Sequences that come with the batch first are transposed before; their projections then run once
    for each position, in several times the time. What was one tensor stays one: the attention asks.
    """
    dense = {id(leaf): leaf.contiguous() for leaf in args[:3] if isinstance(leaf, torch.Tensor)}
    return (*(dense.get(id(leaf), leaf) for leaf in args[:3]), *args[3:])
