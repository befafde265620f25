"""Rates that change during training."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

import dropsurgery as ds
from dropsurgery.errors import ArgumentError, ArgumentTypeError, PassError
from dropsurgery.graph.drops import rate
from tests.drop_helpers import LAYERS


def net() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), ds.layers.DropBlock2d(0.2, 3), nn.Flatten(), nn.Dropout(0.4)
    )


def rates(module: nn.Module) -> list[float]:
    return [rate(module[1]), rate(module[3])]  # type: ignore[index]


def test_from_nothing_to_the_target() -> None:
    module = net()
    schedule = ds.RateSchedule(module, ds.ramps.linear(4))
    seen = [rates(module)]
    for _ in range(6):
        schedule.step()
        seen.append(rates(module))
    assert [pair[0] for pair in seen] == pytest.approx([0.0, 0.05, 0.1, 0.15, 0.2, 0.2, 0.2])
    assert [pair[1] for pair in seen] == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4, 0.4, 0.4])


def test_every_kind_of_layer_has_a_rate() -> None:
    for name, (build, _) in LAYERS.items():
        layer = build(0.5)
        schedule = ds.RateSchedule(layer, ds.ramps.step(1))
        assert rate(layer) == 0.0, name
        schedule.step()
        assert rate(layer) == 0.5, name


def test_where_and_checkpoints() -> None:
    module = net()
    schedule = ds.RateSchedule(module, ds.ramps.linear(4), where="1")
    assert rates(module) == [0.0, 0.4]
    for _ in range(3):
        schedule.step()
    state = schedule.state_dict()
    fresh = net()
    other = ds.RateSchedule(fresh, ds.ramps.linear(4), where="1")
    other.load_state_dict(state)
    assert rates(fresh) == rates(module) == pytest.approx([0.15, 0.4])
    with pytest.raises(ArgumentError, match=r"only one of the two schedules has '3'"):
        ds.RateSchedule(fresh, ds.ramps.linear(4)).load_state_dict(state)
    with pytest.raises(ArgumentError, match=r"step must be an integer of at least 0, got -1"):
        other.load_state_dict({**state, "step": -1})


def test_a_compiled_network_is_compiled_once_for_all_rates() -> None:
    module = ds.apply(
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 4)),
        ds.InsertDropBlock(0.3, 3),
        ds.InsertDropout(0.5, before="Linear"),
        ds.InsertDropConnect(0.2, of="Linear"),
    ).module.train()
    schedule = ds.RateSchedule(module, ds.ramps.linear(12))
    torch._dynamo.reset()
    counters.clear()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for _ in range(12):
        compiled(torch.randn(2, 3, 8, 8)).sum().backward()
        schedule.step()
    # One without drops at rate 0, one with the first rates, one for every other.
    assert counters["stats"]["unique_graphs"] <= 3


def test_bad_ramps() -> None:
    with pytest.raises(ArgumentTypeError, match=r"ramp must be a callable of the step, got 4"):
        ds.RateSchedule(net(), 4)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match=r"the ramp at step 0 must lie in \[0, 1\], got 1.5"):
        ds.RateSchedule(net(), lambda step: 1.5)


def test_nothing_to_schedule() -> None:
    with pytest.raises(PassError, match=r"the network has no drop layer with a rate"):
        ds.RateSchedule(nn.Linear(2, 2), ds.ramps.linear(4))
    with pytest.raises(PassError, match=r"where='7' matches no drop layer"):
        ds.RateSchedule(net(), ds.ramps.linear(4), where="7")
