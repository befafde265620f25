"""The fx tracer that keeps `training` symbolic.

fx bakes the mode of the moment into everything that reads `self.training`. Here each module of the
(cloned) model being traced carries a `ModeFlag` in place of the bool. Passed on to a function, the
call becomes a module that reads its own flag. Asked for its truth, it answers with the mode of this
trace and notes that the forward branches, so that the other mode is traced too. A module that
branches and holds nothing, no parameter and no child, stays whole instead.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.autograd import Function
from torch.utils import _pytree as pytree

from dropsurgery.graph.calls import bind, follow
from dropsurgery.graph.example_run import ExampleRun
from dropsurgery.graph.leaves import Leaves, function_homes, whole_functions
from dropsurgery.graph.modes import ModeFlag, reads_training
from dropsurgery.graph.module import fresh_path
from dropsurgery.layers.functions import Apply

_OTHER_SIZES = "the network was traced for other input sizes: trace it with example_inputs of these"


@dataclass(frozen=True)
class Given:
    """What the example inputs supply.

    Attributes:
        names: forward arguments that become inputs although they may have defaults.
        star: how many inputs `*args` stands for.
        examples: the inputs, by which questions about sizes are answered; empty where there are
            none.
    """

    names: tuple[str, ...] = ()
    star: int = 0
    examples: tuple[Any, ...] = ()


class StaticProxy(fx.Proxy):
    """A proxy of a parameter or buffer, whose shape is known and may steer Python."""

    def __init__(self, tracer: fx.Tracer, node: fx.Node, tensor: Tensor) -> None:
        super().__init__(node, tracer)
        self._tensor = tensor

    @property
    def shape(self) -> torch.Size:
        """The tensor's shape, as ints."""
        return self._tensor.shape

    @property
    def ndim(self) -> int:
        """The tensor's rank."""
        return self._tensor.ndim

    def size(self, dim: int | None = None) -> Any:
        """Return the tensor's size, as ints."""
        return self._tensor.size() if dim is None else self._tensor.size(dim)

    def dim(self) -> int:
        """Return the tensor's rank."""
        return self._tensor.ndim

    def numel(self) -> int:
        """Return how many elements the tensor has."""
        return self._tensor.numel()

    def __len__(self) -> int:
        return len(self._tensor)


class _StaysWhole(BaseException):
    """A module does what a graph cannot hold, and is kept as it is; not an error.

    Attributes:
        module: which module.
        reason: what its forward does, for the error where the module is the root.
    """

    def __init__(self, module: nn.Module, reason: str) -> None:
        super().__init__()
        self.module = module
        self.reason = reason


class CannotHold(Exception):
    """The root's own forward does what a graph cannot hold."""


@dataclass(frozen=True)
class _Surroundings:
    """What surrounds a module call: modes of autograd and autocast, random state, its buffers."""

    modes: tuple[bool, ...]
    random: Tensor
    buffers: tuple[tuple[int, int], ...]


class ModeTracer(fx.Tracer):
    """Traces one mode of a structural clone that belongs to the trace.

    Args:
        leaves: which modules stay whole.
        training: the mode that a branch on `training` sees.
        given: which optional arguments of the forward become inputs.
        constants: tensors that the forward makes out of nothing, by attribute name; shared
            between the traces of both modes.
        proxy_buffers: record what is done to buffers, and do not do it. Off, as in fx, buffers are
            plain tensors, for forwards whose Python depends on their values.
    """

    proxy_buffer_attributes = True

    def __init__(
        self,
        leaves: Leaves,
        *,
        training: bool,
        given: Given,
        constants: dict[str, Tensor],
        proxy_buffers: bool,
    ) -> None:
        super().__init__(autowrap_functions=whole_functions())
        self._autowrap_search += function_homes()
        self.leaves = leaves
        self.training = training
        self.given = given
        self.constants = constants
        self.proxy_buffer_attributes = proxy_buffers
        self.branched = False
        self.branching: set[str] = set()
        self.layers: dict[str, nn.Module] = {}
        self._is_whole: dict[nn.Module, bool] = {}
        self._running: list[nn.Module] = []
        self._entered: list[_Surroundings] = []
        self._proxies: dict[str, fx.Proxy] = {}
        self._tensor_paths: dict[int, str] = {}
        self._example: ExampleRun | None = None
        # Whether an answer of the examples is in the graph, so that it holds for their sizes.
        self.sized = False

    def trace_clone(self, clone: nn.Module, *, symbolic_mode: bool = True) -> fx.Graph:
        """Trace a clone, which is spent by it, and return the graph.

        With `symbolic_mode` off, `training` is a plain bool and the forward counts as branching;
        torch's builtins take nothing else.
        """
        named: list[tuple[str, Tensor]] = [*clone.named_parameters(), *clone.named_buffers()]
        self._tensor_paths = {id(tensor): path for path, tensor in named}
        self.branched = not symbolic_mode
        if self.given.examples:
            self._example = ExampleRun(clone, self)
        for module in clone.modules():
            flag = ModeFlag(module, self) if symbolic_mode else self.training
            module.__dict__["training"] = flag
        self._running = [clone]
        self._entered = [_surroundings(clone)]
        if not symbolic_mode:
            self.branching = {p for p, m in clone.named_modules() if reads_training(type(m))}
        try:
            with self._watching():
                graph = self.trace(clone)
                self._check_left(clone, self._entered[0])
        except _StaysWhole as signal:
            raise CannotHold(f"the forward {signal.reason}, which a graph cannot hold") from None
        # The tracer would be needed to unpickle the graph, which never happens with a clone.
        graph._tracer_cls = None
        return graph

    def to_bool(self, obj: fx.Proxy) -> bool:
        """Answer a question about sizes as the example inputs have it, and hold later inputs to it.

        Other sizes raise an error when the graph runs.
        """
        if self._example is None:
            return super().to_bool(obj)
        answer = self._example.value(obj.node)
        if not isinstance(answer, bool | int | float):
            return super().to_bool(obj)  # it depends on values
        self.sized = True
        held = obj
        if not isinstance(answer, bool):  # a number
            compare = operator.ne if answer else operator.eq
            held = self.create_proxy("call_function", compare, (obj, 0), {})
        elif not answer:
            held = self.create_proxy("call_function", operator.not_, (obj,), {})
        self.create_proxy("call_function", torch._assert, (held, _OTHER_SIZES), {})
        return bool(answer)

    def branch(self, flag: ModeFlag) -> bool:
        """Answer a flag that was asked for its truth."""
        module = flag.module
        if module is self._running[-1] and module is not self.root and not _holds_anything(module):
            raise _StaysWhole(module, "depends on its mode")
        self.branched = True
        self.branching.add("" if module is self.root else self.path_of_module(module))
        return self.training

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Say whether a module stays whole."""
        if m not in self._is_whole:
            self._is_whole[m] = self.leaves(m, module_qualified_name)
        return self._is_whole[m]

    def call_module(
        self,
        m: nn.Module,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Trace a module call; fall back to a leaf where the module turns out to be one."""
        if self._example is not None and self._example.active:
            return forward(*args, **kwargs)
        self._check_modes()
        if self.is_leaf_module(m, self.path_of_module(m)):
            return super().call_module(m, forward, args, kwargs)
        last = next(iter(reversed(self.graph.nodes)), None)
        layers, depth = dict(self.layers), len(self.module_stack)
        before = _surroundings(m)
        self._running.append(m)
        self._entered.append(before)
        try:
            result = super().call_module(m, forward, args, kwargs)
            self._check_left(m, before)
        except _StaysWhole as signal:
            if signal.module is not m:
                raise
        except Exception:
            if not self.leaves.is_reluctant(m):
                raise
        else:
            return result
        finally:
            self._running.pop()
            self._entered.pop()
        self._undo(last)
        self.layers = layers
        while len(self.module_stack) > depth:
            path, _ = self.module_stack.popitem(last=True)[1]
            self.num_calls[path] -= 1
        self._is_whole[m] = True
        return super().call_module(m, forward, args, kwargs)

    def _check_modes(self) -> None:
        """Blame the running module where it changed the modes of autograd or autocast."""
        if _modes() != self._entered[-1].modes:
            raise _StaysWhole(
                self._running[-1], "switches gradients or autocast for a part of itself"
            )

    def _check_left(self, module: nn.Module, before: _Surroundings) -> None:
        """Blame a module whose forward drew random numbers or wrote to its buffers for real."""
        after = _surroundings(module)
        if not torch.equal(after.random, before.random):
            torch.set_rng_state(before.random)
            raise _StaysWhole(module, "draws random numbers that depend on no input")
        if after.buffers != before.buffers:
            raise _StaysWhole(
                module, "assigns to a buffer (write in place, with `add_` or `copy_`)"
            )

    @contextmanager
    def _watching(self) -> Iterator[None]:
        """While tracing, keep autograd functions whole, and notice autocast even if it is off.

        Functions that make tensors take traced sizes, as torch's own do not.
        """

        def maker(real: Callable[..., Any]) -> Callable[..., Any]:
            def make(*args: Any, **kwargs: Any) -> Any:
                if any(isinstance(v, fx.Proxy) for v in pytree.tree_leaves((args, kwargs))):
                    return self.create_proxy("call_function", real, args, kwargs)
                return real(*args, **kwargs)

            return make

        def apply(cls: type[Function], *args: Any, **kwargs: Any) -> Any:
            if any(isinstance(value, fx.Proxy) for value in (*args, *kwargs.values())):
                return self.call_layer(Apply(cls), cls.__name__, args, kwargs)
            return real_apply(cls, *args, **kwargs)

        def enter(region: torch.autocast) -> Any:
            if self._example is not None and self._example.active:
                return real_enter(region)
            raise _StaysWhole(self._running[-1], "switches autocast for a part of itself")

        real_apply = Function.__dict__["apply"].__func__
        real_enter = torch.autocast.__enter__
        makers = {name: getattr(torch, name) for name in ("ones", "zeros", "empty", "full")}
        try:
            for name, real in makers.items():
                setattr(torch, name, maker(real))
            Function.apply = classmethod(apply)  # type: ignore[assignment, method-assign]
            torch.autocast.__enter__ = enter  # type: ignore[method-assign]
            yield
        finally:
            Function.apply = classmethod(real_apply)  # type: ignore[assignment, method-assign]
            torch.autocast.__enter__ = real_enter  # type: ignore[method-assign]
            for name, real in makers.items():
                setattr(torch, name, real)

    def _undo(self, last: fx.Node | None) -> None:
        """Erase every node that was made after `last`."""
        for node in list(reversed(self.graph.nodes)):
            if node is last:
                break
            self.graph.erase_node(node)
            if node.op == "get_attr":
                self._proxies.pop(str(node.target), None)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, fx.Proxy]) -> Any:
        """Return a proxy for a parameter or buffer, one node a tensor."""
        if self._example is not None and self._example.active:
            return attr_val
        if not isinstance(attr_val, Tensor):
            return attr_val
        if not self.proxy_buffer_attributes and not isinstance(attr_val, nn.Parameter):
            return attr_val
        path = self._tensor_paths.get(id(attr_val))
        if path is None:
            return attr_val
        if path not in self._proxies:
            self._proxies[path] = self.create_proxy(
                "get_attr",
                path,
                (),
                {},
                proxy_factory_fn=lambda node: StaticProxy(self, node, attr_val),
            )
        return self._proxies[path]

    def create_arg(self, a: Any) -> Any:
        """Turn a traced value into a node argument; loose tensors become named constants."""
        if isinstance(a, ModeFlag):
            return bool(a)
        if isinstance(a, Tensor) and not isinstance(a, fx.Proxy):
            path = self._tensor_paths.get(id(a)) or self.tensor_attrs.get(a)
            if path is None and isinstance(a, nn.Parameter):
                raise NameError("the forward uses a parameter that is not registered in the model")
            return self.create_node("get_attr", path or self._constant(a), (), {})
        return super().create_arg(a)

    def _constant(self, tensor: Tensor) -> str:
        for name, known in self.constants.items():
            if known is tensor or _same(known, tensor):
                return name
        taken = len(self.constants)
        while hasattr(self.root, f"_tensor_constant{taken}"):
            taken += 1
        name = f"_tensor_constant{taken}"
        self.constants[name] = tensor
        return name

    def create_args_for_root(
        self, root_fn: Callable[..., Any], is_module: bool, concrete_args: Any = None
    ) -> tuple[Callable[..., Any], list[Any]]:
        """Make a placeholder for each required or given argument; the rest keep their default."""
        positional: list[Any] = []
        keyword: dict[str, Any] = {}
        after_star = False
        for parameter in list(inspect.signature(root_fn).parameters.values())[1:]:
            name = parameter.name
            if parameter.kind is parameter.VAR_POSITIONAL:
                numbered = (f"{name}_{number}" for number in range(self.given.star))
                positional += [self.create_proxy("placeholder", n, (), {}) for n in numbered]
                after_star = True
            elif parameter.kind is not parameter.VAR_KEYWORD:
                value = parameter.default
                if value is parameter.empty or name in self.given.names:
                    value = self.create_proxy("placeholder", name, (), {})
                if after_star or parameter.kind is parameter.KEYWORD_ONLY:
                    keyword[name] = value
                else:
                    positional.append(value)
        return lambda root: root_fn(root, *positional, **keyword), [self.root]

    def create_proxy(
        self,
        kind: str,
        target: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        name: str | None = None,
        type_expr: Any | None = None,
        proxy_factory_fn: Callable[[fx.Node], fx.Proxy] | None = None,
    ) -> Any:
        """Record an operation; a call that takes a mode flag becomes a module."""
        self._check_modes()
        if kind == "call_function" and any(
            isinstance(value, ModeFlag) for value in (*args, *kwargs.values())
        ):
            layer = self._flagged_call(target, args, kwargs)
            if layer is not None:
                return layer
        return super().create_proxy(kind, target, args, kwargs, name, type_expr, proxy_factory_fn)

    def _flagged_call(
        self, target: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Record `target(…, training=<flag>)` as a module; None where that cannot be."""
        arguments = bind(target, args, kwargs)
        if arguments is None:
            return None
        flags = [key for key, value in arguments.items() if isinstance(value, ModeFlag)]
        if len(flags) != 1:
            return None
        del arguments[flags[0]]
        layer, call_args, call_kwargs = follow(target, flags[0], arguments)
        return self.call_layer(layer, getattr(target, "__name__", "call"), call_args, call_kwargs)

    def call_layer(
        self, layer: nn.Module, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Call a new layer from the module that is running, under a fresh name."""
        owner = self._running[-1]
        prefix = next(reversed(self.module_stack.values()))[0] if self.module_stack else ""
        path = fresh_path(owner, prefix, name, self.layers)
        self.layers[path] = layer
        self.module_stack[path] = (path, type(layer))
        try:
            return super().create_proxy("call_module", path, args, kwargs)
        finally:
            del self.module_stack[path]


def _modes() -> tuple[bool, ...]:
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.is_autocast_enabled("cuda"),
    )


def _surroundings(module: nn.Module) -> _Surroundings:
    buffers = ((id(b), b._version) for b in module._buffers.values() if b is not None)
    return _Surroundings(_modes(), torch.get_rng_state(), tuple(buffers))


def _holds_anything(module: nn.Module) -> bool:
    return bool(module._modules or module._parameters or module._buffers)


def _same(left: Tensor, right: Tensor) -> bool:
    if left.is_meta or right.is_meta or left.device != right.device:
        return False
    return left.dtype == right.dtype and left.shape == right.shape and torch.equal(left, right)
