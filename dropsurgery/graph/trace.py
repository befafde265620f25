"""nn.Module → fx.GraphModule that keeps keys, flags and modes."""

from __future__ import annotations

import copy
import inspect
import linecache
import traceback
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter
from torch.utils import _pytree as pytree

from dropsurgery.errors import ArgumentTypeError, TraceError
from dropsurgery.graph.calls import bind, follow
from dropsurgery.graph.clone import clone_structure
from dropsurgery.graph.example_run import from_record, to_record
from dropsurgery.graph.leaves import Leaves
from dropsurgery.graph.modes import asks_by_identity
from dropsurgery.graph.module import (
    HISTORY,
    called_module,
    fresh_path,
    graphs,
    owner_call,
    place_like,
)
from dropsurgery.graph.shapes import record_batch, record_shapes
from dropsurgery.graph.traced import TracedModule
from dropsurgery.graph.tracer import Given, ModeTracer
from dropsurgery.graph.two_mode import TwoModeGraphModule
from dropsurgery.layers.attention import ScaledDotProductAttention
from dropsurgery.layers.functions import FollowTraining

_REGISTRIES = frozenset(nn.Module().__dict__)


def trace(
    model: nn.Module,
    *,
    example_inputs: Any = None,
    leaf_modules: Iterable[Any] = (),
) -> fx.GraphModule:
    """Turn a network into a graph module that behaves like it in both modes.

    The result has the state-dict keys of `model` in their order, the same `training` flag on every
    submodule, and follows `train()` and `eval()` afterwards: drop layers stay leaves, functional
    dropout and the dropout of `scaled_dot_product_attention` become modules without state, and a
    Python `if self.training:` that changes the graph gives a module that holds both graphs. Each
    node keeps `meta["nn_module_stack"]`.

    `model` is not changed. Its modules are cloned; its parameters and buffers are shared, so that
    training the result trains `model` too (`copy.deepcopy` it first to keep them apart).

    Arguments of `forward` that have defaults are fixed at them, unless `example_inputs` gives them;
    they are then no inputs of the graph.

    Two things of Python do not reach a graph: `x += y` becomes `x = x + y`, as in every fx trace
    (write `x.add_(y)` where another name of x must see the sum), and numbers that a forward counts
    in attributes of its module keep the value of the moment.

    Args:
        model: the network, in either mode. A GraphModule is copied, not traced again.
        example_inputs: a tensor, a sequence of positional arguments or a mapping of arguments by
            name. Where given, every node's `meta["tensor_meta"]` holds its shape and dtype, and
            `meta["dropsurgery_batch_axis"]`, as (kind, axis), what a second batch size showed;
            nothing is computed and no statistics are updated. A branch of the forward on sizes or
            ranks then goes as the examples have it, and the graph asserts that later inputs agree.
        leaf_modules: further modules to keep whole: classes, dotted paths, or module objects.

    Raises:
        TraceError: the forward cannot be traced, or `example_inputs` do not fit it. The message
            names the module path, the source line, and what can be done.
    """
    _check_model(model)
    if isinstance(model, fx.GraphModule):
        module = _copy_graph_module(model)
    else:
        given = _given(model, example_inputs)
        leaves = Leaves(leaf_modules, model, sized=bool(given.examples))
        module = _trace_modes(model, leaves, given)
    _copy_flags(module, model)
    if example_inputs is not None:
        inputs = arguments(module, example_inputs)
        record_shapes(module, inputs)
        record_batch(module, inputs)
    return module


def trace_like(model: nn.Module, record: Mapping[str, Any]) -> fx.GraphModule:
    """Trace a model as the one was traced that has this `history`: same leaves, same inputs."""
    _check_model(model)
    inputs = record.get("inputs") or {}
    examples = tuple(from_record(entry) for entry in inputs.get("examples", ()))
    given = Given(tuple(inputs.get("names", ())), inputs.get("star", 0), examples)
    if isinstance(model, fx.GraphModule):
        module = _copy_graph_module(model)
    else:
        leaves = Leaves(record.get("leaf_modules", ()), model, sized=bool(examples))
        module = _trace_modes(model, leaves, given)
    _copy_flags(module, model)
    return module


def keep_eval(module: fx.GraphModule) -> None:
    """Make a traced module an inference graph, in place.

    The training graph of a two-mode module is dropped, and calls that follow the mode become
    plain calls with their flag off.
    """
    if isinstance(module, TwoModeGraphModule):
        module.set_training(None)
    for node in list(module.graph.nodes):
        layer = called_module(module, node)
        if isinstance(layer, FollowTraining):
            with module.graph.inserting_before(node):
                kwargs = {**node.kwargs, layer.argument: False}
                plain = module.graph.call_function(layer.function, node.args, kwargs)
            place_like(plain, node)
            node.replace_all_uses_with(plain)
            module.graph.erase_node(node)
            module.delete_submodule(str(node.target))
    module.recompile()


def arguments(module: fx.GraphModule, example_inputs: Any) -> tuple[Any, ...]:
    """Return example inputs as positional arguments in the order of the graph's placeholders."""
    names = [str(node.target) for node in module.graph.nodes if node.op == "placeholder"]
    if isinstance(example_inputs, Mapping):
        unknown = sorted(set(example_inputs) - set(names))
        missing = [name for name in names if name not in example_inputs]
        if unknown or missing:
            raise TraceError(
                f"example_inputs names {sorted(example_inputs)}, the network takes {names}",
                fix="one entry for each input",
            )
        return tuple(example_inputs[name] for name in names)
    values = as_tuple(example_inputs)
    if len(values) != len(names):
        raise TraceError(
            f"example_inputs holds {len(values)} inputs, the network takes {len(names)}: {names}",
            fix="one example for each input, in the order of forward's arguments",
        )
    return values


def as_tuple(example_inputs: Any) -> tuple[Any, ...]:
    """Return positional inputs as a tuple: a single tensor is one input."""
    if isinstance(example_inputs, Tensor):
        return (example_inputs,)
    if isinstance(example_inputs, Sequence) and not isinstance(example_inputs, str):
        return tuple(example_inputs)
    raise ArgumentTypeError(
        f"example_inputs is a tensor or a sequence of inputs, got {type(example_inputs).__name__}"
    )


def _check_model(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise ArgumentTypeError(
            f"expected a torch.nn.Module, got {type(model).__name__}",
            fix="pass the model object, not its class or its state dict",
        )
    kind = type(model).__name__
    for wrapper, inner in (("OptimizedModule", "_orig_mod"), ("DistributedDataParallel", "module")):
        if kind == wrapper:
            raise TraceError(f"{kind} cannot be traced", fix=f"pass model.{inner}")
    if isinstance(model, nn.DataParallel):
        raise TraceError(f"{kind} cannot be traced", fix="pass model.module")
    if isinstance(model, torch.jit.ScriptModule):
        raise TraceError("a TorchScript module cannot be traced", fix="pass the eager model")
    for path, parameter in [*model.named_parameters(), *model.named_buffers()]:
        if isinstance(parameter, UninitializedParameter | UninitializedBuffer):
            raise TraceError(
                "a lazy module has no weights yet",
                where=path,
                fix="run the model once before the surgery",
            )


def _given(model: nn.Module, example_inputs: Any) -> Given:
    """Return which forward arguments the examples supply."""
    parameters = list(inspect.signature(type(model).forward).parameters.values())[1:]
    by_position = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    named = [p.name for p in parameters if p.kind in by_position]
    star = any(p.kind is p.VAR_POSITIONAL for p in parameters)
    if example_inputs is None:
        # A forward of nothing but *inputs is taken to have one.
        return Given(star=1 if star and not named else 0)
    if isinstance(example_inputs, Mapping):
        return Given(tuple(example_inputs), examples=_in_order(named, example_inputs))
    examples = as_tuple(example_inputs)
    count = len(examples)
    return Given(tuple(named[:count]), max(0, count - len(named)) if star else 0, examples)


def _in_order(named: Sequence[str], example_inputs: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return examples in the order of forward's arguments."""
    rest = [name for name in example_inputs if name not in named]
    order = [name for name in named if name in example_inputs] + rest
    return tuple(example_inputs[name] for name in order)


def _trace_modes(model: nn.Module, leaves: Leaves, given: Given) -> fx.GraphModule:
    """Trace eval, and training too where the forward asks which it is."""
    constants: dict[str, Tensor] = {}
    evaluated = _trace_once(model, leaves, given, constants, training=False)
    layers = dict(evaluated.layers)
    trained: ModeTracer | None = None
    error: TraceError | None = None
    if evaluated.branched:
        try:
            trained = _trace_once(model, leaves, given, constants, training=True)
        except TraceError as failure:
            error = failure
    root = clone_structure(model)
    for name, value in constants.items():
        root.register_buffer(name, value, persistent=False)
    merged = trained is not None and _merge(evaluated, trained, layers, root)
    if trained is not None and not merged:
        layers.update(trained.layers)
        _share_layers(evaluated.graph, trained.graph, layers, root)
    for path, layer in layers.items():
        prefix, _, name = path.rpartition(".")
        owner = root.get_submodule(prefix)
        layer.train(owner.training)
        owner.add_module(name, layer)
    history = {
        "source": f"{type(model).__module__}.{type(model).__qualname__}",
        "leaf_modules": sorted(leaves.paths),
        "inputs": _inputs_record(given, evaluated, trained),
        "passes": [],
    }
    two_mode = error is not None or (trained is not None and not merged)
    module = _assemble(root, evaluated.graph, history, two_mode=two_mode)
    if isinstance(module, TwoModeGraphModule):
        branching = sorted(evaluated.branching | (trained.branching if trained else set()))
        module.set_training(None if trained is None else trained.graph, error, tuple(branching))
    return module


def _inputs_record(given: Given, *traces: ModeTracer | None) -> dict[str, Any]:
    """Write down which inputs a trace had, and their sizes where the graph depends on them."""
    record: dict[str, Any] = {"names": list(given.names), "star": given.star}
    if any(one is not None and one.sized for one in traces):
        record["examples"] = [to_record(value) for value in given.examples]
    return record


def _trace_once(
    model: nn.Module,
    leaves: Leaves,
    given: Given,
    constants: dict[str, Tensor],
    *,
    training: bool,
) -> ModeTracer:
    """Trace one mode, as symbolically as the forward allows.

    What is done to buffers is recorded; where that fails, buffers are concrete. `training` is
    symbolic; where it is handed to a builtin of torch, it is a bool.
    """
    failure: TraceError | None = None
    proxy_buffers = True
    symbolic_mode = not asks_by_identity(model)
    while True:
        tracer = ModeTracer(
            leaves,
            training=training,
            given=given,
            constants=dict(constants),
            proxy_buffers=proxy_buffers,
        )
        clone = clone_structure(model)
        if not proxy_buffers:
            # What a forward writes to a concrete buffer must not reach the model's own.
            for module in clone.modules():
                for name, buffer in module._buffers.items():
                    module._buffers[name] = None if buffer is None else buffer.clone()
        try:
            tracer.trace_clone(clone, symbolic_mode=symbolic_mode)
        except Exception as error:
            if symbolic_mode and "ModeFlag" in str(error):
                symbolic_mode = False
                continue
            failure = failure or _explain(error, tracer, training)
            if not proxy_buffers:
                raise failure from failure.__cause__
            proxy_buffers = False
            continue
        constants.update(tracer.constants)
        return tracer


_KEEP_WHOLE = (
    "keep the module whole with leaf_modules=('its.path',) or its class, take Python that depends "
    "on tensor values out of forward, or fix optional arguments with example_inputs"
)
_ASK_EXAMPLES = "pass example_inputs, which answer questions about sizes and ranks"
_WRAP_IT = "a layer of torch's is kept whole inside another module: wrap it in a nn.Module of yours"


def _explain(error: Exception, tracer: ModeTracer, training: bool) -> TraceError:
    """Say where in the user's model, and on which line, tracing failed."""
    if tracer.module_stack:
        path, kind = next(reversed(tracer.module_stack.values()))
        where = f"module '{path}' ({kind.__name__})" if path else kind.__name__
    else:
        where = f"the forward of {type(tracer.root).__name__}"
    home = type(tracer.root).__module__
    at_root = not tracer.module_stack
    torch_home = str(Path(torch.__file__).parent)
    ours = str(Path(__file__).parent.parent)
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith((torch_home, ours, "<"))
    ]
    if frames:
        last = frames[-1]
        line = linecache.getline(last.filename, last.lineno or 0).strip()
        where += f", {last.filename}:{last.lineno}: {line}"
    mode = "training" if training else "eval"
    asks = "control flow" in str(error) and not tracer.given.examples
    fix = f"{_ASK_EXAMPLES}; else {_KEEP_WHOLE}" if asks else _KEEP_WHOLE
    failure = TraceError(
        f"the network cannot be traced in {mode} mode: {type(error).__name__}: {error}",
        where=where,
        fix=_WRAP_IT if at_root and home.startswith("torch.nn.") else fix,
    )
    failure.__cause__ = error
    return failure


def _merge(
    evaluated: ModeTracer, trained: ModeTracer, layers: dict[str, nn.Module], root: nn.Module
) -> bool:
    """Make one graph of both where they differ only in what a module can follow.

    Walks the two graphs in step. Any difference that is not a mode flag, or an attention's dropout
    probability, ends it: False, and nothing has been changed.
    """
    ours, theirs = list(evaluated.graph.nodes), list(trained.graph.nodes)
    if len(ours) != len(theirs) or {p: repr(m) for p, m in evaluated.layers.items()} != {
        p: repr(m) for p, m in trained.layers.items()
    }:
        return False
    twins: dict[fx.Node, fx.Node] = {}
    switches: list[tuple[fx.Node, tuple[nn.Module, tuple[Any, ...], dict[str, Any]]]] = []
    for node, other in zip(ours, theirs, strict=True):
        if node.op != other.op or node.target != other.target:
            return False
        twins[other] = node
        other_args = _mapped((other.args, other.kwargs), twins)
        if not _equal((node.args, node.kwargs), other_args):
            switch = _switch(node, *other_args)
            if switch is None:
                return False
            switches.append((node, switch))
    for node, (layer, args, kwargs) in switches:
        path = _new_path(node, layers, root)
        layers[path] = layer
        _become_call(node, path, layer, args, kwargs)
    return True


def _share_layers(
    eval_graph: fx.Graph, train_graph: fx.Graph, layers: dict[str, nn.Module], root: nn.Module
) -> None:
    """Where two graphs stay two, let calls that differ in their mode alone share a layer.

    Calls are paired by the module call they stand in, their function and their turn there.
    """
    pairs = dict(_by_turn(eval_graph))
    twins = {node: pairs[key] for key, node in _by_turn(train_graph) if key in pairs}
    for other, node in twins.items():
        args = _mapped((other.args, other.kwargs), twins)
        if node.op != "call_function" or _equal((node.args, node.kwargs), args):
            continue
        switch = _switch(node, *args)
        if switch is None:
            continue
        layer, eval_args, eval_kwargs = switch
        back = {ours: theirs for theirs, ours in twins.items()}
        train_args = _mapped((eval_args, eval_kwargs), back)
        path = _new_path(node, layers, root)
        layers[path] = layer
        _become_call(node, path, layer, eval_args, eval_kwargs)
        _become_call(other, path, layer, *train_args)


def _mapped(arguments: Any, nodes: Mapping[fx.Node, fx.Node]) -> Any:
    return fx.map_arg(arguments, lambda node: nodes.get(node, node))


def _by_turn(graph: fx.Graph) -> Iterator[tuple[tuple[Any, ...], fx.Node]]:
    turns: dict[tuple[Any, ...], int] = {}
    for node in graph.nodes:
        key = (owner_call(node), node.op, node.target)
        turns[key] = turns.get(key, 0) + 1
        yield (*key, turns[key]), node


def _new_path(node: fx.Node, layers: dict[str, nn.Module], root: nn.Module) -> str:
    prefix, _ = owner_call(node)
    name = getattr(node.target, "__name__", "call")
    return fresh_path(root.get_submodule(prefix), prefix, name, layers)


def _become_call(
    node: fx.Node, path: str, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    """Turn a function call into a call of a layer, in its place."""
    stack = node.meta.get("nn_module_stack") or {}
    node.op, node.target, node.args, node.kwargs = "call_module", path, args, kwargs
    node.meta["nn_module_stack"] = {**stack, path: (path, type(layer))}


def _equal(left: Any, right: Any) -> bool:
    left_leaves, left_spec = pytree.tree_flatten(left)
    right_leaves, right_spec = pytree.tree_flatten(right)
    return left_spec == right_spec and all(
        a is b or (type(a) is type(b) and bool(a == b))
        for a, b in zip(left_leaves, right_leaves, strict=True)
    )


def _switch(
    node: fx.Node, train_args: tuple[Any, ...], train_kwargs: dict[str, Any]
) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]] | None:
    """Return the layer, and its arguments, that makes an eval call and a training call one."""
    if node.op != "call_function":
        return None
    if node.target is F.scaled_dot_product_attention:
        names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
        before = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
        after = {**dict(zip(names, train_args, strict=False)), **train_kwargs}
        p_eval, p_train = before.pop("dropout_p", 0.0), after.pop("dropout_p", 0.0)
        if not _equal(before, after) or p_eval != 0.0 or not isinstance(p_train, int | float):
            return None
        qkv = tuple(before.pop(name) for name in names[:3])
        return ScaledDotProductAttention(float(p_train)), qkv, before
    bound = bind(node.target, node.args, dict(node.kwargs))  # type: ignore[arg-type]
    other = bind(node.target, train_args, train_kwargs)  # type: ignore[arg-type]
    if bound is None or other is None or bound.keys() != other.keys():
        return None
    differ = [key for key in bound if not _equal(bound[key], other[key])]
    if len(differ) != 1 or (bound[differ[0]], other[differ[0]]) != (False, True):
        return None
    flag = differ[0]
    del bound[flag]
    return follow(node.target, flag, bound)  # type: ignore[arg-type]


def _assemble(
    root: nn.Module, graph: fx.Graph, history: dict[str, Any], *, two_mode: bool
) -> fx.GraphModule:
    """Make a graph module out of a clone's whole module tree, used by the graph or not."""
    kind = TwoModeGraphModule if two_mode else TracedModule
    module = kind(nn.Module(), fx.Graph(), type(root).__name__)
    for name, value in root.__dict__.items():
        if name in _REGISTRIES or name not in module.__dict__:
            module.__dict__[name] = value
    module.graph = graph
    module.meta = {HISTORY: history}
    module.remember(getattr(root, "_original_class", None) or type(root))
    return module


def _copy_graph_module(model: fx.GraphModule) -> fx.GraphModule:
    record = model.meta.get(HISTORY) or {"source": type(model).__name__, "passes": []}
    two_mode = isinstance(model, TwoModeGraphModule)
    module = _assemble(
        clone_structure(model),
        copy.deepcopy(model.graph),
        copy.deepcopy(record),
        two_mode=two_mode,
    )
    if isinstance(module, TwoModeGraphModule) and isinstance(model, TwoModeGraphModule):
        train_graph = model.train_graph
        copied = None if train_graph is None else copy.deepcopy(train_graph)
        module.set_training(copied, model.train_error, model.branching)
    for graph in graphs(module):
        graph._tracer_cls = None
    return module


def _copy_flags(module: nn.Module, model: nn.Module) -> None:
    """Give every module of a clone the training flag of the original at its path."""
    clones = dict(module.named_modules(remove_duplicate=False))
    for path, original in model.named_modules(remove_duplicate=False):
        if path in clones:
            clones[path].__dict__["training"] = original.training
