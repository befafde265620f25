"""Two gloo processes on this machine, started once; each test reads what they report."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

import dropsurgery as ds
from tests.distributed_ranks import CASES, MODES, RANKS, Net, run_cases

GRADIENTS = [name for name in CASES if name.startswith("gradients")]


@pytest.fixture(scope="module")
def reports() -> list[dict[str, Any]]:
    return run_cases()


def of_both(reports: list[dict[str, Any]], name: str) -> list[Any]:
    found = [report[name] for report in reports]
    assert len(found) == RANKS
    for value in found:
        assert "Traceback" not in str(value), value
    return found


@pytest.mark.parametrize("name", GRADIENTS)
def test_gradients_are_the_mean_over_the_ranks(reports: list[dict[str, Any]], name: str) -> None:
    for report in of_both(reports, name):
        assert report["error"] <= 1e-12 * max(report["scale"], 1.0)
        # Dropped by the whole mini-batch, a branch leaves its parameters without gradient.
        assert any(report["missing"]) == ("batch" in name)


@pytest.mark.parametrize("mode", MODES)
def test_a_rank_alone_has_another_gradient(reports: list[dict[str, Any]], mode: str) -> None:
    assert min(of_both(reports, f"alone {mode}")) > 1e-3


@pytest.mark.parametrize("mode", MODES)
def test_masks_in_step_or_per_rank(reports: list[dict[str, Any]], mode: str) -> None:
    first, second = of_both(reports, f"masks {mode} per_rank=False")
    assert first == second
    own_first, own_second = of_both(reports, f"masks {mode} per_rank=True")
    assert own_first != own_second
    assert first == own_first  # rank 0 draws the same either way


@pytest.mark.parametrize("mode", MODES)
def test_a_resumed_run_ends_bit_for_bit_the_same(reports: list[dict[str, Any]], mode: str) -> None:
    assert all(of_both(reports, f"resume {mode} seeded"))
    assert all(of_both(reports, f"resume {mode} global"))
    # Without the generator's state it does not: the comparison can fail.
    assert not any(of_both(reports, f"resume {mode} forgotten"))


def test_batch_mode_needs_to_be_told_to_ddp(reports: list[dict[str, Any]]) -> None:
    for message in of_both(reports, "unused"):
        assert "find_unused_parameters=True" in message
    for message in of_both(reports, "refused ddp"):
        assert "mode 'batch' leaves parameters without gradient" in message
        assert "where: blocks.0.drop_path" in message
        assert "fix: DistributedDataParallel(net, **ds.ddp_options(net))" in message
    for message in of_both(reports, "refused static"):
        assert "static_graph=True" in message


def test_a_sharded_block_is_never_called(reports: list[dict[str, Any]]) -> None:
    for message in of_both(reports, "container"):
        assert "mixed torch.Tensor and DTensor" in message
    for message in of_both(reports, "refused blocks"):
        assert "never calls" in message
        assert "where: 0.blocks.0\n" in message


def test_sharded_batch_mode_needs_ranks_in_step(reports: list[dict[str, Any]]) -> None:
    for name in ("refused unseeded", "refused per rank"):
        for message in of_both(reports, name):
            assert "must drop a branch on all ranks together" in message
            assert "ds.seed_drop_paths" in message


def test_what_is_right_passes(reports: list[dict[str, Any]]) -> None:
    assert of_both(reports, "fine") == ["", ""]


def test_options() -> None:
    assert ds.ddp_options(Net()) == {}
    for mode in MODES:
        net = ds.retrofit(Net(), mode=mode)
        expected = {"find_unused_parameters": True} if mode == "batch" else {}
        assert ds.ddp_options(net) == expected
        assert ds.ddp_options(nn.Sequential(nn.Linear(4, 4), net)) == expected


def test_nothing_wrapped_is_fine() -> None:
    ds.check_distributed(ds.retrofit(Net(), mode="batch"))
