"""The sweep of slim over the zoo: it must count what is left, and report what is not exact."""

from __future__ import annotations

import json
from typing import Any

import onnx
import pytest
import torch
from onnx import TensorProto, helper
from torch import Tensor, nn

import dropsurgery as ds
from benchmarks import half_precision, latency
from benchmarks.slim import ours, page, peers
from benchmarks.slim.counting import network, norm_calls, onnx_counts, told
from benchmarks.zoo import catalogue, sweep
from benchmarks.zoo.catalogue import Entry
from tests.helpers import randomize

SMALL = Entry("timm", "resnet", "resnet10t")


def two_norms() -> nn.Module:
    """One BatchNorm behind a convolution, one with nothing that could take it in."""
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Sigmoid(), nn.BatchNorm2d(4), nn.Tanh()
    )
    return randomize(model).eval()


def test_ours_counts_what_is_left_and_tells_why() -> None:
    row = ours.slimmed(two_norms().double(), torch.randn(2, 3, 8, 8, dtype=torch.float64))
    assert row["norms"] == [2, 1]
    assert row["nodes"][1] < row["nodes"][0]
    assert row["error"] <= page.EXACT
    assert 0 < row["own"] < 1e-13
    assert sum(row["reasons"].values()) == 1


def test_the_error_sees_a_wrong_value_a_nan_and_a_wrong_integer() -> None:
    x = torch.tensor([1.0, -4.0])
    assert ours.relative(x, x) == 0.0
    assert ours.relative(x + 1e-3, x) == pytest.approx(2.5e-4, rel=1e-3)
    assert ours.relative(torch.tensor([1.0, float("nan")]), x) == float("inf")
    nans = torch.tensor([1.0, float("nan")])
    assert ours.relative(nans, nans) == 0.0
    assert ours.relative(torch.tensor([1, 2]), torch.tensor([1, 3])) == 1.0


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # of the fuser itself
def test_the_fuser_of_torch_is_counted_on_its_own_graph() -> None:
    model, x = two_norms(), torch.randn(2, 3, 8, 8)
    assert norm_calls(model, x) == 2
    assert norm_calls(peers._fused(model), x) == 1


def test_onnx_nodes_are_counted_by_kind() -> None:
    nodes = [
        helper.make_node("BatchNormalization", ["x", "s", "b", "m", "v"], ["y"]),
        helper.make_node("Relu", ["y"], ["z"]),
    ]
    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 2])
    graph = helper.make_graph(nodes, "g", [value], [])
    counts = onnx_counts(helper.make_model(graph))
    assert counts == {"nodes": 2, "norms": 1, "convolutions": 0}
    assert isinstance(graph, onnx.GraphProto)


def test_a_tool_that_fails_leaves_its_error_in_the_row() -> None:
    row: dict[str, Any] = {"norms": 3}
    with told(row, "fx"):
        raise RuntimeError("no  graph\nhere")
    assert row["fx"] == {"error": "RuntimeError: no graph here"}
    assert page._peer_share([row], "fx") == "0 of 3 (0.0%); fails on 1 of 1 models"


def test_random_gains_are_positive_or_signed() -> None:
    def gains(signs: bool) -> Tensor:
        model, _ = network(SMALL, signs=signs)
        norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
        return torch.cat([norm.weight for norm in norms])

    assert bool((gains(signs=False) > 0).all())
    assert 0 < int((gains(signs=True) < 0).sum()) < 0.15 * gains(signs=True).numel()


def row_of(name: str, left: int, error: float, status: str = "ok") -> dict[str, Any]:
    slim = {
        "nodes": [9, 7], "norms": [4, left], "parameters": [10, 8], "seconds": 0.1, "error": error,
        "own": 1e-16,
        "reasons": {"its input comes from add '…'": left} if left else {},
    }  # fmt: skip
    tools = {tool: {"nodes": 8, "norms": 3, "convolutions": 2} for tool in page.TOOLS_ONNX}
    return {
        "source": "timm", "family": "resnet", "name": name, "status": status, "norms": 4,
        "fx": {"norms": 2}, "timm": {"norms": 4}, **tools,
        "onnx": {"nodes": 6, "norms": left, "convolutions": 2}, "slim": slim, "signs": slim,
    }  # fmt: skip


def test_the_page_tells_what_is_left_what_is_not_exact_and_what_failed() -> None:
    rows = [
        row_of("densenet121", 1, 1e-15),
        row_of("resnet18", 0, 1e-9),
        {**row_of("resnet34", 0, 0.0, "timeout"), "error": "not done after 300 s"},
    ]
    text = page.write(rows, {"torch": "1"})
    assert "| 2 of 4; worst 1.0e-09 |" in text
    each = "resnet18 1.0e-09 by 1.0e-16"
    assert f"| 0 of the other 2 ({each}; {each}) |" in text
    assert "- densenet121: 1 of 4. 1 times its input comes from add '…'" in text
    assert "- resnet34: not done after 300 s" in text
    assert "| densenet121 | 3 | 3 | 3 | as few as possible | 1 |" in text


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_both_sides_make_a_row_of_a_real_model() -> None:
    theirs, own = peers.measure(SMALL, with_onnx=False), ours.measure(SMALL, with_onnx=False)
    (row,) = page.joined([SMALL], {SMALL.label: theirs}, {SMALL.label: own})
    assert row["status"] == "ok"
    assert row["norms"] == row["slim"]["norms"][0] > 10
    assert row["slim"]["norms"][1] == 0
    assert row["fx"]["norms"] <= row["norms"]


def test_each_family_and_each_model_that_the_project_names_stand_in_the_sweep() -> None:
    found = page.entries()
    labels = [entry.label for entry in found]
    assert len(labels) == len(set(labels))
    assert {f"timm:{name}" for name in page.ASKED} <= set(labels)
    families = {(entry.source, entry.family) for entry in catalogue.entries()}
    assert {(entry.source, entry.family) for entry in found} == families


def test_a_digest_depends_on_what_it_is_told() -> None:
    assert sweep.digest_of([], []) != sweep.digest_of([1], [])


def test_half_precision_is_compared_with_float64() -> None:
    found = half_precision.ratios("resnet10t", 32, torch.bfloat16, 0)
    half_then_slim, half_then_fold, slim_then_half = found
    assert 0.3 < half_then_slim < 2
    assert half_then_slim in (half_then_fold, 1.0)  # folded, or refused
    # Weights that are folded before they are rounded err less.
    assert slim_then_half < half_then_slim


def test_the_half_precision_page_tells_what_is_worse_for_sure() -> None:
    worse, unsure = (half_precision.Figure.of(v) for v in ([1.2, 1.21, 1.19], [0.8, 1.5, 1.0]))
    assert worse.is_worse
    assert not unsure.is_worse
    text = half_precision.page({"a": [worse] * 6, "b": [unsure] * 6})
    assert "above 1 beyond the 95 % interval: a\n" in text


def test_the_latency_page_names_what_is_slower() -> None:
    entry = {"ratio": 0.9, "low": 0.8, "high": 1.0}
    document = {
        "about": "here",
        "cases": {"resnet18:1": {"eager": entry}, "resnet50:1": {"eager": {**entry, "ratio": 1.3}}},
    }
    text = latency.page(json.loads(json.dumps(document)))
    assert "faster on 1 of 2; slower than 1.02: resnet50:1 1.30" in text


def test_a_network_that_is_too_large_is_left_out() -> None:
    large = Entry("timm", "vision_transformer", "vit_large_patch16_224")
    assert peers.measure(large, with_onnx=False)["large"]
    assert ds.__version__
