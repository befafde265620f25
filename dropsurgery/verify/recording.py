"""Every tensor of one run of a network: what made it, in which module, and its float64 value."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from dropsurgery.graph.module import module_path
from dropsurgery.graph.signature import named_inputs, named_outputs, signature
from dropsurgery.verify.cases import Case
from dropsurgery.verify.float64 import widen
from dropsurgery.verify.run import inference_clone

# Operations that pass on their input, element by element in the same order.
_COPIES = {"view", "_unsafe_view", "clone", "unsqueeze", "squeeze", "detach", "alias"}


class Ref(NamedTuple):
    """A tensor of a recording: the event that made it and its number among the outputs."""

    event: int
    output: int


@dataclass
class Event:
    """One ATen operation, or a tensor that came from elsewhere.

    Attributes:
        func: the operation; None for an input of the network, and for a tensor that was written to
            through another view of its memory.
        args, kwargs: its arguments, with a `Ref` in place of each tensor that an event made.
        path: dotted path of the module whose forward ran it.
        outputs: its tensors in the network's own dtype.
        wide: the same in float64, computed from float64 throughout.
    """

    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    path: str
    outputs: list[Tensor]
    wide: list[Tensor]

    @property
    def name(self) -> str:
        """The operation's name without namespace, overload and underscores of in-place forms."""
        if self.func is None:
            return ""
        return str(self.func.overloadpacket.__name__).rstrip("_")

    @property
    def inputs(self) -> list[Ref]:
        """The events' tensors among the arguments."""
        leaves = pytree.tree_leaves((self.args, self.kwargs), is_leaf=_is_ref)
        return [leaf for leaf in leaves if isinstance(leaf, Ref)]


def _is_ref(value: Any) -> bool:
    return isinstance(value, Ref)


class Call(NamedTuple):
    """One call of a module.

    Attributes:
        path: its dotted path.
        output: the first tensor that it returned.
    """

    path: str
    output: Ref


@dataclass
class Recording:
    """One run of a network in eval mode.

    Attributes:
        events: in order of execution.
        calls: calls of modules, inner ones first.
        inputs, outputs: the network's own, by name.
    """

    events: list[Event] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)
    inputs: dict[str, Ref] = field(default_factory=dict)
    outputs: dict[str, Ref] = field(default_factory=dict)

    def native(self, ref: Ref) -> Tensor:
        """Return a tensor as the network computed it."""
        return self.events[ref.event].outputs[ref.output]

    def wide(self, ref: Ref) -> Tensor:
        """Return a tensor in float64, from a float64 run of all that is before it."""
        return self.events[ref.event].wide[ref.output]

    def origin(self, ref: Ref) -> Ref:
        """Return the first tensor with the same elements in the same order."""
        while True:
            event = self.events[ref.event]
            if event.name not in _COPIES or not isinstance(event.args[0], Ref):
                return ref
            before = event.args[0]
            if self.native(before).numel() != self.native(ref).numel():
                return ref
            ref = before

    def in_float64(self) -> Recording:
        """Return the same run with the float64 tensors as the network's own."""

        def wide(leaf: Any) -> Any:
            return leaf if isinstance(leaf, Ref) else widen(leaf)

        events = []
        for event in self.events:
            args, kwargs = pytree.tree_map(wide, (event.args, event.kwargs), is_leaf=_is_ref)
            events.append(Event(event.func, args, kwargs, event.path, event.wide, event.wide))
        return Recording(events, self.calls, self.inputs, self.outputs)

    def users(self) -> dict[Ref, list[int]]:
        """Map each tensor to the events that read it."""
        found: dict[Ref, list[int]] = {}
        for index, event in enumerate(self.events):
            for ref in event.inputs:
                found.setdefault(ref, []).append(index)
        return found

    def replay(self, wanted: Ref, known: Callable[[Ref], Tensor | None], wide: bool) -> Replay:
        """Compute one tensor again from those that are known.

        Args:
            wanted: the tensor.
            known: returns the values to start from; `wanted` itself is not asked for.
            wide: compute in float64.
        """
        change: Callable[[Any], Any] = widen if wide else _same
        values: dict[Ref, Any] = {}
        replay = Replay(values, set(), set())
        stack = [wanted]
        while stack:
            ref = stack[-1]
            event = self.events[ref.event]
            given = known(ref) if ref not in values and ref != wanted else None
            if ref in values:
                stack.pop()
            elif given is not None:
                values[ref] = change(given)
                replay.starts.add(ref)
            elif event.func is None:
                values[ref] = change(event.outputs[ref.output])
                own = ref in self.inputs.values()
                (replay.starts if own else replay.opaque).add(ref)
            elif missing := [r for r in event.inputs if r not in values]:
                stack += missing
            else:
                replay.events.add(ref.event)
                results = computed(event, values, change)
                values.update({Ref(ref.event, i): value for i, value in enumerate(results)})
        return replay


@dataclass
class Replay:
    """What `Recording.replay` computed.

    Attributes:
        values: all tensors on the way.
        starts: those that were known, and the network's inputs.
        opaque: those that were taken from the recording since nothing tells how they came about.
        events: the operations that ran.
    """

    values: dict[Ref, Tensor]
    starts: set[Ref]
    opaque: set[Ref]
    events: set[int] = field(default_factory=set)


def _same(value: Any) -> Any:
    return value


def computed(
    event: Event, values: Mapping[Ref, Any], change: Callable[[Any], Any] = _same
) -> list[Any]:
    """Return the tensors that an operation makes of others.

    Args:
        event: the operation.
        values: what it reads.
        change: what is done to its constants.
    """

    def resolve(leaf: Any) -> Any:
        return values[leaf] if isinstance(leaf, Ref) else change(leaf)

    args, kwargs = pytree.tree_map(resolve, (event.args, event.kwargs), is_leaf=_is_ref)
    written = set(_written(event.func, args, kwargs))
    args, kwargs = pytree.tree_map(
        lambda leaf: leaf.clone() if id(leaf) in written else leaf, (args, kwargs)
    )
    with torch.no_grad():
        return _tensors(event.func(*args, **kwargs))


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


def _written(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterator[int]:
    """Yield the identities of the tensors that an operation writes to."""
    schema = func._schema
    if not schema.is_mutable:
        return
    for index, argument in enumerate(schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[index] if index < len(args) else kwargs.get(argument.name)
            for tensor in _tensors(value):
                yield id(tensor)


class _Recorder(TorchDispatchMode):
    """Writes down every operation while it is active, and computes each in float64 as well."""

    def __init__(self) -> None:
        super().__init__()
        self.recording = Recording()
        self.path = ""
        # By identity; None where the memory was written to since, through another view.
        self._refs: dict[int, Ref | None] = {}
        self._shadows: dict[int, Tensor] = {}
        self._alive: list[Tensor] = []  # an identity is unique while its tensor lives
        self._stored: dict[int, list[tuple[int, Ref]]] = {}

    def source(self, tensor: Tensor, wide: Tensor) -> Ref:
        """Write down a tensor of which no operation tells how it came about."""
        with _disable_current_modes():  # a hook asks while this mode is active
            native, wide_copy = tensor.detach().clone(), wide.clone()
        event = Event(None, (), {}, self.path, [native], [wide_copy])
        self.recording.events.append(event)
        ref = Ref(len(self.recording.events) - 1, 0)
        self._know(tensor, wide, ref)
        return ref

    def ref(self, tensor: Tensor) -> Ref | None:
        """Return where a tensor comes from; None for a parameter or another constant."""
        if id(tensor) not in self._refs:
            return None
        return self._refs[id(tensor)] or self.source(tensor, self._shadows[id(tensor)])

    def __torch_dispatch__(
        self,
        func: Any,
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        event_args, event_kwargs = pytree.tree_map_only(Tensor, self._named, (args, kwargs))
        wide_args, wide_kwargs = pytree.tree_map(self._wide, (args, kwargs))
        written = set(_written(func, args, kwargs))
        for leaf in pytree.tree_leaves((args, kwargs)):
            if id(leaf) in written:
                self._keep(leaf)
        result = func(*args, **kwargs)
        outputs = _tensors(result)
        wide = _try_wide(func, wide_args, wide_kwargs, outputs)
        kept = [output.detach() for output in outputs]
        event = Event(func, event_args, event_kwargs, self.path, kept, wide)
        self.recording.events.append(event)
        for index, output in enumerate(outputs):
            self._know(output, wide[index], Ref(len(self.recording.events) - 1, index))
        return result

    def _named(self, tensor: Tensor) -> Ref | Tensor:
        ref = self.ref(tensor)
        return tensor.detach() if ref is None else ref

    def _wide(self, leaf: Any) -> Any:
        return self._shadows[id(leaf)] if id(leaf) in self._refs else widen(leaf)

    def _know(self, tensor: Tensor, wide: Tensor, ref: Ref) -> None:
        self._refs[id(tensor)] = ref
        self._shadows[id(tensor)] = wide
        self._alive.append(tensor)
        self._stored.setdefault(_memory(tensor), []).append((id(tensor), ref))

    def _keep(self, tensor: Tensor) -> None:
        """Copy what was recorded of a memory that is about to be written to."""
        for identity, ref in self._stored.pop(_memory(tensor), ()):
            self._refs[identity] = None
            event = self.recording.events[ref.event]
            event.outputs[ref.output] = event.outputs[ref.output].clone()
            event.wide[ref.output] = event.wide[ref.output].clone()


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _try_wide(
    func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], outputs: list[Tensor]
) -> list[Tensor]:
    try:
        wide = _tensors(func(*args, **kwargs))
    except (RuntimeError, NotImplementedError, TypeError):
        wide = []  # an operator without a float64 kernel
    if [tensor.shape for tensor in wide] != [tensor.shape for tensor in outputs]:
        return [widen(output).clone() for output in outputs]
    return wide


class _Interpreter(fx.Interpreter):
    """Runs a graph module node by node, so that functions between modules have a place too."""

    def __init__(self, module: fx.GraphModule, recorder: _Recorder) -> None:
        super().__init__(module, garbage_collect_values=False)
        self._recorder = recorder

    def run_node(self, n: fx.Node) -> Any:
        """Run a node in the name of the module whose forward holds it."""
        self._recorder.path = module_path(n)
        return super().run_node(n)


def record(model: nn.Module, case: Case) -> Recording:
    """Run a network once in eval mode and write down every tensor.

    The network is not changed: it runs on a clone that shares its parameters. All tensors of the
    run are kept, in the network's dtype and in float64: this takes three times the memory of the
    activations.

    Args:
        model: the network.
        case: the inputs.
    """
    clone = inference_clone(model)
    recorder = _Recorder()
    args, kwargs = pytree.tree_map_only(
        Tensor, lambda t: t.detach().clone(), (case.args, dict(case.kwargs))
    )
    for name, tensor in named_inputs(model, args, kwargs).items():
        ref = recorder.source(tensor, widen(tensor).clone())
        recorder.recording.inputs[name] = ref
    for path, module in clone.named_modules():
        _watch(module, path, recorder)
    recurrent = any(isinstance(module, nn.RNNBase) for module in clone.modules())
    with torch.no_grad(), _decomposed(recurrent), recorder:
        bound = signature(model).bind(*args, **kwargs)
        if isinstance(clone, fx.GraphModule) and not bound.kwargs:
            value = _Interpreter(clone, recorder).run(*bound.args)
        else:
            value = clone(*args, **kwargs)
    for name, tensor in named_outputs(value).items():
        known = recorder.ref(tensor)
        # A parameter or a number that is returned was made by nothing.
        ref = recorder.source(tensor, widen(tensor)) if known is None else known
        recorder.recording.outputs[name] = ref
    return recorder.recording


def _watch(module: nn.Module, path: str, recorder: _Recorder) -> None:
    """Let a module tell the recorder when it is called and what it returns."""
    above: list[str] = []

    def enter(_: nn.Module, args: Any) -> None:
        above.append(recorder.path)
        recorder.path = path

    def leave(_: nn.Module, args: Any, output: Any) -> None:
        recorder.path = above.pop()
        ref = next(map(recorder.ref, _tensors(output)), None)
        if ref is not None:
            recorder.recording.calls.append(Call(path, ref))

    module.register_forward_pre_hook(enter)
    module.register_forward_hook(leave)


@contextlib.contextmanager
def _decomposed(recurrent: bool) -> Iterator[None]:
    """Keep whole layers from running as one operation, which would hide what is inside."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    # The fused kernel of recurrent layers has no float64 form. The public switch, flags(), warns of
    # TF32 on Intel's GPUs where there are none.
    fused = torch._C._get_mkldnn_enabled()
    try:
        torch._C._set_mkldnn_enabled(fused and not recurrent)
        yield
    finally:
        torch._C._set_mkldnn_enabled(fused)
        torch.backends.mha.set_fastpath_enabled(fast)
