"""Stochastic depth as a layer."""

from __future__ import annotations

import math
from typing import Literal, cast, get_args

import torch
from torch import Tensor, nn

from dropsurgery.errors import ArgumentError
from dropsurgery.layers.compiled_rows import along
from dropsurgery.layers.draws import Draws
from dropsurgery.layers.rows import SMALL, Rows
from dropsurgery.survival import check_probability

Mode = Literal["row", "subset", "batch"]

# Below this drop probability computing a subset costs more than it saves. Of the networks of
# docs/train_step.md it is highest for ResNet-110, whose branches are the cheapest: on one core
# there 0.1 pays for batches of 16 and of 64.
BREAK_EVEN = 0.1
# With one thread torch gives float32 convolutions of one pixel to oneDNN from 16 samples on; below
# it computes them by itself, and takes half as long again for each. A batch that was above and a
# subset that is below pay from here on, as ResNet-50 does.
ONEDNN_FROM = 16
BREAK_EVEN_BELOW = 0.45
# Compiled, how many rows a branch gets is reckoned with the survival probability in such parts.
_PARTS = 1 << 16
# So few rows are not made fewer by leaving out one that does not count: BatchNorm needs two.
_FEWEST = 2
# In a batch as large as this the copies that an index makes are kept for the backward: it is taken
# for a quarter of what is SMALL.
_LARGE_BATCH = 32


def _one_thread() -> bool:
    return torch.get_num_threads() == 1


# As `torch.compiler.assume_constant_result` does, which imports the compiler: it is asked once.
_one_thread._dynamo_marked_constant = True  # type: ignore[attr-defined]


def check_mode(mode: str) -> Mode:
    """Return `mode`, or raise where it names no way of drawing."""
    if mode not in get_args(Mode):
        raise ArgumentError(
            f"unknown mode {mode!r}", fix=f"one of {', '.join(map(repr, get_args(Mode)))}"
        )
    return cast(Mode, mode)


class DropPath(nn.Module):
    """Stochastic depth: drops a residual branch, for some samples or for a whole mini-batch.

    Huang et al., "Deep Networks with Stochastic Depth", 2016, arXiv:1603.09382; with inverted
    scaling, so that a network's eval output does not depend on the rate.

    In training the input is multiplied by a mask that is 0 with probability `drop_prob` and
    1/(1 - drop_prob) otherwise, drawn from the global generator of the input's device just as
    timm draws it: the same seed gives the same output. In eval, and with `drop_prob` 0, the input
    itself is returned. With `drop_prob` 1 the output in training is zero.

    As a layer on its own it masks, in every mode. In a graph that `InsertDropPath` made, the modes
    "subset" and "batch" do not compute what they drop: the graph is compiled to run the branch
    between `rows` and the add, or only where it `survives`. A branch that does not run leaves its
    parameters without gradient: see `ds.ddp_options`.

    Args:
        drop_prob: probability of dropping, in [0, 1]; one minus the survival probability.
        mode: "row" draws once for every sample, "batch" once for all of them. "subset" draws how
            the network's branch is computed: for ceil(B·p) neighbours of B samples from a random
            one on (around the end), p the survival probability, or for one less, with the
            probability that makes every sample survive with p exactly. (Of one sample or two, and
            in compiled code, where sizes must stay, the last one is computed and masked instead.)
            Draws of different layers are independent; within a layer neighbours in the batch tend
            to go together, which in a shuffled batch is a random subset. Where that never leaves
            out a sample, and for a `drop_prob` below the break-even, it draws like "row".
        axis: where the batch is.
        break_even: for "subset", the drop probability from which on it saves time. On one thread
            it is raised to 0.45 where a branch with convolutions of one pixel would get fewer than
            16 samples of 16 or more: torch computes these more slowly. The default was measured on
            one core with eager code, on a network of cheap branches
            (`benchmarks/train_step.py --break-even`); 0 takes a subset always.

    Attributes:
        peak: the largest drop probability that the layer was given. Compiled code takes a subset
            or masks by this one, so that a rate that changes does not have it compiled again.
        draws: where the random numbers come from: None for the global generator, or `Draws`.
        site: which numbers of `draws` are this layer's.

    Shape:
        Any floating-point tensor of rank 1 or more with the batch on `axis`; output the same.

    Raises:
        ArgumentError: `drop_prob` or `break_even` outside [0, 1], an unknown mode, or (in
            training) an input that has no such axis or a dtype that is not floating point.
    """

    draws: Draws | None
    site: int
    peak: float

    def __init__(
        self,
        drop_prob: float = 0.0,
        mode: Mode = "row",
        *,
        axis: int = 0,
        break_even: float = BREAK_EVEN,
    ) -> None:
        super().__init__()
        self.drop_prob = self.peak = check_probability(drop_prob, "drop_prob")
        self.mode = check_mode(mode)
        self.axis = axis
        self.break_even = check_probability(break_even, "break_even")
        self.draws = None
        self.site = 0

    @property
    def drop_prob(self) -> float:
        """The probability of dropping; may be set at any time, compiled or not."""
        return self._drop_prob

    @drop_prob.setter
    def drop_prob(self, value: float) -> None:
        self._drop_prob = check_probability(value, "drop_prob")
        # How many rows a branch gets hangs on the rate. The compiler lets a size change from call
        # to call where it comes from the size of a tensor, and not where it comes from a float.
        self._parts = torch.empty(round((1.0 - value) * _PARTS), 0)

    def forward(self, x: Tensor) -> Tensor:
        """Return `x` with its branch dropped (training) or as it is (eval)."""
        if not self.training or self.drop_prob == 0.0:
            return x
        self._check(x)
        count = 1 if self.mode == "batch" else x.shape[self.axis]
        return x * along(self._mask(x, count, x.dtype), x, self.axis)

    def rows(self, x: Tensor, axis: int = 0, pixelwise: bool = False) -> Rows | None:
        """Draw the samples that the branch is computed for.

        Args:
            x: any tensor that holds the batch.
            axis: where `x` holds it.
            pixelwise: whether the branch holds a convolution of one pixel.

        Returns:
            None in eval and with `drop_prob` 0.
        """
        if not self.training or self.drop_prob == 0.0:
            return None
        batch, keep = x.shape[axis], 1.0 - self.drop_prob
        scale = 1.0 / keep if keep > 0.0 else 0.0
        cpu = x.device.type == "cpu"
        pixelwise = pixelwise and cpu
        if not torch.compiler.is_compiling():
            if self.run(batch, pixelwise) == batch:
                return Rows(mask=self._mask(x, 1 if self.mode == "batch" else batch, torch.float32))
            first, count, last = self._window(batch)
            small = SMALL if batch < _LARGE_BATCH else SMALL // 4
            if not cpu or x.numel() > small:
                return Rows(last=last, scale=scale, window=(first, count))
            index = torch.arange(first, first + count)
            return Rows(index.remainder_(batch), last=last, scale=scale)
        # Compiled, a question about the rate would be a guard, and each site would have code
        # compiled again where its answer changes. A subset of all B rows is right too.
        if self.mode != "subset" or self.below_break_even(batch, pixelwise, self.peak):
            return Rows(mask=self._mask(x, 1 if self.mode == "batch" else batch, torch.float32))
        count = self._count_compiled(batch)
        start, chance = self._numbers_compiled(x.device)
        last = chance + (count - 1) < batch * keep
        return Rows(last=last, scale=scale, traced=((start * batch).long(), count))

    def _window(self, batch: int) -> tuple[int, int, bool]:
        """Draw, on the host, the first row, how many there are, and whether the last one counts."""
        count = self._most(batch)
        share = batch * (1.0 - self.drop_prob) - (count - 1)
        first = min(int(self._number(0) * batch), batch - 1)
        last = share >= 1.0 - 1e-9 or self._number(1) < share
        if not last and count > _FEWEST:  # what does not count need not run
            count, last = count - 1, True
        return (first if count < batch else 0), count, last

    def below_break_even(
        self, batch: int, pixelwise: bool = False, drop_prob: float | None = None
    ) -> bool:
        """Say whether a subset of a batch costs more than it saves.

        Args:
            batch: how many samples there are.
            pixelwise: whether the branch holds a convolution of one pixel, on a CPU.
            drop_prob: at which rate; None for the layer's own.
        """
        rate = self.drop_prob if drop_prob is None else drop_prob
        if rate < self.break_even:
            return True
        if not pixelwise or self.break_even == 0.0 or rate >= BREAK_EVEN_BELOW:
            return False
        few = batch * (1.0 - rate) <= ONEDNN_FROM - 1 + 1e-9
        return few and batch >= ONEDNN_FROM and _one_thread()

    def count(self, batch: int, pixelwise: bool = False) -> int:
        """Return for how many samples of a batch at most the branch is computed in training."""
        if self.mode != "subset" or self.below_break_even(batch, pixelwise):
            return batch
        return self._most(batch)

    def run(self, batch: int, pixelwise: bool = False) -> float:
        """Return for how many it is in expectation, in eager code."""
        if self.mode != "subset" or self.below_break_even(batch, pixelwise):
            return batch
        most = self._most(batch)
        return most if most <= _FEWEST else batch * (1.0 - self.drop_prob)

    def _most(self, batch: int) -> int:
        # The tolerance is for products such as 10 · 0.7, which floats do not hold.
        return min(max(math.ceil(batch * (1.0 - self.drop_prob) - 1e-9), 1), batch)

    def _count_compiled(self, batch: int) -> int:
        """Return the same of the survival probability in parts: integers only."""
        return max((batch * (self._parts.shape[0] - 1) + _PARTS - 1) // _PARTS, 1)

    def survives(self) -> bool:
        """Draw, on the host, whether a whole mini-batch keeps the branch; always so in eval."""
        if not self.training or self.drop_prob == 0.0:
            return True
        return self._number(0) < 1.0 - self.drop_prob

    def _number(self, place: int) -> float:
        """Draw a number in [0, 1) on the host, whatever the device: nothing waits for it."""
        if self.draws is not None and torch.compiler.is_compiling():
            # The step as a number would be a constant of the code, and each step compiled anew.
            return self.draws.uniform(1, self.site + place, torch.device("cpu")).item()
        if self.draws is not None:
            return self.draws.number(self.site + place)
        return torch.rand((), dtype=torch.float64, device="cpu").item()

    def _numbers_compiled(self, device: torch.device) -> Tensor:
        """Draw two numbers as a tensor."""
        if self.draws is None:
            return torch.rand(2, dtype=torch.float64, device=device)
        return torch.cat([self.draws.uniform(1, self.site + place, device) for place in (0, 1)])

    def _mask(self, x: Tensor, count: int, dtype: torch.dtype) -> Tensor:
        """Return a (count,) mask of 0 and 1/keep on the device of `x`."""
        keep = 1.0 - self.drop_prob
        if self.draws is not None:
            mask = (self.draws.uniform(count, self.site, x.device) < keep).to(dtype)
        elif torch.compiler.is_compiling():
            # Compiled, `bernoulli_` would hold the probability as a constant.
            mask = (torch.rand(count, device=x.device) < keep).to(dtype)
        else:
            mask = torch.empty(count, dtype=dtype, device=x.device).bernoulli_(keep)
        return mask.div_(keep) if keep > 0.0 else mask

    def _check(self, x: Tensor) -> None:
        if not -x.ndim <= self.axis < x.ndim or not x.is_floating_point():
            raise ArgumentError(
                f"DropPath needs a floating-point tensor with a batch on axis {self.axis}, got "
                f"{x.dtype} of shape {tuple(x.shape)}"
            )

    def extra_repr(self) -> str:
        """Return the parameters for `repr`."""
        axis = f", axis={self.axis}" if self.axis else ""
        return f"drop_prob={self.drop_prob:.4g}, mode={self.mode!r}{axis}"
