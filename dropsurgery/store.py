"""Surgery as data: the passes as JSON, the weights as safetensors, nothing pickled."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from dropsurgery.errors import ArgumentTypeError, DropsurgeryError, ModelLoadError
from dropsurgery.graph.drops import is_classic, is_drop, rate, rate_name, set_rate
from dropsurgery.graph.module import HISTORY, history
from dropsurgery.graph.trace import trace_like
from dropsurgery.passes.base import Pass, run
from dropsurgery.survival import check_probability

FORMAT = 1
WEIGHTS = "model.safetensors"
SURGERY = "surgery.json"


def save(module: nn.Module, directory: str | os.PathLike[str]) -> Path:
    """Write a surgery: which passes were run, and the weights.

    Two files are written to `directory`, which is made if need be: `surgery.json` and
    `model.safetensors`. Each is written beside its place and then moved there; a failed or
    interrupted save leaves what was there before.

    Args:
        module: a module that dropsurgery returned.
        directory: where to write.

    Returns:
        The directory.

    Raises:
        ArgumentTypeError: `module` does not come from dropsurgery.
        ModelLoadError: the directory cannot be written.
    """
    from safetensors.torch import save_file

    if not isinstance(module, fx.GraphModule) or HISTORY not in module.meta:
        raise ArgumentTypeError(
            f"save takes a module that dropsurgery returned, got {type(module).__name__}",
            fix="ds.save(ds.retrofit(model), directory), or torch.save for a plain module",
        )
    tensors, aliases = _unique(module.state_dict())
    modules = list(module.named_modules())
    document = {
        "format": FORMAT,
        **history(module),
        "training": module.training,
        "other_mode": [path for path, m in modules if m.training != module.training],
        "rates": {path: rate(m) for path, m in modules if _is_rated(m)},
        "frozen": [name for name, p in module.named_parameters() if not p.requires_grad],
        "aliases": aliases,
        "versions": {"torch": torch.__version__},
    }
    text = json.dumps(document, indent=2, allow_nan=False)
    target = _path(directory)
    try:
        target.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target, prefix=".saving-") as staging:
            save_file(tensors, Path(staging) / WEIGHTS, metadata={"format": "pt"})
            (Path(staging) / SURGERY).write_text(text + "\n", encoding="utf-8")
            for name in (WEIGHTS, SURGERY):
                # safetensors makes its file readable by its owner alone.
                os.chmod(Path(staging) / name, (Path(staging) / SURGERY).stat().st_mode)
                os.replace(Path(staging) / name, target / name)
    except OSError as error:
        raise ModelLoadError(
            f"the surgery cannot be written: {error.strerror or error}",
            where=str(target),
            fix="a directory that can be written",
        ) from error
    return target


def load(directory: str | os.PathLike[str], model: nn.Module) -> fx.GraphModule:
    """Rebuild a saved surgery on a freshly made model.

    The passes are run on `model` and the saved weights are loaded, strictly. The result computes
    bit for bit what the saved module computed. No pickled code is run.

    Args:
        directory: what `save` wrote.
        model: a model of the architecture that was operated on; its weights do not matter, and it
            is not changed.

    Returns:
        The rebuilt module, in the mode that the saved one was in.

    Raises:
        ModelLoadError: files are missing or damaged, or do not fit the model.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    source = _path(directory)
    document = _read(source / SURGERY)
    passes = read_passes(document["passes"], str(source / SURGERY))
    try:
        tensors: dict[str, Tensor] = load_file(source / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise ModelLoadError(
            f"the weights cannot be read: {error}", where=str(source / WEIGHTS)
        ) from error
    module = replay(model, document, passes, where=str(source / SURGERY))
    _fill(module, tensors, document, source)
    _set_state(module, document, source)
    return module


def replay(
    model: nn.Module, record: Mapping[str, Any], passes: Sequence[Pass], *, where: str
) -> fx.GraphModule:
    """Run recorded passes on another model of the same architecture.

    Args:
        model: the model, which is not changed; the result shares what no pass rewrites.
        record: what the history of the traced network tells of its trace; "source", its class, is
            for messages.
        passes: as `read_passes` returned them.
        where: what the passes were read from, for messages.

    Returns:
        The network after the passes, in eval mode.

    Raises:
        ModelLoadError: the passes do not fit the model.
        TraceError: the model cannot be traced.
    """
    module = trace_like(model, record)
    # Passes that fold refuse a network in training mode, whatever mode it was put into later.
    module.eval()
    for item in passes:
        try:
            run(item, module)
        except DropsurgeryError as error:
            raise ModelLoadError(
                f"the saved surgery does not fit this {type(model).__name__}: {error.problem}",
                where=f"{where}, pass {item!r}",
                fix=f"load it on a model like the one it was made from: {record['source']}",
            ) from error
    return module


def _is_rated(layer: nn.Module) -> bool:
    return (is_drop(layer) or is_classic(layer)) and rate_name(layer) is not None


def _path(directory: str | os.PathLike[str]) -> Path:
    try:
        return Path(directory)
    except TypeError as error:
        raise ArgumentTypeError(f"expected the path of a directory, got {directory!r}") from error


def _set_state(module: fx.GraphModule, document: dict[str, Any], source: Path) -> None:
    """Set rates, modes and what is frozen as the saved module had them."""
    modules = dict(module.named_modules())
    parameters = dict(module.named_parameters())
    try:
        for path, drop_prob in document["rates"].items():
            set_rate(modules[path], check_probability(drop_prob, f"the rate of '{path}'"))
        for submodule in modules.values():
            submodule.training = document["training"]
        for path in document["other_mode"]:
            modules[path].training = not document["training"]
        frozen = {id(parameters[name]) for name in document["frozen"]}
    except KeyError as error:
        raise ModelLoadError(
            f"the saved surgery names {error}, which this model does not have",
            where=str(source / SURGERY),
            fix=f"load it on a model like the one it was made from: {document['source']}",
        ) from error
    for parameter in parameters.values():
        if parameter.is_floating_point():
            parameter.requires_grad_(id(parameter) not in frozen)


def _unique(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Split a state dict into tensors that share no memory, and keys that repeat another's."""
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    first: dict[tuple[Any, ...], str] = {}
    for key, value in state.items():
        if not isinstance(value, Tensor):
            raise ArgumentTypeError(
                f"the state dict holds a {type(value).__name__}; safetensors holds only tensors",
                where=key,
                fix="take get_extra_state out, or save that part yourself",
            )
        place = (value.data_ptr(), value.shape, value.stride(), value.dtype, value.device)
        if value.numel() and place in first:
            aliases[key] = first[place]
        else:
            first[place] = key
            # A copy where the memory is not this tensor's alone, as safetensors wants it.
            tensors[key] = value.detach().contiguous()
    storages: set[int] = set()
    for key, value in tensors.items():
        pointer = value.untyped_storage().data_ptr()
        if pointer in storages:
            tensors[key] = value.clone()
        storages.add(pointer)
    return tensors, aliases


def _read(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelLoadError(
            f"no saved surgery here: {error.strerror or error}",
            where=str(path),
            fix="a directory that ds.save or `dropsurgery retrofit` wrote",
        ) from error
    except ValueError as error:
        raise ModelLoadError(f"the saved surgery is damaged: {error}", where=str(path)) from error
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise ModelLoadError(
            "this is not a saved surgery that this version can read",
            where=str(path),
            fix=f"a file with format {FORMAT}",
        )
    for name, kind in _FIELDS.items():
        if not isinstance(document.get(name), kind):
            raise ModelLoadError(
                f"the saved surgery is damaged: {name!r} is {document.get(name)!r}",
                where=str(path),
            )
    return document


_FIELDS = {
    "source": str,
    "passes": list,
    "training": bool,
    "other_mode": list,
    "rates": dict,
    "frozen": list,
    "aliases": dict,
}


def read_passes(entries: Sequence[Any], where: str) -> list[Pass]:
    """Build passes again from what `Pass.to_json` wrote.

    Raises:
        ModelLoadError: one is unknown, or its parameters cannot be read.
    """
    passes = []
    for entry in entries:
        data = dict(entry) if isinstance(entry, dict) else {}
        name = data.pop("pass", None)
        if name not in Pass.registry:
            raise ModelLoadError(f"unknown pass {name!r}", where=where)
        try:
            passes.append(Pass.registry[name].from_json(data))
        except (TypeError, KeyError, DropsurgeryError) as error:
            raise ModelLoadError(
                f"the parameters of pass {name} cannot be read: {error}", where=where
            ) from error
    return passes


def _fill(
    module: fx.GraphModule, tensors: dict[str, Tensor], document: dict[str, Any], source: Path
) -> None:
    """Give the module the saved weights as its own tensors; tied parameters stay tied."""
    own = module.state_dict(keep_vars=True)
    values: dict[str, Tensor] = {}
    for key, value in tensors.items():
        old = own.get(key)
        if old is not None and value.shape == old.shape:
            # A file's tensors may lie unaligned, for which kernels round in another order.
            value = value.to(old.device, copy=True)
            if isinstance(old, nn.Parameter):
                value = nn.Parameter(value, requires_grad=old.requires_grad)
        values[key] = value
    for key, original in document["aliases"].items():
        if original not in values:
            raise ModelLoadError(
                f"the saved surgery is damaged: {key!r} repeats {original!r}, which is not saved",
                where=str(source / SURGERY),
            )
        values[key] = values[original]
    try:
        module.load_state_dict(values, strict=True, assign=True)
    except RuntimeError as error:
        raise ModelLoadError(
            f"the saved weights do not fit this model: {str(error).splitlines()[-1].strip()}",
            where=str(source / WEIGHTS),
            fix=f"load it on a model like the one it was made from: {document['source']}",
        ) from error
