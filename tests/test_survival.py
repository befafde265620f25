"""The rules give the survival probabilities of the papers and libraries they are named after."""

from __future__ import annotations

import math

import pytest
import timm
import torch

from dropsurgery import survival
from dropsurgery.errors import ArgumentError, ArgumentTypeError


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        (survival.linear(0.5), [0.875, 0.75, 0.625, 0.5]),
        (survival.linspace(0.7), [1.0, 0.9, 0.8, 0.7]),
        (survival.efficientnet(0.6), [1.0, 0.9, 0.8, 0.7]),
        (survival.constant(0.3), [0.3] * 4),
        (survival.per_stage(0.5, (1, 2, 1)), [1.0, 0.75, 0.75, 0.5]),
        (survival.table((1.0, 0.5, 0.25, 0.0)), [1.0, 0.5, 0.25, 0.0]),
    ],
)
def test_rules(rule: survival.Rule, expected: list[float]) -> None:
    assert [rule(l, 4) for l in range(1, 5)] == pytest.approx(expected, abs=1e-15)


def test_a_single_block() -> None:
    assert survival.linear(0.5)(1, 1) == 0.5
    assert survival.linspace(0.5)(1, 1) == 1.0
    assert survival.efficientnet(0.5)(1, 1) == 1.0


def test_linspace_is_timms() -> None:
    model = timm.create_model("resnet26", drop_path_rate=0.3)
    rule = survival.linspace(0.7)
    blocks = [b for stage in (1, 2, 3, 4) for b in getattr(model, f"layer{stage}")]
    for index, block in enumerate(blocks, start=1):
        rate = 0.0 if block.drop_path is None else block.drop_path.drop_prob
        assert 1.0 - rule(index, len(blocks)) == pytest.approx(rate, abs=1e-7)


def test_linspace_in_single_precision_is_timms_vision_transformers() -> None:
    model = timm.create_model("vit_tiny_patch16_224", drop_path_rate=0.3, img_size=32)
    rule = survival.linspace(0.7, single=True)
    ours = [1.0 - rule(l, 12) for l in range(2, 13)]
    assert ours == [block.drop_path1.drop_prob for block in model.blocks[1:]]
    assert survival.from_json(survival.to_json(rule)) == rule


@pytest.mark.parametrize("value", [-0.1, 1.1, math.nan, math.inf])
def test_probabilities_outside_0_and_1_are_refused(value: float) -> None:
    for make in (survival.linear, survival.linspace, survival.efficientnet):
        with pytest.raises(ArgumentError, match=r"final must lie in \[0, 1\]"):
            make(value)
    with pytest.raises(ArgumentError, match=r"p must lie in \[0, 1\]"):
        survival.constant(value)


@pytest.mark.parametrize("value", ["0.5", None, True, torch.tensor(0.5)])
def test_what_is_no_number_is_refused(value: object) -> None:
    with pytest.raises(ArgumentTypeError, match="final must be a number"):
        survival.linear(value)  # type: ignore[arg-type]


def test_a_block_outside_1_to_L_is_refused() -> None:
    for block in (0, 5):
        with pytest.raises(ArgumentError, match=f"l={block} of L=4"):
            survival.linear(0.5)(block, 4)
    with pytest.raises(ArgumentError, match="has 2 survival probabilities and the network has 3"):
        survival.table((1.0, 0.5))(1, 3)


def test_names() -> None:
    assert survival.by_name("linspace", 0.5) == survival.linspace(0.5)
    with pytest.raises(ArgumentError, match="have 5 blocks and the network has 4"):
        survival.per_stage(0.5, (2, 3))(1, 4)
    with pytest.raises(ArgumentError, match="numbers of blocks in each stage"):
        survival.per_stage(0.5, ())
    for name in ("cosine", "table", "per_stage"):
        with pytest.raises(ArgumentError, match=f"unknown survival rule '{name}'"):
            survival.by_name(name, 0.5)


@pytest.mark.parametrize(
    "rule",
    [
        survival.linear(0.1),
        survival.per_stage(0.5, (1, 2)),
        survival.constant(0.2),
        survival.table((0.5, 0.25)),
    ],
)
def test_rules_survive_json(rule: survival.Rule) -> None:
    assert survival.from_json(survival.to_json(rule)) == rule


def test_a_foreign_rule_is_no_json() -> None:
    with pytest.raises(ArgumentTypeError, match="not one of dropsurgery's rules"):
        survival.to_json(lambda l, L: 0.5)


def test_what_a_rule_returns_is_checked() -> None:
    assert survival.survival_of(lambda l, L: l / L, 1, 2) == 0.5
    with pytest.raises(ArgumentError, match=r"block 3 of 4 must lie in \[0, 1\], got 3"):
        survival.survival_of(lambda l, L: l, 3, 4)
    with pytest.raises(ArgumentTypeError, match=r"callable rule\(l, L\)"):
        survival.survival_of(0.5, 1, 2)  # type: ignore[arg-type]
