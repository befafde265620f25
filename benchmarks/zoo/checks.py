"""Everything that is asked of one model, as one row of plain data."""

from __future__ import annotations

import fnmatch
import itertools
import re
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import fx, nn

import dropsurgery as ds
from benchmarks.zoo import catalogue
from benchmarks.zoo.catalogue import Entry
from benchmarks.zoo.oracle import (
    Comparison,
    Key,
    Native,
    compare,
    fits,
    native_drops,
    sites_by_key,
    where_pattern,
)
from dropsurgery.errors import ArgumentError
from dropsurgery.graph.batch import batch_axes
from dropsurgery.graph.residual import Site
from dropsurgery.graph.shapes import BATCH_META

BATCH = 4
LARGE = 200  # side of the input from which half a batch must do
TRIED = 2  # rules whose training output is compared, before the table of native rates
UNITS = ("block", "position", "add")
Row = dict[str, Any]


def check(entry: Entry, structure_only: bool = False) -> Row:
    """Check one model. What fails is written into the row; nothing is raised."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    start = time.perf_counter()
    row: Row = {"source": entry.source, "family": entry.family, "name": entry.name}
    try:
        row.update(status="ok")
        structure(entry, row)
        if row["traced"] and not structure_only and row["parameters"] < catalogue.META_ONLY:
            numerics(entry, row)
    except Exception as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{frame.filename.rpartition('site-packages/')[2]}:{frame.lineno}"
        row.update(status="error", error=f"{one_line(error)} ({where})")
    row["seconds"] = round(time.perf_counter() - start, 1)
    return row


# --- structure: nothing is run, so that weights are not needed -----------------------------------


def structure(entry: Entry, row: Row) -> None:
    """Trace, find the sites, and compare sites and rates with the network's own drop path."""
    plain, graph = _traced(entry, native=False)
    assert plain is not None
    row["parameters"] = sum(p.numel() for p in plain.parameters())
    shape: tuple[int, ...] | None = None
    if not isinstance(graph, fx.GraphModule):
        shape = catalogue.default_size(entry, plain)
        graph = _traced(entry, native=False, shape=shape)[1]
        row["needs_examples"] = True
    row["traced"] = isinstance(graph, fx.GraphModule)
    if not isinstance(graph, fx.GraphModule):
        row["trace_error"] = one_line(graph)
        return
    start = time.perf_counter()
    residuals = ds.find_residuals(graph)
    row["find_seconds"] = round(time.perf_counter() - start, 4)
    row["nodes"] = len(graph.graph.nodes)
    row["sites"] = dict(Counter(site.kind for site in residuals.sites))
    row["blocks"] = residuals.blocks
    row["skipped"] = dict(Counter(_group(skip.reason) for skip in residuals.skipped))
    _, native = _traced(entry, native=True, shape=shape)
    if isinstance(native, Exception):
        raise native
    if native is None:
        return
    drops = native_drops(native)
    if not drops.hidden:
        oracle(graph, drops, row)
        if shape is not None:  # by default there is no graph, and nothing is found
            result = row["oracle"]
            result["default"] = {**result["default"], "found": False, "exact": False}
            result["option"] = {"example_inputs": list(shape), **result["option"]}
        return
    # Sites are hidden in modules that branch on sizes: example inputs answer for these.
    shape = catalogue.default_size(entry, plain)
    graphs = [_traced(entry, native=flag, shape=shape)[1] for flag in (False, True)]
    inside, with_drops = graphs
    if isinstance(inside, fx.GraphModule) and isinstance(with_drops, fx.GraphModule):
        default = _summary(compare(drops, _sites(graph, ())))
        oracle(inside, native_drops(with_drops), row)
        row["oracle"]["default"] = default
        row["oracle"]["option"] = {"example_inputs": list(shape), **row["oracle"]["option"]}
    else:
        oracle(graph, drops, row)


def _traced(
    entry: Entry, *, native: bool, shape: tuple[int, ...] | None = None
) -> tuple[nn.Module | None, fx.GraphModule | Exception | None]:
    """Build on the meta device and trace; on the CPU where the model asks for real values.

    Args:
        entry: the model.
        native: with the network's own drop path.
        shape: of one sample of the example inputs; None for none.
    """
    error: Exception | None = None
    for device in ("meta", "cpu"):
        model = None
        try:
            with torch.device(device):
                model = catalogue.build(entry, native=native)
            example = None if shape is None else torch.empty(2, *shape, device=device)
            return model, None if model is None else ds.trace(model.eval(), example_inputs=example)
        except Exception as problem:
            error = problem
    if model is None:
        raise error or RuntimeError("the model cannot be built")
    return model, error


def _group(reason: str) -> str:
    """Return a reason without the names in it, so that like reasons can be counted."""
    text = re.sub(r"'[^']*'", "'…'", reason)
    kept = re.match(r"(\w+) is kept whole", text)
    return f"{kept[1]} is kept whole" if kept else re.split(r"[:;(]", text)[0].strip()


def oracle(graph: fx.GraphModule, native: Native, row: Row) -> None:
    """Compare sites and rates with what the network drops by itself."""
    default = _sites(graph, ())
    comparison = compare(native, default)
    result: Row = {
        "native": len(native.rates),
        "slots": len(native.slots),
        "elsewhere": len(native.elsewhere),
        "partial": len(native.partial),
        "unread": len(native.unread),
        "hidden": list(native.hidden),
        "default": _summary(comparison),
        "residual": bool(native.rates or native.hidden),
    }
    row["oracle"] = result
    option, sites, comparison = _best_option(graph, native, default, comparison)
    result.update(option=option, best=_summary(comparison))
    if comparison.exact and native.rates:
        rules = _rules(graph, native, comparison, option, sites)
        # A rule at the rate that the network was built with is the one that its authors use.
        result["rules"] = sorted(rules, key=lambda rule: rule["rate"] != catalogue.RATE)
        result["rates"] = [native.rates.get(key, 0.0) for key in sites]


def _sites(graph: fx.GraphModule, include: tuple[str, ...]) -> dict[Key, Site]:
    return sites_by_key(graph, ds.find_residuals(graph, include=include))


def _summary(comparison: Comparison) -> Row:
    return {
        "found": comparison.found,
        "exact": comparison.exact,
        "missed": [f"{call}#{turn}" for call, turn in comparison.missed],
        "extra": [f"{call}#{turn}" for call, turn in comparison.extra],
        "at_zero": len(comparison.at_zero),
    }


def _best_option(
    graph: fx.GraphModule, native: Native, default: dict[Key, Site], comparison: Comparison
) -> tuple[Row, dict[Key, Site], Comparison]:
    """Return the first option that is exact, else the best: none, one include, one where."""
    options: list[tuple[Row, dict[Key, Site], Comparison]] = [({}, default, comparison)]
    if not comparison.exact:
        for include in ("linear", "nested"):
            sites = _sites(graph, (include,))
            options.append(({"include": [include]}, sites, compare(native, sites)))
        if comparison.found and native.rates:
            extra = set(comparison.extra)
            patterns = where_pattern(
                {site.module for key, site in default.items() if key in native.rates},
                {site.module for key, site in default.items() if key in extra},
            )
            if patterns:
                kept = _chosen(default, patterns)
                options.append(({"where": list(patterns)}, kept, compare(native, kept)))
    return min(options, key=lambda o: (not o[2].exact, not o[2].found, len(o[2].extra)))


def _chosen(sites: Mapping[Key, Site], where: tuple[str, ...]) -> dict[Key, Site]:
    return {
        key: site
        for key, site in sites.items()
        if any(fnmatch.fnmatchcase(site.module, pattern) for pattern in where)
    }


def insert(
    rule: Callable[[int, int], float], unit: str, option: Mapping[str, Any]
) -> ds.InsertDropPath:
    """Return the pass with a rule, a unit and one option."""
    return ds.InsertDropPath(
        rule,
        unit=unit,  # type: ignore[arg-type]
        where=tuple(option["where"]) if "where" in option else None,
        include=tuple(option.get("include", ())),
        count="chosen" if "where" in option else "all",
    )


def _rules(
    graph: fx.GraphModule,
    native: Native,
    comparison: Comparison,
    option: Row,
    sites: Mapping[Key, Site],
) -> Iterator[Row]:
    """Yield every (rule, unit, rate) that gives all native rates."""
    names = {site.add: key for key, site in sites.items()}
    for unit, name in itertools.product(UNITS, RULES):
        if (unit, name) == ("position", "per_stage"):
            continue  # the stages of blocks without a residual are not known

        def drops(final: float, unit: str = unit, name: str = name) -> dict[Key, float]:
            depths = _depths(graph, unit, option) if name == "per_stage" else ()
            plan = insert(make_rule(name, final, depths), unit, option).plan(graph)
            return {names[s.site.add]: s.drop_prob for s in plan.steps if s.site.add in names}

        try:
            rate = fits(native, comparison, drops)
        except ArgumentError:  # stages that do not add up to what this unit counts
            continue
        if rate is not None:
            depths = _depths(graph, unit, option) if name == "per_stage" else ()
            yield {"rule": name, "unit": unit, "rate": rate, "depths": list(depths)}


# Most timm families take their rates from torch.linspace, in float32; the last bit of an output
# shows which of the two it was.
SINGLE = "linspace, single"
STAGE_SINGLE = "per_stage, single"
ROUNDED = {"linspace": SINGLE, "per_stage": STAGE_SINGLE}
RULES = ("linspace", "efficientnet", "constant", "linear", "per_stage")


def make_rule(name: str, final: float, depths: tuple[int, ...] = ()) -> ds.survival.Rule:
    """Return a rule of dropsurgery by name."""
    if name == "per_stage":
        return ds.survival.per_stage(final, depths)
    if name == STAGE_SINGLE:
        return ds.survival.per_stage(final, depths, single=True)
    if name == SINGLE:
        return ds.survival.linspace(final, single=True)
    return ds.survival.by_name(name, final)


def _depths(graph: fx.GraphModule, unit: str, option: Mapping[str, Any]) -> tuple[int, ...]:
    """Return how many l each stage holds, a stage being the module that holds the blocks."""
    sites = ds.find_residuals(graph, include=tuple(option.get("include", ()))).sites
    stages = [(site.block if unit == "block" else n, site) for n, site in enumerate(sites)]
    counted = {number: site.call.rpartition(".")[0] for number, site in stages}
    return tuple(len(list(group)) for _, group in itertools.groupby(counted.values()))


# --- numerics: networks are run ------------------------------------------------------------------


def numerics(entry: Entry, row: Row) -> None:
    """Check what the retrofit promises, and compare training outputs with the native network's."""
    torch.manual_seed(0)
    shape, size = smallest_input(entry)
    model = catalogue.build(entry, native=False, size=size)
    assert model is not None
    randomize(model)
    x = torch.randn(BATCH if shape[-1] < LARGE else BATCH // 2, *shape)
    result: Row = {"input": list(shape), "built_for": size}
    row["run"] = result
    state = {key: value.clone() for key, value in model.state_dict().items()}
    oracle = row.get("oracle", {})
    sized = row.get("needs_examples") or "example_inputs" in oracle.get("option", {})
    examples = x if sized else None
    _promises(model.eval(), x, result, examples)
    if not row.get("needs_examples"):
        _batch(model, x, result)
    _training_step(model, x, result, examples)
    model.zero_grad()
    if oracle.get("rates"):
        with catalogue.without_init():
            native = catalogue.build(entry, native=True, size=size)
        assert native is not None
        result["train"] = _same_training(native, model, state, x, oracle, examples)


def smallest_input(entry: Entry) -> tuple[tuple[int, ...], int | None]:
    """Return the smallest input that a model takes in training, and the side to build it for."""
    probe = catalogue.build(entry, native=False) if _needs_values(entry) else None
    with torch.device("meta"):
        plain = probe if probe is not None else catalogue.build(entry, native=False)
    assert plain is not None
    default = catalogue.default_size(entry, plain)
    if probe is not None:
        return default, None
    for shape, size in catalogue.input_shapes(entry, plain):
        try:
            with torch.device("meta"):
                model = plain if size is None else catalogue.build(entry, native=False, size=size)
                assert model is not None
                model.train()(torch.empty(BATCH, *shape))
                model.eval()(torch.empty(BATCH, *shape))
        except Exception:
            continue
        return shape, size
    return default, None


def _needs_values(entry: Entry) -> bool:
    """Say whether a model cannot be built on the meta device."""
    try:
        with torch.device("meta"):
            catalogue.build(entry, native=False)
    except Exception:
        return True
    return False


def randomize(model: nn.Module, seed: int = 0) -> None:
    """Make every branch count: random BatchNorm statistics, no gain at zero or next to it."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            mean, var = getattr(module, "running_mean", None), getattr(module, "running_var", None)
            if isinstance(mean, torch.Tensor) and isinstance(var, torch.Tensor):
                mean.uniform_(-0.2, 0.2, generator=generator)
                var.uniform_(0.5, 1.5, generator=generator)
        for name, parameter in model.named_parameters():
            gain = parameter.ndim <= 1 and not name.endswith("bias")
            if gain and parameter.abs().max() < 1e-2:
                parameter.uniform_(0.05, 0.2, generator=generator)


def _promises(
    model: nn.Module, x: torch.Tensor, result: Row, examples: torch.Tensor | None
) -> None:
    """Eval output, state-dict keys, strict loading both ways, and removal."""
    before = ds.trace(model, example_inputs=examples)
    net = ds.retrofit(model if examples is None else before, 0.5).eval()
    with torch.no_grad():
        expected, got = list(tensors_of(model(x))), list(tensors_of(net(x)))
    result["finite"] = all(bool(torch.isfinite(t).all()) for t in expected)
    result["eval_identical"] = _identical(expected, got)
    result["keys"] = list(model.state_dict()) == list(net.state_dict())
    net.load_state_dict(model.state_dict(), strict=True)
    model.load_state_dict(net.state_dict(), strict=True)
    result["strict"] = True
    insertion = ds.InsertDropPath(ds.survival.linear(0.5))
    after = ds.apply(model, insertion, ds.RemoveDropPath(), example_inputs=examples).module
    result["removed"] = before.code == after.code and (
        [name for name, _ in before.named_modules()] == [name for name, _ in after.named_modules()]
    )


def _batch(model: nn.Module, x: torch.Tensor, result: Row) -> None:
    """Count the operands of sites by what is claimed of their batch axis and what sizes show.

    The claim is made without example inputs, the sizes are those of two batches.
    """
    plain, sized = ds.trace(model), ds.trace(model, example_inputs=x)
    claims = batch_axes(plain, plain.graph)
    shown = {node.name: node.meta.get(BATCH_META) for node in sized.graph.nodes}
    counts: Counter[str] = Counter()
    nodes = {node.name: node for node in plain.graph.nodes}
    for site in ds.find_residuals(plain).sites:
        for name in (site.branch, site.skip):
            claim, probed = claims[nodes[name]], shown.get(name)
            if claim.kind == "unknown" or probed is None or probed[0] == "unknown":
                counts["open" if claim.kind == "unknown" else "unchecked"] += 1
            else:
                counts["agree" if tuple(claim) == tuple(probed) else "contradict"] += 1
    result["batch"] = dict(counts)


def _training_step(
    model: nn.Module, x: torch.Tensor, result: Row, examples: torch.Tensor | None
) -> None:
    """One backward pass with every site dropping at 0.5."""
    insertion = ds.InsertDropPath(ds.survival.constant(0.5))
    net = ds.apply(model.train(), insertion, example_inputs=examples).module
    torch.manual_seed(1)
    loss = sum(t.float().square().mean() for t in tensors_of(net(x)) if t.is_floating_point())
    assert isinstance(loss, torch.Tensor)
    loss.backward()
    grads = [p.grad for p in net.parameters() if p.grad is not None]
    result["gradients"] = len(grads)
    result["gradients_finite"] = bool(grads) and all(bool(torch.isfinite(g).all()) for g in grads)


def _same_training(
    native: nn.Module,
    plain: nn.Module,
    state: dict[str, torch.Tensor],
    x: torch.Tensor,
    oracle: Row,
    examples: torch.Tensor | None,
) -> Row:
    """Compare the training output with the native network's, under one seed and one state."""
    option = oracle["option"]
    native.load_state_dict(state, strict=True)
    expected = _seeded(native.train(), x)
    best: Row = {}
    choices = oracle["rules"][:TRIED]
    rounded = [{**c, "rule": ROUNDED[c["rule"]]} for c in choices if c["rule"] in ROUNDED]
    for choice in (*choices, *rounded, {"rule": "table", "unit": "add"}):
        if choice["rule"] == "table":
            net = _by_table(plain, oracle, option, examples)
        else:
            rule = make_rule(choice["rule"], 1.0 - choice["rate"], tuple(choice["depths"]))
            insertion = insert(rule, choice["unit"], option)
            net = ds.apply(plain, insertion, example_inputs=examples).module
        net.load_state_dict(state, strict=True)
        got = _seeded(net.train(), x)
        result = {
            "by": choice,
            "identical": _identical(expected, got),
            "difference": _difference(expected, got),
        }
        if result["identical"]:
            return result
        if not best or result["difference"] < best["difference"]:
            best = result
    return best


def _by_table(
    plain: nn.Module, oracle: Row, option: Row, examples: torch.Tensor | None
) -> nn.Module:
    """Insert the native rates one by one."""
    include = tuple(option.get("include", ()))
    traced = ds.trace(plain, example_inputs=examples)
    residuals = ds.find_residuals(traced, include=include)
    rates = iter(oracle["rates"])
    where = tuple(option["where"]) if "where" in option else None
    chosen = [s for s in residuals.sites if where is None or _chosen({("", 0): s}, where)]
    values = [1.0 - next(rates) for _ in chosen]
    rule = ds.survival.table(tuple(values))
    return ds.apply(traced, insert(rule, "add", option)).module


def _seeded(model: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    torch.manual_seed(2)
    with torch.no_grad():
        return list(tensors_of(model(x)))


def tensors_of(value: object) -> Iterator[torch.Tensor]:
    """Yield the tensors of an output, in order."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_of(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors_of(item)


def _identical(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    return len(first) == len(second) and all(
        torch.equal(a.nan_to_num(), b.nan_to_num()) and torch.equal(a.isnan(), b.isnan())
        for a, b in zip(first, second, strict=True)
    )


def _difference(first: list[torch.Tensor], second: list[torch.Tensor]) -> float:
    """Return the largest difference, relative to the largest value."""
    worst = 0.0
    for a, b in zip(first, second, strict=True):
        if a.is_floating_point():
            scale = max(float(a.abs().max()), 1e-30)
            worst = max(worst, float((a - b).abs().max()) / scale)
    return worst


def one_line(error: object) -> str:
    """Return an error as one line, without the folders of the machine."""
    text = re.sub(r"\S*/site-packages/", "", " ".join(str(error).split()))
    return f"{type(error).__name__}: {text}"[:500]
