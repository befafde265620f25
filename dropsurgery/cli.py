"""The command line: parse, call, print."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn

import torch
import typer
from rich.markup import escape

import dropsurgery as ds
from dropsurgery import inspection, skeleton
from dropsurgery.cli_options import (
    Batch,
    Count,
    Depths,
    Directory,
    Every,
    Final,
    Include,
    Inputs,
    Json,
    Model,
    ModelArgs,
    ModeName,
    RuleName,
    Single,
    Slim,
    Surgery,
    UnitName,
    Weights,
    Wheres,
    example_inputs,
    insertion,
    keyword_arguments,
    read_inputs,
    survival_rule,
)
from dropsurgery.compute import Compute
from dropsurgery.errors import DropsurgeryError
from dropsurgery.models import LoadedModel, load_model
from dropsurgery.passes.base import Result
from dropsurgery.report import census, json_text, onnx_census, skips_text, write_whole
from dropsurgery.slimming import SlimReport
from dropsurgery.surgery import SLIM
from dropsurgery.tables import render

if TYPE_CHECKING:
    from rich.console import Console

DONE, DIFFERENT, FAILED, INTERRUPTED, TERMINATED = 0, 1, 2, 130, 143

app = typer.Typer(
    help="Put stochastic depth into a network, take it out again, export it, prove it equal.\n\n"
    "MODEL is torchvision:NAME, timm:NAME or FILE.py:FACTORY. An output that exists is replaced, "
    "in one step and only when the new one is complete.\n\n"
    "Exit codes: 0 done, 1 not equivalent, 2 wrong use or an error, 130 interrupted.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        from importlib import metadata

        _print(f"dropsurgery {metadata.version('dropsurgery')}, torch {torch.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print versions.")
    ] = False,
) -> None:
    pass


@app.command()
def inspect(
    model: Model,
    weights: Weights = None,
    model_arg: ModelArgs = None,
    surgery: Surgery = None,
    final_survival: Final = 0.8,
    rule: RuleName = "linear",
    depths: Depths = None,
    single: Single = False,
    unit: UnitName = "block",
    where: Wheres = None,
    count: Count = "all",
    include: Include = None,
    mode: ModeName = "row",
    batch: Batch = None,
    input_shapes: Inputs = None,
    svg: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw the residual skeleton.")
    ] = None,
    png: Annotated[Path | None, typer.Option(metavar="FILE", help="The same as a PNG.")] = None,
    slim: Slim = False,
    every: Every = False,
    as_json: Json = False,
) -> int:
    """List the residual sites of a network with their rates, and what is none and why.

    Example: dropsurgery inspect timm:convnext_tiny --rule linspace --final-survival 0.9
    """
    if slim:
        with _working(f"slimming {model}"):
            loaded = _load(model, weights, model_arg, surgery)
            told = ds.slim_report(loaded.module, example_inputs(loaded, input_shapes, batch or 1))
        return _tell_slimming(model, told, every, as_json)
    falling = survival_rule(rule, final_survival, depths, single)
    chosen = insertion(falling, unit, where, include, count, mode)
    pictures = {kind: path for kind, path in (("svg", svg), ("png", png)) if path is not None}
    with _working(f"inspecting {model}"):
        loaded = _load(model, weights, model_arg, surgery)
        examples = example_inputs(loaded, input_shapes) if input_shapes else None
        found = inspection.inspect(model, loaded.module, chosen, examples)
        cost = None
        if batch is not None:
            inputs = example_inputs(loaded, input_shapes, batch)
            network = ds.apply(loaded.module, chosen, example_inputs=inputs).module
            cost = ds.expected_compute(network, inputs)
        drawn = {kind: skeleton.picture(found, kind) for kind in pictures}
        for kind, path in pictures.items():
            write_whole(path, drawn[kind])
    if as_json:
        paths = {kind: str(path) for kind, path in pictures.items()}
        counted = {} if cost is None else {"compute": asdict(cost)}
        return _print_json({**found.to_json(), **counted, "pictures": paths})
    _print(found.text(_width(), every=every))
    if cost is not None:
        _print(f"\n{cost.text(_width())}")
    for path in pictures.values():
        _print(f"drawn in {path}")
    return DONE


@app.command()
def retrofit(
    model: Model,
    output: Directory,
    weights: Weights = None,
    model_arg: ModelArgs = None,
    surgery: Surgery = None,
    final_survival: Final = 0.8,
    rule: RuleName = "linear",
    depths: Depths = None,
    single: Single = False,
    mode: ModeName = "row",
    unit: UnitName = "block",
    where: Wheres = None,
    count: Count = "all",
    include: Include = None,
    batch: Batch = None,
    input_shapes: Inputs = None,
    every: Every = False,
    as_json: Json = False,
) -> int:
    """Put stochastic depth into a network and save the surgery as data.

    Fine-tune it in Python: net = dropsurgery.load(DIR, model).

    Example: dropsurgery retrofit torchvision:resnet50 --weights r50.safetensors -o r50-drop
    """
    falling = survival_rule(rule, final_survival, depths, single)
    chosen = insertion(falling, unit, where, include, count, mode)
    with _working(f"retrofitting {model}"):
        loaded = _load(model, weights, model_arg, surgery)
        examples = example_inputs(loaded, input_shapes) if input_shapes else None
        result = ds.apply(loaded.module, chosen, example_inputs=examples)
        cost = None
        if batch is not None:
            inputs = example_inputs(loaded, input_shapes, batch)
            cost = ds.expected_compute(result.module, inputs)
        ds.save(result.module, output)
    return _tell(result, output, model, every, as_json, cost)


@app.command()
def slim(
    model: Model,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="DIR", help="Save the slim network here."),
    ] = None,
    weights: Weights = None,
    model_arg: ModelArgs = None,
    surgery: Surgery = None,
    every: Every = False,
    as_json: Json = False,
) -> int:
    """Take drops out and fold BatchNorm, and tell what was done and what was not.

    Example: dropsurgery slim torchvision:resnet50
    """
    with _working(f"slimming {model}"):
        loaded = _load(model, weights, model_arg, surgery)
        result = ds.apply(loaded.module, *SLIM)
        if output is not None:
            ds.save(result.module, output)
    return _tell(result, output, model, every, as_json)


@app.command()
def export(
    model: Model,
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FILE.onnx", help="The file to write.")
    ],
    weights: Weights = None,
    model_arg: ModelArgs = None,
    surgery: Surgery = None,
    slim: Annotated[
        bool, typer.Option("--slim/--no-slim", help="Take drops out and fold BatchNorm first.")
    ] = True,
    opset: Annotated[int | None, typer.Option(help="ONNX opset; torch's default without.")] = None,
    input_shapes: Inputs = None,
    static_batch: Annotated[
        bool, typer.Option("--static-batch", help="Fix the batch at 1; dynamic without.")
    ] = False,
    verify: Annotated[
        bool, typer.Option("--verify/--no-verify", help="Compare the file with the network.")
    ] = True,
    as_json: Json = False,
) -> int:
    """Export a network to ONNX, slim, and verify the file against the network.

    Exit code 1: the file was written and is not equivalent.

    Example: dropsurgery export net.py:make --weights net.pt --input 1x16x16 -o net.onnx
    """
    with _working(f"exporting {model}"):
        loaded = _load(model, weights, model_arg, surgery)
        inputs = example_inputs(loaded, input_shapes)
        network = ds.slim(loaded.module) if slim else loaded.module
        ds.export_onnx(network, output, inputs, dynamic_batch=not static_batch, opset=opset)
        counts = onnx_census(output)
    verdict = None
    if verify:
        try:
            with _working(f"verifying {output}") as tell:
                verdict = ds.verify(loaded.module, output, progress=tell)
        except KeyboardInterrupt:
            raise _Interrupted(f"{output} was written and not verified") from None
    size = output.stat().st_size
    if as_json:
        told = verdict.to_json() if verdict is not None else None
        document = {"model": model, "file": str(output), "bytes": size, "verdict": told}
        return _print_json({**document, **vars(counts)}, _code(verdict))
    _print(f"{output}: {size / 1e6:.1f} MB, {counts}")
    if verdict is not None:
        _print(f"\n{verdict.table(_width())}")
    return _code(verdict)


@app.command()
def verify(
    model: Model,
    file: Annotated[Path, typer.Argument(metavar="FILE.onnx", help="The file to check.")],
    weights: Weights = None,
    model_arg: ModelArgs = None,
    surgery: Surgery = None,
    provider: Annotated[
        Literal["cpu", "cuda"], typer.Option(help="Where onnxruntime runs the file.")
    ] = "cpu",
    input_file: Annotated[
        Path | None,
        typer.Option(
            metavar="X.npy|X.npz",
            help="Inputs with their batch: an .npy array, or an .npz with one array an input.",
        ),
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Draws of random inputs.")] = 3,
    as_json: Json = False,
) -> int:
    """Compare an ONNX file with the network it should equal.

    Exit code 1: they differ.

    Example: dropsurgery verify torchvision:resnet50 r50.onnx --weights r50.safetensors
    """
    with _working(f"verifying {file}") as tell:
        loaded = _load(model, weights, model_arg, surgery)
        inputs = None if input_file is None else read_inputs(input_file)
        verdict = ds.verify(
            loaded.module, file, inputs, provider=provider, seeds=range(seeds), progress=tell
        )
    if as_json:
        return _print_json(verdict.to_json(), _code(verdict))
    _print(verdict.table(_width()))
    return _code(verdict)


@app.command()
def demo(
    out: Annotated[
        Path, typer.Option(metavar="DIR", help="Where model.onnx and the report go.")
    ] = Path("demo"),
    epochs: Annotated[int, typer.Option(min=1, help="The most epochs of each training.")] = 30,
    depth: Annotated[int, typer.Option(min=1, help="Residual blocks in each stage.")] = 3,
    seed: Annotated[int, typer.Option(help="Of the split, the weights and every draw.")] = 0,
    as_json: Json = False,
) -> int:
    """Train a small ResNet on handwritten digits and take it through all of dropsurgery.

    Example: dropsurgery demo --out /tmp/demo
    """
    from dropsurgery.demo import run_demo

    with contextlib.redirect_stdout(sys.stderr):
        report, ok = run_demo(out, epochs=epochs, depth=depth, seed=seed, console=_stderr())
    code = DONE if ok else DIFFERENT
    if as_json:
        return _print_json(report.to_json(), code)
    _print(report.text(min(_width(), 100)))
    _print(f"\nLeft in {out}: model.onnx, report.md, report.json")
    return code


# --- calling -------------------------------------------------------------------------------------


def _load(
    name: str, weights: str | None, model_args: list[str] | None, surgery: Path | None
) -> LoadedModel:
    loaded = load_model(name, weights=weights, arguments=keyword_arguments(model_args or []))
    if surgery is None:
        return loaded
    return LoadedModel(name, ds.load(surgery, loaded.module).eval(), loaded.input_shape)


def _code(verdict: Any) -> int:
    return DONE if verdict is None or verdict.ok else DIFFERENT


# --- printing ------------------------------------------------------------------------------------


def _tell(
    result: Result,
    output: Path | None,
    model: str,
    every: bool,
    as_json: bool,
    cost: Compute | None = None,
) -> int:
    counts = census(result.module)
    if as_json:
        directory = None if output is None else str(output)
        changes = [(c.by, c.module, c.node, c.what) for c in result.changes]
        skipped = [(s.by, s.module, s.node, s.reason) for s in result.skipped]
        document: dict[str, Any] = {
            "changes": _records(("pass", "module", "node", "what"), changes),
            "skipped": _records(("pass", "module", "node", "reason"), skipped),
        }
        if cost is not None:
            document["compute"] = asdict(cost)
        return _print_json({"model": model, "directory": directory, **document, **vars(counts)})
    # What was done names its module; the table of what was not needs the place as well.
    passes = {change.by for change in result.changes}
    alone = len(passes) == 1
    title = f"{model}: {len(result.changes)} changes" + (f" by {min(passes)}" if alone else "")
    told = [(change.by, change.what)[alone:] for change in result.changes]
    _print(render(("pass", "what")[alone:], told, title=title, width=_width()))
    if result.skipped:
        title = f"{len(result.skipped)} left alone"
        _print("\n" + skips_text(result.skipped, _width(), title=title, every=every))
    _print(f"\n{counts}")
    if cost is not None:
        _print(f"\n{cost.text(_width())}")
    if output is not None:
        _print(f"saved in {output}; in Python: net = dropsurgery.load({str(output)!r}, model)")
    return DONE


def _records(keys: Sequence[str], rows: Sequence[Sequence[object]]) -> list[dict[str, object]]:
    return [dict(zip(keys, row, strict=True)) for row in rows]


def _width() -> int:
    """The terminal's columns, or COLUMNS; wide where the output is a file or a pipe."""
    return max(shutil.get_terminal_size((160, 24)).columns, 40)


def _tell_slimming(model: str, told: SlimReport, every: bool, as_json: bool) -> int:
    if as_json:
        return _print_json({"model": model, **told.to_json()})
    _print(told.text(_width(), title=model, every=every))
    return DONE


def _print(text: str) -> None:
    try:
        sys.stdout.write(f"{text}\n")
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader (head, less) has seen enough; the interpreter must not try to flush again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(DONE) from None


def _print_json(document: Any, code: int = DONE) -> int:
    _print(json_text(document))
    return code


def _stderr() -> Console:
    from rich.console import Console

    return Console(stderr=True, highlight=False)


@contextlib.contextmanager
def _working(what: str) -> Iterator[Callable[[str], None]]:
    """Show a spinner on stderr, and keep what models and libraries print off stdout.

    Gives a function that says more of how far the work is.
    """
    with contextlib.redirect_stdout(sys.stderr), _stderr().status(escape(what)) as status:
        yield lambda more: status.update(escape(f"{what}: {more}"))


# --- the entry point -----------------------------------------------------------------------------


class _Interrupted(Exception):
    """An interrupt that left something behind, and what."""


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and exit with its code."""
    interrupted = []

    def on_interrupt(*_: object) -> None:
        interrupted.append(True)
        raise KeyboardInterrupt

    def on_terminate(*_: object) -> None:
        raise SystemExit(TERMINATED)  # unlike the default, runs what tidies up

    signal.signal(signal.SIGINT, on_interrupt)
    signal.signal(signal.SIGTERM, on_terminate)
    try:
        code = app(args=argv, prog_name="dropsurgery", standalone_mode=False)
        if code == INTERRUPTED:  # typer's answer to a KeyboardInterrupt
            _complain("interrupted; nothing was left behind")
    except typer.TyperException as error:
        code = _misused(error)
    except DropsurgeryError as error:
        code = _complain(str(error))
    except (_Interrupted, KeyboardInterrupt) as error:
        code = _complain(f"interrupted; {error}".rstrip("; "), INTERRUPTED)
    except Exception as error:
        # Code that an interrupt passes through may turn it into an error of its own.
        code = _complain("interrupted", INTERRUPTED) if interrupted else _unexpected(error)
    sys.exit(code)


def _misused(error: typer.TyperException) -> int:
    context = getattr(error, "ctx", None)
    command = context.command_path if context is not None else "dropsurgery"
    text = error.format_message().replace("Value error, ", "")  # pydantic's way to begin
    return _complain(f"{text}\n  fix: see {command} --help", error.exit_code)


def _complain(text: str, code: int = FAILED) -> int:
    sys.stderr.write(f"dropsurgery: {text}\n")
    return code


def _unexpected(error: Exception) -> int:
    if os.environ.get("DROPSURGERY_TRACEBACK"):
        traceback.print_exception(error)
    text = " ".join(str(error).split())
    return _complain(
        f"{type(error).__name__}: {text}\n  fix: DROPSURGERY_TRACEBACK=1 shows where; if it is not "
        "your model's code, please report it"
    )
