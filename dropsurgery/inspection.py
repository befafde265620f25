"""What a person asks of a network before surgery: its sites, their rates, what is left alone."""

from __future__ import annotations

import re
import textwrap
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from torch import fx, nn

from dropsurgery import survival as rules
from dropsurgery.errors import PassError
from dropsurgery.graph import drops
from dropsurgery.graph.module import Skip
from dropsurgery.graph.residual import Site, find_residuals
from dropsurgery.graph.trace import trace
from dropsurgery.passes.drop_path import InsertDropPath
from dropsurgery.report import Census, census, skips_text
from dropsurgery.tables import NOTHING, render

ROOT = "(root)"
_MOST_STAGES = 12


@dataclass(frozen=True)
class SiteRate:
    """A residual site and what an insertion would make of it.

    Attributes:
        site: the site.
        stage: the part of the network that its block stands in, as a module path.
        survival: its survival probability in [0, 1]; None where it is left alone.
        native: the drop rate of the drop path that the network has there already, or None.
        over: for a nested site, the indices of the first and last site that its skip goes around.
    """

    site: Site
    stage: str
    survival: float | None
    native: float | None
    over: tuple[int, int] | None = None

    @property
    def kind(self) -> str:
        """The site's kind in words."""
        if not self.site.linear:
            return self.site.kind
        return "linear" if self.site.kind == "identity" else f"linear {self.site.kind}"


@dataclass(frozen=True)
class Inspection:
    """A network as an insertion sees it.

    Attributes:
        name: what the reader knows the network as.
        insertion: the pass whose rates are shown; it is planned, not run.
        sites: by block, and in the order in which they run.
        total: L, what the rule was given as the number of blocks, adds or positions.
        skipped: every other add, and layers that may hide some, and why each is left alone.
        refused: why the pass would refuse the network; "" where it would not.
        counts: what the graph holds.
    """

    name: str
    insertion: InsertDropPath
    sites: tuple[SiteRate, ...]
    total: int
    skipped: tuple[Skip, ...]
    refused: str
    counts: Census

    @property
    def blocks(self) -> int:
        """The number of residual blocks."""
        return max((rate.site.block for rate in self.sites), default=0)

    @property
    def headline(self) -> str:
        """The number of sites and blocks, in words."""
        if not self.sites:
            return "no residual sites, so there is nothing to drop"
        return f"{_plural(len(self.sites), 'residual site')} in {_plural(self.blocks, 'block')}"

    @property
    def rule(self) -> str:
        """The rule, the unit and the choice of sites, in words."""
        chosen, rule = self.insertion, self.insertion.survival
        name = getattr(rule, "name", getattr(rule, "__name__", "custom"))
        values = vars(rule) if type(rule) in rules.RULES.values() else {}
        told = [f"rule {name}"]
        told += [f"{key} {_value(value)}" for key, value in values.items() if value is not False]
        over = " over the chosen sites" if chosen.count == "chosen" else ""
        told.append(f"counted by {chosen.unit}{over} (L = {self.total})")
        if chosen.where is not None:
            told.append(f"where {_value(chosen.where)}")
        if chosen.include:
            told.append(f"with {_value(chosen.include)}")
        return ", ".join(told)

    def stages(self) -> list[tuple[str, int, int]]:
        """Return (path, first block, last block) of every stretch of blocks in one stage."""
        by_block = {rate.site.block: rate.stage for rate in self.sites}
        stretches = [list(run) for _, run in groupby(sorted(by_block), key=by_block.__getitem__)]
        return [(by_block[run[0]], run[0], run[-1]) for run in stretches]

    def text(self, width: int = 100, *, every: bool = False) -> str:
        """Return everything as text of at most `width` columns; `every` lists skips one by one."""
        parts = [f"{self.name}: {self.headline}"]
        if self.sites:
            parts = [self._table(width, parts[0])]
            lines = [f"survival: {self.rule}"]
            if any(rate.native is not None for rate in self.sites):
                lines.append("native: the drop rate of the drop path that the network has there")
            if any(rate.site.batch_axis is None for rate in self.sites):
                lines.append("batch axis shared: no axis of the branch holds the samples alone")
            stages = self.stages()
            if 1 < len(stages) <= _MOST_STAGES:
                depths = ", ".join(f"{path} {last - first + 1}" for path, first, last in stages)
                lines.append(f"blocks by stage: {depths}")
            parts[0] += "\n" + "\n".join(_wrapped(line, width) for line in lines)
        if self.refused:
            parts.append(_wrapped(f"retrofit would refuse this network: {self.refused}", width))
        if self.skipped:
            title = f"{len(self.skipped)} left alone"
            parts.append(skips_text(self.skipped, width, title=title, every=every))
        return "\n\n".join([*parts, str(self.counts)])

    def _table(self, width: int, title: str) -> str:
        columns = ["block", "module", "add", "kind", "survival", "drop"]
        has_native = any(rate.native is not None for rate in self.sites)
        moved = any(rate.site.batch_axis != 0 for rate in self.sites)
        columns += ["native"] * has_native + ["batch axis"] * moved
        rows = []
        for rate in self.sites:
            p = rate.survival
            drops = (None if p is None else 1.0 - p, rate.native)
            told = [NOTHING if value is None else round(value, 4) for value in (p, *drops)]
            site = rate.site
            cells = [site.block, site.module or ROOT, site.add, rate.kind, *told[:2]]
            cells += told[2:] * has_native
            cells += ["shared" if site.batch_axis is None else site.batch_axis] * moved
            rows.append(cells)
        return render(columns, rows, title=title, width=width)

    def to_json(self) -> dict[str, Any]:
        """Return the inspection as JSON values; a module of "" is the root."""
        sites = [
            {
                **vars(rate.site),
                "stage": rate.stage,
                "survival": rate.survival,
                "drop": None if rate.survival is None else 1.0 - rate.survival,
                "native_drop": rate.native,
            }
            for rate in self.sites
        ]
        skipped = [{"module": s.module, "node": s.node, "reason": s.reason} for s in self.skipped]
        return {
            "model": self.name,
            "rule": self.rule,
            "blocks": self.blocks,
            "total": self.total,
            "sites": sites,
            "skipped": skipped,
            "refused": self.refused or None,
            **vars(self.counts),
        }


def inspect(
    name: str, model: nn.Module, insertion: InsertDropPath, example_inputs: Any = None
) -> Inspection:
    """Look at a network through the eyes of an insertion. Nothing is run or changed.

    Args:
        name: what the reader knows the network as.
        model: any `nn.Module`, or a GraphModule that dropsurgery returned.
        insertion: says which sites there are, which of them count, and their survival.
        example_inputs: as for `trace`; they open blocks whose forward branches on sizes.

    Raises:
        ArgumentError: the rule does not fit the network's number of blocks.
        PassError: `where` matches no site.
        TraceError: the network cannot be turned into a graph.
    """
    module = trace(model, example_inputs=example_inputs)
    found = find_residuals(module, include=insertion.include)
    plan = insertion.plan(module)
    steps = [step for step in plan.steps if step.graph == 0]
    survival = {step.site.add: 1.0 - step.drop_prob for step in steps}
    sites = sorted(found.sites, key=lambda site: site.block)
    order = {node.name: index for index, node in enumerate(module.graph.nodes)}
    refused = ""
    try:
        insertion.check(module)
    except PassError as error:
        refused = error.problem
    return Inspection(
        name=name,
        insertion=insertion,
        sites=tuple(
            SiteRate(
                site=site,
                stage=stage_of(site.module),
                survival=survival.get(site.add),
                native=_native_rate(module, site),
                over=_over(site, sites, order),
            )
            for site in sites
        ),
        total=steps[0].total if steps else 0,
        skipped=tuple(skip for skip in plan.skipped if not _told_already(skip)),
        refused=refused,
        counts=census(module),
    )


def stage_of(module: str) -> str:
    """Return the stage that a block stands in, read off its module path.

    The last number of a path counts the blocks, and what stands before it names the stage, up to
    its first number: layer1.0 is in layer1, stages.2.blocks.5 in stages.2, blocks.7 in blocks.
    """
    parts = module.split(".")
    counters = [index for index, part in enumerate(parts) if re.search(r"\d$", part)]
    if not counters or counters[-1] == 0:
        return module or ROOT
    parts = parts[: counters[-1]]
    first = next((index for index, part in enumerate(parts) if part.isdigit()), len(parts))
    return ".".join(parts[: first + 1])


def _told_already(skip: Skip) -> bool:
    """Say whether a skip is told elsewhere: by a site without a rate, or by the headline."""
    return skip.reason.startswith("not chosen by where=") or not skip.node


def _over(site: Site, sites: list[Site], order: dict[str, int]) -> tuple[int, int] | None:
    if site.kind != "nested":
        return None
    begin, end = order[site.fork], order[site.add]
    inner = [
        index
        for index, other in enumerate(sites)
        if begin <= order[other.fork] and order[other.add] < end
    ]
    return (inner[0], inner[-1]) if inner else None


def _native_rate(module: fx.GraphModule, site: Site) -> float | None:
    if site.native is None:
        return None
    call = next(node for node in module.graph.nodes if node.name == site.native)
    return drops.rate(module.get_submodule(str(call.target)))


def _value(value: object) -> str:
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def _wrapped(text: str, width: int) -> str:
    return textwrap.fill(text, width, subsequent_indent="  ", break_on_hyphens=False)
