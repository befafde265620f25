"""BatchNorm statistics estimated again: exact, dropout off, frozen layers left as they are."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from torch import Tensor, nn

import dropsurgery as ds
from dropsurgery.errors import ArgumentError, ArgumentTypeError
from dropsurgery.models import import_torchvision
from tests.helpers import randomize


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.drop = nn.BatchNorm2d(3), nn.Dropout(0.5)
        self.conv, self.second = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.conv(self.drop(self.first(x))))


def data(count: int = 3, rows: int = 6) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(rows, 3, 5, 5, generator=generator) * 2 + 1 for _ in range(count)]


def pooled(x: Tensor) -> tuple[Tensor, Tensor]:
    values = x.double().transpose(0, 1).flatten(1)
    return values.mean(1), values.var(1)


def check(norm: nn.BatchNorm2d, x: Tensor) -> None:
    mean, variance = pooled(x)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    torch.testing.assert_close(norm.running_mean, mean.float(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(norm.running_var, variance.float(), rtol=1e-6, atol=1e-6)


def test_statistics_are_those_of_all_the_data_with_dropout_off() -> None:
    model = randomize(Net()).eval()
    found = ds.recalibrate_batchnorm(model, data())
    check(found.first, torch.cat(data()))
    # Of one batch, the second BatchNorm's input is what eval gives it, whatever was there before.
    whole = torch.cat(data())
    found = ds.recalibrate_batchnorm(model, whole)
    mean, _ = pooled(whole)
    x = (whole - mean.float().view(1, 3, 1, 1)) / (
        whole.double().transpose(0, 1).flatten(1).var(1, correction=0).float().view(1, 3, 1, 1)
        + model.first.eps
    ).sqrt()
    x = x * model.first.weight.view(1, 3, 1, 1) + model.first.bias.view(1, 3, 1, 1)
    check(found.second, model.conv(x))
    assert model.first.running_mean is not found.first.running_mean
    assert found.first.num_batches_tracked == model.first.num_batches_tracked


def test_it_is_exact_where_an_exponential_average_is_not() -> None:
    batches = [torch.full((2, 3, 1, 1), float(i)) + torch.rand(2, 3, 1, 1) for i in range(20)]
    model = Net()
    found = ds.recalibrate_batchnorm(model, batches)
    check(found.first, torch.cat(batches))
    for batch in batches:
        model.train()(batch)
    with pytest.raises(AssertionError):
        check(model.first, torch.cat(batches))


def test_dropout_off_heals_the_shift() -> None:
    torch.manual_seed(0)
    model = Net()
    x = torch.cat(data(20))
    model.train()
    for _ in range(50):
        model(x)
    model.eval()
    shifted = (model(x).var((0, 2, 3)) - 1).abs().max()
    healed = ds.recalibrate_batchnorm(model, x).eval()(x).var((0, 2, 3))
    assert shifted > 0.15
    assert (healed - 1).abs().max() < 0.01


@pytest.mark.parametrize("how", ["flag", "own train", "parameters", "class"])
def test_frozen_layers_stay_frozen(how: str) -> None:
    class Frozen(Net):
        def train(self, mode: bool = True) -> Frozen:
            super().train(mode)
            if how == "own train":
                self.first.eval()
            return self

    model = randomize(Frozen()).train()
    if how == "flag":
        model.first.eval()
    elif how == "parameters":
        model.first.requires_grad_(False)
    elif how == "class":
        model.first = import_torchvision().ops.FrozenBatchNorm2d(3)  # type: ignore[assignment]
    if how == "own train":
        model.eval()
    before = copy.deepcopy(model.first.state_dict())
    second = model.second.running_mean.clone()
    found = ds.recalibrate_batchnorm(model, data())
    after = found.first.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert not torch.equal(second, found.second.running_mean)
    assert {p: m.training for p, m in found.named_modules()} == {
        p: m.training for p, m in model.named_modules()
    }


def test_in_place_and_on_a_traced_network() -> None:
    model = randomize(Net())
    assert ds.recalibrate_batchnorm(model, data(), inplace=True) is model
    check(model.first, torch.cat(data()))
    model.second.eval()
    flags = [m.training for m in model.modules()]
    net = ds.trace(model)
    found = ds.recalibrate_batchnorm(net, data(2))
    check(found.first, torch.cat(data(2)))
    assert [m.training for m in net.modules()][: len(flags)] == flags
    slim = ds.slim(found)
    torch.testing.assert_close(slim(data()[0]), found.eval()(data()[0]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "form", ["labels", "tuple of inputs", "mapping", "generator", "one tensor"]
)
def test_forms_of_data(form: str) -> None:
    batches: object = {
        "labels": [(x, torch.zeros(6)) for x in data()],
        "tuple of inputs": [((x,), torch.zeros(6)) for x in data()],
        "mapping": [{"x": x} for x in data()],
        "generator": (x for x in data()),
        "one tensor": torch.cat(data()),
    }[form]
    found = ds.recalibrate_batchnorm(Net(), batches, progress=form == "labels")
    check(found.first, torch.cat(data()))


def test_what_goes_wrong_leaves_everything_as_it_was() -> None:
    model = randomize(Net()).train()
    model.second.eval()
    before = copy.deepcopy(model.state_dict())
    for bad, message in (
        ([*data(), torch.full((2, 3, 4, 4), float("nan"))], "statistics that are not finite"),
        ([*data(), torch.ones(2, 5, 4, 4)], "does not run on the data"),
        ([torch.ones(1, 3, 1, 1)], "does not run on the data"),
        ([], "the data holds no batch"),
    ):
        with pytest.raises(ArgumentError, match=message):
            ds.recalibrate_batchnorm(model, bad, inplace=True)
        assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
        assert model.training
        assert not model.second.training
        assert model.first.momentum == 0.1
        assert not model.first._forward_pre_hooks


def test_bad_arguments() -> None:
    with pytest.raises(ArgumentTypeError, match="data is an iterable of batches, got dict"):
        ds.recalibrate_batchnorm(Net(), {"x": data()[0]})
    with pytest.raises(ArgumentTypeError, match="a batch is a tensor"):
        ds.recalibrate_batchnorm(Net(), [3])
    with pytest.raises(ArgumentTypeError, match="got str"):
        ds.recalibrate_batchnorm("net", data())  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="no BatchNorm whose statistics could be estimated"):
        ds.recalibrate_batchnorm(nn.Linear(2, 2), [torch.ones(2, 2)])


def _process(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2
    )
    torch.manual_seed(0)
    model = Net()
    part = data(4)[rank::2] if rank else data(4)[:1]
    found = ds.recalibrate_batchnorm(model, part)
    torch.save(found.state_dict(), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_processes_of_a_group_agree(tmp_path: Path) -> None:
    mp.spawn(_process, (str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert all(torch.equal(first[key], second[key]) for key in first)
    batches = data(4)
    mean, variance = pooled(torch.cat([batches[0], batches[1], batches[3]]))
    torch.testing.assert_close(first["first.running_mean"], mean.float())
    torch.testing.assert_close(first["first.running_var"], variance.float())
