"""The figures that other tools print, for those who compare with them. Nothing is decided by them.

Cosine, top-1 agreement and fixed tolerances pass networks whose epsilon or statistics are wrong;
see `Gate` for what is decided by.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

# (rtol, atol) of torch.testing.assert_close.
_TOLERANCES = {
    torch.float16: (1e-3, 1e-5),
    torch.bfloat16: (1.6e-2, 1e-5),
    torch.float32: (1.3e-6, 1e-5),
    torch.complex64: (1.3e-6, 1e-5),
}
_FINE = (1e-7, 1e-7)


@dataclass(frozen=True)
class Figures:
    """A candidate's output beside the reference's, both in their own dtype, over all inputs.

    Attributes:
        top1: share of positions with the same largest class: along axis 1 of (N, C) and
            (N, C, H, W), along the last of (N, L, C); None where there are no classes.
        sqnr: signal to noise in dB; None where the two are the same bit for bit.
        max_abs: largest absolute difference.
        max_rel: largest difference relative to the reference's element, where that is not zero.
        outside: share of elements that `torch.testing.assert_close` rejects with its default
            tolerances.
    """

    top1: float | None
    sqnr: float | None
    max_abs: float
    max_rel: float
    outside: float


@dataclass
class FigureTally:
    """Sums for the figures of one output."""

    signal: float = 0.0
    noise: float = 0.0
    max_abs: float = 0.0
    max_rel: float = 0.0
    rejected: int = 0
    count: int = 0
    same: int = 0
    choices: int = 0

    def add(self, native: Tensor, candidate: Tensor) -> None:
        """Count in one output on one input, of equal shapes and dtypes."""
        rtol, atol = _TOLERANCES.get(native.dtype, _FINE)
        wide = torch.complex128 if native.is_complex() else torch.float64
        finite = native.isfinite()
        one, other = native[finite].to(wide), candidate[finite].to(wide)
        difference, size = (other - one).abs(), one.abs()
        self.signal += float(size.square().sum())
        self.noise += float(difference.square().sum())
        if one.numel():
            self.max_abs = max(self.max_abs, float(difference.max()))
            relative = difference[size > 0] / size[size > 0]
            self.max_rel = max(self.max_rel, float(relative.max()) if relative.numel() else 0.0)
        self.rejected += int((difference > atol + rtol * size).sum())
        self.count += native.numel()
        axis = {2: 1, 3: 2, 4: 1}.get(native.ndim)
        if axis is not None and not native.is_complex() and native.shape[axis] > 1:
            agree = native.argmax(axis) == candidate.argmax(axis)
            self.same += int(agree.sum())
            self.choices += agree.numel()

    def figures(self) -> Figures | None:
        """Return the figures, or None where nothing was compared."""
        if not self.count:
            return None
        sqnr = None
        if self.noise:
            ratio = self.signal / self.noise
            sqnr = 10 * math.log10(ratio) if ratio else -math.inf
            sqnr = max(sqnr, -999.0)  # JSON has no infinities
        return Figures(
            top1=self.same / self.choices if self.choices else None,
            sqnr=sqnr,
            max_abs=self.max_abs,
            max_rel=self.max_rel,
            outside=self.rejected / self.count,
        )
