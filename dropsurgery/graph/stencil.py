"""The algebra of convolutions: which sums and which chains of them are one convolution.

Every linear layer here is y(p) = b + Σᵢ W[i]·x(stride·p + first + step·i), a stencil. Padding is no
part of it but of x, which is continued beyond its borders. Two stencils of one x add up where they
read the same positions of it for the same p, and a stencil of a stencil is a stencil where what the
outer one reads beyond the borders of the inner one's output is what the inner one would give there.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import product
from typing import Self

import torch
from torch import Tensor

from dropsurgery.graph.affine import Affine, Refused


@dataclass(frozen=True)
class Axis:
    """What a stencil reads along one spatial axis, and how many outputs it has.

    For an input of n entries there are floor((n - 1 + slack) / stride) + 1 outputs; output p reads
    stride·p + first + step·i for i < count. A convolution's padding p, kernel k and dilation d are
    first = -p, step = d, count = k, slack = 2p - d(k - 1).

    Attributes:
        first: position of the first tap, against stride·p.
        step: distance between taps; 0 where there is one tap.
        count: number of taps.
        stride: distance between the places of neighbouring outputs.
        slack: what the number of outputs follows from; see above.
    """

    first: int = 0
    step: int = 0
    count: int = 1
    stride: int = 1
    slack: int = 0

    @classmethod
    def window(cls, size: int, stride: int, dilation: int, before: int, after: int) -> Self:
        """Return the axis of a window that slides over an input with this padding."""
        step = dilation if size > 1 else 0
        return cls(-before, step, size, stride, before + after - step * (size - 1))

    @property
    def last(self) -> int:
        """Position of the last tap."""
        return self.first + self.step * (self.count - 1)

    @property
    def before(self) -> int:
        """How far it reads beyond the beginning; negative: how much it leaves out."""
        return -self.first

    @property
    def after_end(self) -> int:
        """How far it may read beyond the end."""
        return self.slack + self.last

    @property
    def is_inside(self) -> bool:
        """Whether it never reads beyond a border."""
        return self.before <= 0 and self.after_end <= 0

    @property
    def is_point(self) -> bool:
        """Whether output p reads x(stride·p) alone, for every p there is."""
        return self.count == 1 and self.first == 0 and self.slack == 0

    def spread(self, first: int, last: int, other: int = 0) -> Self:
        """Return the axis with taps from `first` to `last`, close enough for a step of `other`."""
        step = math.gcd(self.step, other, self.first - first, self.last - last, last - first)
        count = (last - first) // step + 1 if step else 1
        return replace(self, first=first, step=step if count > 1 else 0, count=count)

    def plus(self, other: Axis) -> Self:
        """Return the taps of both."""
        first, last = min(self.first, other.first), max(self.last, other.last)
        step = math.gcd(other.step, self.first - other.first)
        return self.spread(first, last, step)

    def behind(self, inner: Axis) -> Axis:
        """Return what this reads of x, where it reads the output of another, which reads x."""
        first = inner.stride * self.first + inner.first
        last = inner.stride * self.last + inner.last
        step = math.gcd(inner.stride * self.step, inner.step)
        return Axis(
            first,
            step,
            (last - first) // step + 1 if step else 1,
            self.stride * inner.stride,
            inner.slack + inner.stride * self.slack,
        )

    def even(self) -> Self:
        """Return the axis with zero taps put in until padding is the same at both ends."""
        pad = max(self.before, self.after_end, 0)
        return self.spread(-pad, pad - self.slack)


POINT = Axis()


@dataclass(frozen=True)
class Stencil:
    """The form of a stencil, without its values.

    Attributes:
        axes: its spatial axes; none for a linear layer, whose channels are on the last axis.
        inputs: number of input channels.
        outputs: number of output channels.
        groups: groups, as those of a convolution.
        border: how the input goes on beyond its borders, as a convolution's `padding_mode`; None
            where nothing is read there.
        shifts: whether it may add a constant.
    """

    axes: tuple[Axis, ...]
    inputs: int
    outputs: int
    groups: int
    border: str | None = None
    shifts: bool = False

    @classmethod
    def identity(cls, spatial: int, channels: int) -> Self:
        """Return the stencil that gives its input."""
        return cls((POINT,) * spatial, channels, channels, channels)

    @property
    def stride(self) -> int:
        """Input positions for each output position, over all axes."""
        return math.prod(axis.stride for axis in self.axes)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the weight, as a convolution has it."""
        counts = (axis.count for axis in self.axes)
        return (self.outputs, self.inputs // self.groups, *counts)

    @property
    def numel(self) -> int:
        """Number of weights, and of multiplications for each output position."""
        return math.prod(self.shape)

    @property
    def is_gain(self) -> bool:
        """Whether it multiplies each channel by a number."""
        pointwise = all(axis == POINT for axis in self.axes)
        return pointwise and self.groups == self.inputs == self.outputs

    def plus(self, other: Stencil) -> Stencil:
        """Return the form of the sum of two stencils of one input.

        W(p) = W₁(p) + W₂(p), b = b₁ + b₂: exact where both have the same stride, as many outputs
        for every size of the input, the same channels, and read the same values beyond its borders.

        Raises:
            Refused: they do not.
        """
        pairs = list(zip(self.axes, other.axes, strict=True))
        if self.outputs != other.outputs:
            raise Refused(
                f"its operands have {self.outputs} and {other.outputs} channels, of which one "
                "is broadcast"
            )
        if any(a.stride != b.stride for a, b in pairs):
            raise Refused("its branches have different strides")
        if any(a.slack != b.slack for a, b in pairs):
            raise Refused(
                "its branches have paddings and kernels by which their outputs are of one size for "
                "some inputs only"
            )
        borders = {border for border in (self.border, other.border) if border is not None}
        if len(borders) > 1:
            raise Refused(f"its branches pad in different ways: {' and '.join(sorted(borders))}")
        return Stencil(
            tuple(a.plus(b) for a, b in pairs),
            self.inputs,
            self.outputs,
            math.gcd(self.groups, other.groups),
            self.border or other.border,
            self.shifts or other.shifts,
        )

    def behind(self, inner: Stencil) -> Stencil:
        """Return the form of this stencil of the output of another.

        W(q) = Σ W₂(j)·W₁(i) over stride₁·j + i = q, b = b₂ + Σ W₂·b₁: exact where this reads
        nothing beyond the borders of that output, or what it reads there is what the inner one
        would have given: for zeros a pointwise one without a bias, for copies of entries
        (reflect, replicate, circular) any pointwise one without a stride.

        Raises:
            Refused: it is not.
        """
        if self.inputs != inner.outputs:
            raise Refused(f"it takes {self.inputs} channels and gets {inner.outputs}")
        if self.border is not None:
            if not all(axis.is_point for axis in inner.axes):
                raise Refused("it pads the output of a layer that is not 1x1, where borders differ")
            if self.border == "zeros" and inner.shifts:
                raise Refused("it pads with zeros a value that has a bias")
            if self.border != "zeros" and inner.stride != 1:
                raise Refused(f"it pads ({self.border}) the output of a layer with a stride")
        axes = tuple(a.behind(b) for a, b in zip(self.axes, inner.axes, strict=True))
        inside = all(axis.is_inside for axis in axes)
        return Stencil(
            axes,
            inner.inputs,
            self.outputs,
            math.gcd(self.groups, inner.groups),
            None if inside else self.border or inner.border,
            self.shifts or inner.shifts,
        )

    def shifted(self) -> Stencil:
        """Return the form with a constant added."""
        return self if self.shifts else replace(self, shifts=True)

    def even(self) -> Stencil:
        """Return the form as a convolution can have it: with the same padding at both ends.

        Raises:
            Refused: it would need another padding, and pads with entries of the input.
        """
        axes = tuple(axis.even() for axis in self.axes)
        if axes != self.axes and self.border not in (None, "zeros"):
            raise Refused(f"its padding ({self.border}) is not the same at both ends")
        inside = all(axis.is_inside for axis in axes)
        return replace(self, axes=axes, border=None if inside else self.border or "zeros")


@dataclass(frozen=True)
class Kernel:
    """A stencil with its values, whose arithmetic is float64.

    Attributes:
        form: the stencil.
        weight: shape `form.shape`, before the scale; as it is stored, in any dtype.
        bias: shape (outputs,).
        scale: what each output channel of the weight is to be multiplied by, or None; kept apart,
            since large weights are best gone through once.
        is_own: whether the weight is nobody else's, so that a sum may be made in it.
    """

    form: Stencil
    weight: Tensor
    bias: Tensor
    scale: Tensor | None = None
    is_own: bool = False

    def then(self, affine: Affine) -> Kernel:
        """Return s·y + t."""
        scale = affine.scale if self.scale is None else affine.scale * self.scale
        bias = affine.scale * self.bias + affine.shift
        return Kernel(self.form.shifted(), self.weight, bias, scale, self.is_own)

    def plus(self, other: Kernel, sign: float) -> Kernel:
        """Return the sum, or with a sign of -1 the difference, of two kernels of one input."""
        form = self.form.plus(other.form)
        bias = self.bias + sign * other.bias
        first, second, signs = self, other, (1.0, sign)
        if other.form.numel > self.form.numel or (other.is_own and not self.is_own):
            first, second, signs = other, self, (sign, 1.0)
        total = first.placed(form, signs[0])
        part = total.view(form.groups, -1, *total.shape[1:])
        part = part[(slice(None),) * 3 + second._window(form)]
        part.add_(_grouped(second, form.groups) * second._factor(form.groups), alpha=signs[1])
        return Kernel(form, total, bias, is_own=True)

    def behind(self, inner: Kernel) -> Kernel:
        """Return this kernel of the output of another."""
        form = self.form.behind(inner.form)
        if inner.form.is_gain:
            return self._behind_gain(inner, form)
        second, first = _grouped(self, form.groups).double(), _grouped(inner, form.groups)
        first = first * inner._factor(form.groups)
        second = second.reshape(*second.shape[:3], -1)
        weight = first.new_zeros((form.groups, second.shape[1], first.shape[2], *form.shape[2:]))
        taps = product(*(range(axis.count) for axis in self.form.axes))
        for number, tap in enumerate(taps):
            window = tuple(
                _places(axis.first + axis.step * i, inside, whole)
                for i, axis, inside, whole in zip(
                    tap, self.form.axes, inner.form.axes, form.axes, strict=True
                )
            )
            mixed = second[..., number] @ first.flatten(2)
            target = weight[(slice(None),) * 3 + window]
            target += mixed.view(target.shape)
        bias = (second.sum(3) @ inner.bias.view(form.groups, -1, 1)).flatten()
        return self._scaled(form, weight.view(form.shape), bias)

    def _behind_gain(self, gain: Kernel, form: Stencil) -> Kernel:
        """Return this kernel behind a gain, channel by channel."""
        groups, taps = self.form.groups, (1,) * len(form.axes)
        weight = self.weight.double().view(groups, -1, *self.weight.shape[1:])
        factor = gain.weight if gain.scale is None else gain.weight.flatten() * gain.scale
        shift = gain.bias.view(groups, -1, 1)
        total = weight.reshape(*weight.shape[:3], -1).sum(3)
        scaled = (weight * factor.view(groups, 1, -1, *taps)).view(self.weight.shape)
        return self._scaled(form, scaled, (total @ shift).flatten())

    def _scaled(self, form: Stencil, weight: Tensor, bias: Tensor) -> Kernel:
        """Return a kernel behind this one's scale and with its bias."""
        bias = bias if self.scale is None else self.scale * bias
        return Kernel(form, weight, self.bias + bias, self.scale)

    def placed(self, form: Stencil, sign: float = 1.0) -> Tensor:
        """Return the scaled weight in a form that has its taps and perhaps more.

        It is a copy, or the weight itself where that is nobody else's.
        """
        factor = sign * self._factor(form.groups)
        if self.is_own and self.form.shape == form.shape and self.form.groups == form.groups:
            plain = sign == 1.0 and self.scale is None
            own = self.weight.view(form.groups, -1, *self.weight.shape[1:])
            return self.weight if plain else own.mul_(factor).view(form.shape)
        weight = _grouped(self, form.groups)
        if weight.shape[2:] == (form.shape[1], *form.shape[2:]):
            return (weight * factor).view(form.shape)
        placed = factor.new_zeros((*weight.shape[:3], *form.shape[2:]))
        placed[(slice(None),) * 3 + self._window(form)] = weight * factor
        return placed.view(form.shape)

    def _window(self, form: Stencil) -> tuple[slice, ...]:
        """Return where its taps are in a form that has them."""
        pairs = zip(self.form.axes, form.axes, strict=True)
        return tuple(_taps(own, own.first, whole) for own, whole in pairs)

    def _factor(self, groups: int) -> Tensor:
        """Return the scale as it is multiplied with (groups, outputs, inputs, *taps)."""
        scale = torch.ones_like(self.bias) if self.scale is None else self.scale
        return scale.view(groups, -1, *(1,) * (self.weight.ndim - 1))


def _places(offset: int, inner: Axis, whole: Axis) -> slice:
    """Return where one tap of an outer stencil puts the taps of the inner one."""
    return _taps(inner, inner.stride * offset + inner.first, whole)


def _taps(axis: Axis, first: int, whole: Axis) -> slice:
    """Return where the taps of an axis, moved to begin at `first`, are among those of another."""
    unit = whole.step or 1
    step = axis.step // unit or 1
    start = (first - whole.first) // unit
    return slice(start, start + step * (axis.count - 1) + 1, step)


def _grouped(kernel: Kernel, groups: int) -> Tensor:
    """Return the weight as (groups, outputs, inputs, *taps), for a divisor of its own groups."""
    form, weight = kernel.form, kernel.weight
    taps = weight.shape[2:]
    merged = form.groups // groups
    rows, columns = form.outputs // form.groups, form.inputs // form.groups
    if merged == 1:
        return weight.reshape(groups, rows, columns, *taps)
    blocks = weight.reshape(groups, merged, rows, columns, *taps)
    full = weight.new_zeros((groups, merged, rows, merged, columns, *taps))
    index = torch.arange(merged, device=weight.device)
    # The advanced indices stand apart, so that their axis comes first.
    full[:, index, :, index] = blocks.transpose(0, 1)
    return full.view(groups, merged * rows, merged * columns, *taps)
