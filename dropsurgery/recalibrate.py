"""BatchNorm statistics estimated again, with dropout off."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dropsurgery.errors import ArgumentError, ArgumentTypeError
from dropsurgery.graph.clone import clone_structure
from dropsurgery.graph.signature import first_line


def recalibrate_batchnorm(
    model: nn.Module, data: Any, *, inplace: bool = False, progress: bool = False
) -> nn.Module:
    """Return the network with BatchNorm statistics that were estimated again with dropout off.

    Dropout in front of a BatchNorm gives it, in training, a variance that eval does not have
    (Li et al. 2018, arXiv:1801.05134). Here the data is run through the network once with every
    layer in eval mode but the BatchNorms, which normalise by the batch; their running mean and
    (unbiased) variance become those of *all* the data together, summed up in float64, not an
    exponential average. Run it before BatchNorms are folded.

    A BatchNorm stays as it is where it is frozen: in eval mode while the network is in training
    mode, put there by the network's own `train`, with parameters that are frozen while others are
    not, or without running statistics; and where the data does not reach it (auxiliary heads).
    Training flags are what they were, also after an error. In a process group
    (`torch.distributed`), each process brings its part of the data and all get the same statistics.

    Args:
        model: the network, in either mode. It is not changed, unless `inplace`.
        data: batches of training data: tensors; tuples and lists, whose first entry is the input,
            or a tuple of positional inputs; or mappings of forward's arguments. A single tensor is
            one batch. Take batches as large as in training.
        inplace: write the statistics into `model` itself and return it.
        progress: draw a progress bar (needs `rich`).

    Returns:
        A deep copy of the network, or `model` itself.

    Raises:
        ArgumentError: no data, no BatchNorm to recalibrate, or the network does not run on the
            data, or statistics that are not finite. The network then has the statistics it had.
        ArgumentTypeError: an argument of the wrong type.
    """
    if not isinstance(model, nn.Module):
        raise ArgumentTypeError(
            f"recalibrate_batchnorm takes a torch.nn.Module, got {type(model).__name__}"
        )
    result = model if inplace else copy.deepcopy(model)
    norms = _unfrozen(result)
    if not norms:
        raise ArgumentError(
            "the network has no BatchNorm whose statistics could be estimated",
            where=type(model).__name__,
            fix="BatchNorm with running statistics, not frozen",
        )
    sums = _Sums(norms)
    with torch.no_grad(), _only_in_training(result, norms), sums.watching():
        for batch in _shown(batches(data), progress):
            run_batch(result, batch)
    sums.write()
    return result


def batches(data: Any) -> Iterator[tuple[tuple[Any, ...], dict[str, Any]]]:
    """Yield the positional and keyword arguments of forward for each batch.

    Raises:
        ArgumentError: there is no batch.
        ArgumentTypeError: `data` is not made of batches.
    """
    if isinstance(data, Tensor):
        data = (data,)
    if isinstance(data, str | Mapping) or not isinstance(data, Iterable):
        raise ArgumentTypeError(
            f"data is an iterable of batches, got {type(data).__name__}",
            fix="a DataLoader, a list of tensors, or one tensor",
        )
    empty = True
    for batch in data:
        empty = False
        if isinstance(batch, Mapping):
            yield (), dict(batch)
            continue
        inputs = batch[0] if isinstance(batch, tuple | list) and batch else batch
        inputs = tuple(inputs) if isinstance(inputs, tuple | list) else (inputs,)
        if not inputs or not any(isinstance(x, Tensor) for x in inputs):
            raise ArgumentTypeError(
                f"a batch is a tensor, (inputs, labels) or a mapping, got {type(batch).__name__}"
            )
        yield inputs, {}
    if empty:
        raise ArgumentError("the data holds no batch", fix="an iterable that was not used up")


def run_batch(model: Callable[..., Any], batch: tuple[tuple[Any, ...], dict[str, Any]]) -> None:
    """Run a network on a batch; what it raises becomes a typed error."""
    try:
        model(*batch[0], **batch[1])
    except (RuntimeError, ValueError, TypeError) as error:
        shapes = [tuple(x.shape) for x in batch[0] if isinstance(x, Tensor)]
        raise ArgumentError(
            f"the network does not run on the data: {first_line(error)}",
            where=f"inputs of shape {shapes}",
            fix="batches of forward's inputs, with more than one value a channel",
        ) from error


def _unfrozen(model: nn.Module) -> dict[str, Any]:
    """Return the BatchNorms whose statistics are to be estimated, by path."""
    shadow = clone_structure(model)
    shadow.train()  # the network's own `train` may keep some of them in eval
    trains = {path for path, layer in shadow.named_modules() if layer.training}
    tunable = any(parameter.requires_grad for parameter in model.parameters())
    found = {}
    for path, layer in model.named_modules():
        if not isinstance(layer, _BatchNorm) or layer.running_mean is None:
            continue
        own = [p for p in (layer.weight, layer.bias) if p is not None]
        locked = tunable and bool(own) and not any(p.requires_grad for p in own)
        in_eval = model.training and not layer.training
        if path in trains and not locked and not in_eval:
            found[path] = layer
    return found


@contextlib.contextmanager
def _only_in_training(model: nn.Module, norms: dict[str, Any]) -> Iterator[None]:
    """Put the BatchNorms into training mode, without updates, and all else into eval."""
    modules = list(model.modules())
    flags = [module.training for module in modules]
    momenta = [norm.momentum for norm in norms.values()]
    # A momentum of 0 keeps the statistics, unless the batch is not finite: 0 times NaN is NaN.
    buffers = [buffer for norm in norms.values() for buffer in norm._buffers.values()]
    copies = [None if buffer is None else buffer.clone() for buffer in buffers]
    try:
        for module in modules:
            module.training = False
        for norm in norms.values():
            norm.training, norm.momentum = True, 0.0
        yield
    finally:
        for module, flag in zip(modules, flags, strict=True):
            module.training = flag
        for norm, momentum in zip(norms.values(), momenta, strict=True):
            norm.momentum = momentum
        for buffer, value in zip(buffers, copies, strict=True):
            if buffer is not None:
                buffer.copy_(value)


class _Sums:
    """Sums over the data of what each BatchNorm sees: count, x, x²; by channel, in float64."""

    def __init__(self, norms: dict[str, Any]) -> None:
        self._norms = norms
        self._sums = {
            path: torch.zeros(3, norm.num_features, dtype=torch.float64, device=_device(norm))
            for path, norm in norms.items()
        }

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Add up what comes by."""
        handles = [
            norm.register_forward_pre_hook(self._hook(path)) for path, norm in self._norms.items()
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, path: str) -> Any:
        def add(module: nn.Module, args: tuple[Any, ...]) -> None:
            add_moments(self._sums[path], args[0])

        return add

    def write(self) -> None:
        """Set the statistics, all of them or, where one is not finite, none."""
        sums = self._over_processes()
        new = {}
        for path, (count, first, second) in ((p, s.unbind()) for p, s in sums.items()):
            if not count[0]:
                continue  # the data does not reach it
            mean = first / count
            variance = (second / count - mean.square()).clamp(min=0.0)
            variance = variance * count / (count - 1).clamp(min=1.0)
            if not bool(mean.isfinite().all() and variance.isfinite().all()):
                raise ArgumentError(
                    "the data gives statistics that are not finite", where=path,
                    fix="data without NaN and infinity",
                )  # fmt: skip
            new[path] = (mean, variance)
        for path, (mean, variance) in new.items():
            norm = self._norms[path]
            norm.running_mean.copy_(mean)
            norm.running_var.copy_(variance)

    def _over_processes(self) -> dict[str, Tensor]:
        """Return the sums over all processes of the group, if there is one."""
        distributed = torch.distributed
        if not (distributed.is_available() and distributed.is_initialized()):
            return self._sums
        flat = torch.cat([sums.flatten() for sums in self._sums.values()])
        distributed.all_reduce(flat)
        parts = flat.split([sums.numel() for sums in self._sums.values()])
        return {path: part.view(3, -1) for path, part in zip(self._sums, parts, strict=True)}


def add_moments(sums: Tensor, x: Tensor) -> None:
    """Add count, Σx and Σx² of (N, C, …) by channel to sums of shape (3, C)."""
    values = x.detach().double().transpose(0, 1).flatten(1)
    sums[0] += values.shape[1]
    sums[1] += values.sum(1)
    sums[2] += values.square().sum(1)


def _device(norm: Any) -> torch.device:
    device: torch.device = norm.running_mean.device
    return device


def _shown(items: Iterator[Any], progress: bool) -> Iterator[Any]:
    if not progress:
        yield from items
        return
    from rich.progress import track

    yield from track(items, description="BatchNorm statistics", transient=True)
