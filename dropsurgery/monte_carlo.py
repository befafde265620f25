"""Monte-Carlo dropout: repeated runs of a network that draws in eval, and what they tell."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from dropsurgery.errors import ArgumentError, ArgumentTypeError, PassError
from dropsurgery.graph.marks import MASK
from dropsurgery.graph.module import graphs
from dropsurgery.graph.shapes import record_shapes
from dropsurgery.graph.signature import first_line
from dropsurgery.graph.trace import as_tuple, trace
from dropsurgery.layers.monte_carlo import Noise, check_noise, factors
from dropsurgery.layers.noise import noise_shape

Activation = Literal["softmax", "sigmoid"] | None
Run = Callable[[tuple[Tensor, ...]], Any]
_RECORD = "dropsurgery.noise"


@dataclass(frozen=True)
class Prediction:
    """What repeated runs of a random network tell about its outputs for N inputs.

    Attributes:
        samples: number of runs for each input.
        mean: mean of the outputs over the runs, (N, …), float64.
        variance: their variance (over samples - 1), (N, …), float64.
        probabilities: mean of the activated outputs, (N, …); None without an activation.
        entropy: entropy of `probabilities` in nats, (N, …) without the class axis: the total
            uncertainty; None without an activation.
        mutual_information: `entropy` less the mean entropy of the single runs: the part that comes
            from the weights' uncertainty (Gal et al. 2017, "BALD"), in nats.
    """

    samples: int
    mean: Tensor
    variance: Tensor
    probabilities: Tensor | None
    entropy: Tensor | None
    mutual_information: Tensor | None


def mc_predict(
    model: Any,
    inputs: Any,
    samples: int = 30,
    *,
    batch_size: int = 64,
    activation: Activation = "softmax",
    output: int | str = 0,
    generator: torch.Generator | None = None,
) -> Prediction:
    """Run a random network repeatedly, and return mean, variance, entropy, mutual information.

    Gal and Ghahramani, "Dropout as a Bayesian Approximation", 2016, arXiv:1506.02142. Where the
    noise of one row is not another's, the samples of an input are drawn side by side in one run, up
    to `batch_size` rows at a time. Masks that are inputs of the network
    (`ConvertDropout("monte-carlo", noise="input")`) are drawn here. Two onnxruntime sessions of one
    process draw the same numbers, unless `onnxruntime.set_seed` comes before the second.

    Args:
        model: a module in eval mode that draws there (`ConvertDropout("monte-carlo")`), or an
            `onnxruntime.InferenceSession` of one.
        inputs: one tensor, a sequence of positional inputs or a mapping by name; axis 0 of every
            tensor is the batch of N. Masks are left out.
        samples: runs for each input, 2 or more.
        batch_size: the most rows of one run.
        activation: "softmax" (over axis 1) or "sigmoid" of the outputs for the probabilities; None
            for a regression, which has no entropy.
        output: which output, by position or name, where there are several.
        generator: where masks that are inputs are drawn from; drawn noise is the network's own.

    Returns:
        The prediction, on the CPU.

    Raises:
        ArgumentError, ArgumentTypeError: an argument that cannot be used; a module in training
            mode; a network whose outputs do not change from run to run.
    """
    _check(samples, batch_size, activation)
    runner = _runner(model, inputs, output, generator)
    moments = [
        _predict(runner, chunk, samples, batch_size, activation)
        for chunk in _chunks(runner.inputs, batch_size)
    ]
    whole = [torch.cat(parts) for parts in zip(*moments, strict=True)]
    mean, variance = whole[:2]
    if not bool(variance.any()):
        raise ArgumentError(
            f"{samples} runs gave the same outputs bit for bit: nothing in the network draws, or "
            "its noise is frozen",
            where=runner.name,
            fix='ds.apply(model, ds.ConvertDropout("monte-carlo")).module, exported with '
            "ds.export_onnx",
        )
    if activation is None:
        return Prediction(samples, mean, variance, None, None, None)
    probabilities, of_each = whole[2:]
    entropy = _entropy(probabilities, activation)
    return Prediction(samples, mean, variance, probabilities, entropy, entropy - of_each)


def draw_masks(
    model: nn.Module,
    inputs: Any,
    *,
    noise: Noise = "bernoulli",
    generator: torch.Generator | None = None,
) -> tuple[Tensor, ...]:
    """Draw the masks that a network takes as inputs, in the order of its arguments.

    A mask holds factors of mean 1: 0 or 1/(1 - p), or Gaussian ones. The same masks give the same
    outputs, in PyTorch and in onnxruntime.

    Args:
        model: what `ConvertDropout("monte-carlo", noise="input")` returned.
        inputs: the network's other inputs: a tensor or a sequence of them.
        noise: "bernoulli" or "gaussian".
        generator: on the device of the inputs; None for the global one.

    Raises:
        PassError: the network takes no masks.
        ArgumentError: unknown noise.
    """
    check_noise(noise)
    given = as_tuple(inputs)
    if not isinstance(model, fx.GraphModule) or not _mask_inputs(model):
        raise PassError(
            "the network takes no masks as inputs",
            where=type(model).__name__,
            fix='ds.apply(model, ds.ConvertDropout("monte-carlo", noise="input")).module',
        )
    view = trace(model)
    masks = _mask_inputs(view)
    # A mask of one entry leaves every shape as it is.
    record_shapes(view, (*given, *(torch.ones(()) for _ in masks)))
    device = next(leaf.device for leaf in pytree.tree_leaves(given) if isinstance(leaf, Tensor))
    users = {
        str(node.target): user
        for graph in graphs(view)
        for node in graph.nodes
        if node.op == "placeholder" and MASK in node.meta
        for user in node.users
    }
    drawn = []
    for node in masks:
        meta = users[str(node.target)].all_input_nodes[0].meta["tensor_meta"]
        record = node.meta[MASK]
        shape = noise_shape(torch.empty(meta.shape, device="meta"), record["units"])
        drawn.append(_mask(shape, record["p"], noise, generator, device).to(meta.dtype))
    return tuple(drawn)


def noise_record(model: nn.Module) -> dict[str, Any]:
    """Return what a session must know of a network's noise; {} where it has none.

    Keys: "masks" (input name → p and units), "shared" (whether rows share draws).
    """
    masks = _mask_inputs(model) if isinstance(model, fx.GraphModule) else []
    named = {str(node.target): node.meta[MASK] for node in masks}
    if not named and not any(_is_monte_carlo(layer) for layer in model.modules()):
        return {}
    return {"masks": named, "shared": _shares_draws(model)}


def _is_monte_carlo(layer: nn.Module) -> bool:
    return type(layer).__module__ == "dropsurgery.layers.monte_carlo"


def _shares_draws(model: nn.Module) -> bool:
    units = (getattr(layer, "units", getattr(layer, "mode", "")) for layer in model.modules())
    masks = _mask_inputs(model) if isinstance(model, fx.GraphModule) else []
    return "batch" in units or any(node.meta[MASK]["units"] == "batch" for node in masks)


def _mask_inputs(module: fx.GraphModule) -> list[fx.Node]:
    return [n for n in module.graph.nodes if n.op == "placeholder" and MASK in n.meta]


def _mask(
    shape: Sequence[int],
    p: float,
    noise: Noise,
    generator: torch.Generator | None,
    device: torch.device,
) -> Tensor:
    if generator is None:
        return factors(torch.empty(tuple(shape), device=device), p, noise)
    draws = torch.empty(tuple(shape), device=device)
    if noise == "gaussian":
        return draws.normal_(generator=generator) * math.sqrt(p / (1.0 - p)) + 1.0
    return (draws.uniform_(generator=generator) >= p).float() / (1.0 - p)


def _check(samples: int, batch_size: int, activation: Activation) -> None:
    for name, value, least in (("samples", samples, 2), ("batch_size", batch_size, 1)):
        if isinstance(value, bool) or not isinstance(value, int):
            raise ArgumentTypeError(f"{name} is a whole number, got {value!r}")
        if value < least:
            raise ArgumentError(f"{name} is {value}", fix=f"{least} or more")
    if activation not in ("softmax", "sigmoid", None):
        raise ArgumentError(f"unknown activation {activation!r}", fix="'softmax', 'sigmoid', None")


@dataclass(frozen=True)
class _Runner:
    """A network to be run on positional inputs.

    Attributes:
        name: what it is, for messages.
        run: takes the inputs of one run, draws masks if it needs them, returns one output.
        inputs: the inputs of the whole prediction.
        repeats: whether several samples of an input may be rows of one run.
    """

    name: str
    run: Run
    inputs: tuple[Tensor, ...]
    repeats: bool


def _runner(
    model: Any, inputs: Any, output: int | str, generator: torch.Generator | None
) -> _Runner:
    if isinstance(model, nn.Module):
        return _module_runner(model, inputs, output, generator)
    if all(hasattr(model, name) for name in ("run", "get_inputs", "get_modelmeta")):
        return _session_runner(model, inputs, output, generator)
    raise ArgumentTypeError(
        f"mc_predict runs modules and onnxruntime sessions, got {type(model).__name__}",
        fix="onnxruntime.InferenceSession(path) for a file",
    )


def _module_runner(
    model: nn.Module, inputs: Any, output: int | str, generator: torch.Generator | None
) -> _Runner:
    if model.training:
        raise ArgumentError(
            "the model is in training mode, where BatchNorm uses the statistics of the batch",
            where=type(model).__name__,
            fix='model.eval(), after ds.ConvertDropout("monte-carlo")',
        )
    tensors = _batched(tuple(inputs.values()) if isinstance(inputs, Mapping) else as_tuple(inputs))
    takes_masks = isinstance(model, fx.GraphModule) and bool(_mask_inputs(model))
    names = tuple(inputs) if isinstance(inputs, Mapping) else ()

    def run(chunk: tuple[Tensor, ...]) -> Any:
        masks = draw_masks(model, chunk, generator=generator) if takes_masks else ()
        with torch.no_grad():
            if names:
                return _select(model(*masks, **dict(zip(names, chunk, strict=True))), output)
            return _select(model(*chunk, *masks), output)

    return _Runner(type(model).__name__, run, tensors, not _shares_draws(model))


def _session_runner(
    session: Any, inputs: Any, output: int | str, generator: torch.Generator | None
) -> _Runner:
    record = json.loads(session.get_modelmeta().custom_metadata_map.get(_RECORD, "{}"))
    masks = record.get("masks", {})
    slots = [value for value in session.get_inputs() if value.name not in masks]
    if isinstance(inputs, Mapping):
        missing = [slot.name for slot in slots if slot.name not in inputs]
        if missing:
            raise ArgumentError(f"the session also takes {missing}", fix="one entry for each input")
        inputs = [inputs[slot.name] for slot in slots]
    tensors = _batched(as_tuple(inputs))
    if len(tensors) != len(slots):
        raise ArgumentError(
            f"the session takes {[slot.name for slot in slots]}, got {len(tensors)} inputs"
        )
    outputs = [value.name for value in session.get_outputs()]
    name = _output_name(outputs, output)
    open_batch = all(not isinstance(slot.shape[0], int) for slot in slots)

    def run(chunk: tuple[Tensor, ...]) -> Any:
        feeds = {slot.name: t.cpu().numpy() for slot, t in zip(slots, chunk, strict=True)}
        for slot in session.get_inputs():
            if slot.name in masks:
                shape = _mask_shape(slot, len(chunk[0]))
                p = masks[slot.name]["p"]
                mask = _mask(shape, p, "bernoulli", generator, torch.device("cpu"))
                feeds[slot.name] = mask.to(_DTYPES.get(slot.type, torch.float32)).numpy()
        return torch.from_numpy(session.run([name], feeds)[0])

    repeats = open_batch and bool(record) and not record["shared"]
    return _Runner("the session", run, tensors, repeats)


_DTYPES = {"tensor(double)": torch.float64, "tensor(float16)": torch.float16}


def _mask_shape(slot: Any, rows: int) -> list[int]:
    shape = [
        rows if axis == 0 and not isinstance(n, int) else n for axis, n in enumerate(slot.shape)
    ]
    if not all(isinstance(size, int) for size in shape):
        raise ArgumentError(
            f"the size of mask '{slot.name}' is not known: {slot.shape}",
            fix="export with inputs of one size, or run the session with masks of yours",
        )
    return shape


def _output_name(outputs: list[str], output: int | str) -> str:
    if isinstance(output, int) and -len(outputs) <= output < len(outputs):
        return outputs[output]
    if output in outputs:
        return str(output)
    raise ArgumentError(f"there is no output {output!r}", fix=f"one of {outputs}")


def _select(value: Any, output: int | str) -> Tensor:
    """Return one tensor of what a module returned."""
    if isinstance(value, Tensor):
        return value
    try:
        found = value[output]
    except (KeyError, IndexError, TypeError) as error:
        raise ArgumentError(
            f"there is no output {output!r} in a {type(value).__name__}: {first_line(error)}",
            fix="output=, a position or a key",
        ) from error
    if not isinstance(found, Tensor):
        raise ArgumentTypeError(f"output {output!r} is a {type(found).__name__}, not a tensor")
    return found


def _batched(inputs: tuple[Any, ...]) -> tuple[Tensor, ...]:
    if not inputs or not all(isinstance(x, Tensor) and x.ndim for x in inputs):
        raise ArgumentTypeError(
            "inputs are tensors with a batch axis", fix="x[None] for one sample"
        )
    sizes = {len(x) for x in inputs}
    if len(sizes) != 1 or sizes == {0}:
        raise ArgumentError(
            f"the inputs have batches of {sorted(sizes)}", fix="one batch size, 1 or more"
        )
    return inputs


def _chunks(inputs: tuple[Tensor, ...], size: int) -> Iterator[tuple[Tensor, ...]]:
    yield from zip(*(x.split(size) for x in inputs), strict=True)


def _predict(
    runner: _Runner,
    inputs: tuple[Tensor, ...],
    samples: int,
    batch_size: int,
    activation: Activation,
) -> tuple[Tensor, ...]:
    """Return mean, variance and, with an activation, mean probabilities and mean entropy."""
    rows = len(inputs[0])
    copies = max(1, min(batch_size // rows, samples)) if runner.repeats else 1
    mean = squares = probabilities = entropies = torch.zeros((), dtype=torch.float64)
    done = 0
    while done < samples:
        count = min(copies, samples - done)
        repeated = tuple(torch.cat([x] * count) for x in inputs)
        found = runner.run(repeated)
        values = found.detach().cpu().double().unflatten(0, (count, rows))
        # Chan et al.'s update: the variance of many samples without keeping them.
        own = values.mean(0)
        shift, total = own - mean, done + count
        squares = squares + (values - own).square().sum(0) + shift.square() * done * count / total
        mean = mean + shift * count / total
        if activation is not None:
            chances = _activate(values, activation)
            probabilities = probabilities + chances.sum(0) / samples
            entropies = entropies + _entropy(chances, activation, axis=2).sum(0) / samples
        done = total
    moments = (mean, squares / (samples - 1))
    return moments if activation is None else (*moments, probabilities, entropies)


def _activate(values: Tensor, activation: Activation) -> Tensor:
    """Return probabilities of outputs (samples, N, …)."""
    if activation == "sigmoid":
        return values.sigmoid()
    if values.ndim < 3:
        raise ArgumentError(
            f"the network's output has the shape {tuple(values.shape[1:])}, without a class axis",
            fix='activation="sigmoid" or None',
        )
    return values.softmax(2)


def _entropy(probabilities: Tensor, activation: Activation, axis: int = 1) -> Tensor:
    """Return the entropy in nats, over the class axis or of each Bernoulli variable."""
    if activation == "sigmoid":
        return torch.special.entr(probabilities) + torch.special.entr(1.0 - probabilities)
    return torch.special.entr(probabilities).sum(axis)
