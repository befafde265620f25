"""Random residual networks: the sites are exactly the known ones, and drops sit on the branches."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import fx

import dropsurgery as ds
from dropsurgery.graph import residual
from dropsurgery.graph.batch import batch_axes
from dropsurgery.graph.forks import Flow
from dropsurgery.graph.module import module_path
from tests.random_networks import (
    Branch,
    Element,
    Net,
    Network,
    Op,
    Residual,
    dropped,
    inputs,
    known,
    networks,
)
from tests.random_ops import Known

THOROUGH = settings.get_current_profile_name() == "thorough"
ANY = settings(
    max_examples=settings().max_examples if THOROUGH else 150,
    derandomize=not THOROUGH,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
BOTH = ("linear", "nested")


def adds_of(module: fx.GraphModule) -> list[fx.Node]:
    """Return the adds of a graph, of whatever values, without the library's own tables."""
    functions = (operator.add, operator.iadd, torch.add)
    return [
        node
        for node in module.graph.nodes
        if (node.op == "call_function" and node.target in functions)
        or (node.op == "call_method" and node.target in ("add", "add_"))
    ]


def check_sites(net: Net, spec: Network, include: tuple[str, ...]) -> None:
    """Every add is what is known of it, with the right operands, block and reason."""
    module = ds.trace(net)
    found = ds.find_residuals(module, include=include)
    sites = {site.add: site for site in found.sites}
    reasons = {skip.node: skip.reason for skip in found.skipped}
    adds, truth = adds_of(module), known(net, spec)
    claims = batch_axes(module, module.graph)
    named = {node.name: node for node in module.graph.nodes}
    branches = {site.add: named[site.branch] for site in found.sites}
    assert [module_path(add) for add in adds] == [add.path for add in truth]
    assert len(sites) + len(reasons) == sum(add.what != "size" for add in truth), str(found)
    blocks: dict[object, int] = {}
    for number, (add, expected) in enumerate(zip(adds, truth, strict=True)):
        if not expected.is_site(include):
            assert add.name not in sites, f"false site: {sites[add.name]} is {expected}"
            if expected.what != "size":
                assert re.match(expected.reason, reasons[add.name]), reasons[add.name]
            continue
        assert add.name in sites, f"{add.name} is missed: {reasons.get(add.name)}; {expected}"
        site = sites[add.name]
        block = blocks.setdefault(expected.block or -number - 1, len(blocks) + 1)
        skip, branch = (operand.name for operand in sorted_operands(add, expected))
        assert (site.kind, site.module, site.block) == (expected.kind_found, expected.path, block)
        assert (site.skip, site.branch) == (skip, branch)
        assert site.linear == (expected.what == "linear")
        claim = claims[branches[site.add]]
        assert claim.kind == "unknown" or site.batch_axis == expected.batch, str(found)


def sorted_operands(add: fx.Node, expected: Known) -> tuple[fx.Node, fx.Node]:
    """Return (skip, branch), by the places in which the specification put them."""
    named = [add.kwargs[key] for key in ("input", "other") if key in add.kwargs]
    first, second = [*add.args, *named][:2]
    assert isinstance(first, fx.Node)
    assert isinstance(second, fx.Node)
    return (second, first) if expected.branch_first else (first, second)


@ANY
@given(networks(), st.sampled_from([(), ("nested",), ("linear",), BOTH]))
def test_sites_are_exactly_the_known_ones(spec: Network, include: tuple[str, ...]) -> None:
    check_sites(Net(spec).eval(), spec, include)


_BLOCK = Residual(Branch("relu"))
# What the analysis once got wrong.
FOUND: dict[str, tuple[bool, tuple[Element, ...]]] = {
    "an embedding is added in two layers": (True, (Op("condition"), Op("relu"), Op("condition"))),
    "positions are an input": (False, (Residual(Branch("attention, positions")),) * 2),
    "a mask is added to capped scores": (False, (Residual(Branch("attention, capped")),) * 2),
    "a linear branch of pooled values": (True, (Op("point"), Op("max"), Op("linear"))),
    "x beside a function of it is no skip": (True, (Op("dense and branch"),)),
    "positions around a long skip": (False, (Residual(
        Branch("attention, positions"), inner=(_BLOCK, Residual(Branch("attention, positions")))
    ),)),
}  # fmt: skip


@pytest.mark.parametrize("include", [(), BOTH])
@pytest.mark.parametrize("name", FOUND)
def test_what_was_found(name: str, include: tuple[str, ...]) -> None:
    spec = Network(*FOUND[name])
    check_sites(Net(spec).eval(), spec, include)


@settings(ANY, max_examples=ANY.max_examples if THOROUGH else 100)
@given(networks(), st.sampled_from([0.0, 0.5]), st.sampled_from([(), BOTH]))
def test_the_drop_sits_on_the_branch_and_comes_out_again(
    spec: Network, survival: float, include: tuple[str, ...]
) -> None:
    net = Net(spec).eval()
    plain = ds.trace(net, example_inputs=inputs(spec))  # these tell where the batch is
    insert = ds.InsertDropPath(ds.survival.constant(survival), include=include)
    dropping = ds.apply(plain, insert).module
    assert list(dropping.state_dict()) == list(net.state_dict())
    with torch.no_grad():
        assert torch.equal(dropping(*inputs(spec)), net(*inputs(spec)))
        torch.manual_seed(spec.seed)
        ours = dropping.train()(*inputs(spec))
    torch.manual_seed(spec.seed)
    assert torch.equal(ours, dropped(net.train(), spec, survival, include))
    assert ds.apply(dropping, ds.RemoveDropPath()).module.code == plain.code


def _no_blocks(run: Callable[[Any], Any]) -> Callable[[Any], Any]:
    class Forgets(set[Any]):
        def add(self, _: Any) -> None:
            return

    def without(analysis: Any) -> Any:
        analysis.blocks = Forgets()
        return run(analysis)

    return without


BROKEN: dict[str, tuple[type, str, Any]] = {
    "gates are sites": (Flow, "is_gate", lambda flow, fork: False),
    "attention's values are a branch": (Flow, "is_attention_product", lambda flow, node: False),
    "linear branches are branches": (Flow, "_affine", lambda flow, region: False),
    "nothing is nested": (residual._Analysis, "run", _no_blocks(residual._Analysis.run)),
    "a part is a skip of the whole": (Flow, "_is_part", lambda flow, node, whole: False),
    "products pass no skip": (Flow, "elementwise", lambda flow, node: False),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_analysis_is_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    owner, attribute, broken = BROKEN[name]
    monkeypatch.setattr(owner, attribute, broken)

    @settings(ANY, max_examples=300, derandomize=True, phases=[Phase.generate], database=None)
    @given(networks())
    def exact(spec: Network) -> None:
        check_sites(Net(spec).eval(), spec, ())

    with pytest.raises(AssertionError):
        exact()
