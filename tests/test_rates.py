"""Rates that change during training."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

import dropsurgery as ds
from dropsurgery.errors import ArgumentError, ArgumentTypeError, PassError
from dropsurgery.graph.drops import rate


def net() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), ds.layers.DropBlock2d(0.2, 3), nn.Flatten(), nn.Dropout(0.4)
    )


def rates(module: nn.Module) -> list[float]:
    return [rate(module[1]), rate(module[3])]  # type: ignore[index]


def test_from_nothing_to_the_target() -> None:
    module = net()
    schedule = ds.RateSchedule(module, 4)
    seen = [rates(module)]
    for _ in range(6):
        schedule.step()
        seen.append(rates(module))
    assert [pair[0] for pair in seen] == pytest.approx([0.0, 0.05, 0.1, 0.15, 0.2, 0.2, 0.2])
    assert [pair[1] for pair in seen] == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4, 0.4, 0.4])


@pytest.mark.parametrize(
    ("arguments", "fractions"),
    [
        ({}, [0.0, 0.25, 0.5, 0.75, 1.0, 1.0, 1.0]),
        ({"start": 0.5}, [0.5, 0.625, 0.75, 0.875, 1.0, 1.0, 1.0]),
        ({"delay": 2}, [0.0, 0.0, 0.0, 0.25, 0.5, 0.75, 1.0]),
        ({"shape": "cosine"}, [0.0, 0.1464466, 0.5, 0.8535534, 1.0, 1.0, 1.0]),
        ({"shape": "step"}, [0.0, 0.0, 0.0, 0.0, 1.0, 1.0, 1.0]),
    ],
)
def test_shapes(arguments: dict[str, object], fractions: list[float]) -> None:
    schedule = ds.RateSchedule(net(), 4, **arguments)  # type: ignore[arg-type]
    assert [schedule.fraction(step) for step in range(7)] == pytest.approx(fractions)


def test_where_and_checkpoints() -> None:
    module = net()
    schedule = ds.RateSchedule(module, 4, where="1")
    assert rates(module) == [0.0, 0.4]
    for _ in range(3):
        schedule.step()
    state = schedule.state_dict()
    fresh = net()
    other = ds.RateSchedule(fresh, 4, where="1")
    other.load_state_dict(state)
    assert rates(fresh) == rates(module) == pytest.approx([0.15, 0.4])
    with pytest.raises(ArgumentTypeError, match=r"not the state of a RateSchedule for these"):
        ds.RateSchedule(fresh, 4).load_state_dict(state)


def test_a_compiled_network_is_compiled_once_for_all_rates() -> None:
    module = ds.apply(
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 4)),
        ds.InsertDropBlock(0.3, 3),
        ds.InsertDropout(0.5, before="Linear"),
        ds.InsertDropConnect(0.2, of="Linear"),
    ).module.train()
    schedule = ds.RateSchedule(module, 12)
    torch._dynamo.reset()
    counters.clear()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for _ in range(12):
        compiled(torch.randn(2, 3, 8, 8)).sum().backward()
        schedule.step()
    # One without drops at rate 0, one with the first rates, one for every other.
    assert counters["stats"]["unique_graphs"] <= 3


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"steps": 0}, "steps must be an int of 1 or more, got 0"),
        ({"steps": 4, "delay": -1}, "delay must be an int of 0 or more, got -1"),
        ({"steps": 4, "shape": "ramp"}, "unknown shape 'ramp'"),
        ({"steps": 4, "start": 1.5}, r"start must lie in \[0, 1\], got 1.5"),
    ],
)
def test_bad_arguments(arguments: dict[str, object], match: str) -> None:
    with pytest.raises(ArgumentError, match=match):
        ds.RateSchedule(net(), **arguments)  # type: ignore[arg-type]


def test_nothing_to_schedule() -> None:
    with pytest.raises(PassError, match=r"there is no drop layer to schedule"):
        ds.RateSchedule(nn.Linear(2, 2), 4)
    with pytest.raises(PassError, match=r"where='7' matches no drop layer"):
        ds.RateSchedule(net(), 4, where="7")
