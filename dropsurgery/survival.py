"""Survival probabilities: p_l of residual block l (1-based) out of L, as pure floats.

A rule is called as `rule(l, L)` and returns the probability that block l keeps its branch; any
callable of that form will do. These are the ones in use:

| rule | survival of block l | used by |
|---|---|---|
| `linear` | 1 - (l/L)(1 - final) | Huang et al. 2016, arXiv:1603.09382 |
| `linspace` | 1 - ((l-1)/(L-1))(1 - final) | timm and torchvision, most families |
| `efficientnet` | 1 - ((l-1)/L)(1 - final) | EfficientNet in timm and torchvision |
| `constant` | p | timm's LeViT, CaiT, Mixer; DINOv2's uniform rate |
| `per_stage` | 1 - (s/(S-1))(1 - final) in stage s = 0..S-1 | one rate for each stage |
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Real
from typing import Any, ClassVar

from dropsurgery.errors import ArgumentError, ArgumentTypeError

Rule = Callable[[int, int], float]


def check_probability(value: object, name: str) -> float:
    """Return `value` as a float in [0, 1], or raise a typed error that says `name`."""
    # `Real` lets numpy's scalars in; it is slow to ask for, so the plain types stand before it.
    if isinstance(value, bool) or not isinstance(value, (float, int, Real)):
        raise ArgumentTypeError(f"{name} must be a number, got {value!r}")
    number = float(value)
    if not 0.0 <= number <= 1.0:
        raise ArgumentError(f"{name} must lie in [0, 1], got {value!r}")
    return number


@dataclass(frozen=True)
class _Final:
    """A rule that is fixed by the survival probability of the last block."""

    final: float
    name: ClassVar[str]

    def __post_init__(self) -> None:
        object.__setattr__(self, "final", check_probability(self.final, "final"))

    def drop_share(self, l: int, L: int) -> float:
        """Return which share of the final drop probability block l gets, in [0, 1]."""
        raise NotImplementedError

    def __call__(self, l: int, L: int) -> float:
        _check_block(l, L)
        return 1.0 - self.drop_share(l, L) * (1.0 - self.final)


class Linear(_Final):
    """The paper's rule: p_l = 1 - (l/L)(1 - final)."""

    name = "linear"

    def drop_share(self, l: int, L: int) -> float:
        """Return l/L."""
        return l / L


@dataclass(frozen=True)
class Linspace(_Final):
    """From 1 at the first block to `final` at the last (a single block keeps 1).

    Attributes:
        single: round the drop probabilities to float32, as `torch.linspace` returns them. timm's
            ViT, Swin, ConvNeXt and others take theirs from it, its ResNets and torchvision's
            networks do not; the last bit of a training output tells.
    """

    single: bool = False
    name: ClassVar[str] = "linspace"

    def __call__(self, l: int, L: int) -> float:
        """Return the survival probability of block l of L."""
        survival = super().__call__(l, L)
        if not self.single:
            return survival
        import torch

        return 1.0 - torch.linspace(0.0, 1.0 - self.final, L)[l - 1].item()

    def drop_share(self, l: int, L: int) -> float:
        """Return (l-1)/(L-1)."""
        return (l - 1) / (L - 1) if L > 1 else 0.0


class EfficientNet(_Final):
    """From 1 at the first block towards `final`, which no block reaches."""

    name = "efficientnet"

    def drop_share(self, l: int, L: int) -> float:
        """Return (l-1)/L."""
        return (l - 1) / L


@dataclass(frozen=True)
class Constant:
    """The same survival probability for every block."""

    p: float
    name: ClassVar[str] = "constant"

    def __post_init__(self) -> None:
        object.__setattr__(self, "p", check_probability(self.p, "p"))

    def __call__(self, l: int, L: int) -> float:
        """Return `p`."""
        _check_block(l, L)
        return self.p


@dataclass(frozen=True)
class PerStage:
    """One survival probability a stage, from 1 in the first stage to `final` in the last.

    Attributes:
        final: the last stage's.
        depths: the number of blocks in each stage.
        single: round the drop probabilities to float32; see `Linspace`.
    """

    final: float
    depths: tuple[int, ...]
    single: bool = False
    name: ClassVar[str] = "per_stage"

    def __post_init__(self) -> None:
        object.__setattr__(self, "final", check_probability(self.final, "final"))
        if not self.depths or any(type(d) is not int or d < 1 for d in self.depths):
            raise ArgumentError(
                f"depths are the numbers of blocks in each stage, got {self.depths!r}",
                fix="for example (3, 4, 6, 3)",
            )

    def __call__(self, l: int, L: int) -> float:
        """Return the survival probability of the stage that block l is in."""
        _check_block(l, L)
        if sum(self.depths) != L:
            raise ArgumentError(
                f"the stages {self.depths} have {sum(self.depths)} blocks and the network has {L}"
            )
        ends = itertools.accumulate(self.depths)
        stage = next(index for index, end in enumerate(ends) if l <= end)
        return Linspace(self.final, self.single)(stage + 1, len(self.depths))


@dataclass(frozen=True)
class Table:
    """Survival probabilities written down block by block; how a custom rule is saved."""

    values: tuple[float, ...]
    name: ClassVar[str] = "table"

    def __post_init__(self) -> None:
        for value in self.values:
            check_probability(value, "survival probability")

    def __call__(self, l: int, L: int) -> float:
        """Return entry l; the table must have L entries."""
        _check_block(l, L)
        if len(self.values) != L:
            raise ArgumentError(
                f"the table has {len(self.values)} survival probabilities and the network has {L} "
                "blocks"
            )
        return self.values[l - 1]


def linear(final: float) -> Linear:
    """Return the paper's linear rule; `final` in [0, 1] is the last block's survival."""
    return Linear(final)


def linspace(final: float, *, single: bool = False) -> Linspace:
    """Return timm's and torchvision's rule: the first block keeps 1, the last `final`.

    Args:
        final: the last block's survival probability, in [0, 1].
        single: drop probabilities in float32, as `torch.linspace` returns them; see `Linspace`.
    """
    return Linspace(final, single)


def efficientnet(final: float) -> EfficientNet:
    """Return EfficientNet's rule: block l keeps 1 - ((l-1)/L)(1 - final)."""
    return EfficientNet(final)


def constant(p: float) -> Constant:
    """Return the rule that gives every block the survival probability `p`."""
    return Constant(p)


def per_stage(final: float, depths: tuple[int, ...], *, single: bool = False) -> PerStage:
    """Return the rule that gives each stage one survival: 1 in the first, `final` in the last.

    Args:
        final: the last stage's survival probability, in [0, 1].
        depths: the number of blocks in each stage, in order.
        single: drop probabilities in float32, as `torch.linspace` returns them; see `Linspace`.
    """
    return PerStage(final, tuple(depths), single)


def table(values: tuple[float, ...]) -> Table:
    """Return the rule that looks block l up in `values`."""
    return Table(tuple(float(value) for value in values))


RULES: dict[str, type[Any]] = {
    rule.name: rule for rule in (Linear, Linspace, EfficientNet, Constant, PerStage, Table)
}
# The rules that one number makes.
NAMED = ("linear", "linspace", "efficientnet", "constant")


def by_name(name: str, final: float) -> Rule:
    """Return the rule of that name with `final` (for "constant": every block's survival)."""
    if name not in NAMED:
        known = ", ".join(map(repr, NAMED))
        raise ArgumentError(
            f"unknown survival rule {name!r}",
            fix=f"one of {known}; a rule of your own goes to ds.InsertDropPath(rule)",
        )
    rule: Rule = RULES[name](final)
    return rule


def to_json(rule: Rule) -> dict[str, Any]:
    """Return one of the rules of this module as JSON."""
    if type(rule) not in RULES.values():
        raise ArgumentTypeError(f"{rule!r} is not one of dropsurgery's rules")
    name: str = rule.name  # type: ignore[attr-defined]
    values = {k: list(v) if isinstance(v, tuple) else v for k, v in vars(rule).items()}
    return {"rule": name, **values}


def from_json(data: dict[str, Any]) -> Rule:
    """Return the rule that `to_json` wrote down."""
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in data.items() if k != "rule"}
    rule: Rule = RULES[data["rule"]](**values)
    return rule


def survival_of(rule: Rule, l: int, L: int) -> float:
    """Call a rule and check what it returns.

    Raises:
        ArgumentError: the result is not a number in [0, 1].
        ArgumentTypeError: `rule` is not callable.
    """
    if not callable(rule):
        raise ArgumentTypeError(
            f"a survival rule is a callable rule(l, L), got {rule!r}",
            fix="ds.survival.linear(0.8), or any function of l and L",
        )
    value = rule(l, L)
    return check_probability(value, f"the survival probability of block {l} of {L}")


def _check_block(l: int, L: int) -> None:
    if not 1 <= l <= L:
        raise ArgumentError(f"block l must lie in 1..L, got l={l} of L={L}")
