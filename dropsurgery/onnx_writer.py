"""Finishing an exported graph and writing it: names, metadata, checks, and files that are whole."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn

from dropsurgery.errors import ArgumentError, ArgumentTypeError, ExportError
from dropsurgery.graph.module import HISTORY
from dropsurgery.graph.signature import first_line
from dropsurgery.monte_carlo import noise_record
from dropsurgery.onnx_random import op_draws

# A protobuf message holds at most 2 GiB; the graph itself takes some of it.
ONE_FILE_LIMIT = 2**31 - 64 * 2**20
_PREFIX = "dropsurgery."
# How the network was traced, without which its passes cannot be run again.
_TRACE = ("leaf_modules", "inputs")


def check_target(path: str | os.PathLike[str]) -> Path:
    """Return the file to write, or fail before the long part rather than after it."""
    if not isinstance(path, str | os.PathLike) or not isinstance(os.fspath(path), str):
        raise ArgumentTypeError(
            f"path is a {type(path).__name__}", fix='a str or a Path, as "model.onnx"'
        )
    if "\0" in os.fspath(path):
        raise ArgumentError(f"path is {os.fspath(path)!r}", fix="a file name without NUL")
    target = Path(path)
    try:
        if target.is_symlink():  # the file is replaced, not the link
            target = Path(os.path.realpath(target))
        if target.is_dir():
            raise ExportError("the path is a folder", where=str(target), fix="name a file in it")
        if not target.parent.is_dir():
            raise ExportError(
                "the folder does not exist",
                where=str(target.parent),
                fix="make it, or check the path",
            )
        os.rmdir(_new_folder(target))
        if target.exists() and not os.access(target, os.W_OK):
            raise PermissionError(13, "the file is read-only")
    except OSError as error:
        raise _unwritable(target, error) from error
    return target


def _new_folder(target: Path) -> str:
    # A name may be as long as the file system allows: the folder's must not be longer.
    return tempfile.mkdtemp(prefix=f".{target.name[:32]}.", suffix=".tmp", dir=target.parent)


def _unwritable(target: Path, error: OSError) -> ExportError:
    return ExportError(
        f"the file cannot be written: {error.strerror or error}",
        where=str(target),
        fix="check permissions and free space, or choose another folder",
    )


def name_values(ir_model: Any, inputs: list[str], outputs: list[str]) -> None:
    """Name the graph's inputs and outputs; other values that bear such a name are renamed."""
    graph = ir_model.graph
    if len(graph.outputs) != len(outputs):
        raise ExportError(
            f"the network returns {len(outputs)} tensors and its graph {len(graph.outputs)}",
            fix="return tensors only: numbers and None are not kept",
        )
    # A value that is returned twice, or an input that is returned, is one value under two names.
    seen: set[int] = {id(value) for value in graph.inputs} | {
        id(value) for value in graph.initializers.values()
    }
    import onnx_ir

    for index, value in enumerate(graph.outputs):
        if id(value) in seen:
            copied = onnx_ir.node("Identity", [value])
            graph.append(copied)
            copied.outputs[0].type, copied.outputs[0].shape = value.type, value.shape
            graph.outputs[index] = copied.outputs[0]
        seen.add(id(graph.outputs[index]))
    tensors = [value for value in graph.inputs if value.type is not None]
    if len(tensors) != len(inputs):
        raise ExportError(
            f"the network takes {len(inputs)} tensors ({', '.join(inputs)}) and its graph "
            f"{len(tensors)} ({', '.join(str(value.name) for value in tensors)})",
            fix="pass tensors only; give other arguments their values as defaults of forward",
        )
    wanted = dict(zip(map(id, tensors), inputs, strict=True))
    for value, name in zip(graph.outputs, outputs, strict=True):
        wanted[id(value)] = f"{name}_out" if name in inputs else name
    taken = set(wanted.values())
    for node in graph.all_nodes():
        for value in node.outputs:
            if value.name in taken and id(value) not in wanted:
                value.name = f"{value.name}_inner"
    for value in [*graph.initializers.values()]:
        if value.name in taken and id(value) not in wanted:
            graph.initializers.pop(value.name)
            value.name = f"{value.name}_weight"
            graph.initializers[value.name] = value
    for value in [*tensors, *graph.outputs]:
        value.name = wanted[id(value)]


def name_nodes(ir_model: Any) -> None:
    """Name each node after the module that holds it, and drop what tells of this machine.

    The exporter records source lines with the paths of this file system.
    """
    taken: set[str] = set()
    for node in ir_model.graph.all_nodes():
        node.metadata_props.pop("pkg.torch.onnx.stack_trace", None)
        path = _path(node)
        stem = f"{path}/{node.op_type}" if path else node.op_type
        name, count = stem, 1
        while name in taken:
            name, count = f"{stem}_{count}", count + 1
        taken.add(name)
        node.name = name


def refuse_random_nodes(ir_model: Any, places: Collection[str] = ()) -> None:
    """Look once more at the result: functions and custom translations can bring randomness in.

    Args:
        ir_model: the graph.
        places: paths of the modules whose draws are meant (`monte_carlo_places`).
    """
    for node in ir_model.graph.all_nodes():
        # Dropout without its third input, training_mode, is the identity.
        trains = node.op_type == "Dropout" and len(node.inputs) > 2
        if not trains and not op_draws(node.op_type, node.domain):
            continue
        if not _draws_at_run_time(node, places):
            raise ExportError(
                f"the exported graph draws random numbers ({node.op_type})",
                where=node.name,
                fix="take the randomness out, or make the noise an input",
            )


def monte_carlo_places(model: nn.Module) -> frozenset[str]:
    """Return where Monte-Carlo dropout draws: its paths, and those of layers of torch around it.

    The nodes of a layer that a graph calls whole all bear the path of that layer.
    """
    own = [p for p, m in model.named_modules() if _is_monte_carlo(type(m))]
    around = [
        path
        for path, layer in model.named_modules()
        if type(layer).__module__.startswith("torch.nn.")
        and any(inner.startswith(f"{path}.") for inner in own)
    ]
    return frozenset({*own, *around})


def _is_monte_carlo(cls: type[nn.Module]) -> bool:
    return cls.__module__ == "dropsurgery.layers.monte_carlo"


def _draws_at_run_time(node: Any, places: Collection[str]) -> bool:
    """Say whether a node is a draw of Monte-Carlo dropout, in the form that stays random.

    A runtime's optimiser folds what depends on constants, and takes Dropout nodes out.
    """
    alike = node.op_type in ("RandomUniformLike", "RandomNormalLike")
    given = [value for value in node.inputs if value is not None and value.const_value is None]
    return alike and _path(node) in places and bool(given)


def _path(node: Any) -> str:
    """Return the path of the module that holds a node, as the exporter wrote it down."""
    scopes = node.metadata_props.get("pkg.torch.onnx.name_scopes")
    path = json.loads(scopes.replace("'", '"'))[:-1] if scopes else []
    return path[-1] if path else ""


def check_draws(ir_model: Any, draws: int, places: Collection[str]) -> None:
    """Refuse a graph that lost one of the draws of Monte-Carlo dropout: folded, or merged."""
    found = sum(_draws_at_run_time(node, places) for node in ir_model.graph.all_nodes())
    if found != draws:
        raise ExportError(
            f"the exported graph draws {found} times at run time, the network {draws} times",
            fix="let Monte-Carlo dropout draw for what depends on the input, not for a constant",
        )


def check_opset(ir_model: Any, opset: int | None) -> None:
    """Refuse another opset than was asked for, which the exporter falls back to in silence."""
    found = ir_model.opset_imports.get("")
    if opset is not None and found != opset:
        raise ExportError(
            f"the exporter could not convert the graph to opset {opset}, it needs {found}",
            fix=f"opset={found}, or None",
        )


def write_metadata(ir_model: Any, model: nn.Module) -> None:
    """Write down what made the file."""
    import onnx

    import dropsurgery

    record: Mapping[str, Any] = (
        model.meta.get(HISTORY, {}) if isinstance(model, fx.GraphModule) else {}
    )
    cls = type(model)
    ir_model.metadata_props.update(
        {
            f"{_PREFIX}version": dropsurgery.__version__,
            f"{_PREFIX}torch": torch.__version__,
            f"{_PREFIX}onnx": onnx.__version__,
            f"{_PREFIX}source": record.get("source") or f"{cls.__module__}.{cls.__qualname__}",
            f"{_PREFIX}passes": json.dumps(record.get("passes", [])),
            f"{_PREFIX}trace": json.dumps(
                {name: record[name] for name in _TRACE if name in record}
            ),
            f"{_PREFIX}inputs": json.dumps([value.name for value in ir_model.graph.inputs]),
            f"{_PREFIX}outputs": json.dumps([value.name for value in ir_model.graph.outputs]),
        }
    )
    if noise := noise_record(model):
        ir_model.metadata_props[f"{_PREFIX}noise"] = json.dumps(noise)


def save(ir_model: Any, target: Path) -> None:
    """Write beside the target, check, and move into place."""
    import onnx
    import onnx_ir

    size = sum(value.const_value.nbytes for value in ir_model.graph.initializers.values())
    sidecar = f"{target.name}.data" if size > ONE_FILE_LIMIT else None
    folder: Path | None = None
    try:
        folder = Path(_new_folder(target))
        written = folder / target.name
        onnx_ir.save(ir_model, written, format="protobuf", external_data=sidecar)
        onnx.checker.check_model(str(written))
        _move(folder, target, sidecar)
    except OSError as error:
        raise _unwritable(target, error) from error
    except onnx.checker.ValidationError as error:
        raise ExportError(
            f"the exported file is not valid ONNX: {first_line(error)}",
            fix="try another opset; if it stays, please report it with the model",
        ) from error
    finally:
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)


def _move(folder: Path, target: Path, sidecar: str | None) -> None:
    """Move the file, and its weights where they are apart, into place; undo it when interrupted.

    Two files cannot be replaced in one step. The old weights wait in `folder` until the model that
    refers to the new ones is there.
    """
    if sidecar is None:
        os.replace(folder / target.name, target)
        return
    weights, kept = target.parent / sidecar, folder / "before"
    had_weights = weights.exists()
    done = False
    try:
        if had_weights:
            os.replace(weights, kept)
        os.replace(folder / sidecar, weights)
        os.replace(folder / target.name, target)
        done = True
    finally:
        if not done:
            if kept.exists():
                os.replace(kept, weights)
            elif not had_weights:
                weights.unlink(missing_ok=True)
