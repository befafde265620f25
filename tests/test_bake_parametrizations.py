"""BakeParametrizations: weights that were computed at each call are parameters, bit for bit."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

import dropsurgery as ds
from dropsurgery.errors import PassError
from tests.fold_helpers import IMAGE, Chain, norms_left


class Double(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


def old(make: Callable[[nn.Module], Any]) -> Callable[[nn.Module], nn.Module]:
    def wrapped(layer: nn.Module) -> nn.Module:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            make(layer)
        return layer

    return wrapped


def custom(layer: nn.Module) -> nn.Module:
    parametrize.register_parametrization(layer, "weight", Double())
    parametrize.register_parametrization(layer, "weight", Double())
    return parametrize.register_parametrization(layer, "bias", Double())


WAYS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "custom": custom,
    "old weight_norm": old(nn.utils.weight_norm),
    "old spectral_norm": old(nn.utils.spectral_norm),
    "pruned": lambda layer: prune.l1_unstructured(layer, "weight", 0.3),
}


def make(way: str, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    model = Chain(conv=WAYS[way](nn.Conv2d(4, 6, 3)), bn=nn.BatchNorm2d(6), act=nn.ReLU()).double()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model(torch.randn(4, 4, 9, 8).double())  # so that weights and statistics are not the first
    return model.eval()


@pytest.mark.parametrize("way", WAYS)
def test_weights_become_parameters(way: str, tmp_path: Path) -> None:
    model = make(way)
    state = copy.deepcopy(model.state_dict())
    expected = model(IMAGE)
    result = ds.apply(model, ds.BakeParametrizations())
    conv = result.module.conv
    assert type(conv) is nn.Conv2d
    assert [name for name, _ in conv.named_parameters()] in (["weight", "bias"], ["bias", "weight"])
    assert not list(conv.buffers())
    assert not conv._forward_pre_hooks
    assert torch.equal(result.module(IMAGE), expected)
    assert torch.equal(model(IMAGE), expected)
    assert list(model.state_dict()) == list(state)
    assert model.conv is not conv
    assert all(torch.equal(model.state_dict()[key], state[key]) for key in state)
    ds.save(result.module, tmp_path)
    assert torch.equal(ds.load(tmp_path, make(way, 1))(IMAGE), expected)


@pytest.mark.parametrize("way", WAYS)
def test_slim_folds_into_them(way: str) -> None:
    model = make(way)
    slim = ds.slim(model)
    assert norms_left(slim) == 0
    torch.testing.assert_close(slim(IMAGE), model(IMAGE), rtol=1e-12, atol=1e-12)
    assert set(slim.state_dict()) == {"conv.weight", "conv.bias"}


def test_one_of_two_on_a_layer() -> None:
    model = make("custom")
    result = ds.apply(model, ds.BakeParametrizations(tensors=("conv.weight",)))
    conv = result.module.conv
    assert parametrize.is_parametrized(conv, "bias")
    assert not parametrize.is_parametrized(conv, "weight")
    assert parametrize.is_parametrized(model.conv, "weight")
    assert torch.equal(result.module(IMAGE), model(IMAGE))


def test_training_mode_is_left_alone() -> None:
    result = ds.apply(make("spectral_norm").train(), ds.BakeParametrizations())
    assert result.changes == ()
    assert result.skipped[0].reason == (
        "'conv.weight' is computed by SpectralNorm, in training mode: call .eval()"
    )


def test_a_layer_that_is_plain() -> None:
    with pytest.raises(PassError, match=r"is to bake 0\.weight, which is not computed"):
        ds.apply(nn.Sequential(nn.Linear(2, 2)), ds.BakeParametrizations(tensors=("0.weight",)))
