"""Deciding where each affine map of a network goes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch
from torch import Tensor, fx, nn

from dropsurgery.graph.affine import Refused, is_norm
from dropsurgery.graph.channel_maps import ChannelMap, read_map
from dropsurgery.graph.dense import can_be_plain, needs_dense
from dropsurgery.graph.gauge import Gauge, Part
from dropsurgery.graph.ledger import Deposit, LayerState, Ledger, MapState, Move, held_in
from dropsurgery.graph.memory import Memory
from dropsurgery.graph.module import Skip, fresh_path, module_path
from dropsurgery.graph.stored import Product
from dropsurgery.graph.transfer import Scene, Spread, is_pure
from dropsurgery.graph.two_mode import TwoModeGraphModule
from dropsurgery.passes.affine_dtypes import check_identity, common_dtype
from dropsurgery.passes.affine_steps import Rewrite, Write
from dropsurgery.passes.base import Change, Plan

# Into more layers than these a scale goes back only where the way forward is no shorter: maps that
# pass a whole residual stream are multiplied with each other there.
_NEAR = 4


class Planner:
    """Plans on a graph that it does not change.

    For every map y = s·x + t, in the order of the graph, its scale and its shift leave it where
    they can: back, where that is possible, else forward. The scale goes first where it goes back
    (what is left of the shift is then t), and last where it goes forward (so that a shift that
    goes forward, too, need not be divided by a scale of zero). A map is tried again once others
    have gone.

    Args:
        module: the traced module.
        border_maps: see `FoldAffine`.
    """

    def __init__(self, module: fx.GraphModule, border_maps: str = "never") -> None:
        self.module, self.border_maps = module, border_maps
        graph = module.graph
        self.nodes = {node.name: node for node in graph.nodes}
        modules: Mapping[str, nn.Module] = dict(module.named_modules(remove_duplicate=False))
        self.ledger = Ledger(module, self.nodes, modules)
        self.reasons: dict[str, str] = {}
        found = self._read_maps()
        norms = [self.nodes[name] for name, read in found.items() if read.norm is not None]
        self.memory = Memory(module, graph, fresh=norms)
        self.scene = Scene(module, self.ledger, self.memory, borders=border_maps != "never")
        for name, read in found.items():
            self._place(name, read)
        self.moves: list[Move] = []
        self.dtypes: dict[str, torch.dtype] = {}
        self.kept: set[str] = set()
        self.fresh: dict[str, tuple[str, ...]] = {}
        self.passed: dict[str, None] = {}

    def _read_maps(self) -> dict[str, ChannelMap]:
        found: dict[str, ChannelMap] = {}
        off = self.module.training and isinstance(self.module, TwoModeGraphModule)
        for name, node in self.nodes.items():
            called = self.ledger.called(node)
            try:
                if off and is_norm(node, called):
                    raise Refused(
                        "the network is in training mode, where its forward is another: "
                        "call .eval() on it first"
                    )
                read = read_map(self.module, node, called)
            except Refused as refused:
                self.reasons[name] = str(refused)
                continue
            if read is not None and not off:
                found[name] = read
        return found

    def _place(self, name: str, read: ChannelMap) -> None:
        """Enter a map whose channels' axis is proved."""
        axis = read.axis
        if read.norm is not None:
            rank = self.scene.shapes.rank(read.data)
            if read.norm.ranks is not None and rank is not None and rank not in read.norm.ranks:
                self.reasons[name] = f"it does not take an input with {rank} axes"
                return
        elif read.rank:
            shape = self.scene.shapes.shape(read.data)
            if shape is None or len(shape) < read.rank:
                return  # the constant may give the value more axes
            if axis is not None:
                if shape[axis] != len(read.affine.scale):
                    return
                axis += len(shape)
        self.ledger.add_map(name, read, axis)

    def plan(self) -> Plan:
        """Return what is done with each map, in the order of the graph."""
        pending = [name for name in self.nodes if name in self.ledger.maps]
        for _ in range(3):
            before = len(self.moves)
            for name in pending:
                if not self.ledger.maps[name].is_gone:
                    self._try(name)
            if len(self.moves) == before:
                break
        writes, rewrites = self._writes(), self._rewrites()
        rewrites += [Rewrite(name, "identity") for name in self.passed]
        steps = (*self.moves, *writes, *rewrites)
        return Plan(tuple(self._changes(writes, rewrites)), tuple(self._skips()), steps)

    # --- one map --------------------------------------------------------------------------------

    def _try(self, name: str) -> None:
        """Move what can be moved of one map; take all of it back where that is no gain."""
        state = self.ledger.maps[name]
        if name in self.kept:
            return
        undo: list[dict[str, MapState | LayerState]] = []
        count = len(self.moves)
        reasons: list[str] = []
        if state.scales:
            far = self._is_far(name)
            if far or not self._move(name, "scale", (False,), undo, reasons):
                if state.shifts:
                    self._move(name, "shift", (True,), undo, reasons)
                self._move(name, "scale", (True, False) if far else (True,), undo, reasons)
        if self.ledger.maps[name].shifts:
            self._move(name, "shift", (False, True), undo, reasons)
        if len(self.moves) == count:
            self.reasons[name] = "; ".join(dict.fromkeys(reasons))
            return
        try:
            self._check_result(name)
        except Refused as refused:
            for old in reversed(undo):
                self.ledger.restore(old)
            del self.moves[count:]
            self.reasons[name] = "; ".join(dict.fromkeys([*reasons, str(refused)]))
            self.kept.add(name)
            return
        self.reasons[name] = "; ".join(dict.fromkeys(reasons))

    def _is_far(self, name: str) -> bool:
        """Say whether a scale's way back leads into many layers, and that forward into fewer."""
        counts = []
        for forward in (False, True):
            try:
                counts.append(len(self._find(name, "scale", forward)[0].deposits))
            except Refused:
                return False
            if counts[0] <= _NEAR:
                return False
        return counts[1] < counts[0]

    def _move(
        self,
        name: str,
        part: Part,
        ways: tuple[bool, ...],
        undo: list[dict[str, MapState | LayerState]],
        reasons: list[str],
    ) -> bool:
        """Move a part of a map the first way that works."""
        for forward in ways:
            try:
                move, dtype = self._find(name, part, forward)
                old = self.ledger.apply(move)
                try:
                    self.ledger.check(old)
                    self._check_held(old, dtype)
                except Refused:
                    self.ledger.restore(old)
                    raise
            except Refused as refused:
                way = "forward" if forward else "back"
                reasons.append(f"its {part} cannot go {way}: {refused}")
                continue
            self.moves.append(move)
            self.passed.update(dict.fromkeys(wire.name for wire in self.passing))
            undo.append(old)
            if dtype is not None:
                self.dtypes.update(dict.fromkeys((name, *old), dtype))
            return True
        return False

    def _check_held(self, names: Iterable[str], dtype: torch.dtype | None) -> None:
        """Raise Refused where a single addition or multiplication is not held any more."""
        for name in names:
            state = self.ledger.maps.get(name)
            partly = state is not None and state.scales != state.shifts
            if partly and state is not None and dtype and not held_in(state.affine, dtype):
                raise Refused(f"{state.read.label} would not be held in {dtype}")

    def _find(self, name: str, part: Part, forward: bool) -> tuple[Move, torch.dtype | None]:
        node, state = self.nodes[name], self.ledger.maps[name]
        vector = self._vector(name, part, forward)
        wire = node if forward else state.read.data
        if forward and state.read.tail:
            self._check_tail(node, state, part, vector)
        self.passing: list[fx.Node] = []
        gauge = Gauge(state.axis, vector, part)
        if gauge.is_identity():
            check_identity(node, state.read)
            return Move(name, part, forward, ()), None
        spread = self.scene.spread(node, wire, gauge)
        dtype = common_dtype(self.scene, state, spread, forward)
        self._check_borders(state, spread)
        self.passing = [wire for wire in spread.gauges if self.scene.is_identity(wire)]
        return Move(name, part, forward, spread.as_deposits()), dtype

    def _check_borders(self, state: MapState, spread: Spread) -> None:
        """Raise Refused where maps of borders cost more than the addition that they save.

        An addition reads and writes every entry of its input; a map of the borders every entry of
        the convolution's output, and is read itself.
        """
        found = [self.nodes[name] for name, port in spread.deposits if port == "border"]
        if not found:
            return
        if state.scales or len(found) > 1:
            raise Refused("it would need maps of borders and stay in part, or need several")
        before, after = (
            (
                math.prod(value.meta["tensor_meta"].shape[1:])
                for value in (state.read.data, found[0])
            )
            if "tensor_meta" in state.read.data.meta
            else (0, 1)
        )
        if self.border_maps == "cost" and 3 * after > 2 * before:
            raise Refused(
                f"the map of the borders of {self.scene.label(found[0])} would cost more than the "
                'addition that it saves (border_maps="always" makes it)'
            )

    def _vector(self, name: str, part: Part, forward: bool) -> Tensor:
        state = self.ledger.maps[name]
        scale = state.affine.scale
        vector = self.ledger.start(name, part, forward)
        if part == "scale":
            if state.shifts and forward and not bool((scale != 0).all()):
                raise Refused("it is zero for some channels")
            return vector + 0.0  # no negative zeros
        if not bool(vector.isfinite().all()):
            raise Refused("the scale is zero for some channels")
        return vector

    def _check_tail(self, node: fx.Node, state: MapState, part: Part, vector: Tensor) -> None:
        known = {node: Gauge(state.axis, vector, part)}
        self.scene.through_map(node, replace(state, scales=True, shifts=True), known)

    def _check_result(self, name: str) -> None:
        """Raise Refused where what is left of a map costs more than the map, or is not held."""
        state, node = self.ledger.maps[name], self.nodes[name]
        data = state.read.data
        if state.is_gone:
            self.fresh[name] = self._check_removal(node, data)
            self.scene.joined(node, data)
            return
        if self._rank(state) is None:
            raise Refused("its rank is not known, so that no part of it can stay alone")
        if needs_dense(node, data):
            raise Refused("only a part of it could move, and its input is not contiguous")
        dtype = self._dtype(name, state)
        if dtype is None:
            raise Refused("the dtype of its input is not known: trace with example inputs")
        if not held_in(state.affine, dtype):
            raise Refused(f"what would stay of it cannot be held in {dtype}")

    def _rank(self, state: MapState) -> int | None:
        rank, norm = self.scene.shapes.rank(state.read.data), state.read.norm
        if rank is None and norm is not None and norm.ranks is not None and len(norm.ranks) == 1:
            return norm.ranks[0]
        return rank

    def _dtype(self, name: str, state: MapState) -> torch.dtype | None:
        """Return the dtype of what stays of a map: that of the values it is joined to."""
        norm, meta = state.read.norm, state.read.data.meta.get("tensor_meta")
        if name in self.dtypes:
            return self.dtypes[name]
        if norm is not None and norm.promotes:
            return norm.mean.dtype
        return getattr(meta, "dtype", None) or state.read.dtype

    def _check_removal(self, node: fx.Node, data: fx.Node) -> tuple[str, ...]:
        """Return which writes in place have to become plain operations when a map goes.

        The map's output was a new value. Once it is its input, what wrote into the one writes
        into the other.

        Raises:
            Refused: one of them cannot be made plain.
        """
        own = self.memory.group(node)
        group = [*dict.fromkeys((*own, *self.memory.group(data)))]
        tail = self.ledger.maps[node.name].read.tail
        layers = [self.ledger.modules[f"{node.target}.{name}"] for name in tail]
        writes = [value for value in own if value in self.memory.writes]
        if any(getattr(layer, "inplace", False) for layer in layers):
            writes.append(node)
        if not writes:
            if is_pure(self.memory, group):
                return ()
            raise Refused("its input is written in place while its output is read")
        self.memory.writes.add(node) if node in writes else None
        given = any(value.op in ("placeholder", "get_attr") for value in group)
        if not given and is_pure(self.memory, group):
            return ()
        self.memory.writes -= set(writes)
        fixed = all(
            value is node or can_be_plain(value, self.scene.called(value)) for value in writes
        )
        if fixed and is_pure(self.memory, group):
            return tuple(value.name for value in writes)
        self.memory.writes |= set(writes) - {node}
        raise Refused("what is written in place behind it would be written into its input")

    # --- all of them ----------------------------------------------------------------------------

    def _writes(self) -> list[Write]:
        """Return the new weights: one set for all calls of a layer that get the same."""
        groups: list[list[str]] = []
        by_layer: dict[int, list[list[str]]] = {}
        used = {deposit.node for move in self.moves for deposit in move.deposits}
        layers = {name: state for name, state in self.ledger.layers.items() if name in used}
        for name, state in layers.items():
            layer = state.carrier.module
            found = by_layer.setdefault(id(layer or state.carrier), [])
            for group in found:
                if layers[group[0]].same(state):
                    group.append(name)
                    break
            else:
                found.append([name])
                groups.append(found[-1])
        taken: set[str] = set()
        own: set[int] = set()
        writes = []
        for names in groups:
            first = layers[names[0]]
            layer, path = first.carrier.module, ""
            if isinstance(first.carrier, Product) and first.adds:
                (operand, _) = first.carrier.operands
                path = self._fresh(str(operand.target if operand else ""), "linear", taken)
            elif layer is not None:
                calls = {call.name for call in self.scene.uses.calls(layer)}
                all_fold = calls <= set(layers)
                if id(layer) in own or not all_fold or self.scene.uses.is_within(layer):
                    path = self._fresh(str(self.nodes[names[0]].target), "folded", taken)
                else:
                    own.add(id(layer))
            border, size = "", tuple[int, ...]()
            if first.border is not None:
                node = self.nodes[names[0]]
                target = str(node.target) if node.op == "call_module" else self._own_path(node)
                border = self._fresh(target, "border", taken)
                shape = node.all_input_nodes[0].meta["tensor_meta"].shape
                size = tuple(shape[-(first.carrier.spatial or 0) :])
            writes.append(Write(tuple(names), path, border, size, first.adds))
        # A copy is made of the layer as it was, so before the layer itself is written.
        return sorted(writes, key=lambda write: not write.copy_to)

    def _fresh(self, target: str, suffix: str, taken: set[str]) -> str:
        prefix, _, name = target.rpartition(".")
        path = fresh_path(self.ledger.modules[prefix], prefix, f"{name}_{suffix}", taken)
        taken.add(path)
        return path

    def _rewrites(self) -> list[Rewrite]:
        taken: set[str] = set()
        found = []
        for name, state in self.ledger.maps.items():
            read, node = state.read, self.nodes[name]
            if not state.touched and state.scales == read.scales and state.shifts == read.shifts:
                continue
            if state.is_gone:
                dense, fresh = needs_dense(node, read.data), self.fresh[name]
                found.append(Rewrite(name, "gone", fresh=fresh, dense=dense))
                continue
            target = str(node.target) if node.op == "call_module" else self._own_path(node)
            if state.scales and state.shifts:
                path, rank = self._fresh(target, "folded", taken), self._rank(state)
                found.append(Rewrite(name, "norm", path, (rank or 2) - 2))
                continue
            how = "scale" if state.scales else "shift"
            rank = self._rank(state)
            ones = 0 if state.axis is None or rank is None else rank - 1 - state.axis
            path, dtype = self._fresh(target, how, taken), str(self._dtype(name, state))
            found.append(Rewrite(name, how, path, ones, dtype.removeprefix("torch.")))
        return found

    def _own_path(self, node: fx.Node) -> str:
        owner = module_path(node)
        return f"{owner}.{node.name}" if owner else node.name

    def _skips(self) -> list[Skip]:
        """Say why what is left of the maps is left."""
        found = []
        for name, reason in self.reasons.items():
            state = self.ledger.maps.get(name)
            if state is not None and state.is_gone:
                continue
            if state is not None and state.read.norm is None:
                continue
            node = self.nodes[name]
            left = (
                ""
                if state is None or (state.scales and state.shifts)
                else ("its scale stays: " if state.scales else "its shift stays: ")
            )
            found.append(Skip(module_path(node), name, f"{self.scene.label(node)}: {left}{reason}"))
        return found

    def _changes(self, writes: list[Write], rewrites: list[Rewrite]) -> list[Change]:
        """Say for every map where its parts went."""
        copies = {name: write.copy_to for write in writes for name in write.nodes if write.copy_to}
        parts: dict[str, list[str]] = {}
        for move in self.moves:
            targets = [self._target(deposit, copies) for deposit in move.deposits]
            where = ", ".join(dict.fromkeys(targets)) or "nothing: it changes nothing"
            parts.setdefault(move.source, []).append(f"{move.part} into {where}")
        results = {rewrite.node: rewrite for rewrite in rewrites}
        changes = []
        for name, found in parts.items():
            node, state = self.nodes[name], self.ledger.maps[name]
            what = f"{state.read.label}: {'; '.join(found)}"
            if not state.is_gone:
                verb = "multiplies" if state.scales else "adds"
                what += f"; '{results[name].path}' only {verb}"
            elif state.read.tail:
                what += f"; its {' and '.join(state.read.tail)} stays"
            changes.append(Change(module_path(node), name, what))
        for name in self.passed:
            what = f"{self.scene.label(self.nodes[name])} removed: in eval mode it is the identity"
            changes.append(Change(module_path(self.nodes[name]), name, what))
        if changes and isinstance(self.module, TwoModeGraphModule):
            gone = "the training graph was dropped: this is an inference graph"
            changes.append(Change("", "", gone))
        return changes

    def _target(self, deposit: Deposit, copies: Mapping[str, str]) -> str:
        copy, state = copies.get(deposit.node), self.ledger.layers.get(deposit.node)
        if state is None:
            return self.scene.label(self.nodes[deposit.node])
        label = state.carrier.label
        if copy is not None:
            now = "a linear layer now" if isinstance(state.carrier, Product) else "a copy"
            return f"{label} ({now}, '{copy}')"
        weight, operand = state.carrier.weight, state.carrier.operands[0]
        node = self.nodes[deposit.node]
        own = node.target
        if operand is not None or node.op == "get_attr":
            own = str((operand or node).target).rpartition(".")[0]
        owner = self.ledger.modules[str(own)]
        tied = [p for p in self.scene.uses.holders(weight) if self.ledger.modules[p] is not owner]
        told = f" (its weight is no longer tied to that of {', '.join(map(repr, tied))})"
        return label + told * bool(tied)
