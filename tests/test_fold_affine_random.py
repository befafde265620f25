"""FoldAffine on random graphs; `python -m benchmarks.random_graphs` runs thousands of them."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx

from benchmarks.random_graphs import check
from dropsurgery.graph.gauge import Gauge, evaluate
from dropsurgery.graph.ledger import Ledger, Move
from dropsurgery.graph.transfer import Scene, Spread
from tests.random_affine import OPERATIONS, Step, graphs


@settings(max_examples=120, deadline=None, derandomize=True)
@given(graphs(), st.integers(0, 99), st.booleans())
def test_random_graphs(steps: tuple[Step, ...], number: int, shapes: bool) -> None:
    check(steps, number, shapes, Counter())


@pytest.mark.parametrize("name", sorted(OPERATIONS))
def test_every_operation_before_and_behind_a_batchnorm(name: str) -> None:
    seen: Counter[str] = Counter()
    for steps in (("valid", name, "bn", "gelu"), ("gelu", "bn", name, "valid")):
        check(tuple(Step(step, index % 2) for index, step in enumerate(steps)), 3, True, seen)
        check(tuple(Step(step) for step in steps), 4, True, seen)
    assert seen["graphs"] == 4


FOUND = [
    (("negative bn", "relu_"), False),  # the dtype of what stays was a guess
    (("half", "token norm"), False),  # and so was the rank of a factor that took in a vector
]


@pytest.mark.parametrize(("names", "shapes"), FOUND)
def test_graphs_that_went_wrong_once(names: tuple[str, ...], shapes: bool) -> None:
    check(tuple(Step(name) for name in names), 0, shapes, Counter())


def test_the_check_would_notice_a_wrong_vector(monkeypatch: pytest.MonkeyPatch) -> None:
    steps = (Step("valid"), Step("cat"), Step("bn"), Step("relu"), Step("same"))
    check(steps, 0, True, Counter())
    real = Ledger.apply

    def wrong(ledger: Ledger, move: Move) -> object:
        old = real(ledger, move)
        for name, state in ledger.layers.items():
            if state.after is not None and name in old:
                state.after.shift.add_(1e-9)
        return old

    monkeypatch.setattr(Ledger, "apply", wrong)
    with pytest.raises(AssertionError, match="e-"):
        check(steps, 0, True, Counter())


def test_vectors_and_their_paths_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the planner decides with is what the surgeon computes."""
    real, kinds = Scene.spread, set[str]()

    def spread(scene: Scene, source: fx.Node, wire: fx.Node, gauge: Gauge) -> Spread:
        found = real(scene, source, wire, gauge)
        for end in found.deposits.values():
            kinds.update(step[0] for step in end.path)
            vector = evaluate(end.path, gauge.vector, gauge.part, scene.ledger.scale_of)
            assert torch.equal(vector, end.vector)
        return found

    monkeypatch.setattr(Scene, "spread", spread)
    names = ("valid", "chunk", "cat and norm", "add", "sub", "bn", "shuffle", "bn", "channel first")
    check(tuple(Step(name, index % 2) for index, name in enumerate(names)), 5, True, Counter())
    check(tuple(Step(name) for name in ("shuffle", "bn", "relu", "cat", "bn")), 5, True, Counter())
    assert kinds >= {"join", "repeat"}
