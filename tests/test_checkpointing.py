"""Activation checkpointing runs a forward again: it must drop what it dropped the first time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import dropsurgery as ds
from tests.distributed_ranks import MODES, Net


class Convolutions(nn.Module):
    """Two blocks without BatchNorm, which a second forward would move."""

    def __init__(self) -> None:
        super().__init__()
        block = torchvision.models.resnet.BasicBlock
        down = nn.Conv2d(4, 6, 1, 2)
        self.first = block(4, 4, norm_layer=nn.Identity)
        self.second = block(4, 6, 2, down, norm_layer=nn.Identity)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))


NETWORKS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "mlp": (Net, (6, 4)),
    "convolutions": (Convolutions, (6, 4, 5, 5)),
}


class Larger(nn.Module):
    """A model of its own forward around two retrofitted networks, run anew in the backward."""

    def __init__(self, name: str, mode: str) -> None:
        super().__init__()
        build, self.shape = NETWORKS[name]
        torch.manual_seed(0)
        nets = (ds.retrofit(build(), 0.5, rule="constant", mode=mode) for _ in range(2))
        self.nets = nn.ModuleList(nets)
        self.checked: tuple[bool, ...] = (False, False)
        self.options: dict[str, Any] = {}
        self.double().train()

    def forward(self, x: Tensor) -> Tensor:
        outputs = [
            checkpoint(net, x, **self.options) if checked else net(x)
            for net, checked in zip(self.nets, self.checked, strict=True)
        ]
        return outputs[0].flatten(1).sum(1) * outputs[1].flatten(1).sum(1)

    def gradients(self, checked: tuple[bool, ...], **options: Any) -> list[Tensor | None]:
        """Return the gradients of the input and of each parameter, from one fixed seed."""
        self.checked, self.options = checked, options
        self.zero_grad()
        x = torch.randn(self.shape, generator=torch.Generator().manual_seed(2)).double()
        x.requires_grad_()
        torch.manual_seed(11)
        output = self(x)
        torch.rand(3)  # the backward does not begin where the forward began
        output.square().sum().backward()
        return [x.grad, *(p.grad for p in self.parameters())]


def equal(left: list[Tensor | None], right: list[Tensor | None], rounding: float = 0.0) -> bool:
    return all(
        b is None
        if a is None
        else b is not None and bool((a - b).abs().max() <= rounding * b.abs().max())
        for a, b in zip(left, right, strict=True)
    )


@pytest.mark.parametrize("checked", [(True, False), (True, True)])
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("seeded", [False, True])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", NETWORKS)
def test_gradients_are_those_without(
    name: str, mode: str, seeded: bool, reentrant: bool, checked: tuple[bool, ...]
) -> None:
    model = Larger(name, mode)
    if seeded:
        ds.seed_drop_paths(model, 3)
    # Seeded draws need no generator's state.
    options = {"use_reentrant": reentrant, "preserve_rng_state": not seeded}
    expected = model.gradients((False, False))
    # A reentrant checkpoint sums the gradients of the input in another order.
    rounding = 1e-13 if reentrant else 0.0
    assert equal(model.gradients(checked, **options), expected, rounding)
    assert any(g is not None and bool(g.any()) for g in expected)


@pytest.mark.parametrize("mode", ["row", "subset"])
def test_without_the_generators_state_they_are_not(mode: str) -> None:
    model = Larger("mlp", mode)
    options = {"use_reentrant": True, "preserve_rng_state": False}
    assert not equal(model.gradients((True, True), **options), model.gradients((False, False)))


def test_two_steps_of_seeded_draws_differ() -> None:
    for mode in MODES:
        model = Larger("mlp", mode)
        draws = ds.seed_drop_paths(model, 3)
        first = model.gradients((True, True), use_reentrant=False)
        kept = [None if g is None else g.clone() for g in first]
        draws.advance()
        assert not equal(model.gradients((True, True), use_reentrant=False), kept)
