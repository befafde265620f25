"""Which adds a network drops by itself, and how they compare with the sites that are found.

An add has a key that does not depend on node names: the call of the module whose forward holds it,
and which of that call's adds of data it is. The network built with drop path and the one built
without differ in their drop-path calls only, so that one add has one key in both.
"""

from __future__ import annotations

import fnmatch
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

from torch import fx, nn

from dropsurgery.graph.leaves import DROP_PATHS, is_one_of
from dropsurgery.graph.module import called_module, owner_call
from dropsurgery.graph.ops import Kind, Role, kind_of, roles
from dropsurgery.graph.residual import Residuals, Site

Key = tuple[str, int]

# What may lie between a drop and the add that it belongs to: gains, slices, other layouts.
_PASSED = frozenset({Kind.ALIAS, Kind.DROP, Kind.SLICE, Kind.ITEM})


@dataclass(frozen=True)
class Native:
    """What the drop-path calls of a network do.

    Attributes:
        rates: drop probability by add, in the order in which the adds run; zero rates left out.
        slots: adds behind a drop-path attribute that is at rate 0.
        order: position of every add of data.
        elsewhere: calls at a nonzero rate that belong to no add: they drop a whole path.
        partial: the adds in `rates` whose call also drops values that do not go into the add.
        unread: calls whose result nobody reads, so that nothing is dropped.
        hidden: drop-path layers at a nonzero rate inside a module that the graph keeps whole.
    """

    rates: dict[Key, float]
    slots: frozenset[Key]
    order: dict[Key, int]
    elsewhere: tuple[str, ...]
    partial: frozenset[Key]
    unread: tuple[str, ...]
    hidden: tuple[str, ...]


@dataclass(frozen=True)
class Comparison:
    """Sites against native drops.

    Attributes:
        missed: adds that the network drops and that are no sites.
        extra: sites that the network never drops.
        at_zero: sites whose native rate is 0 because the network's rates start there.
    """

    missed: tuple[Key, ...]
    extra: tuple[Key, ...]
    at_zero: tuple[Key, ...]

    @property
    def found(self) -> bool:
        """No native site is missed."""
        return not self.missed

    @property
    def exact(self) -> bool:
        """No native site is missed and there is no other."""
        return not self.missed and not self.extra


def add_keys(module: fx.GraphModule) -> dict[fx.Node, Key]:
    """Map every add of data to its key, in the order in which they run."""
    graph = module.graph
    role = roles(module, graph)
    turn: Counter[str] = Counter()
    keys = {}
    for node in graph.nodes:
        if role[node] is Role.DATA and kind_of(module, node) is Kind.ADD:
            call = owner_call(node)[1]
            keys[node] = (call, turn[call])
            turn[call] += 1
    return keys


def sites_by_key(module: fx.GraphModule, residuals: Residuals) -> dict[Key, Site]:
    """Map the key of every site's add to the site; `module` is the graph that they are of."""
    names = {node.name: key for node, key in add_keys(module).items()}
    return {names[site.add]: site for site in residuals.sites}


def native_drops(module: fx.GraphModule) -> Native:
    """Read the drop-path calls of a traced network that was built with its own drop path."""
    role = roles(module, module.graph)
    keys = add_keys(module)
    index = {node: position for position, node in enumerate(module.graph.nodes)}
    rates: dict[Key, float] = {}
    slots: set[Key] = set()
    partial: set[Key] = set()
    called: set[int] = set()
    elsewhere, unread = [], []
    for node in module.graph.nodes:
        rate = _rate(module, node)
        if rate is None:
            continue
        called.add(id(called_module(module, node)))
        adds, leaks = _adds_behind(module, node, keys, index, role)
        if rate == 0.0:
            slots.update(adds)
        elif adds:
            rates.update(dict.fromkeys(adds, rate))
            partial.update(adds if leaks else ())
        elif node.users:
            elsewhere.append(node.name)
        else:
            unread.append(node.name)
    whole = {str(node.target) for node in module.graph.nodes if node.op == "call_module"}
    hidden = [
        path
        for path, layer in module.named_modules()
        if is_one_of(layer, DROP_PATHS)
        and id(layer) not in called
        and probability(layer) > 0
        and any(path.startswith(f"{leaf}.") for leaf in whole)
    ]
    order = {key: position for position, key in enumerate(keys.values())}
    rates = dict(sorted(rates.items(), key=lambda item: order[item[0]]))
    return Native(rates, frozenset(slots - rates.keys()), order, tuple(elsewhere),
                  frozenset(partial), tuple(unread), tuple(hidden))  # fmt: skip


def probability(layer: nn.Module) -> float:
    """Return the drop probability of timm's, torchvision's or our drop-path layer."""
    value = getattr(layer, "drop_prob", None)
    return float(layer.p if value is None else value)  # type: ignore[arg-type]


def _rate(module: fx.GraphModule, node: fx.Node) -> float | None:
    """Return the rate of a drop-path call; None for every other node.

    At rate 0 timm's networks put an Identity where the drop path would be, under the same name.
    """
    layer = called_module(module, node)
    if layer is None:
        return None
    if is_one_of(layer, DROP_PATHS):
        return probability(layer)
    name = str(node.target).rpartition(".")[2]
    named = re.match(r"drop_?path|stochastic_depth", name) is not None
    return 0.0 if isinstance(layer, nn.Identity) and named else None


def _adds_behind(
    module: fx.GraphModule,
    drop: fx.Node,
    keys: Mapping[fx.Node, Key],
    index: Mapping[fx.Node, int],
    role: Mapping[fx.Node, Role],
) -> tuple[set[Key], bool]:
    """Return the adds whose branch a drop-path call is, and whether it drops more than these.

    Where the other operand is computed from the dropped values too, they are the skip of the next
    block: the drop is then on the path itself and belongs to no add.
    """
    adds: set[Key] = set()
    leaks, seen, stack = False, {drop}, [drop]
    while stack:
        node = stack.pop()
        for user in node.users:
            if user in seen:
                continue
            seen.add(user)
            if user in keys:
                others = [value for value in user.all_input_nodes if value is not node]
                if any(_depends(other, drop, index) for other in others):
                    leaks = True
                else:
                    adds.add(keys[user])
            elif _passes(module, user, role):
                stack.append(user)
            elif kind_of(module, user) is not Kind.SHAPE:
                leaks = True
    return adds, leaks


def _passes(module: fx.GraphModule, node: fx.Node, role: Mapping[fx.Node, Role]) -> bool:
    kind = kind_of(module, node)
    data = sum(role[value] is Role.DATA for value in node.all_input_nodes)
    return kind in _PASSED or (kind is Kind.PRODUCT and data == 1)


def _depends(node: fx.Node, ancestor: fx.Node, index: Mapping[fx.Node, int]) -> bool:
    """Say whether `node` is computed from `ancestor`."""
    seen, stack = {node}, [node]
    while stack:
        current = stack.pop()
        if current is ancestor:
            return True
        for value in current.all_input_nodes:
            if index[value] >= index[ancestor] and value not in seen:
                seen.add(value)
                stack.append(value)
    return False


def compare(native: Native, sites: Mapping[Key, Site]) -> Comparison:
    """Compare the adds that a network drops with the sites found on it without its drop path.

    A site at native rate 0 is where the rates start when the network has a drop-path attribute
    there and drops at a nonzero rate later; or, where networks leave the attribute out at rate 0,
    when it is the first block.
    """
    missed = tuple(key for key in native.rates if key not in sites) + tuple(
        (path, -1) for path in native.hidden
    )
    positions = [native.order[key] for key in native.rates]
    first, last = min(positions, default=-1), max(positions, default=-1)
    extra: list[Key] = []
    at_zero: list[Key] = []
    for key, site in sites.items():
        if key in native.rates:
            continue
        position = native.order[key]
        if native.slots:
            starts = key in native.slots and position < last
        else:
            starts = site.block == 1 and position < first
        (at_zero if starts else extra).append(key)
    return Comparison(missed, tuple(extra), tuple(at_zero))


def where_pattern(
    wanted: Iterable[str], unwanted: Iterable[str], most: int = 3
) -> tuple[str, ...] | None:
    """Return at most `most` module-path patterns that match all of `wanted`, none of `unwanted`.

    Short patterns come first. None where there are no such patterns.
    """
    rest, avoid = set(wanted), set(unwanted)
    candidates = {pattern for path in rest for pattern in _patterns(path)}
    good = [p for p in candidates if not any(fnmatch.fnmatchcase(path, p) for path in avoid)]
    chosen: list[str] = []
    while rest and len(chosen) < most:
        covers = {p: sum(fnmatch.fnmatchcase(path, p) for path in rest) for p in good}
        best = min(good, key=lambda p: (-covers[p], *_looseness(p)), default=None)
        if best is None or not covers[best]:
            return None
        chosen.append(best)
        rest = {path for path in rest if not fnmatch.fnmatchcase(path, best)}
    return None if rest or not chosen else tuple(chosen)


def _looseness(pattern: str) -> tuple[bool, bool, int, int, str]:
    counted = re.search(r"\[0-\d\](?!\*)", pattern) is not None
    return pattern.startswith("*"), counted, pattern.count("*"), len(pattern), pattern


def _patterns(path: str) -> Iterator[str]:
    """Yield patterns that match a path: by a leading part, by a trailing part, numbers open."""
    parts = path.split(".")
    for number in (None, "*", "[0-9]*"):
        forms = [number if number and part.isdigit() else part for part in parts]
        yield ".".join(forms)
        for cut in range(1, len(forms)):
            yield ".".join(forms[:cut]) + ".*"
            yield "*." + ".".join(forms[cut:])
    for place, part in enumerate(parts):
        if len(part) == 1 and part.isdigit():
            head = ".".join([*parts[:place], f"[0-{part}]"])
            yield head
            yield f"{head}.*"


def fits(
    native: Native,
    comparison: Comparison,
    drops: Callable[[float], Mapping[Key, float]],
    tolerance: float = 1e-6,
) -> float | None:
    """Return the rate at which a rule gives every site its native drop probability.

    Args:
        native: the network's own drops.
        comparison: which sites are at rate 0.
        drops: the rule: final survival probability → drop probability by add.
        tolerance: largest difference of a drop probability.

    Returns:
        The rule's largest drop probability, or None where the rule does not fit.
    """
    key = max(native.rates, key=lambda k: native.rates[k])
    share = drops(0.5).get(key, 0.0) / 0.5
    # A network names its rate in few digits; what is left over is rounding.
    rate = round(native.rates[key] / share, 6) if share > 0 else 2.0
    if rate > 1.0:
        return None
    ours = drops(1.0 - rate)
    wanted = {**native.rates, **dict.fromkeys(comparison.at_zero, 0.0)}
    same = all(abs(ours.get(k, 0.0) - value) <= tolerance for k, value in wanted.items())
    return rate if same else None
