"""From the graph that is read and edited to the one that runs.

A network with drop path has one flat graph: the drop-path layer is a call on the branch, whatever
its mode. Run as it stands, that graph masks. What is compiled from it does not compute what it
drops:

- "subset": the chosen rows of what the branch reads are taken before it, and its result is added
  back to them; where nothing but a ReLU stands between two such blocks, the first one's sum is
  written with the second one's rows at the front, which are then taken as a view;
- "batch": the branch is a function of its own, called only where it survives.

This happens anew at each `recompile`, so that passes, analyses and pickles know nothing of it.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from dropsurgery.graph.memory import Memory
from dropsurgery.graph.module import INSERTED, NATIVE
from dropsurgery.graph.region import NoRegion, Region, Regions
from dropsurgery.layers.compiled_rows import Start, rectify
from dropsurgery.layers.drop_path import DropPath
from dropsurgery.layers.rows import Order, Rows, add_rows, like_rows, split_rows, take_rows

# The attribute under which a traced module gives itself to the functions of its branches.
ITSELF = "_itself"
# What may stand between two blocks whose samples are turned around. It keeps its result for the
# backward: a view of some rows then costs no memory, where a copy of them would.
_RELU = (F.relu, torch.relu, torch.relu_, "relu", "relu_")
# What may stand on the skip of such a block in compiled code: in which order the samples come is
# nothing to them. In eager code the gradient that comes back through them would have to be turned.
_PROJECTIONS = (nn.Conv2d, nn.BatchNorm2d, nn.AvgPool2d)
# What makes a tensor that the backward of none of them asks for: it may be written over.
_FORGOTTEN = (nn.Conv2d, nn.BatchNorm2d, nn.Linear)


def lower(module: fx.GraphModule, graph: fx.Graph) -> fx.Graph | None:
    """Return the graph to run in place of `graph`; None where it is that one itself."""
    calls = working_calls(module, graph)
    if not calls:
        return None
    regions = Regions(module, graph)
    found: dict[fx.Node, Region] = {}
    for node in calls:
        try:
            found[node] = region_of(module, regions, node)
        except NoRegion:
            continue  # it masks; the pass that chose the mode has said so
    if not found:
        return None
    program = _Program(module, regions.memory, found)
    return _Builder(program).run(graph)


def working_calls(module: fx.GraphModule, graph: fx.Graph) -> list[fx.Node]:
    """Return the calls of drop-path layers that a pass set to save work, in order."""
    calls = []
    for node in graph.nodes:
        if node.op == "call_module" and (INSERTED in node.meta or NATIVE in node.meta):
            layer = module.get_submodule(str(node.target))
            if isinstance(layer, DropPath) and layer.mode != "row":
                calls.append(node)
    return calls


def region_of(module: fx.GraphModule, regions: Regions, node: fx.Node) -> Region:
    """Return the region behind a drop-path call.

    Raises:
        NoRegion: its branch can only be masked.
    """
    layer = module.get_submodule(str(node.target))
    users, branch = list(node.users), node.args[0]
    if len(users) != 1 or not isinstance(branch, fx.Node):
        raise NoRegion("something else follows the drop path than its add")
    region = regions.find(branch, users[0], node)
    if getattr(layer, "mode", "") == "batch":
        regions.check_move(region)
    return region


class _Program:
    """What is known of all regions of a graph while it is lowered."""

    def __init__(
        self, module: fx.GraphModule, memory: Memory, regions: dict[fx.Node, Region]
    ) -> None:
        self.module = module
        self.memory = memory
        # Larger ones first: those of a node go from the outermost to the innermost.
        self.calls = dict(sorted(regions.items(), key=lambda item: -len(item[1].nodes)))
        self.owners: dict[fx.Node, list[fx.Node]] = {}
        inside: dict[fx.Node, set[fx.Node]] = {}
        for call, region in list(self.calls.items()):
            nodes = inside[call] = set(region.nodes)
            outer = self.owners.get(region.add, [])
            if any(not nodes <= inside[other] for n in nodes for other in self.owners.get(n, [])):
                del self.calls[call]  # two branches that share a part of their work: it masks
                continue
            for node in (*region.nodes, call):
                self.owners[node] = [*outer, call]
        self.adds = {region.add: call for call, region in self.calls.items()}
        # What a block's skip leads from, and the identities and projections on the way.
        self.forks = {call: self._fork(region.skip) for call, region in self.calls.items()}
        self.readers: dict[fx.Node, fx.Node] = {}  # by what their skips lead from
        for call, way in self.forks.items():
            self.readers.setdefault(way[0], call)
        self.inside = inside
        for call, region in self.calls.items():
            if self.layer(call).mode == "batch":
                # A dropped block hands its skip on as its sum.
                memory.join(region.add, region.skip)

    def layer(self, call: fx.Node) -> DropPath:
        """Return the layer that a drop-path call calls."""
        layer = self.module.get_submodule(str(call.target))
        assert isinstance(layer, DropPath)
        return layer

    def splits(self, call: fx.Node, value: fx.Node) -> bool:
        """Say whether a value that a branch takes rows of is read by others later, and kept.

        What reads it after the rows are taken (the add, a projection on the skip) then adds to one
        gradient of the whole, to which that of the rows is added at once.
        """
        inside, order = self.inside[call], self.memory.order
        first = min(order[user] for user in value.users if user in inside)
        others = [user for user in value.users if user not in inside]
        written = any(n in self.memory.writes for n in self.memory.group(value) if order[n] > first)
        return not written and any(order[user] > first for user in others)

    def follows(self, call: fx.Node) -> tuple[fx.Node, tuple[fx.Node, ...]] | None:
        """Return the block that alone reads the ReLU of a sum, and the modules between the two.

        None unless both blocks take subsets of one batch.
        """
        users = list(self.calls[call].add.users)
        if len(users) != 1 or not self._is_relu(users[0]):
            return None
        value = users[0]
        between = (value,) if value.op == "call_module" else ()
        after = self.readers.get(value)
        if after is None or not self.alone(after) or self.is_batch(call):
            return None
        region, following = self.calls[call], self.calls[after]
        together = self.owners.get(region.add) == self.owners.get(following.add)
        alike = self.layer(call).axis == self.layer(after).axis and not region.in_place
        return (after, (*between, *self.forks[after][1:])) if together and alike else None

    def _is_relu(self, node: fx.Node) -> bool:
        if node.op == "call_module":
            return self._type(node) is nn.ReLU
        return node.target in _RELU

    def _fork(self, skip: fx.Node) -> tuple[fx.Node, ...]:
        way: tuple[fx.Node, ...] = (skip,)
        while way[0].op == "call_module" and len(way[0].users) == 1:
            if self._type(way[0]) not in (nn.Identity, *_PROJECTIONS):
                break
            way = (way[0].all_input_nodes[0], *way)
        return way

    def projects(self, call: fx.Node) -> bool:
        """Say whether there is more than identities on a block's skip."""
        return any(self._type(node) is not nn.Identity for node in self.forks[call][1:])

    def _type(self, node: fx.Node) -> type:
        return type(self.module.get_submodule(str(node.target)))

    def alone(self, call: fx.Node) -> bool:
        """Say whether the rows of a branch and its add alone read the fork, as it is."""
        region, way = self.calls[call], self.forks[call]
        readers, order = {*self.inside[call], *way[1:], region.add}, self.memory.order
        if self.is_batch(call) or region.in_place or not readers.issuperset(way[0].users):
            return False
        axis = region.gathered.get(way[0])
        if axis != self.layer(call).axis or (axis != 0 and self.projects(call)):
            return False
        group = self.memory.group(way[0])
        return not any(n in self.memory.writes and order[n] > order[way[0]] for n in group)

    def maker(self, call: fx.Node) -> fx.Node | None:
        """Return what makes a branch that nothing asks for once it is added, where that is so."""
        branch = self.calls[call].branch
        made = branch.op == "call_module" and self._type(branch) in _FORGOTTEN
        return branch if made and set(branch.users) == {call} else None

    def is_batch(self, call: fx.Node) -> bool:
        """Say whether a call drops whole mini-batches."""
        return self.layer(call).mode == "batch"


class _Builder:
    """Writes the nodes of a graph, or of one branch of it, anew, each with its view of its inputs.

    A node inside a region sees the boundary of the region through the chosen rows. That view is
    made when the first node asks for it.

    Args:
        program: the regions.
        call: whose branch is written as a function of its own; None for the whole graph.
        within: the regions around that call.
    """

    def __init__(
        self, program: _Program, call: fx.Node | None = None, within: tuple[fx.Node, ...] = ()
    ) -> None:
        self.program = program
        self.graph = fx.Graph()
        self.call = call
        self.within = within
        self.inputs: dict[fx.Node, fx.Node] = {}
        self.made: dict[fx.Node, fx.Node] = {}
        self.rows: dict[fx.Node, fx.Node] = {}
        self.orders: dict[fx.Node, fx.Node] = {}
        # By the ReLU of a sum: which sample stands first in it.
        self.starts: dict[fx.Node, fx.Node] = {}
        self.views: dict[tuple[fx.Node, fx.Node], fx.Node] = {}

    def run(self, graph: fx.Graph) -> fx.Graph:
        """Write a whole graph."""
        for node in graph.nodes:
            self.write(node)
        return self.graph

    def write(self, node: fx.Node) -> None:
        """Write one node, unless it belongs to a branch that is written when its add is."""
        chain = self._chain(node)
        if node in self.program.calls or any(self.program.is_batch(call) for call in chain):
            return
        call = self.program.adds.get(node)
        if node in self.starts:
            self.made[node] = self._write_relu(node, chain)
        elif call is None:
            self.made[node] = self.graph.node_copy(node, lambda value: self.see(value, chain))
        elif self.program.is_batch(call):
            self.made[node] = self._write_branch(call, chain)
        else:
            region, axis = self.program.calls[call], self.program.layer(call).axis
            inner = (*chain, call)
            branch = self.see(region.branch, inner)
            skip = self.see(region.skip, chain)
            rows, order = self.rows[call], self.orders.get(call)
            arguments: list[Any] = [skip, branch, rows, axis, region.in_place]
            to = self._start(call, chain)
            if order is not None or to is not None:
                arguments += [order, to or 0]
            maker = self.program.maker(call)
            if maker is None:
                self.made[node] = self._function(add_rows, *arguments)
            else:
                layer = self.graph.get_attr(str(maker.target))
                self.made[node] = self._function(_add_over, layer, *arguments)

    def _write_relu(self, node: fx.Node, chain: tuple[fx.Node, ...]) -> fx.Node:
        """Write a ReLU between two blocks."""
        value, to = self.see(node.all_input_nodes[0], chain), self.starts[node]
        if node.op == "call_module":
            return self._function(_relu, value, to, self.graph.get_attr(str(node.target)))
        in_place = node.target in (torch.relu_, "relu_") or True in node.args
        in_place = bool(in_place or node.kwargs.get("inplace"))
        return self._function(_relu, value, to, None, in_place)

    def see(self, value: fx.Node, chain: tuple[fx.Node, ...]) -> fx.Node:
        """Return what a node inside the regions `chain` (outermost first) sees of a value."""
        if not chain:
            return self._base(value)
        call, outer = chain[-1], chain[:-1]
        region = self.program.calls[call]
        if value in self.program.inside[call]:
            return self._base(value)
        if (call, value) in self.views:
            return self.views[call, value]
        if value in region.gathered:
            rows, seen = self._rows(value, region.gathered[value], chain), self.see(value, outer)
            axis = region.gathered[value]
            if value is self.program.forks[call][0] and self._is_turned(call):
                first, projects = self.starts.get(value, 0), self.program.projects(call)
                self.orders[call] = order = self._function(_order, rows, first, projects)
                parts = self._function(split_rows, seen, rows, axis, order)
                self._replace(value, outer, self._function(operator.getitem, parts, 0))
                view = self._function(operator.getitem, parts, 1)
            elif self.program.splits(call, value):
                parts = self._function(split_rows, seen, rows, axis)
                self._replace(value, outer, self._function(operator.getitem, parts, 0))
                view = self._function(operator.getitem, parts, 1)
            else:
                view = self._function(take_rows, seen, rows, axis)
        elif value in region.sizes and region.asked:
            view = self.graph.node_copy(value, lambda v: self._see_size(v, chain))
        else:
            return self.see(value, outer)
        self.views[call, value] = view
        return view

    def _replace(self, value: fx.Node, chain: tuple[fx.Node, ...], whole: fx.Node) -> None:
        """Let the later readers of a value inside the regions `chain` see `whole` in its place."""
        while chain and value not in self.program.inside[chain[-1]]:
            if (chain[-1], value) in self.views:
                self.views[chain[-1], value] = whole
                return
            chain = chain[:-1]
        self.made[value] = whole

    def _see_size(self, value: fx.Node, chain: tuple[fx.Node, ...]) -> fx.Node:
        """Return what a size that is computed again is computed from."""
        call, outer = chain[-1], chain[:-1]
        region = self.program.calls[call]
        if value not in region.asked or (call, value) in self.views:
            return self.see(value, chain)
        axis = region.asked[value]
        rows, seen = self._rows(value, axis, chain), self.see(value, outer)
        # Not kept as the view of the value: its entries are not those of the chosen rows.
        return self._function(like_rows, seen, rows, axis)

    def _rows(self, value: fx.Node, axis: int, chain: tuple[fx.Node, ...]) -> fx.Node:
        """Return the draw of a region, made here where it is the first to be asked for."""
        call = chain[-1]
        if call not in self.rows:
            layer = self.graph.get_attr(str(call.target))
            seen = self.see(value, chain[:-1])
            pixelwise = pixelwise_within(self.program.module, self.program.calls[call])
            self.rows[call] = self._function(_draw_rows, layer, seen, axis, pixelwise)
        return self.rows[call]

    def _start(self, call: fx.Node, chain: tuple[fx.Node, ...]) -> fx.Node | None:
        """Return which sample is to stand first in a block's sum: the next branch's first one."""
        following = self.program.follows(call)
        if following is None:
            return None
        after, between = following
        modules = [self.graph.get_attr(str(node.target)) for node in between]
        value, axis = next(iter(self.program.calls[call].gathered.items()))
        drawn = self._rows(value, axis, (*chain, after))
        projects = self.program.projects(after)
        start = self._function(_first, self.rows[call], drawn, projects, *modules)
        self.starts[self.program.forks[after][0]] = start
        return start

    def _is_turned(self, call: fx.Node) -> bool:
        """Say whether a block's fork, or the gradient of its sum, may be turned around."""
        program = self.program
        turned = program.forks[call][0] in self.starts or program.follows(call) is not None
        return turned and program.alone(call)

    def _base(self, value: fx.Node) -> fx.Node:
        """Return a value as it is outside of every region that this builder writes."""
        if value in self.made:
            return self.made[value]
        if value.op == "get_attr":
            self.made[value] = self.graph.node_copy(value)
        else:
            self.inputs[value] = self.made[value] = self._placeholder(value)
        return self.made[value]

    def _placeholder(self, value: fx.Node) -> fx.Node:
        last = next(reversed(self.inputs.values()), None)
        place = self.graph._root if last is None else last
        with self.graph.inserting_after(place):
            return self.graph.placeholder(value.name)

    def _chain(self, node: fx.Node) -> tuple[fx.Node, ...]:
        owners = self.program.owners.get(node, [])
        known = {*self.within, self.call}
        return tuple(call for call in owners if call not in known)

    def _write_branch(self, call: fx.Node, chain: tuple[fx.Node, ...]) -> fx.Node:
        """Write a branch as a function of its own, and the call that runs it or not."""
        program, region = self.program, self.program.calls[call]
        within = (*self.within, *chain, *(() if self.call is None else (self.call,)))
        inner = _Builder(program, call, within)
        for node in region.nodes:
            inner.write(node)
        inner.graph.output(inner.see(region.branch, ()))
        copied = self._may_be_written(region)
        run = _runner(compile_graph(inner.graph)[0], region.in_place, copied)
        layer = self.graph.get_attr(str(call.target))
        module = self.graph.get_attr(ITSELF)
        values = [self.see(value, chain) for value in inner.inputs]
        return self._function(run, layer, module, self.see(region.skip, chain), *values)

    def _may_be_written(self, region: Region) -> bool:
        """Say whether something after the add may write into the memory that holds its sum."""
        memory = self.program.memory
        after = memory.order[region.add]
        return any(n in memory.writes and memory.order[n] > after for n in memory.group(region.add))

    def _function(self, function: Callable[..., Any], *arguments: Any) -> fx.Node:
        return self.graph.call_function(function, arguments)


def pixelwise_within(module: fx.GraphModule, region: Region) -> bool:
    """Say whether a branch holds a convolution of one pixel, without a stride."""
    return any(
        isinstance(layer, nn.Conv2d) and {*layer.kernel_size, *layer.stride} == {1}
        for node in region.nodes
        if node.op == "call_module"
        for layer in module.get_submodule(str(node.target)).modules()
    )


def _draw_rows(layer: DropPath, x: Tensor, axis: int, pixelwise: bool) -> Rows | None:
    return layer.rows(x, axis, pixelwise)


def _order(rows: Rows | None, first: Start, projects: bool) -> Order | Tensor | None:
    if isinstance(first, Tensor):
        return first
    return None if projects or rows is None or rows.window is None else Order(first)


def _first(rows: Rows | None, following: Rows | None, projects: bool, *between: nn.Module) -> Start:
    """Return the sample that is to stand first in a sum.

    A hook on a module between the blocks is shown the samples as they stand in the batch, and a
    module that was put there later is shown them so too.

    Args:
        rows: what was drawn for the block of the sum.
        following: what was drawn for the next block.
        projects: whether that one has a projection on its skip.
        between: the modules on the way, and on that skip.
    """
    if rows is None or following is None or not all(map(_transparent, between)):
        return 0
    if following.traced is not None:
        return following.traced[0]
    if projects or rows.window is None or following.window is None:
        return 0
    return following.window[0]


def _relu(x: Tensor, to: Start, module: nn.Module | None, in_place: bool = False) -> Tensor:
    """Run the ReLU of a sum in which the sample `to` stands first; compiled, without its module."""
    if isinstance(to, Tensor):
        return rectify(x)
    return F.relu(x, in_place) if module is None else module(x)


def _transparent(module: nn.Module) -> bool:
    """Say whether samples may go through a module in any order, and nobody looks into it."""
    return type(module) in (nn.ReLU, nn.Identity, *_PROJECTIONS) and not _hooked(module)


def _add_over(
    maker: nn.Module, skip: Tensor, branch: Tensor, rows: Rows | None, *rest: Any
) -> Tensor:
    """Add the rows of a branch that nothing asks for afterwards, but for a hook on its maker."""
    over = type(maker) in _FORGOTTEN and not _hooked(maker)
    return add_rows(skip, branch, rows, *rest, over=over)


def _hooked(module: nn.Module) -> bool:
    backward = module._backward_hooks or module._backward_pre_hooks
    return bool(module._forward_hooks or module._forward_pre_hooks or backward)


def compile_graph(graph: fx.Graph) -> tuple[Callable[..., Any], str]:
    """Return the function (module, *inputs) → value that a graph describes, and its code."""
    code = graph.python_code("self")
    namespace = dict(code.globals)
    exec(compile(code.src, "<dropsurgery: lowered graph>", "exec"), namespace)
    forward: Callable[..., Any] = namespace["forward"]
    return forward, code.src


def _runner(branch: Callable[..., Any], in_place: bool, copied: bool) -> Callable[..., Tensor]:
    """Return the function that runs a branch where it survives, and adds it.

    Args:
        branch: the branch's own function.
        in_place: the add writes the sum into the skip.
        copied: the sum is written to later, so that a dropped block may not hand on its skip.
    """

    def run_or_skip(layer: DropPath, module: nn.Module, skip: Tensor, *values: Any) -> Tensor:
        if not layer.survives():
            return skip.clone() if copied and not in_place else skip
        result = branch(module, *values)
        if layer.training and layer.drop_prob > 0.0:
            result = result * (1.0 / (1.0 - layer.drop_prob))
        return skip.add_(result) if in_place else skip + result

    # torch.compile keeps what it compiled by code object, up to a limit: one for each branch.
    run_or_skip.__code__ = run_or_skip.__code__.replace()
    return run_or_skip
