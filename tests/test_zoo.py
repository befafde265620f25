"""The oracle of the sweep over the model zoo: it must see what networks drop, and report misses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import dropsurgery as ds
from benchmarks.zoo import catalogue, checks, page, reasons, sweep
from benchmarks.zoo.catalogue import Entry
from benchmarks.zoo.oracle import (
    Comparison,
    add_keys,
    compare,
    fits,
    native_drops,
    sites_by_key,
    where_pattern,
)


class Block(nn.Module):
    def __init__(self, drop: float | None, hidden: int = 4) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(4, hidden), nn.Linear(hidden, 4)
        self.gain = nn.Parameter(torch.ones(4))
        self.drop_path = ds.DropPath(drop) if drop else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.gain * self.drop_path(self.fc2(self.fc1(x).relu()))


class Undropped(nn.Module):
    """A residual block whose author drops nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc(x).relu()


class Affine(nn.Module):
    """A branch that is no site by default."""

    def __init__(self, drop: float | None) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.drop_path = ds.DropPath(drop) if drop else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop_path(self.fc(x))


class WholePath(nn.Module):
    """The whole path is dropped: the drop is on the skip of what follows."""

    def __init__(self, drop: float | None) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.drop_path = ds.DropPath(drop) if drop else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.drop_path(self.fc(x).relu())


class Unread(nn.Module):
    def __init__(self, drop: float | None) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.drop_path = ds.DropPath(drop) if drop else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        self.drop_path(x)
        return x + self.fc(x).relu()


class Partial(nn.Module):
    """Some channels get the skip, and the drop is on all of them."""

    def __init__(self, drop: float | None) -> None:
        super().__init__()
        self.fc1, self.fc2, self.fc3 = nn.Linear(4, 4), nn.Linear(4, 6), nn.Linear(6, 4)
        self.drop_path = ds.DropPath(drop) if drop else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.drop_path(self.fc2(self.fc1(x).relu()))
        return self.fc3(torch.cat([y[:, :4] + x, y[:, 4:]], dim=1))


def judge(native: nn.Module, plain: nn.Module, **options: object) -> Comparison:
    graph = ds.trace(plain.eval())
    sites = sites_by_key(graph, ds.find_residuals(graph, **options))  # type: ignore[arg-type]
    return compare(native_drops(ds.trace(native.eval())), sites)


def build(*kinds: type[nn.Module], rates: tuple[float, ...]) -> tuple[nn.Module, nn.Module]:
    """Return the network with drop path and the one without."""

    def stack(with_drop: bool) -> nn.Module:
        return nn.Sequential(*(
            kind() if kind is Undropped else kind(rate if with_drop else None)
            for kind, rate in zip(kinds, rates, strict=True)
        ))  # fmt: skip

    return stack(True), stack(False)


def test_equal_sites_are_exact() -> None:
    result = judge(*build(Block, Block, Block, rates=(0.0, 0.1, 0.2)))
    assert result == Comparison(missed=(), extra=(), at_zero=(("0", 0),))
    assert result.exact


def test_a_site_that_is_not_found_is_reported_as_missed() -> None:
    result = judge(*build(Block, Affine, rates=(0.1, 0.2)))
    assert result.missed == (("1", 0),)
    assert not result.found
    assert not result.exact


def test_the_option_that_finds_it_is_found() -> None:
    pair = build(Block, Affine, rates=(0.1, 0.2))
    assert judge(*pair, include=("linear",)).exact
    row: dict = {}
    native = native_drops(ds.trace(pair[0].eval()))
    checks.oracle(ds.trace(pair[1].eval()), native, row)
    assert not row["oracle"]["default"]["found"]
    assert row["oracle"]["option"] == {"include": ["linear"]}
    assert row["oracle"]["best"]["exact"]


def test_a_site_that_the_network_does_not_drop_is_reported_as_extra() -> None:
    result = judge(*build(Block, Undropped, Block, rates=(0.1, 0.0, 0.2)))
    assert result.extra == (("1", 0),)
    assert result.found
    assert not result.exact


def test_a_rate_of_zero_is_no_excuse_after_the_last_drop_or_without_a_slot() -> None:
    after = judge(*build(Block, Block, rates=(0.1, 0.0)))
    assert after.extra == (("1", 0),)
    without = judge(*build(Undropped, Block, Block, rates=(0.0, 0.0, 0.1)))
    assert without.extra == (("0", 0),)
    assert without.at_zero == (("1", 0),)


def test_the_first_block_is_excused_where_no_slots_are_left() -> None:
    class Sometimes(nn.Module):
        def __init__(self, drop: float | None) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)
            self.drop_path = ds.DropPath(drop) if drop else None

        def forward(self, x: Tensor) -> Tensor:
            y = self.fc(x).relu()
            return x + (y if self.drop_path is None else self.drop_path(y))

    first = judge(*build(Sometimes, Sometimes, rates=(0.0, 0.1)))
    assert first.at_zero == (("0", 0),)
    assert first.exact
    second = judge(*build(Sometimes, Sometimes, Sometimes, rates=(0.0, 0.0, 0.1)))
    assert second.extra == (("1", 0),)


def test_drops_that_belong_to_no_add_are_told_apart() -> None:
    native = native_drops(ds.trace(build(WholePath, Block, rates=(0.1, 0.2))[0].eval()))
    assert list(native.rates) == [("1", 0)]
    assert len(native.elsewhere) == 1
    unread = native_drops(ds.trace(build(Unread, Block, rates=(0.1, 0.2))[0].eval()))
    assert list(unread.rates) == [("1", 0)]
    assert len(unread.unread) == 1
    partial = native_drops(ds.trace(build(Partial, rates=(0.1,))[0].eval()))
    assert partial.partial == {("0", 0)}


def test_a_drop_inside_a_module_that_stays_whole_counts_as_missed() -> None:
    native, plain = build(Block, Block, rates=(0.1, 0.2))
    graph = ds.trace(native.eval(), leaf_modules=["1"])
    drops = native_drops(graph)
    assert drops.hidden == ("1.drop_path",)
    whole = ds.trace(plain.eval(), leaf_modules=["1"])
    result = compare(drops, sites_by_key(whole, ds.find_residuals(whole)))
    assert result.missed == (("1.drop_path", -1),)


def test_keys_do_not_depend_on_the_drops() -> None:
    native, plain = build(Block, Undropped, Block, rates=(0.1, 0.0, 0.2))
    with_drop = list(add_keys(ds.trace(native.eval())).values())
    assert with_drop == list(add_keys(ds.trace(plain.eval())).values())
    assert with_drop == [("0", 0), ("1", 0), ("2", 0)]


def test_where_patterns_match_all_that_is_wanted_and_nothing_else() -> None:
    assert where_pattern(["blocks.0", "blocks.1"], ["cls.0"]) == ("blocks.*",)
    stages = ["stages.0.blocks.0", "stages.1.blocks.3"]
    found = where_pattern(stages, ["stages.0.conv", "stages.0.more.blocks.conv"])
    assert found == ("stages.[0-9]*.blocks.[0-9]*",)
    assert where_pattern(["a.0"], ["a.0"]) is None
    assert where_pattern(["s.3.0", "s.3.4", "s.0.1"], ["s.3.5"]) == ("s.3.[0-4]", "s.0.1")
    assert where_pattern(["a.0", "b.1", "c.2", "d.3"], ["a.1", "b.0", "c.0", "d.0"]) is None


def test_rules_are_recognised_and_near_ones_are_not() -> None:
    rates = (0.0, 0.1, 0.2, 0.3)
    native, plain = build(Block, Block, Block, Block, rates=rates)
    row: dict = {}
    checks.oracle(ds.trace(plain.eval()), native_drops(ds.trace(native.eval())), row)
    rules = {(r["rule"], r["rate"]) for r in row["oracle"]["rules"] if r["unit"] == "block"}
    assert rules == {("linspace", 0.3), ("efficientnet", 0.4)}
    other, _ = build(Block, Block, Block, Block, rates=(0.0, 0.1, 0.2 + 2e-6, 0.3))
    checks.oracle(ds.trace(plain.eval()), native_drops(ds.trace(other.eval())), row)
    assert row["oracle"]["rules"] == []


def test_a_rule_must_give_zero_where_the_rates_start() -> None:
    native, plain = build(Block, Block, rates=(0.0, 0.2))
    drops = native_drops(ds.trace(native.eval()))
    result = judge(native, plain)
    assert fits(drops, result, lambda final: dict.fromkeys([("0", 0), ("1", 0)], 1 - final)) is None
    assert fits(drops, result, lambda final: {("0", 0): 0.0, ("1", 0): 1 - final}) == 0.2


def test_training_outputs_are_compared_bit_by_bit() -> None:
    native, plain = build(Block, Block, Block, rates=(0.0, 0.15, 0.3))
    row: dict = {}
    checks.oracle(ds.trace(plain.eval()), native_drops(ds.trace(native.eval())), row)
    state = {key: value.clone() for key, value in native.state_dict().items()}
    x = torch.randn(16, 4)
    same = checks._same_training(native, plain, state, x, row["oracle"], None)
    assert same["identical"]
    assert same["by"]["rule"] == "linspace"
    wrong = {**row["oracle"], "rules": [], "rates": [0.0, 0.15, 0.4]}
    assert not checks._same_training(native, plain, state, x, wrong, None)["identical"]


def test_a_model_whose_structure_changed_is_run_again() -> None:
    entry = Entry("timm", "resnet", "resnet10t")
    row: dict = {"traced": True, "sites": {"identity": 2}, "oracle": {"rates": [0.1], "native": 1}}
    kept = {entry.label: {**row, "run": {"keys": True}}}
    assert sweep._as_was(row, kept, entry)
    assert not sweep._as_was({**row, "oracle": {"rates": [0.2]}}, kept, entry)
    assert not sweep._as_was({**row, "sites": {"identity": 3}}, kept, entry)
    assert not sweep._as_was(row, {entry.label: row}, entry)
    assert not sweep._as_was(row, {}, entry)


SMOKE = (
    Entry("timm", "resnet", "resnet10t"),
    Entry("timm", "cait", "cait_xxs24_224"),
    Entry("torchvision", "classification: convnext", "convnext_tiny"),
    Entry("torchvision", "classification: squeezenet", "squeezenet1_1"),
)


@pytest.mark.parametrize("entry", SMOKE, ids=lambda entry: entry.name)
def test_models_are_exact(entry: Entry) -> None:
    row = checks.check(entry, structure_only=entry.name.startswith("cait"))
    assert row["status"] == "ok", row
    if "run" in row:
        assert all(row["run"][key] for key in page.PROMISES)
    if entry.name.startswith("squeezenet"):
        assert "oracle" not in row
        return
    assert row["oracle"]["best"]["exact"]
    if entry.name.startswith("cait"):
        assert row["oracle"]["option"] == {"where": ["blocks.*"]}
        assert reasons.rates("timm:crossvit_9_240")
    else:
        assert row["run"]["train"]["identical"]
    text = page.write([row], {"torch": "0"})
    assert entry.name in text
    assert "no reason is written down" not in text
    json.dumps(row)


def test_a_model_that_fails_is_a_row() -> None:
    row = checks.check(Entry("timm", "none", "no_such_model"))
    assert row["status"] == "error"
    assert "no_such_model" in row["error"]
    assert "no_such_model" in page.write([row], {})


def test_every_family_is_in_the_sweep() -> None:
    models = catalogue.entries()
    in_timm = {entry.family for entry in models if entry.source == "timm"}
    assert in_timm == set(catalogue.timm_families())
    kinds = {entry.family.partition(":")[0] for entry in models if entry.source == "torchvision"}
    assert kinds == {"classification", "segmentation", "detection backbone", "video"}
    labels = [entry.label for entry in models]
    assert len(labels) == len(set(labels))
    assert set(page.SHOWN) <= set(labels)
    assert [e.name for e in sweep.matching(models, "timm:vit_tiny_patch16_224")] == [
        "vit_tiny_patch16_224"
    ]


def test_a_model_has_a_process_a_time_limit_and_a_row_that_is_kept(tmp_path: Path) -> None:
    late = sweep.run(SMOKE[:1], tmp_path, structure_only=True, timeout=0.001)
    assert [row["status"] for row in late] == ["timeout"]
    made = sweep.run(SMOKE[:1], tmp_path, structure_only=True)
    assert [row["status"] for row in made] == ["ok"]
    assert sweep.run(SMOKE[:1], tmp_path, structure_only=True, timeout=0.001) == made


def test_the_written_results_keep_what_the_project_asks_for() -> None:
    rows = json.loads((sweep.ROOT / "docs" / "zoo.json").read_text())["models"]
    assert {f"{row['source']}:{row['name']}" for row in rows} == {
        entry.label for entry in catalogue.entries()
    }
    judged = [row for row in page.judged(rows, "timm") if row["name"] in catalogue.sample()]
    for which, what, share in (
        ("best", "found", 0.95),
        ("best", "exact", 0.90),
        ("default", "exact", 0.80),
    ):
        assert sum(row["oracle"][which][what] for row in judged) >= share * len(judged)
    for row in page.judged(rows, "torchvision"):
        assert row["oracle"]["default"]["exact"], row["name"]
    for row in rows:
        assert row["status"] == "ok", row["name"]
        assert all(row["run"][key] for key in page.PROMISES if "run" in row), row["name"]
    assert "no reason is written down" not in page.write(rows, {})
