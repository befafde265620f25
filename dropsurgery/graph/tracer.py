"""The fx tracer that keeps `training` symbolic.

fx bakes the mode of the moment into everything that reads `self.training`. Here each module of the
(cloned) model being traced carries a `ModeFlag` in place of the bool. Passed on to a function, the
call becomes a module that reads its own flag. Asked for its truth, it answers with the mode of this
trace and notes that the forward branches, so that the other mode is traced too. A module that
branches and holds nothing, no parameter and no child, stays whole instead.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from dropsurgery.graph.leaves import Leaves, whole_functions
from dropsurgery.layers.dropout import FollowTraining

# Functional dropouts and the module that does the same. torch.* are builtins without a signature.
DROPOUTS: dict[Callable[..., Any], type[nn.Module]] = {
    F.dropout: nn.Dropout,
    F.dropout1d: nn.Dropout1d,
    F.dropout2d: nn.Dropout2d,
    F.dropout3d: nn.Dropout3d,
    F.alpha_dropout: nn.AlphaDropout,
    F.feature_alpha_dropout: nn.FeatureAlphaDropout,
    torch.dropout: nn.Dropout,
    torch.alpha_dropout: nn.AlphaDropout,
    torch.feature_dropout: nn.Dropout2d,
    torch.feature_alpha_dropout: nn.FeatureAlphaDropout,
}
_BUILTIN_ARGUMENTS = ("input", "p", "train")


@dataclass(frozen=True)
class Given:
    """What the example inputs supply.

    Attributes:
        names: forward arguments that become inputs although they may have defaults.
        star: how many inputs `*args` stands for.
    """

    names: tuple[str, ...] = ()
    star: int = 0


class ModeFlag:
    """Stands for one module's `training` while it is traced."""

    __slots__ = ("module", "tracer")

    def __init__(self, module: nn.Module, tracer: ModeTracer) -> None:
        self.module = module
        self.tracer = tracer

    def __bool__(self) -> bool:
        return self.tracer.branch(self)

    __index__ = __int__ = __bool__

    def __float__(self) -> float:
        return float(bool(self))

    def __eq__(self, other: object) -> bool:
        return bool(self) == other

    def __hash__(self) -> int:
        return hash(bool(self))

    def __mul__(self, other: Any) -> Any:
        return bool(self) * other

    __rmul__ = __mul__

    def __and__(self, other: Any) -> Any:
        return bool(self) & other

    __rand__ = __and__

    def __or__(self, other: Any) -> Any:
        return bool(self) | other

    __ror__ = __or__


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
    """A module without parameters and children branches on its mode; not an error."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


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
        self.leaves = leaves
        self.training = training
        self.given = given
        self.constants = constants
        self.proxy_buffer_attributes = proxy_buffers
        self.branched = False
        self.layers: dict[str, nn.Module] = {}
        self._whole: set[nn.Module] = set()
        self._running: list[nn.Module] = []
        self._proxies: dict[str, fx.Proxy] = {}
        self._tensor_paths: dict[int, str] = {}

    def trace_clone(self, clone: nn.Module, *, symbolic_mode: bool = True) -> fx.Graph:
        """Trace a clone, which is spent by it, and return the graph.

        With `symbolic_mode` off, `training` is a plain bool and the forward counts as branching;
        torch's builtins take nothing else.
        """
        named: list[tuple[str, Tensor]] = [*clone.named_parameters(), *clone.named_buffers()]
        self._tensor_paths = {id(tensor): path for path, tensor in named}
        self.branched = not symbolic_mode
        for module in clone.modules():
            flag = ModeFlag(module, self) if symbolic_mode else self.training
            module.__dict__["training"] = flag
        self._running = [clone]
        graph = self.trace(clone)
        # The tracer would be needed to unpickle the graph, which never happens with a clone.
        graph._tracer_cls = None
        return graph

    def branch(self, flag: ModeFlag) -> bool:
        """Answer a flag that was asked for its truth."""
        module = flag.module
        if module is self._running[-1] and module is not self.root and not _holds_anything(module):
            raise _StaysWhole(module)
        self.branched = True
        return self.training

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Say whether a module stays whole."""
        return m in self._whole or self.leaves(m, module_qualified_name)

    def call_module(
        self,
        m: nn.Module,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Trace a module call; fall back to a leaf where the module turns out to be one."""
        last = next(iter(reversed(self.graph.nodes)), None)
        self._running.append(m)
        try:
            return super().call_module(m, forward, args, kwargs)
        except _StaysWhole as signal:
            if signal.module is not m:
                raise
            self._undo(last)
            _, (path, _) = self.module_stack.popitem(last=True)
            self.num_calls[path] -= 1
            self._whole.add(m)
            return super().call_module(m, forward, args, kwargs)
        finally:
            self._running.pop()

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
        path = fresh_path(prefix, name, lambda p, n: hasattr(owner, n) or p in self.layers)
        self.layers[path] = layer
        self.module_stack[path] = (path, type(layer))
        try:
            return super().create_proxy("call_module", path, args, kwargs)
        finally:
            del self.module_stack[path]


def fresh_path(prefix: str, name: str, taken: Callable[[str, str], bool]) -> str:
    """Return the first of `prefix.name`, `prefix.name_1`, … that is not taken(path, name)."""

    def candidates() -> Iterator[str]:
        yield name
        number = 1
        while True:
            yield f"{name}_{number}"
            number += 1

    for candidate in candidates():
        path = f"{prefix}.{candidate}" if prefix else candidate
        if not taken(path, candidate):
            return path
    raise AssertionError("the candidates never end")


def bind(
    target: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, Any] | None:
    """Return a call's arguments by name, in order; None where the names cannot be known."""
    try:
        return dict(inspect.signature(target).bind(*args, **kwargs).arguments)
    except (ValueError, TypeError):
        if target not in DROPOUTS:
            return None
        return {**dict(zip(_BUILTIN_ARGUMENTS, args, strict=False)), **kwargs}


def follow(
    target: Callable[..., Any], flag: str, arguments: dict[str, Any]
) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    """Return the layer that follows the mode for `target(**arguments, flag=training)`.

    Returns:
        The layer and the positional and keyword arguments to call it with.
    """
    p = arguments.get("p", 0.5)
    if target in DROPOUTS and isinstance(p, int | float):
        layer_class = DROPOUTS[target]
        return (
            layer_class(float(p), bool(arguments.get("inplace", False))),
            (arguments["input"],),
            {},
        )
    first, *rest = arguments
    return (
        FollowTraining(target, flag),
        (arguments[first],),
        {key: arguments[key] for key in rest},
    )


def _holds_anything(module: nn.Module) -> bool:
    return bool(module._modules or module._parameters or module._buffers)


def _same(left: Tensor, right: Tensor) -> bool:
    if left.is_meta or right.is_meta or left.device != right.device:
        return False
    return left.dtype == right.dtype and left.shape == right.shape and torch.equal(left, right)
