"""Running the two sides of a comparison: modules in eval mode and ONNX files."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from dropsurgery.errors import ArgumentTypeError, StochasticError, VerifyError
from dropsurgery.graph.clone import clone_structure
from dropsurgery.graph.signature import named_outputs
from dropsurgery.verify.cases import Case
from dropsurgery.verify.float64 import Float64, widen


class ModuleRunner:
    """A module in eval mode, run on a clone: the caller's module keeps its flags and its state.

    Parameters are shared with the caller's module, buffers are copied, since a forward may write to
    them.

    Args:
        model: the module.
        role: "reference" or "candidate", for messages.
    """

    def __init__(self, model: nn.Module, role: str) -> None:
        self.role = role
        self.name = type(model).__name__
        if any(isinstance(module, torch.jit.ScriptModule) for module in model.modules()):
            raise VerifyError(
                f"the {role} is, or holds, a TorchScript module",
                where=self.name,
                fix="pass the eager model",
            )
        tensors = [*model.parameters(), *model.buffers()]
        if any(tensor.is_meta for tensor in tensors):
            raise VerifyError(f"the {role} has no weights (device meta)", where=self.name)
        self.device = tensors[0].device if tensors else torch.device("cpu")
        self.dtypes = {parameter.dtype for parameter in model.parameters()}
        self._model = model
        self._native = inference_clone(model)
        self._wide: nn.Module | None = None

    def __call__(self, case: Case) -> dict[str, Tensor]:
        """Return the outputs in the module's own dtype."""
        return self._run(self._native, case, contextlib.nullcontext())

    def float64(self, case: Case) -> dict[str, Tensor]:
        """Return the outputs of the same network computed in float64 throughout."""
        # A clone of its own: a forward that keeps a cache must not find one of another dtype.
        if self._wide is None:
            self._wide = inference_clone(self._model)
        return self._run(self._wide, case, Float64(), wide=True)

    def drawn(self, case: Case, seed: int) -> dict[str, Tensor]:
        """Return the outputs of one random run, with torch's generators seeded for it."""
        return self._run(self._native, case, contextlib.nullcontext(), seed=seed)

    def _run(
        self,
        model: nn.Module,
        case: Case,
        mode: contextlib.AbstractContextManager[Any],
        *,
        wide: bool = False,
        seed: int | None = None,
    ) -> dict[str, Tensor]:
        def own(leaf: Any) -> Any:
            # A copy, since a forward may write to its input.
            if not isinstance(leaf, Tensor):
                return leaf
            leaf = leaf.detach().to(self.device, copy=True)
            return widen(leaf) if wide else leaf

        args, kwargs = pytree.tree_map(own, (case.args, dict(case.kwargs)))
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices), torch.no_grad(), _full_precision(self.device):
            if seed is not None:
                torch.manual_seed(seed)
            before = random_state(self.device)
            with mode:
                value = model(*args, **kwargs)
            drew = not torch.equal(before, random_state(self.device))
        if drew and seed is None:
            places = drawing_modules(inference_clone(self._model), args, kwargs, self.device)
            raise DrawsInEval(self.role, self.name, places)
        try:
            outputs = named_outputs(value)
        except ArgumentTypeError as error:
            raise VerifyError(
                f"the {self.role} returns what cannot be compared: {error.problem}",
                where=error.where,
                fix=error.fix,
            ) from error
        return {name: tensor.detach().cpu() for name, tensor in outputs.items()}


def inference_clone(model: nn.Module) -> nn.Module:
    """Return a clone in eval mode: parameters are shared, buffers copied, flags its own."""
    clone = clone_structure(model)
    copies: dict[int, Tensor] = {}
    for module in clone.modules():
        module.__dict__["training"] = False
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = copies.setdefault(id(buffer), buffer.detach().clone())
    return clone


class DrawsInEval(StochasticError):
    """A module draws random numbers in eval mode.

    Args:
        role: "reference" or "candidate".
        name: the module's class.
        places: paths and classes of the layers that draw.
    """

    def __init__(self, role: str, name: str, places: dict[str, str]) -> None:
        self.role = role
        self.name = name
        self.places = places
        told = [f"{path} ({kind})" for path, kind in places.items() if path]
        super().__init__(
            f"the {role} draws random numbers in eval mode",
            where=f"{name}: {', '.join(told)}" if told else name,
            fix="stochastic=True compares means and variances of many runs; or take the "
            "randomness out, or make its draw follow self.training",
        )

    def __reduce__(self) -> tuple[object, ...]:
        return (type(self), (self.role, self.name, self.places))


def drawing_modules(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], device: torch.device
) -> dict[str, str]:
    """Return the innermost modules that draw in a call: class by path, in the order of calls."""
    found: dict[str, str] = {}
    open_calls: list[tuple[Tensor, bool]] = []
    hooks = []

    def enter(module: nn.Module, inputs: Any) -> None:
        open_calls.append((random_state(device), False))

    def leave(path: str, module: nn.Module) -> None:
        before, told = open_calls.pop()
        if not torch.equal(before, random_state(device)):
            if not told:
                found[path] = type(module).__name__
            if open_calls:
                open_calls[-1] = (open_calls[-1][0], True)

    for path, module in model.named_modules():
        hooks.append(module.register_forward_pre_hook(enter))
        hooks.append(module.register_forward_hook(lambda m, i, o, path=path: leave(path, m)))
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices), torch.no_grad():
        model(*args, **kwargs)
    for hook in hooks:
        hook.remove()
    return found


def random_state(device: torch.device) -> Tensor:
    """Return the state of the generators that a module on a device draws from."""
    if device.type == "cuda":
        return torch.cat([torch.get_rng_state(), torch.cuda.get_rng_state(device)])
    return torch.get_rng_state()


@contextlib.contextmanager
def _full_precision(device: torch.device) -> Iterator[None]:
    """Keep TF32 out of the yardstick: convolutions use it on CUDA by default."""
    if device.type != "cuda":
        yield
        return
    backends: tuple[Any, ...] = (torch.backends.cudnn, torch.backends.cuda.matmul)
    before = [backend.allow_tf32 for backend in backends]
    try:
        for backend in backends:
            backend.allow_tf32 = False
        yield
    finally:
        for backend, value in zip(backends, before, strict=True):
            backend.allow_tf32 = value
