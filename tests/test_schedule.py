"""Rates that change over training, and draws as a function of (seed, step, site, rank)."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel

import dropsurgery as ds
from dropsurgery.layers.draws import Draws
from dropsurgery.schedule import drop_paths
from tests.distributed_ranks import MODES, Net
from tests.drop_helpers import assert_mean, assert_uncorrelated, assert_variance

CPU = torch.device("cpu")


def rates(module: nn.Module) -> list[float]:
    return [layer.drop_prob for layer in module.modules() if isinstance(layer, ds.DropPath)]


# --- ramps ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ramp", "shares"),
    [
        (ds.ramps.linear(4), {0: 0.0, 1: 0.25, 2: 0.5, 4: 1.0, 9: 1.0}),
        (ds.ramps.linear(4, start=2), {0: 0.0, 2: 0.0, 3: 0.25, 6: 1.0}),
        (ds.ramps.cosine(4), {0: 0.0, 1: 0.5 - math.sqrt(0.125), 2: 0.5, 4: 1.0, 9: 1.0}),
        (ds.ramps.cosine(2, start=3), {3: 0.0, 4: 0.5, 5: 1.0}),
        (ds.ramps.step(3), {0: 0.0, 2: 0.0, 3: 1.0, 9: 1.0}),
        (ds.ramps.step(0), {0: 1.0}),
        (ds.ramps.early(3), {0: 1.0, 2: 1.0, 3: 0.0, 9: 0.0}),
    ],
)
def test_ramps(ramp: Callable[[int], float], shares: dict[int, float]) -> None:
    for step, share in shares.items():
        assert ramp(step) == pytest.approx(share, abs=1e-15)


def test_ramps_print_as_they_are_written() -> None:
    assert repr(ds.ramps.linear(4, start=2)) == "Linear(steps=4, start=2)"
    assert ds.ramps.linear(4) == ds.ramps.Linear(4)
    assert ds.ramps.linear(4) != ds.ramps.cosine(4)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: ds.ramps.linear(0), "steps must be an integer of at least 1, got 0"),
        (lambda: ds.ramps.linear(2.5), "steps must be an integer of at least 1, got 2.5"),
        (lambda: ds.ramps.cosine(3, start=-1), "start must be an integer of at least 0, got -1"),
        (lambda: ds.ramps.step(-1), "at must be an integer of at least 0, got -1"),
        (lambda: ds.ramps.early(True), "steps must be an integer of at least 1, got True"),
    ],
)
def test_bad_ramps(build: Callable[[], Any], message: str) -> None:
    with pytest.raises(ds.errors.ArgumentError, match=message):
        build()


# --- set_survival --------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_set_survival_counts_blocks_as_the_insertion_did(mode: str) -> None:
    net = ds.retrofit(Net(), 0.5, mode=mode)
    ds.set_survival(net, ds.survival.linear(0.2))
    assert rates(net) == pytest.approx([0.2, 0.4, 0.6, 0.8])
    ds.set_survival(net, lambda l, L: 1.0 - l / 10)
    assert rates(net) == pytest.approx([0.1, 0.2, 0.3, 0.4])


def test_set_survival_of_a_part_leaves_the_rest_alone() -> None:
    net = ds.retrofit(Net(), 0.5, where="blocks.2")
    ds.set_survival(net, ds.survival.linear(0.2))
    assert rates(net) == pytest.approx([0.6])  # block 3 of 4, though it alone drops


def test_set_survival_behind_wrappers() -> None:
    net = ds.retrofit(Net(), 0.5)
    for wrapped in (
        torch.compile(net, backend="eager"),
        DataParallel(net),
        torch.compile(DataParallel(net), backend="eager"),
    ):
        ds.set_survival(net, ds.survival.constant(1.0))
        ds.set_survival(wrapped, ds.survival.constant(0.7))
        assert rates(net) == pytest.approx([0.3] * 4)


def test_what_set_survival_refuses() -> None:
    with pytest.raises(ds.errors.ArgumentTypeError, match="expected a module that dropsurgery"):
        ds.set_survival(Net(), ds.survival.constant(0.5))
    with pytest.raises(ds.errors.ArgumentTypeError, match="expected a module, got str"):
        ds.set_survival("net", ds.survival.constant(0.5))  # type: ignore[arg-type]
    with pytest.raises(ds.errors.PassError, match="the network has no drop path"):
        ds.set_survival(ds.trace(Net()), ds.survival.constant(0.5))
    net = ds.retrofit(Net(), 0.5)
    before = rates(net)
    with pytest.raises(ds.errors.ArgumentError, match="of block 1 of 4 must lie in"):
        ds.set_survival(net, lambda l, L: 1.5)
    with pytest.raises(ds.errors.ArgumentTypeError, match=r"a callable rule\(l, L\)"):
        ds.set_survival(net, 0.5)  # type: ignore[arg-type]
    assert rates(net) == before


def test_a_rate_is_checked_wherever_it_is_set() -> None:
    layer = ds.DropPath(0.2)
    with pytest.raises(ds.errors.ArgumentError, match="drop_prob must lie in"):
        layer.drop_prob = 1.5
    assert layer.drop_prob == 0.2


def test_the_largest_rate_is_what_compiled_code_goes_by() -> None:
    net = ds.retrofit(Net(), 0.5, rule="constant", mode="subset")
    layers = [m for m in net.modules() if isinstance(m, ds.DropPath)]
    ds.SurvivalSchedule(net, ds.ramps.linear(5))
    assert [layer.peak for layer in layers] == [0.5] * 4
    assert rates(net) == [0.0] * 4
    ds.set_survival(net, ds.survival.constant(0.3))
    assert [layer.peak for layer in layers] == [0.7] * 4
    again = ds.retrofit(net, 0.9, rule="constant", mode="subset")
    assert {m.peak for m in again.modules() if isinstance(m, ds.DropPath)} == {1.0 - 0.9}


# --- SurvivalSchedule ----------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_a_schedule_sets_final_rates_times_the_ramp(mode: str) -> None:
    net = ds.retrofit(Net(), 0.6, mode=mode)
    final = rates(net)
    schedule = ds.SurvivalSchedule(net, ds.ramps.linear(4))
    for step in range(7):
        share = min(step / 4, 1.0)
        assert rates(net) == pytest.approx([p * share for p in final])
        schedule.step()


def test_a_schedule_with_a_rule_of_its_own() -> None:
    net = ds.retrofit(Net(), 1.0)
    schedule = ds.SurvivalSchedule(net, ds.ramps.step(1), survival=ds.survival.constant(0.4))
    assert rates(net) == [0.0] * 4
    schedule.step()
    assert rates(net) == pytest.approx([0.6] * 4)


def test_a_schedule_goes_on_where_its_state_was_saved() -> None:
    net = ds.retrofit(Net(), 0.6)
    schedule = ds.SurvivalSchedule(net, ds.ramps.cosine(10))
    for _ in range(3):
        schedule.step()
    state = copy.deepcopy(schedule.state_dict())
    assert state["step"] == 3
    expected = rates(net)
    # The layers of the new network have other rates, as after a checkpoint in mid-ramp.
    other = ds.retrofit(Net(), 0.9)
    resumed = ds.SurvivalSchedule(other, ds.ramps.cosine(10))
    resumed.load_state_dict(state)
    assert rates(other) == expected
    for one in (schedule, resumed):
        one.step()
    assert rates(other) == rates(net) != expected


def test_what_a_schedule_refuses() -> None:
    net = ds.retrofit(Net(), 0.6)
    with pytest.raises(ds.errors.ArgumentTypeError, match="ramp must be a callable of the step"):
        ds.SurvivalSchedule(net, 100)  # type: ignore[arg-type]
    with pytest.raises(ds.errors.ArgumentError, match="the ramp at step 0 must lie in"):
        ds.SurvivalSchedule(net, lambda step: 2.0)
    with pytest.raises(ds.errors.PassError, match="the network has no drop path"):
        ds.SurvivalSchedule(Net(), ds.ramps.step(1))
    schedule = ds.SurvivalSchedule(net, ds.ramps.linear(4))
    state = schedule.state_dict()
    final = {k: v for k, v in state["final"].items() if not k.startswith("blocks.3")}
    with pytest.raises(
        ds.errors.ArgumentError, match=r"only one of the two schedules has 'blocks\.3"
    ):
        schedule.load_state_dict({**state, "final": final})
    for step in (-1, 1.5, True, None):
        with pytest.raises(ds.errors.ArgumentError, match="step must be an integer of at least 0"):
            schedule.load_state_dict({**state, "step": step})
    with pytest.raises(ds.errors.ArgumentError, match="must lie in"):
        schedule.load_state_dict({**state, "final": dict.fromkeys(state["final"], 3.0)})


# --- draws ---------------------------------------------------------------------------------------


def test_draws_are_uniform() -> None:
    values = Draws(7).uniform(20_000, 5, CPU)
    assert values.dtype == torch.float64
    assert float(values.min()) >= 0.0
    assert float(values.max()) < 1.0
    assert_mean(values, 0.5)
    assert_variance(values, 1.0 / 12.0)
    # 100 cells of 200: chi-square with 99 degrees of freedom has the mean 99, the variance 198.
    counts = torch.histc(values, 100, 0.0, 1.0)
    statistic = float((counts - 200.0).square().sum() / 200.0)
    assert abs(statistic - 99.0) <= 4.0 * math.sqrt(198.0)
    assert_uncorrelated(values[:-1], values[1:])


def sequences() -> dict[str, tuple[Tensor, Tensor]]:
    """Return pairs of sequences that should have nothing to do with each other."""
    one, other, near = Draws(7), Draws(7, rank=1), Draws(8)
    later = Draws(7)
    later.advance()
    count = 20_000
    first = one.uniform(count, 5, CPU)
    steps: list[Tensor] = []
    walk = Draws(7)
    for _ in range(4000):
        steps.append(walk.uniform(2, 5, CPU))
        walk.advance()
    sites = torch.stack([one.uniform(2, site, CPU) for site in range(4000)])
    ranks = torch.stack([Draws(7, rank).uniform(2, 5, CPU) for rank in range(4000)])
    return {
        "sites": (first, one.uniform(count, 6, CPU)),
        "steps": (first, later.uniform(count, 5, CPU)),
        "ranks": (first, other.uniform(count, 5, CPU)),
        "seeds": (first, near.uniform(count, 5, CPU)),
        "step after step": tuple(torch.stack([v[0] for v in steps]).split(2000)),  # type: ignore[dict-item]
        "site after site": tuple(sites[:, 0].split(2000)),  # type: ignore[dict-item]
        "rank after rank": tuple(ranks[:, 0].split(2000)),  # type: ignore[dict-item]
        "samples over steps": (torch.stack(steps)[:, 0], torch.stack(steps)[:, 1]),
    }


def test_draws_are_independent_over_sites_steps_ranks_and_seeds() -> None:
    for left, right in sequences().values():
        assert_mean(left, 0.5)
        assert_mean(right, 0.5)
        assert_variance(right, 1.0 / 12.0)
        assert_uncorrelated(left, right)
        assert_uncorrelated(left[:-1], left[1:])
        assert not torch.equal(left, right)


def test_the_check_of_independence_can_fail() -> None:
    values = Draws(7).uniform(20_000, 5, CPU)
    with pytest.raises(AssertionError):
        assert_uncorrelated(values, values + Draws(8).uniform(20_000, 5, CPU))


def test_draws_are_a_function_of_seed_step_site_and_rank() -> None:
    for rank in (None, 0, 1, 3):
        one, other = Draws(-5, rank), Draws(-5, rank)
        for _ in range(3):
            one.advance()
        one.uniform(9, 4, CPU)  # nothing is consumed
        other.load_state_dict(one.state_dict())
        assert torch.equal(one.uniform(50, 4, CPU), other.uniform(50, 4, CPU))
        # More samples do not move the first ones.
        assert torch.equal(one.uniform(50, 4, CPU)[:7], other.uniform(7, 4, CPU))
    assert torch.equal(Draws(3, 0).uniform(5, 1, CPU), Draws(3).uniform(5, 1, CPU))


@pytest.mark.parametrize("seed", [0, 1, -1, 2**40, 2**64 + 3])
def test_a_number_on_the_host_is_the_first_of_the_tensor(seed: int) -> None:
    for rank in (None, 1, 5):
        draws = Draws(seed, rank)
        for step in range(20):
            for site in (0, 1, 12345, 2**32 - 1, 2**32):
                assert draws.number(site) == float(draws.uniform(3, site, CPU)[0])
            draws.advance()
            assert draws.step == step + 1


def test_draws_save_their_seed_and_step() -> None:
    draws = Draws(4)
    draws.advance()
    assert draws.state_dict() == {"seed": 4, "step": 1}
    with pytest.raises(ds.errors.ArgumentError, match="the state is of seed 5, not 4"):
        draws.load_state_dict({"seed": 5, "step": 1})
    for seed in (1.5, True, "3"):
        with pytest.raises(ds.errors.ArgumentError, match="seed must be an integer"):
            Draws(seed)  # type: ignore[arg-type]


# --- seed_drop_paths -----------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_seeded_networks_do_not_touch_the_global_generator(mode: str) -> None:
    torch.manual_seed(0)
    net = ds.retrofit(Net(), 0.5, rule="constant", mode=mode).train()
    draws = ds.seed_drop_paths(net, 3)
    x = torch.randn(12, 4)
    before = torch.get_rng_state()
    with torch.no_grad():
        outputs = []
        for _ in range(4):
            outputs.append(net(x))
            assert torch.equal(outputs[-1], net(x))  # one step draws the same
            draws.advance()
    assert torch.equal(before, torch.get_rng_state())
    assert any(not torch.equal(outputs[0], other) for other in outputs[1:])


def test_the_sites_of_a_network_draw_for_themselves() -> None:
    net = ds.retrofit(Net(), 0.5, rule="constant").train()
    draws = ds.seed_drop_paths(net, 3)
    layers = [m for m in net.modules() if isinstance(m, ds.DropPath)]
    assert len({layer.site for layer in layers}) == len(layers) == 4
    kept = []
    for _ in range(500):
        kept.append(torch.stack([layer(torch.ones(8)) for layer in layers]))
        draws.advance()
    values = torch.stack(kept)  # (steps, sites, samples)
    assert_mean(values.flatten(), 1.0)
    for one in range(4):
        for other in range(one):
            assert_uncorrelated(values[:, one].flatten(), values[:, other].flatten())


def test_drop_paths_are_found_behind_wrappers() -> None:
    net = ds.retrofit(Net(), 0.5)
    for wrapped in (net, torch.compile(net, backend="eager"), DataParallel(net)):
        assert list(drop_paths(wrapped)) == [f"blocks.{i}.drop_path" for i in range(4)]
    larger = nn.Sequential(nn.Linear(4, 4), net)
    assert list(drop_paths(larger)) == [f"1.blocks.{i}.drop_path" for i in range(4)]
    with pytest.raises(ds.errors.PassError, match=r"the network has no ds\.DropPath"):
        ds.seed_drop_paths(Net(), 3)
