"""What the stochastic layers share: rates, which units draw together, and the draws themselves."""

from __future__ import annotations

from typing import Literal, cast, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dropsurgery.errors import ArgumentError, ArgumentTypeError
from dropsurgery.survival import check_probability

Units = Literal["element", "channel", "row", "batch"]


def check_rate(value: object, name: str = "p") -> float:
    """Return `value` as a float in [0, 1), or raise a typed error that says `name`."""
    number = check_probability(value, name)
    if number == 1.0:
        raise ArgumentError(
            f"{name} must lie in [0, 1), got {value!r}", fix="at 1 nothing would be left"
        )
    return number


def check_units(units: str) -> Units:
    """Return `units`, or raise where it names no way of sharing a draw."""
    if units not in get_args(Units):
        raise ArgumentError(
            f"unknown units {units!r}", fix="'element', 'channel', 'row' or 'batch'"
        )
    return cast(Units, units)


def check_generator(generator: object) -> torch.Generator | None:
    """Return `generator`, or raise where it is none."""
    if generator is None or isinstance(generator, torch.Generator):
        return generator
    raise ArgumentTypeError(
        f"generator must be a torch.Generator or None, got {generator!r}",
        fix="torch.Generator(device).manual_seed(0)",
    )


def check_input(x: Tensor, layer: nn.Module, ranks: tuple[int, ...] = ()) -> None:
    """Raise where a layer cannot take `x`: not floating point, or not of one of these ranks."""
    name = type(layer).__name__
    if not x.is_floating_point():
        raise ArgumentError(f"{name} needs a floating-point tensor, got {x.dtype}")
    if ranks and x.ndim not in ranks:
        wanted = " or ".join(map(str, ranks))
        raise ArgumentError(
            f"{name} needs a tensor of rank {wanted}, got shape {tuple(x.shape)}",
            fix="(N, C, …) with the spatial axes last; for features without such axes, Dropout",
        )


def noise_shape(x: Tensor, units: Units) -> tuple[int, ...]:
    """Return the shape of one draw for each unit, which broadcasts over `x`."""
    own = {"element": x.ndim, "channel": 2, "row": 1, "batch": 0}[units]
    return tuple(size if axis < own else 1 for axis, size in enumerate(x.shape))


def uniform(x: Tensor, shape: tuple[int, ...], generator: torch.Generator | None) -> Tensor:
    """Return draws from U[0, 1) on the device of `x`.

    They are float64 for a float64 `x`, else float32: in half precision, 1 in 256 would be the
    finest probability there is.
    """
    if generator is not None and generator.device.type != x.device.type:
        raise ArgumentError(
            f"the generator is on {generator.device} and the input on {x.device}",
            fix=f"torch.Generator('{x.device}')",
        )
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    if shape == tuple(x.shape):
        empty = torch.empty_like(x, dtype=dtype, requires_grad=False)  # the layout of x as well
    else:
        empty = torch.empty(shape, dtype=dtype, device=x.device)
    return empty.uniform_(generator=generator)


def kept(x: Tensor, shape: tuple[int, ...], p: float, generator: torch.Generator | None) -> Tensor:
    """Return a mask of zeros (with probability `p`) and ones, as floats.

    It compares draws with `p`, for which compiled code takes a new rate without compiling again;
    `Tensor.bernoulli_` holds its probability as a constant there.
    """
    return uniform(x, shape, generator).ge_(p)


def drop(x: Tensor, shape: tuple[int, ...], p: float, generator: torch.Generator | None) -> Tensor:
    """Return `x` with inverted dropout: units of `shape` zero with probability `p`, else ÷ (1-p).

    The factor is float32 or wider, so that half precision rounds the result once.
    """
    fused = x.is_cuda and generator is None and shape == tuple(x.shape)
    if fused and not torch.compiler.is_compiling():
        return F.dropout(x, p)  # one kernel
    mask = kept(x, shape, p, generator).mul_(1.0 / (1.0 - p))
    return (x * mask).to(x.dtype)


def set_generator(module: nn.Module, generator: torch.Generator | None) -> None:
    """Let every stochastic layer of dropsurgery's inside `module` draw from one generator.

    Args:
        module: any network.
        generator: on the device of the activations; None for the global one. `torch.compile`
            cannot hold a generator (torch 2.13), so that a compiled network keeps to None.

    Raises:
        ArgumentTypeError: `generator` is no generator.
    """
    check_generator(generator)
    for layer in module.modules():
        own = type(layer).__module__.startswith("dropsurgery.layers.")
        if own and "generator" in layer.__dict__:
            layer.generator = generator  # type: ignore[assignment]
