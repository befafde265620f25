"""Network → ONNX: refused where it would not be the network, written whole or not at all."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import re
import traceback
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from dropsurgery.errors import ArgumentError, ArgumentTypeError, ExportError
from dropsurgery.graph.plain_lists import with_plain_lists
from dropsurgery.graph.signature import (
    argument_list,
    first_line,
    named_inputs,
    named_outputs,
    shapes,
    signature,
)
from dropsurgery.graph.trace import keep_eval, trace
from dropsurgery.graph.two_mode import TwoModeGraphModule
from dropsurgery.onnx_channel_maps import ChannelMaps, check_channel_maps, write_as_convolutions
from dropsurgery.onnx_writer import (
    check_draws,
    check_opset,
    check_target,
    monte_carlo_places,
    name_nodes,
    name_values,
    refuse_random_nodes,
    save,
    write_metadata,
)

BATCH = "batch"
OPSETS = range(18, 24)


def export_onnx(
    model: nn.Module,
    path: str | os.PathLike[str],
    example_inputs: Tensor | Sequence[Any],
    *,
    dynamic_batch: bool = True,
    opset: int | None = None,
    channel_maps: ChannelMaps = "conv",
) -> Path:
    """Write a network to an ONNX file for inference.

    Goes through `torch.onnx.export` (dynamo) and refuses what would not be the network that runs
    in PyTorch: training mode, batch statistics, randomness. The file appears under its name only
    when it is complete and has passed `onnx.checker`; an export that fails or is interrupted leaves
    the folder as it was, with the file that stood there before, if any. Nothing is printed. `model`
    is not changed.

    ONNX nodes are named after the module that holds them ("layer1.0.conv1/Conv"), inputs after
    forward's arguments, outputs "output", "output_0" … or by the keys of a dict. The file's
    `metadata_props` tell what made it: versions, source model, passes, names.

    Args:
        model: any `nn.Module` in eval mode, or a GraphModule that dropsurgery returned.
        path: the file to write; its folder must exist. Where it is a link, the file that it points
            to is written. Weights of 2 GB and more go to `<path>.data` beside it.
        example_inputs: one tensor, or a tuple or list of forward's positional arguments. A batch of
            one is as good as any other. One tensor may stand for several arguments: the graph keeps
            them apart.
        dynamic_batch: leave the batch size open: axis 0 of the first tensor that has one, and of
            every other tensor input of the same size along axis 0. Otherwise all shapes are fixed.
        opset: the ONNX operator set, 18 to 23; None for the exporter's own choice.
        channel_maps: how a shift or scale of an image's channels is written that `slim` left
            between layers: "conv", a depthwise 1x1 convolution, which keeps the layout of the
            convolutions around it (onnxruntime on a CPU takes up to 1.2 times as long for the whole
            densenet121 without); or "elementwise", an Add or Mul.

    Returns:
        The path of the file.

    Raises:
        ExportError: the network or a layer is in training mode, normalises with batch statistics,
            draws random numbers, does not accept the inputs, cannot keep its batch axis open, or
            uses an operator that ONNX lacks; or the file cannot be written. The message names
            the module path and what to do.
        ArgumentError: `opset` or `channel_maps` is not one of these, the path cannot be a file's,
            or the example's batch is empty.
        ArgumentTypeError: an argument is of the wrong type.
    """
    args = _check_arguments(model, example_inputs, opset, dynamic_batch)
    check_channel_maps(channel_maps)
    target = check_target(path)
    _check_modes(model)
    if isinstance(model, TwoModeGraphModule):
        model = trace(model)
        keep_eval(model)
    args, outputs = _run_example(model, args, dynamic_batch)
    inputs = named_inputs(model, args)
    places = monte_carlo_places(model)
    with _quiet():
        program = _capture(model, args, dynamic_batch)
        draws = _refuse_randomness(program, places)
        onnx_program = _translate(program, _axes(model, args, dynamic_batch, BATCH), opset)
    ir_model = onnx_program.model
    if channel_maps == "conv":
        write_as_convolutions(ir_model, model)
    name_values(ir_model, list(inputs), list(named_outputs(outputs)))
    name_nodes(ir_model)
    refuse_random_nodes(ir_model, places)
    check_draws(ir_model, draws, places)
    check_opset(ir_model, opset)
    write_metadata(ir_model, model)
    save(ir_model, target)
    return Path(path)


def _check_arguments(
    model: nn.Module, example_inputs: Any, opset: int | None, dynamic_batch: bool
) -> tuple[Any, ...]:
    if not isinstance(model, nn.Module):
        raise ArgumentTypeError(
            f"expected a torch.nn.Module, got {type(model).__name__}",
            fix="pass the model object, not its class or its state dict",
        )
    if isinstance(model, torch.jit.ScriptModule):
        raise ExportError("a TorchScript module cannot be exported", fix="pass the eager model")
    if opset is not None and (not isinstance(opset, int) or opset not in OPSETS):
        raise ArgumentError(
            f"opset is {opset!r}", fix=f"{OPSETS[0]} to {OPSETS[-1]}, or None for the default"
        )
    if isinstance(example_inputs, Tensor):
        example_inputs = (example_inputs,)
    if not isinstance(example_inputs, tuple | list) or not any(
        isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(example_inputs)
    ):
        raise ArgumentTypeError(
            f"example_inputs is a {type(example_inputs).__name__} without tensors",
            fix="a tensor, or a tuple of forward's positional arguments",
        )
    if dynamic_batch and _batch_size(tuple(example_inputs)) == 0:
        raise ArgumentError(
            "the example inputs hold a batch of 0, which shows nothing of the network",
            fix="an example with a batch of one or more",
        )
    # torch.export takes tensors that share memory for one input, which then stands for both.
    return pytree.tree_map_only(Tensor, lambda leaf: leaf.detach().clone(), tuple(example_inputs))


def _check_modes(model: nn.Module) -> None:
    if model.training:
        raise ExportError(
            "the model is in training mode",
            where=type(model).__name__,
            fix="model.eval() before the export",
        )
    for name, module in model.named_modules():
        where = f"{name} ({type(module).__name__})"
        if module.training and _reads_training(type(module)):
            raise ExportError(
                "a layer that behaves differently in training is in training mode",
                where=where,
                fix=f'model.get_submodule("{name}").eval(), or model.eval() for all of them',
            )
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and (
            module.running_mean is None or module.running_var is None
        ):
            raise ExportError(
                "a BatchNorm without running statistics normalises each batch by itself",
                where=where,
                fix="give it running statistics (track_running_stats=True) and train it, or "
                "replace it: an exported sample must not depend on its neighbours",
            )


def _reads_training(cls: type[nn.Module]) -> bool:
    """Say whether a module class looks at its own `training` flag when it is called."""
    for base in cls.__mro__:
        if base is nn.Module:
            break
        for name, member in vars(base).items():
            code = getattr(member, "__code__", None)
            if code and name not in ("train", "eval", "__init__") and "training" in code.co_names:
                return True
    return False


def _run_example(
    model: nn.Module, args: tuple[Any, ...], dynamic_batch: bool
) -> tuple[tuple[Any, ...], Any]:
    """Run the model on the example, as it is and as a batch of two where its batch is one.

    torch.export takes a size of one for a constant; an example of two keeps the batch open.
    """
    given = named_inputs(model, args)
    outputs = _try(model, args, "the model does not accept the example inputs", shapes(given), None)
    _check_outputs(model, outputs)
    if not dynamic_batch or _batch_size(args) != 1:
        return args, outputs
    doubled = _doubled(args)
    fix = "dynamic_batch=False, or example inputs with a batch of two or more"
    problem = "the network runs with a batch of 1 and not with 2: its batch axis cannot stay open"
    return doubled, _try(model, doubled, problem, shapes(named_inputs(model, doubled)), fix)


def _check_outputs(model: nn.Module, outputs: Any) -> None:
    named_outputs(outputs)
    for leaf in pytree.tree_leaves(outputs):
        if isinstance(leaf, bool | int | float | complex):
            raise ExportError(
                f"the network returns {leaf!r}, a Python {type(leaf).__name__}, and an ONNX graph "
                "returns tensors",
                where=f"{type(model).__name__}.forward",
                fix="return tensors only: torch.tensor(...), or leave the number out",
            )


def _doubled(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return the arguments with each row of the batch twice."""
    batch = _batch_size(args)
    doubled: tuple[Any, ...] = pytree.tree_map(
        lambda leaf: torch.cat([leaf, leaf]) if _is_batched(leaf, batch) else leaf, args
    )
    return doubled


def _try(model: nn.Module, args: tuple[Any, ...], problem: str, where: str, fix: str | None) -> Any:
    try:
        with torch.no_grad():
            return model(*args)
    except Exception as error:
        raise ExportError(
            f"{problem}: {first_line(error)}",
            where=f"{type(model).__name__} with {where}",
            fix=fix or f"{argument_list(model)}; check shapes, dtypes and devices",
        ) from error


def _batch_size(args: tuple[Any, ...]) -> int | None:
    for leaf in pytree.tree_leaves(args):
        if isinstance(leaf, Tensor) and leaf.ndim:
            return leaf.shape[0]
    return None


def _is_batched(leaf: Any, batch: int | None) -> bool:
    return isinstance(leaf, Tensor) and leaf.ndim > 0 and leaf.shape[0] == batch


def _axes(
    model: nn.Module, args: tuple[Any, ...], dynamic_batch: bool, axis: Any
) -> dict[str, Any] | None:
    """Return the `dynamic_shapes` of the arguments: `axis` for axis 0 of every batched tensor."""
    batch = _batch_size(args)
    if not dynamic_batch or batch is None:
        return None
    tree: dict[str, Any] = pytree.tree_map(
        lambda leaf: {0: axis} if _is_batched(leaf, batch) else None,
        dict(signature(model).bind(*args).arguments),
    )
    return tree


def _capture(
    model: nn.Module, args: tuple[Any, ...], dynamic_batch: bool
) -> torch.export.ExportedProgram:
    axes = _axes(model, args, dynamic_batch, torch.export.Dim(BATCH))
    try:
        with torch.no_grad():
            whole = with_plain_lists(model)
            return torch.export.export(whole, args, dynamic_shapes=axes, strict=False)
    except Exception as error:
        where = f"{type(model).__name__} with {shapes(named_inputs(model, args))}"
        if axes is not None and _captures_fixed(model, args):
            fix = "write its reshapes with x.shape[0] or -1, or export with dynamic_batch=False"
            if all(t.ndim < 2 for t in pytree.tree_leaves(args) if isinstance(t, Tensor)):
                fix = (
                    "axis 0 is read as the batch: give the example one (x[None]), or export with "
                    "dynamic_batch=False"
                )
            raise ExportError(
                f"the network does not work for every batch size: {_why_fixed(model, args, error)}",
                where=where,
                fix=fix,
            ) from error
        line = _user_line(error)
        raise ExportError(
            f"the network cannot be captured as a graph: {_without_advice(error)}",
            where=f"{where}, {line}" if line else where,
            fix="no Python branches on the values of tensors: torch.where, or a module of its own "
            "that is exported apart",
        ) from error


def _why_fixed(model: nn.Module, args: tuple[Any, ...], error: Exception) -> str:
    """Return what fixes the batch: the network's own error with another one, or what torch saw."""
    doubled = _doubled(args)
    try:
        with torch.no_grad():
            model(*doubled)
    except Exception as refusal:
        return f"with a batch of {_batch_size(doubled)}, {first_line(refusal)}"
    text = str(error)
    if found := re.search(r"to be a constant \((\d+)\)", text):
        return f"some step of it takes a batch of {found[1]} for granted"
    if found := re.search(r"generated guards? (.+?)\.?$", text, re.MULTILINE):
        condition = re.sub(r"L\[.+?\]\.size\(\)\[0\]", BATCH, found[1])
        return f"it takes another way where not {condition}"
    return _without_advice(error)


def _without_advice(error: BaseException) -> str:
    """Return what torch says, without its pointers to torch's own switches."""
    if "data-dependent" in str(error):
        return "Python code depends on the values of a tensor"
    return re.split(r" *For more information, run with", first_line(error))[0]


def _user_line(error: BaseException) -> str:
    """Return the innermost line of the network's own code on the way to the error."""
    library = os.path.dirname(torch.__file__)
    found = ""
    cause: BaseException | None = error
    while cause is not None:
        for frame, number in traceback.walk_tb(cause.__traceback__):
            name = frame.f_code.co_filename
            if not name.startswith((library, "<")) and name != __file__:
                found = f'File "{name}", line {number}, in {frame.f_code.co_name}'
        cause = cause.__cause__
    return found


def _captures_fixed(model: nn.Module, args: tuple[Any, ...]) -> bool:
    try:
        with torch.no_grad():
            torch.export.export(model, args, strict=False)
    except Exception:
        return False
    return True


def _refuse_randomness(program: torch.export.ExportedProgram, places: frozenset[str]) -> int:
    """Refuse what is random or would be inexact; return how often Monte-Carlo dropout draws."""
    draws = 0
    constant = _constants(program)
    for module in program.graph_module.modules():
        for node in module.graph.nodes if isinstance(module, fx.GraphModule) else ():
            if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
                continue
            given = _arguments(node)
            trains = given.get("training", given.get("train"))
            if "batch_norm" in node.target.name() and trains and node not in constant:
                raise ExportError(
                    "batch normalisation would be exported with batch statistics",
                    where=_place(node),
                    fix="F.batch_norm(..., training=False) in eval mode",
                )
            if torch.Tag.nondeterministic_seeded not in node.target.tags:
                continue
            off = trains is False or given.get("dropout_p", given.get("p", 1)) == 0
            stack = list((node.meta.get("nn_module_stack") or {}).values())
            if not off and stack and stack[-1][0] in places:
                draws += 1
            elif not off:
                raise ExportError(
                    f"the network draws random numbers in eval mode ({node.target.name()})",
                    where=_place(node),
                    fix="make the draw follow self.training, take it out "
                    '(ds.ConvertDropout("identity")), or make the noise an input',
                )
    return draws


def _constants(program: torch.export.ExportedProgram) -> set[fx.Node]:
    """Return the nodes that depend on no input, such as weights that are standardised."""
    given = set(program.graph_signature.user_inputs)
    found: set[fx.Node] = set()
    for node in program.graph.nodes:
        if node.op == "placeholder":
            is_constant = node.name not in given
        else:
            is_constant = node.op != "output" and found.issuperset(node.all_input_nodes)
        if is_constant:
            found.add(node)
    return found


def _arguments(node: fx.Node) -> dict[str, Any]:
    """Return an ATen call's arguments by name, with the schema's defaults."""
    assert isinstance(node.target, torch._ops.OpOverload)
    schema = node.target._schema.arguments
    given = {a.name: a.default_value for a in schema if a.has_default_value()}
    given.update({a.name: value for a, value in zip(schema, node.args, strict=False)})
    return {**given, **node.kwargs}


def _place(node: fx.Node) -> str:
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    path = stack[-1][0] if stack else ""
    kind = stack[-1][1] if stack else ""
    kind = kind if isinstance(kind, str) else kind.__name__
    lines = [line.strip() for line in (node.stack_trace or "").splitlines()]
    lines = [line for line in lines if line.startswith("File") and "/torch/nn/" not in line]
    text = f"{path or 'the root module'} ({kind.rpartition('.')[2]})"
    return f"{text}, {lines[-1]}" if lines else text


def _translate(
    program: torch.export.ExportedProgram, axes: dict[str, Any] | None, opset: int | None
) -> torch.onnx.ONNXProgram:
    try:
        onnx_program = torch.onnx.export(
            program,
            (),
            dynamo=True,
            dynamic_shapes=axes,
            opset_version=opset,
            verbose=False,
        )
    except torch.onnx.OnnxExporterError as error:
        node = _failed_node(error)
        what = f": {node.target}" if node is not None else f": {first_line(error)}"
        raise ExportError(
            f"ONNX has no counterpart for a part of the network{what}",
            where=_place(node) if node is not None else None,
            fix="replace the operator, or try a higher opset",
        ) from error
    assert onnx_program is not None
    return onnx_program


def _failed_node(error: BaseException) -> fx.Node | None:
    """Return the node at which the translation stopped.

    The message has only a generated name; the exporter's own frames hold the node.
    """
    found, cause = None, error.__cause__
    while cause is not None:
        for frame, _ in traceback.walk_tb(cause.__traceback__):
            node = frame.f_locals.get("node")
            found = node if isinstance(node, fx.Node) else found
        cause = cause.__cause__
    return found


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence torch's exporter; its errors carry all that it would have said."""

    class Mute(logging.Filter):
        def filter(self, record: logging.LogRecord) -> bool:
            return False

    mute = Mute()
    handlers = [
        handler
        for name, logger in logging.root.manager.loggerDict.items()
        if name.partition(".")[0] == "torch" and isinstance(logger, logging.Logger)
        for handler in logger.handlers
    ]
    loggers = [logging.getLogger(name) for name in ("onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        warnings.simplefilter("ignore")
        try:
            for handler in handlers:
                handler.addFilter(mute)
            for logger in loggers:
                logger.setLevel(logging.CRITICAL)
            yield
        finally:
            for handler in handlers:
                handler.removeFilter(mute)
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
