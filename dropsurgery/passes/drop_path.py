"""Stochastic depth into a network that was built without it, and out again."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

from torch import fx, nn

from dropsurgery import survival as rules
from dropsurgery.errors import ArgumentError, ArgumentTypeError, PassError
from dropsurgery.graph.drops import is_drop_path, rate, set_rate
from dropsurgery.graph.module import (
    INSERTED,
    NATIVE,
    Skip,
    fresh_path,
    graphs,
    module_path,
    nodes_by_target,
    place_like,
)
from dropsurgery.graph.ops import Kind, kind_of, writes_in_place
from dropsurgery.graph.residual import Residuals, Site, analyse, check_include
from dropsurgery.graph.two_mode import TwoModeGraphModule
from dropsurgery.graph.uses import value_readers
from dropsurgery.layers.drop_path import BREAK_EVEN, DropPath, Mode, check_mode
from dropsurgery.passes.base import Change, Pass, Plan
from dropsurgery.passes.saved_work import SavedWork
from dropsurgery.passes.where import check_where
from dropsurgery.survival import check_probability

_NOT_THE_BATCH = (
    "no axis of the branch is the batch (windows or tokens share it), so that one draw an entry "
    "would drop parts of samples; mode='batch' can"
)
Unit = Literal["block", "add", "position"]
Where = str | tuple[str, ...] | Callable[[Site], bool] | None


@dataclass(frozen=True)
class _Step:
    """One site of one graph: a new layer at `path`, or a native one that gets a new rate."""

    graph: int
    site: Site
    path: str
    drop_prob: float
    mode: Mode
    retune: bool
    total: int


@dataclass(frozen=True)
class InsertDropPath(Pass):
    """Put stochastic depth on the branch of every residual site, right before the add.

    One draw is made for each entry of the batch axis: the leading one, unless the graph proves that
    it is another (tokens first, batch second). A site where it is none at all is left alone.

    The eval output stays bit-identical and the state-dict keys stay the same. A site that already
    carries a drop-path layer (timm's `DropPath`, torchvision's `StochasticDepth`, or one from an
    earlier insertion) gets no second one: its rate is set.

    Args:
        survival: rule(l, L) → survival probability of block l of L, in [0, 1]; see `ds.survival`.
        mode: how a branch is dropped in training. "row": computed for every sample, and masked.
            "subset": computed for B·p random samples of B (in expectation) and added back to them;
            each survives with exactly p, and training saves the rest of the work. BatchNorm in
            the branch sees the chosen samples only. "batch": one draw a mini-batch, on the host;
            a dropped branch does not run, and its BatchNorm statistics stay (the paper's form).
            Where a branch cannot be taken apart from the graph it is masked, and the change says
            so with the reason.
        unit: what l and L count. "block": residual blocks, whose adds share one l. "add": each add.
            "position": every block of the row that a residual block stands in (`features.1.0`,
            `features.2.3`, …), with residual or not, as EfficientNet's authors count.
        where: which sites: a pattern for the module path (`"layer4.*"`, as in `fnmatch`), the name
            of an add, a tuple of such, or a callable that takes a `Site`.
        count: over which sites l and L count: "all", chosen or not, or "chosen". (Unit "position"
            counts every block there is.)
        break_even: with mode "subset", sites that drop less than this are masked: taking rows
            apart costs more than it saves there. In [0, 1]; see `DropPath`.
        include: what else counts as a site: "linear" (adds whose branch is affine), "nested" (long
            skips around other residual sites); see `find_residuals`.

    Raises:
        ArgumentError, ArgumentTypeError: an unknown mode or unit, a rule outside [0, 1].
        PassError: `where` matches no site; or the network's training graph could not be traced.
    """

    survival: rules.Rule
    mode: Mode = "row"
    unit: Unit = "block"
    where: Where = None
    include: tuple[str, ...] = ()
    count: Literal["all", "chosen"] = "all"
    break_even: float = BREAK_EVEN

    def __post_init__(self) -> None:
        check_mode(self.mode)
        check_probability(self.break_even, "break_even")
        if self.unit not in get_args(Unit):
            known = ", ".join(map(repr, get_args(Unit)))
            raise ArgumentError(f"unknown unit {self.unit!r}", fix=f"one of {known}")
        if self.count not in ("all", "chosen"):
            raise ArgumentError(f"unknown count {self.count!r}", fix="'all' or 'chosen'")
        object.__setattr__(self, "include", check_include(self.include))
        if not callable(self.survival):
            raise ArgumentTypeError(
                f"survival is a rule(l, L), got {self.survival!r}",
                fix="ds.survival.linear(0.8), or any function of l and L",
            )
        fix = "'layer4.*', ('layer3.*', 'layer4.*') or lambda site: site.block > 4"
        object.__setattr__(self, "where", check_where(self.where, "sites", fix))

    def check(self, module: fx.GraphModule) -> None:
        """Refuse a network whose training forward is not known."""
        if isinstance(module, TwoModeGraphModule) and module.train_error is not None:
            raise PassError(
                "InsertDropPath needs the training forward, which could not be traced",
                where=module.train_error.where,
                fix=module.train_error.fix,
            ) from module.train_error

    def plan(self, module: fx.GraphModule) -> Plan:
        """Choose the sites, their rates and the paths of the new layers."""
        found = [analyse(module, graph, self.include) for graph in graphs(module)]
        residuals = found[0]
        if not residuals.sites:
            reason = "the network has no residual adds, so there is nothing to drop"
            return Plan(skipped=(*residuals.skipped, Skip("", "", reason)))
        chosen = [site for site in residuals.sites if self._chosen(site)]
        if not chosen:
            known = sorted({site.module or site.add for site in residuals.sites})
            raise PassError(
                f"where={self.where!r} matches none of the {len(residuals.sites)} residual sites",
                where=", ".join(known[:8]) + (", …" if len(known) > 8 else ""),
                fix="a module path or pattern such as 'layer4.*', or a callable that takes a Site",
            )
        depth, total = self.depths(residuals)
        values = _table(self.survival, total).values
        drop_probs = {site: 1.0 - values[l - 1] for site, l in depth.items()}
        users = nodes_by_target(module)
        by_name = {node.name: node for node in module.graph.nodes}
        saved = SavedWork(module, self.mode, self.break_even)
        taken: set[str] = set()
        steps, changes, skipped = [], [], list(residuals.skipped)
        for site in residuals.sites:
            if site not in chosen:
                skipped.append(Skip(site.module, site.add, f"not chosen by where={self.where!r}"))
                continue
            p = drop_probs[site]
            twins = [(0, site), *_twins(site, residuals, found[1:])]
            native = module.get_submodule(_target(module, site)) if site.native else None
            retune = native is not None and self._can_retune(
                native, site, module, users, drop_probs
            )
            alias = _aliased(module, by_name[site.add], by_name[site.branch])
            if alias is not None and native is None:
                reason = f"the add overwrites its branch in place, which '{alias.name}' shares and "
                skipped.append(Skip(site.module, site.add, f"{reason}others read afterwards"))
                continue
            if site.batch_axis is None and native is None and self.mode != "batch":
                skipped.append(Skip(site.module, site.add, _NOT_THE_BATCH))
                continue
            path = (
                _target(module, site)
                if retune
                else fresh_path(module.get_submodule(site.module), site.module, "drop_path", taken)
            )
            taken.add(path)
            mode, remark = saved.judge(twins[-1][1], p)
            steps += [_Step(g, s, path, p, mode, retune, total) for g, s in twins]
            verb = "set" if site.native else "inserted"
            what = f"{verb} '{path}': block {site.block}, survival {1 - p:.4g}, mode {mode!r}"
            what += remark
            changes.append(Change(site.module, site.add, what))
            if len(twins) < len(found):
                reason = "the add is not in the training graph, so training cannot drop its branch"
                skipped.append(Skip(site.module, site.add, reason))
        return Plan(tuple(changes), tuple(skipped), tuple(steps))

    def perform(self, module: fx.GraphModule, plan: Plan) -> None:
        """Add the layers and calls, and set the rates of those that are there."""
        named = [{node.name: node for node in graph.nodes} for graph in graphs(module)]
        # All marks first: a layer that two adds share is set twice, and its first rate counts.
        for step in plan.steps:
            if step.site.native is not None:
                _mark_native(module, named[step.graph][step.site.native])
        for step in plan.steps:
            graph, by_name = graphs(module)[step.graph], named[step.graph]
            add, branch = by_name[step.site.add], by_name[step.site.branch]
            if step.site.native is not None:
                self._set_native(module, by_name[step.site.native], step)
                continue
            if not _has_module(module, step.path):
                layer = self._layer(step)
                layer.train(module.get_submodule(step.site.module).training)
                _add(module, step.path, layer)
            with graph.inserting_before(add):
                call = graph.call_module(step.path, (branch,))
            place_like(call, add)
            late = _late_readers(module, add, branch) if _overwrites(module, add, branch) else []
            # `y.add_(x)` leaves the sum in y; now it lands in the drop path's output instead.
            for user in late:
                user.replace_input_with(branch, add)
            add.replace_input_with(branch, call)
            call.meta[INSERTED] = tuple(user.name for user in late)

    def _set_native(self, module: fx.GraphModule, node: fx.Node, step: _Step) -> None:
        layer = module.get_submodule(str(node.target))
        if step.retune:
            set_rate(layer, step.drop_prob)
            if hasattr(layer, "mode"):
                layer.mode = step.mode  # type: ignore[assignment]
            if isinstance(layer, DropPath):
                layer.break_even, layer.peak = self.break_even, step.drop_prob
            return
        if not _has_module(module, step.path):
            own = self._layer(step)
            own.train(layer.training)
            _add(module, step.path, own)
        node.target = step.path

    def _layer(self, step: _Step) -> DropPath:
        axis = step.site.batch_axis or 0
        return DropPath(step.drop_prob, step.mode, axis=axis, break_even=self.break_even)

    def depths(self, residuals: Residuals) -> tuple[dict[Site, int], int]:
        """Return the l of each site that is counted, and L."""
        sites = residuals.sites
        if self.count == "chosen":
            sites = tuple(site for site in sites if self._chosen(site))
        if self.unit == "add":
            return {site: index for index, site in enumerate(sites, start=1)}, len(sites)
        if self.unit == "position":
            return {site: residuals.positions[site.block] for site in sites}, residuals.places
        blocks = {block: l for l, block in enumerate(sorted({s.block for s in sites}), start=1)}
        return {site: blocks[site.block] for site in sites}, len(blocks)

    def _chosen(self, site: Site) -> bool:
        if self.where is None:
            return True
        if callable(self.where):
            return bool(self.where(site))
        patterns = (self.where,) if isinstance(self.where, str) else self.where
        return any(p == site.add or fnmatch.fnmatchcase(site.module, p) for p in patterns)

    def _can_retune(
        self,
        native: nn.Module,
        site: Site,
        module: fx.GraphModule,
        users: dict[str, list[fx.Node]],
        drop_probs: dict[Site, float],
    ) -> bool:
        """Say whether setting this layer's rate gives every site that calls it the right one."""
        if self.mode != "row" and not isinstance(native, DropPath):
            return False
        calls = {node.name for node in users[_target(module, site)]}
        sharers = [s for s in drop_probs if s.native in calls]
        wanted = {drop_probs[s] for s in sharers}
        return len(wanted) == 1 and all(self._chosen(s) for s in sharers)

    def to_json(self, plan: Plan) -> dict[str, Any]:
        """Return the parameters; what a callable decided is written down as values."""
        rule, where = self.survival, self.where
        sites = [step.site for step in plan.steps if step.graph == 0]
        if type(rule) not in rules.RULES.values():
            rule = _table(rule, plan.steps[0].total if plan.steps else 0)
        if callable(where):
            where = tuple(site.add for site in sites)
        return {
            "pass": self.name,
            "survival": rules.to_json(rule),
            "mode": self.mode,
            "unit": self.unit,
            "where": list(where) if isinstance(where, tuple) else where,
            "include": list(self.include),
            "count": self.count,
            "break_even": self.break_even,
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> InsertDropPath:
        """Build the pass from what `to_json` wrote."""
        where = data["where"]
        return cls(
            rules.from_json(data["survival"]),
            mode=data["mode"],
            unit=data["unit"],
            where=tuple(where) if isinstance(where, list) else where,
            include=tuple(data["include"]),
            count=data["count"],
            break_even=data["break_even"],
        )


@dataclass(frozen=True)
class RemoveDropPath(Pass):
    """Undo `InsertDropPath`: the graph is, as code and as numbers, what it was before.

    Inserted layers are taken out; native drop-path layers get back the rate and mode that they
    had. Native layers whose rate was never set are left alone and listed: they are part of the
    network (`ConvertDropout("identity")` takes every drop out).
    """

    def plan(self, module: fx.GraphModule) -> Plan:
        """List the calls that were inserted and the rates that were set."""
        changes, skipped, steps = [], [], []
        for index, graph in enumerate(graphs(module)):
            for node in graph.nodes:
                path = str(node.target)
                if INSERTED in node.meta:
                    what = f"took out '{path}'"
                elif NATIVE in node.meta:
                    original, before, _ = node.meta[NATIVE]
                    what = f"set '{original}' back to drop probability {before:.4g}"
                else:
                    if node.op == "call_module" and is_drop_path(module.get_submodule(path)):
                        reason = f"'{path}' was there before; ConvertDropout('identity') removes it"
                        skipped.append(Skip(module_path(node), node.name, reason))
                    continue
                steps.append((index, node.name))
                if index == 0:
                    changes.append(Change(module_path(node), node.name, what))
        return Plan(tuple(changes), tuple(skipped), tuple(steps))

    def perform(self, module: fx.GraphModule, plan: Plan) -> None:
        """Take out the calls, then the layers that nothing calls any more."""
        left: set[str] = set()
        for index, name in plan.steps:
            graph = graphs(module)[index]
            node = next(n for n in graph.nodes if n.name == name)
            if INSERTED in node.meta:
                left.add(str(node.target))
                branch = node.args[0]
                for add in list(node.users):
                    for user in [u for u in add.users if u.name in node.meta[INSERTED]]:
                        user.replace_input_with(add, branch)
                node.replace_all_uses_with(branch)
                graph.erase_node(node)
                continue
            original, before, mode = node.meta.pop(NATIVE)
            if node.target != original:
                left.add(str(node.target))
                node.target = original
            layer = module.get_submodule(original)
            set_rate(layer, before)
            if hasattr(layer, "mode"):
                layer.mode = mode
        for path in left - nodes_by_target(module).keys():
            module.delete_submodule(path)


def _overwrites(module: fx.GraphModule, add: fx.Node, branch: fx.Node) -> bool:
    """Say whether an add writes the sum into the branch."""
    return writes_in_place(module, add) and add.args[:1] == (branch,)


def _late_readers(module: fx.GraphModule, add: fx.Node, branch: fx.Node) -> list[fx.Node]:
    """Return the nodes that read `branch` after `add`."""
    order = {node: index for index, node in enumerate(add.graph.nodes)}
    return [user for user in branch.users if user is not add and order[user] > order[add]]


def _aliased(module: fx.GraphModule, add: fx.Node, branch: fx.Node) -> fx.Node | None:
    """Return a node that shares memory with the branch and is read after an in-place add."""
    if not _overwrites(module, add, branch):
        return None

    order = {node: index for index, node in enumerate(add.graph.nodes)}

    def same_memory(node: fx.Node) -> fx.Node | None:
        first = next(iter(node.all_input_nodes), None)
        shares = kind_of(module, node) is Kind.ALIAS or writes_in_place(module, node)
        return first if shares else None

    shared, pending = {branch}, [branch]
    while pending:
        node = pending.pop()
        before = same_memory(node)
        near = [user for user in node.users if order[user] < order[add]]
        after = [user for user in near if same_memory(user) is node]
        fresh = [n for n in (before, *after) if n is not None and n not in shared]
        pending += fresh
        shared.update(fresh)
    for node in shared - {branch}:
        if any(order[user] > order[add] for user in value_readers(node)):
            return node
    return None


def _table(rule: rules.Rule, total: int) -> rules.Table:
    return rules.Table(tuple(rules.survival_of(rule, l, total) for l in range(1, total + 1)))


def _twins(site: Site, first: Residuals, others: list[Residuals]) -> list[tuple[int, Site]]:
    """Return (graph, site) for the same add in the other graphs: the same call, the same turn."""
    turn = [s for s in first.sites if s.call == site.call].index(site)
    twins = []
    for index, other in enumerate(others, start=1):
        same = [s for s in other.sites if s.call == site.call]
        if turn < len(same):
            twins.append((index, same[turn]))
    return twins


def _target(module: fx.GraphModule, site: Site) -> str:
    """Return the path of the drop-path layer that a site already has."""
    return next(str(n.target) for n in module.graph.nodes if n.name == site.native)


def _has_module(module: nn.Module, path: str) -> bool:
    prefix, _, name = path.rpartition(".")
    return name in module.get_submodule(prefix)._modules


def _add(module: nn.Module, path: str, layer: nn.Module) -> None:
    prefix, _, name = path.rpartition(".")
    module.get_submodule(prefix).add_module(name, layer)


def _mark_native(module: fx.GraphModule, node: fx.Node) -> None:
    """Write down, once, what a network's own drop-path call was before its rate is set."""
    if INSERTED not in node.meta and NATIVE not in node.meta:
        layer = module.get_submodule(str(node.target))
        node.meta[NATIVE] = (str(node.target), rate(layer), getattr(layer, "mode", "row"))
