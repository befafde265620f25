"""How long a call of each form of a network takes, side by side."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dropsurgery.report import medians_in_turns
from dropsurgery.verify.onnx_file import OnnxRunner

_SECONDS = 2.0  # for all calls together, more or less
_LEAST, _MOST = 3, 30  # calls of each

Timings = tuple[tuple[str, float], ...]


def latency_of_modules(
    before: nn.Module, after: nn.Module, inputs: Sequence[Any], names: tuple[str, str]
) -> Timings:
    """Return (name, median milliseconds) of two networks in eval mode on the same inputs."""
    return _in_turns(_called(before, inputs), _called(after, inputs), names)


def latency_of_file(
    model: nn.Module, path: Path, inputs: Sequence[Tensor], names: tuple[str, str]
) -> Timings:
    """Return (name, median milliseconds) of a network and of its ONNX file in onnxruntime."""
    runner = OnnxRunner(path, "cpu")
    feeds = dict(zip(runner.inputs, inputs, strict=True))
    return _in_turns(_called(model, inputs), lambda: runner(feeds), names)


def weight_bytes(model: nn.Module) -> int:
    """Return the bytes of a network's parameters and buffers, shared ones once."""
    tensors = {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]}
    return sum(tensor.nbytes for tensor in tensors.values())


def file_bytes(path: Path, sidecars: Sequence[Path] = ()) -> int:
    """Return the bytes of an ONNX file and of its external data."""
    return sum(file.stat().st_size for file in (path, *sidecars))


def _called(model: nn.Module, inputs: Sequence[Any]) -> Callable[[], object]:
    def call() -> object:
        with torch.inference_mode():
            return model(*inputs)

    return call


def _in_turns(
    first: Callable[[], object], second: Callable[[], object], names: tuple[str, str]
) -> Timings:
    began = time.perf_counter()
    for call in (first, second):  # also what the first call alone sets up
        call()
    taken = time.perf_counter() - began
    repeats = int(min(max(_SECONDS / max(taken, 1e-6), _LEAST), _MOST))
    times = medians_in_turns(first, second, repeats, warm_up=1)
    return tuple(zip(names, times, strict=True))
