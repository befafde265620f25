"""Running the two sides of a comparison: modules in eval mode and ONNX files."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from dropsurgery.errors import ArgumentTypeError, VerifyError
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

    def __call__(self, case: Case) -> dict[str, Tensor]:
        """Return the outputs in the module's own dtype."""
        return self._run(self._native, case, contextlib.nullcontext())

    def float64(self, case: Case) -> dict[str, Tensor]:
        """Return the outputs of the same network computed in float64 throughout."""
        # A fresh clone: a forward that keeps a cache must not find one of another dtype.
        return self._run(inference_clone(self._model), case, Float64(), wide=True)

    def _run(
        self,
        model: nn.Module,
        case: Case,
        mode: contextlib.AbstractContextManager[Any],
        *,
        wide: bool = False,
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
            before = _random_state(self.device)
            with mode:
                value = model(*args, **kwargs)
            if not torch.equal(before, _random_state(self.device)):
                raise VerifyError(
                    f"the {self.role} draws random numbers in eval mode",
                    where=self.name,
                    fix="take the randomness out, or make its draw follow self.training",
                )
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


def _random_state(device: torch.device) -> Tensor:
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
