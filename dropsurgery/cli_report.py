"""`dropsurgery report`, and --report of the other commands."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, fx, nn

import dropsurgery as ds
from dropsurgery import inspection, page
from dropsurgery.cli_options import (
    Depths,
    Final,
    Inputs,
    ModelArgs,
    RuleName,
    Single,
    Surgery,
    Weights,
    example_inputs,
    insertion,
    load_network,
    survival_rule,
)
from dropsurgery.cli_output import DIFFERENT, DONE, echo, print_json, tell_report, width, working
from dropsurgery.compute import Compute
from dropsurgery.errors import ArgumentError, OnnxFileError, TraceError, VerifyError
from dropsurgery.models import LoadedModel
from dropsurgery.onnx_reader import read_onnx
from dropsurgery.page import GraphCount, Story
from dropsurgery.page.measure import (
    file_bytes,
    latency_of_file,
    latency_of_modules,
    weight_bytes,
)
from dropsurgery.passes.base import Result
from dropsurgery.passes.drop_path import InsertDropPath
from dropsurgery.provenance import RecordCheck
from dropsurgery.surgery import slimmed
from dropsurgery.verify import Verdict
from dropsurgery.verify.given import given_cases
from dropsurgery.verify.location import Location
from dropsurgery.verify.onnx_reference import OnnxModule
from dropsurgery.verify.repro import check_folder

BATCH = 32  # what dropping saves is counted for, where no batch size was given


def checked(path: Path | None) -> Path | None:
    """Fail before the work where the report cannot be written."""
    return None if path is None else page.check_page_target(path)


def checked_case(folder: Path | None, model: str, stochastic: bool) -> None:
    """Fail before the work where the case of a difference cannot be written."""
    if folder is None:
        return
    if stochastic or model.endswith(".onnx"):
        raise ArgumentError(
            "--repro is about the values inside a network, and of random networks or of two files "
            "there are none to compare",
            fix="leave it out, or compare a file with its network",
        )
    check_folder(folder)


def report(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL|FILE.onnx",
            help="torchvision:NAME, timm:NAME, FILE.py:FACTORY, or a file.",
        ),
    ],
    file: Annotated[
        Path | None,
        typer.Argument(metavar="FILE.onnx", help="Verify this file against the model as well."),
    ] = None,
    output: Annotated[
        Path,
        typer.Option("--output", "-o", metavar="FILE.html", help="Also .md or .json."),
    ] = Path("report.html"),
    weights: Weights = None,
    model_arg: ModelArgs = None,
    surgery: Surgery = None,
    final_survival: Final = 0.8,
    rule: RuleName = "linear",
    depths: Depths = None,
    single: Single = False,
    input_shapes: Inputs = None,
) -> int:
    """Write a page on a network or an ONNX file: what there is, what could be done, what it costs.

    Of a network it tells the residual sites with the survival that retrofit would give them and
    what dropping would save (mode subset, a batch of 32), what slim does and what it leaves alone,
    and the time that both take. Of an ONNX file, its operators and the record of its verdict.

    Exit code 1: the file is not equivalent to the network, or not the one of its record.

    Example: dropsurgery report torchvision:resnet50 -o resnet50.html
    """
    checked(output)
    if model.endswith(".onnx"):
        if file is not None:
            raise ArgumentError(
                "a report is about one file", fix="dropsurgery verify FILE.onnx FILE.onnx --report"
            )
        story = of_file(Path(model), "report")
    else:
        falling = survival_rule(rule, final_survival, depths, single)
        chosen = insertion(falling, "block", None, None, "all", "subset")
        with working(f"looking at {model}") as tell:
            loaded = load_network(model, weights, model_arg, surgery)
            inputs = known_inputs(loaded, input_shapes)
            story = _of_network(loaded, chosen, inputs)
            if file is not None:
                tell(f"verifying {file}")
                verdict = ds.verify(loaded.module, file, progress=tell)
                story = _along_the_depth(story, loaded.module, file, None, None)
                story = with_file(story, loaded.module, file, inputs)
                story = dataclasses.replace(story, verdict=verdict)
    save(output, story)
    tell_report(output)
    return DIFFERENT if story.good is False else DONE


def _of_network(
    loaded: LoadedModel, chosen: InsertDropPath, inputs: Sequence[Tensor] | None
) -> Story:
    found = inspection.inspect(loaded.name, loaded.module, chosen, inputs)
    slim = slimmed(loaded.module)
    story = of_slim(loaded, slim, inputs, "report")
    cost = None
    if inputs is not None and found.sites and not found.refused:
        network = ds.apply(loaded.module, chosen, example_inputs=inputs).module
        cost = counted(network, inputs)
    return dataclasses.replace(story, inspection=found, survival=(), compute=cost)


# --- what commands know --------------------------------------------------------------------------


def known_inputs(loaded: LoadedModel, shapes: list[str] | None) -> tuple[Tensor, ...] | None:
    """Return inputs of batch 1 where their shapes are known."""
    if not shapes and loaded.input_shape is None:
        return None
    return example_inputs(loaded, shapes)


def counted(module: nn.Module, inputs: Sequence[Tensor]) -> Compute:
    """Return what dropping saves at the usual batch size."""
    batch = [torch.cat([tensor] * BATCH) for tensor in inputs]
    return ds.expected_compute(module, batch)


def of_result(
    subject: str, command: str, before: nn.Module, result: Result, names: tuple[str, str]
) -> Story:
    """Return what passes did."""
    graphs = [before if isinstance(before, fx.GraphModule) else ds.trace(before), result.module]
    return Story(
        subject,
        command,
        changes=result.changes,
        skipped=result.skipped,
        graphs=tuple(
            GraphCount(name, page.node_types(graph))
            for name, graph in zip(names, graphs, strict=True)
        ),
        survival=page.survival_along(result.module),
        sizes=tuple(
            (f"weights of the {name}", weight_bytes(graph))
            for name, graph in zip(names, (before, result.module), strict=True)
        ),
    )


def of_slim(
    loaded: LoadedModel, result: Result, inputs: Sequence[Tensor] | None, command: str
) -> Story:
    """Return what slim did, with what it saves of the time where the inputs are known."""
    names = ("network", "slim network")
    story = of_result(loaded.name, command, loaded.module, result, names)
    if inputs is None:
        return story
    timed = latency_of_modules(loaded.module, result.module.eval(), inputs, names)
    return dataclasses.replace(story, latency=timed, latency_note=_note(inputs))


def of_file(path: Path, command: str, record: RecordCheck | None = None) -> Story:
    """Return what an ONNX file tells of itself; a file without a record has nothing to check."""
    file = read_onnx(path)
    if record is None:
        try:
            record = ds.check_record(path)
        except OnnxFileError:
            record = None
    size = file_bytes(file.real, list(file.sidecars.values()))
    return Story(
        str(path),
        command,
        operators=GraphCount(path.name, page.onnx_types(path)),
        sizes=((path.name, size),),
        record=record,
    )


def with_file(story: Story, model: nn.Module, path: Path, inputs: Sequence[Tensor] | None) -> Story:
    """Return a story with what a file adds: operators, size, record and time."""
    of = of_file(path, story.command)
    timed, note = story.latency, story.latency_note
    if inputs is not None:
        timed, note = latency_of_file(model, path, inputs, ("network", path.name)), _note(inputs)
    return dataclasses.replace(
        story,
        operators=of.operators,
        record=of.record,
        sizes=(*story.sizes, *of.sizes),
        latency=timed,
        latency_note=note,
    )


def _note(inputs: Sequence[Tensor]) -> str:
    shapes = ", ".join("x".join(map(str, tensor.shape)) for tensor in inputs)
    threads = torch.get_num_threads()
    return (
        f"Median of calls in turns, in eval mode on {shapes}. torch has {threads} "
        f"{'thread' if threads == 1 else 'threads'}; onnxruntime chooses for itself."
    )


def save(path: Path, story: Story) -> None:
    """Write a report."""
    page.write_page(path, story)


def of_retrofit(
    loaded: LoadedModel,
    result: Result,
    chosen: InsertDropPath,
    examples: Sequence[Tensor] | None,
    cost: Compute | None,
) -> Story:
    """Return what retrofit did, with what dropping saves where the inputs are known."""
    names = ("network", "retrofitted network")
    story = of_result(loaded.name, "retrofit", loaded.module, result, names)
    found = inspection.inspect(loaded.name, loaded.module, chosen, examples)
    inputs = examples or known_inputs(loaded, None)
    if cost is None and inputs is not None:
        cost = counted(result.module, inputs)
    return dataclasses.replace(story, inspection=found, compute=cost)


def of_export(
    loaded: LoadedModel,
    result: Result,
    path: Path,
    inputs: Sequence[Tensor],
    verdict: Verdict | None,
    place: Location | None,
) -> Story:
    """Return what slim did before an export, and what became of it in the file."""
    story = of_result(loaded.name, "export", loaded.module, result, ("network", "slim network"))
    survival = page.survival_along(ds.trace(loaded.module))
    story = dataclasses.replace(story, survival=survival, verdict=verdict)
    if verdict is not None:
        story = _along_the_depth(story, loaded.module, path, None, place)
    return with_file(story, loaded.module, path, inputs)


def compared(loaded: LoadedModel) -> nn.Module | str:
    """Return what a file is compared with: a module, or the path of another file."""
    return loaded.name if isinstance(loaded.module, OnnxModule) else loaded.module


def of_verify(
    loaded: LoadedModel,
    path: Path,
    input_file: Path | None,
    verdict: Verdict,
    place: Location | None,
) -> Story:
    """Return what a comparison found, timed on the first of the caller's inputs."""
    story = Story(loaded.name, "verify", verdict=verdict)
    if isinstance(loaded.module, OnnxModule):
        return with_file(story, loaded.module, path, None)
    size = ("weights of the network", weight_bytes(loaded.module))
    story = dataclasses.replace(story, sizes=(size,))
    try:
        graph = ds.trace(loaded.module)
    except TraceError:  # a verdict needs no graph
        pass
    else:
        types = GraphCount("network", page.node_types(graph))
        survival = page.survival_along(graph)
        story = dataclasses.replace(story, graphs=(types,), survival=survival)
    story = _along_the_depth(story, loaded.module, path, input_file, place)
    inputs = known_inputs(loaded, None)
    if input_file is not None:
        inputs = next(given_cases(input_file)).args or None
    return with_file(story, loaded.module, path, inputs)


def place_of(
    model: nn.Module, path: Path, inputs: Path | None, repro: Path | None = None, **options: Any
) -> Location | None:
    """Return where a file differs, or None where that cannot be had: a verdict stands without.

    Args:
        model: the reference.
        path: the file.
        inputs: a file or folder of the caller's inputs.
        repro: a folder for a case of the place that runs by itself; a note says where none could
            be written.
        options: of `ds.locate`.
    """
    notes: tuple[str, ...] = ()
    if repro is not None:
        try:
            return ds.write_repro(model, path, repro, inputs, **options)
        except VerifyError as error:
            notes = (f"no case was written: {error.problem}",)
    try:
        place = ds.locate(model, path, inputs, **options)
    except VerifyError:
        return None
    return dataclasses.replace(place, notes=(*place.notes, *notes))


def case_text(repro: Path | None, verdict: Verdict) -> str:
    """Return what became of a case that was asked for, in words; "" where none was."""
    if repro is None or (not verdict.ok and not (repro / "run.py").is_file()):
        return ""
    if verdict.ok:
        return f"\n{repro} was not written: nothing differs"
    return f"\nIn {repro}: run.py shows the mismatch of this piece alone"


def _along_the_depth(
    story: Story, model: nn.Module, path: Path, inputs: Path | None, place: Location | None
) -> Story:
    """Return a story with the error of each value; one that cannot be had is left out."""
    place = place or place_of(model, path, inputs, seeds=(0,), batch_sizes=(1,))
    if place is None:
        return story
    errors = tuple((step.module, step.local, step.accumulated) for step in place.steps)
    return dataclasses.replace(story, errors=errors, place=place.conclusion)


def of_record(
    path: str, key: bytes | None, report: Path | None, as_json: bool, **other: Any
) -> int:
    """Check a file against its own record, and tell it; return the exit code.

    Args:
        path: the file.
        key: what its record should be signed with.
        report: where to write a page.
        as_json: print JSON.
        other: the command's other options, which are about comparisons.
    """
    if not path.endswith(".onnx"):
        raise ArgumentError(
            f"there is no file to compare {path} with", fix="dropsurgery verify MODEL FILE.onnx"
        )
    if told := [f"--{name.replace('_', '-')}" for name, value in other.items() if value]:
        raise ArgumentError(
            f"{', '.join(told)}: a file alone is checked against its record, and nothing is run",
            fix="name the network as well: dropsurgery verify MODEL FILE.onnx",
        )
    check = ds.check_record(path, key=key)
    code = DONE if check.equivalent else DIFFERENT
    if report is not None:
        save(report, of_file(Path(path), "verify", check))
    if as_json:
        return print_json(check.to_json(), code)
    echo(check.text(width()))
    tell_report(report)
    return code
