"""A case of its own: the smallest piece that is wrong, what it was given, and what is right."""

from __future__ import annotations

import operator
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from dropsurgery.errors import ArgumentError, ArgumentTypeError, VerifyError
from dropsurgery.verify.comparison import Progress
from dropsurgery.verify.locate import search
from dropsurgery.verify.location import Location, Step
from dropsurgery.verify.marked import MarkedGraph
from dropsurgery.verify.pieces import Pieces
from dropsurgery.verify.recording import Recording, Ref, Replay

_SCRIPT = '''\
"""{title}

piece.onnx is the piece of the file, data.npz what torch gave it and what torch made of it, in its
own dtype and in float64{program}. Needs numpy and onnxruntime.
"""
from pathlib import Path
import numpy as np
import onnxruntime

here = Path(__file__).parent
data = dict(np.load(here / "data.npz"))
own, exact = data.pop("torch"), data.pop("float64")
session = onnxruntime.InferenceSession(here / "piece.onnx", providers=["CPUExecutionProvider"])
found = session.run(None, data)[0]
print("file ", found.dtype, found.shape, found.ravel()[:4])
print("torch", own.dtype, own.shape, own.ravel()[:4])
if found.size == own.size:
    print("largest error of the file ", np.abs(found.reshape(exact.shape) - exact).max())
    print("largest error of torch    ", np.abs(own - exact).max())
'''
_PROGRAM = (
    "; reference.pt2 is torch's piece:\n"
    'program = torch.export.load("reference.pt2"); '
    "program.module()(*program.example_inputs[0])"
)


def write_repro(
    reference: nn.Module,
    candidate: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    inputs: Any = None,
    *,
    surgered: nn.Module | None = None,
    provider: str = "cpu",
    seeds: Sequence[int] = (0, 1, 2),
    batch_sizes: Sequence[int] = (1, 3),
    progress: Progress | None = None,
) -> Location:
    """Write the first piece at which a file and a network part as a case that runs by itself.

    The folder holds `piece.onnx`, the nodes of the piece; `data.npz`, the tensors that torch gave
    to it, and what torch made of them in its own dtype ("torch") and in float64 ("float64");
    `reference.pt2`, the same piece of the network as an exported program, where torch can export
    it; and `run.py`, which shows the mismatch and needs neither the network's code nor dropsurgery.

    Args:
        reference: the original network; it is not changed.
        candidate: path of an ONNX file.
        folder: a new or empty one; it is there when it is complete, or not at all.
        inputs, surgered, provider, seeds, batch_sizes, progress: as in `locate`.

    Returns:
        The place.

    Raises:
        ArgumentError: the folder holds something, or cannot be made.
        VerifyError: there is no place, or none that a piece shows, as where outputs have only
            changed places; otherwise as in `locate`.
    """
    if isinstance(candidate, nn.Module):
        raise ArgumentTypeError(
            "a case is written of a file, and the candidate is a module",
            fix="ds.locate tells the place; or export the module first",
        )
    target = check_folder(folder)
    location, pieces = search(
        reference,
        candidate,
        inputs,
        surgered=surgered,
        provider=provider,
        seeds=seeds,
        batch_sizes=batch_sizes,
        progress=progress,
    )
    step = location.step
    if step is None:
        raise VerifyError(f"nothing to write: {location.conclusion}", where=os.fspath(candidate))
    if pieces is None:
        raise VerifyError(
            f"no piece of the file shows it: {location.conclusion}",
            where=os.fspath(candidate),
            fix="the file is what surgery made of the network: compare the network before and "
            "after each pass",
        )
    ref = pieces.partner(step.value)
    if ref is None or location.reason.startswith("the outputs are"):
        raise VerifyError(
            f"no piece shows it: {location.conclusion}",
            where=os.fspath(candidate),
            fix="compare names, number and order of the file's outputs with the network's",
        )
    _write_whole(target, pieces, step, ref, location)
    return location


def check_folder(folder: Any) -> Path:
    """Return the folder of a case; raise where it cannot be written."""
    if not isinstance(folder, str | os.PathLike):
        raise ArgumentTypeError(f"folder is a {type(folder).__name__}", fix="a str or a Path")
    target = Path(folder)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ArgumentError(
            f"{target} is there already and is no empty folder", fix="name a new folder"
        )
    if not target.absolute().parent.is_dir():
        raise ArgumentError(f"there is no folder {target.parent}", fix="make it, or check the path")
    return target


def _write_whole(target: Path, pieces: Pieces, step: Step, ref: Ref, location: Location) -> None:
    """Write beside the target and move into place."""
    place = target.absolute()
    new: Path | None = None
    try:
        new = Path(tempfile.mkdtemp(prefix=f".{place.name[:32]}.", suffix=".tmp", dir=place.parent))
        _write(new, pieces, step, ref, location)
        new.chmod(0o755)
        os.rename(new, place)  # an empty folder of that name gives way
    except OSError as error:
        raise ArgumentError(
            f"{target} cannot be written: {error.strerror or error}",
            fix="check permissions and free space",
        ) from error
    finally:
        if new is not None:
            shutil.rmtree(new, ignore_errors=True)


def _write(folder: Path, pieces: Pieces, step: Step, ref: Ref, location: Location) -> None:
    import numpy as np
    import onnx

    model, given = _piece(pieces, step.value)
    onnx.save(model, str(folder / "piece.onnx"))
    recording = pieces.recording
    replay = pieces.replay(ref)
    wide = recording.wide(ref) if replay.opaque else replay.values[ref]
    arrays = {name: _array(tensor) for name, tensor in given.items()}
    np.savez(
        folder / "data.npz",
        allow_pickle=False,
        torch=_array(recording.native(ref)),
        float64=_array(wide),
        **arrays,
    )
    saved = _save_program(folder / "reference.pt2", recording, replay, ref)
    title = f"{location.conclusion} (input: {location.case})"
    text = _SCRIPT.format(title=title.replace('"""', "'''"), program=_PROGRAM if saved else "")
    (folder / "run.py").write_text(text)


def _array(tensor: Tensor) -> Any:
    tensor = tensor.detach().cpu()
    if tensor.dtype == torch.bfloat16:
        raise VerifyError(
            "a piece in bfloat16 cannot be written: numpy has no such numbers",
            fix="locate it with the network and the file in float32",
        )
    return tensor.contiguous().numpy()


def _piece(pieces: Pieces, value: str) -> tuple[Any, dict[str, Tensor]]:
    """Return the nodes that compute a value as a model, and what they are given."""
    import onnx

    assert isinstance(pieces.graph, MarkedGraph)
    whole = pieces.graph.model
    wanted = {name for node in pieces.piece(value) for name in node.outputs}
    given: dict[str, Tensor] = {}
    kept = []
    for node in reversed(whole.graph.node):
        if not wanted.isdisjoint(node.output):
            kept.append(node)
            for name in filter(None, node.input):
                known = pieces.given(name)
                if known is not None and name not in wanted:
                    given[name] = known
                elif known is None:
                    wanted.add(name)  # a constant, or what constants make
    names = {name: f"input_{index}" for index, name in enumerate(given)}
    model = onnx.ModelProto()
    model.opset_import.extend(whole.opset_import)
    model.functions.extend(whole.functions)
    model.ir_version, model.graph.name = whole.ir_version, "piece"
    for node in reversed(kept):
        copy = model.graph.node.add()
        copy.CopyFrom(node)
        copy.input[:] = [names.get(name, name) for name in node.input]
    used = {name for node in model.graph.node for name in node.input}
    model.graph.initializer.extend(t for t in whole.graph.initializer if t.name in used)
    for name, tensor in given.items():
        kind = onnx.helper.np_dtype_to_tensor_dtype(_array(tensor).dtype)
        shape = list(tensor.shape)
        model.graph.input.append(onnx.helper.make_tensor_value_info(names[name], kind, shape))
    model.graph.output.append(onnx.ValueInfoProto(name=value))
    return onnx.shape_inference.infer_shapes(model), {names[n]: t for n, t in given.items()}


def _save_program(path: Path, recording: Recording, replay: Replay, ref: Ref) -> bool:
    """Write the network's piece as an exported program; say whether torch could."""
    starts = sorted(replay.starts | replay.opaque)
    if not replay.events:
        return False
    module = _module(recording, replay, starts, ref)
    examples = tuple(recording.native(start).detach().clone() for start in starts)
    try:
        with torch.no_grad():
            torch.export.save(torch.export.export(module, examples), path)
    except Exception:  # an operator that torch.export does not know
        path.unlink(missing_ok=True)
        return False
    return True


def _module(
    recording: Recording, replay: Replay, starts: Sequence[Ref], ref: Ref
) -> fx.GraphModule:
    """Return the operations of a replay as a module."""
    root, graph = nn.Module(), fx.Graph()
    made: dict[Ref, fx.Node] = {
        start: graph.placeholder(f"input_{index}") for index, start in enumerate(starts)
    }

    def argument(leaf: Any) -> Any:
        if isinstance(leaf, Ref):
            return made[leaf]
        if not isinstance(leaf, Tensor):
            return leaf
        name = f"weight_{len(list(root.buffers()))}"
        root.register_buffer(name, leaf.detach().clone())
        return graph.get_attr(name)

    for index in sorted(replay.events):
        event = recording.events[index]
        args, kwargs = pytree.tree_map(
            argument, (event.args, event.kwargs), is_leaf=lambda leaf: isinstance(leaf, Ref)
        )
        if event.func._schema.is_mutable:  # what it writes to may be read again
            args = (graph.call_function(torch.ops.aten.clone.default, (args[0],)), *args[1:])
        node = graph.call_function(event.func, args, kwargs)
        several = len(event.func._schema.returns) > 1 or len(event.outputs) > 1
        for number in range(len(event.outputs)):
            part = graph.call_function(operator.getitem, (node, number)) if several else node
            made[Ref(index, number)] = part
    graph.output(made[ref])
    graph.eliminate_dead_code()
    return fx.GraphModule(root, graph)
