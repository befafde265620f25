"""The command line: parse, call, print."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

import torch
import typer
from torch import nn

import dropsurgery as ds
from dropsurgery import cli_report, inspection, skeleton
from dropsurgery.cli_options import (
    Batch,
    ChannelMaps,
    Count,
    Depths,
    Directory,
    Every,
    Final,
    Include,
    Inputs,
    Json,
    KeyFile,
    Model,
    ModelArgs,
    ModeName,
    ReportFile,
    RuleName,
    Single,
    Slim,
    Surgery,
    UnitName,
    Weights,
    Wheres,
    example_inputs,
    insertion,
    load_network,
    read_key,
    reference_of,
    survival_rule,
)
from dropsurgery.cli_output import (
    DIFFERENT,
    DONE,
    FAILED,
    INTERRUPTED,
    TERMINATED,
    echo,
    print_json,
    stderr,
    tell_report,
    tell_result,
    verdict_code,
    width,
    working,
)
from dropsurgery.errors import DropsurgeryError
from dropsurgery.report import onnx_census, write_whole
from dropsurgery.surgery import slimmed

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

        echo(f"dropsurgery {metadata.version('dropsurgery')}, torch {torch.__version__}")
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
        with working(f"slimming {model}"):
            loaded = load_network(model, weights, model_arg, surgery)
            told = ds.slim_report(loaded.module, example_inputs(loaded, input_shapes, batch or 1))
        if as_json:
            return print_json({"model": model, **told.to_json()})
        echo(told.text(width(), title=model, every=every))
        return DONE
    falling = survival_rule(rule, final_survival, depths, single)
    chosen = insertion(falling, unit, where, include, count, mode)
    pictures = {kind: path for kind, path in (("svg", svg), ("png", png)) if path is not None}
    with working(f"inspecting {model}"):
        loaded = load_network(model, weights, model_arg, surgery)
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
        return print_json({**found.to_json(), **counted, "pictures": paths})
    echo(found.text(width(), every=every))
    if cost is not None:
        echo(f"\n{cost.text(width())}")
    for path in pictures.values():
        echo(f"drawn in {path}")
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
    report: ReportFile = None,
    as_json: Json = False,
) -> int:
    """Put stochastic depth into a network and save the surgery as data.

    Fine-tune it in Python: net = dropsurgery.load(DIR, model).

    Example: dropsurgery retrofit torchvision:resnet50 --weights r50.safetensors -o r50-drop
    """
    falling = survival_rule(rule, final_survival, depths, single)
    chosen = insertion(falling, unit, where, include, count, mode)
    cli_report.checked(report)
    with working(f"retrofitting {model}"):
        loaded = load_network(model, weights, model_arg, surgery)
        examples = example_inputs(loaded, input_shapes) if input_shapes else None
        result = ds.apply(loaded.module, chosen, example_inputs=examples)
        cost = None
        if batch is not None:
            inputs = example_inputs(loaded, input_shapes, batch)
            cost = ds.expected_compute(result.module, inputs)
        ds.save(result.module, output)
        if report is not None:
            story = cli_report.of_retrofit(loaded, result, chosen, examples, cost)
            cli_report.save(report, story)
    return tell_result(result, output, model, every, as_json, cost, report)


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
    report: ReportFile = None,
    as_json: Json = False,
) -> int:
    """Take drops out and fold BatchNorm, and tell what was done and what was not.

    Example: dropsurgery slim torchvision:resnet50
    """
    cli_report.checked(report)
    with working(f"slimming {model}"):
        loaded = load_network(model, weights, model_arg, surgery)
        result = slimmed(loaded.module)
        if output is not None:
            ds.save(result.module, output)
        if report is not None:
            inputs = cli_report.known_inputs(loaded, None)
            cli_report.save(report, cli_report.of_slim(loaded, result, inputs, "slim"))
    return tell_result(result, output, model, every, as_json, report=report)


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
    channel_maps: ChannelMaps = "conv",
    input_shapes: Inputs = None,
    static_batch: Annotated[
        bool, typer.Option("--static-batch", help="Fix the batch at 1; dynamic without.")
    ] = False,
    verify: Annotated[
        bool, typer.Option("--verify/--no-verify", help="Compare the file with the network.")
    ] = True,
    key_file: KeyFile = None,
    report: ReportFile = None,
    as_json: Json = False,
) -> int:
    """Export a network to ONNX, slim, and verify the file against the network.

    Surgery and export are held to budgets of their own, and the verdict is written into the file:
    see verify.

    Exit code 1: the file was written and is not equivalent; the first module that differs is told.

    Example: dropsurgery export net.py:make --weights net.pt --input 1x16x16 -o net.onnx
    """
    key = read_key(key_file)
    cli_report.checked(report)
    with working(f"exporting {model}"):
        loaded = load_network(model, weights, model_arg, surgery)
        inputs = example_inputs(loaded, input_shapes)
        done = slimmed(loaded.module, example_inputs=inputs) if slim else None
        network = loaded.module if done is None else done.module
        ds.export_onnx(
            network, output, inputs, dynamic_batch=not static_batch, opset=opset,
            channel_maps=channel_maps,  # type: ignore[arg-type]  # checked there
        )  # fmt: skip
        counts = onnx_census(output)
    surgered = None if done is None or not done.changes else done.module
    verdict = place = None
    if verify:
        try:
            with working(f"verifying {output}") as tell:
                verdict = ds.verify(loaded.module, output, surgered=surgered, progress=tell)
                ds.record(output, loaded.module, verdict, key=key)
                if not verdict.ok:
                    place = cli_report.place_of(
                        loaded.module, output, None, surgered=surgered, progress=tell
                    )
        except KeyboardInterrupt:
            raise _Interrupted(f"{output} was written and not verified") from None
    size = output.stat().st_size
    if report is not None:
        with working(f"measuring {output}"):
            done = ds.apply(loaded.module) if done is None else done
            story = cli_report.of_export(loaded, done, output, inputs, verdict, place)
            cli_report.save(report, story)
    if as_json:
        told = verdict.to_json() if verdict is not None else None
        where = place.to_json() if place is not None else None
        document = {"model": model, "file": str(output), "bytes": size, "verdict": told}
        document["place"] = where
        return print_json({**document, **vars(counts)}, verdict_code(verdict))
    echo(f"{output}: {size / 1e6:.1f} MB, {counts}")
    if verdict is not None:
        echo(f"\n{verdict.table(width())}")
    if place is not None:
        echo(f"\n{place.table(width())}")
    tell_report(report)
    return verdict_code(verdict)


@app.command()
def verify(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL|FILE.onnx",
            help="The network, or the ONNX file, that FILE.onnx should equal.",
        ),
    ],
    file: Annotated[
        Path | None,
        typer.Argument(
            metavar="FILE.onnx",
            help="The file to check. Without it the first is checked against its own record.",
        ),
    ] = None,
    weights: Weights = None,
    model_arg: ModelArgs = None,
    surgery: Surgery = None,
    provider: Annotated[
        Literal["cpu", "cuda"], typer.Option(help="Where onnxruntime runs the file.")
    ] = "cpu",
    input_file: Annotated[
        Path | None,
        typer.Option(
            metavar="X.npy|X.npz|DIR",
            help="Inputs with their batch: an .npy array, an .npz with one array an input, or a "
            "folder of such files.",
        ),
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Draws of random inputs.")] = 3,
    stochastic: Annotated[
        bool, typer.Option(help="Compare means and variances of a network that draws.")
    ] = False,
    figures: Annotated[
        bool, typer.Option(help="Also print top-1 agreement, SQNR and assert_close figures.")
    ] = False,
    record: Annotated[
        bool, typer.Option("--record", help="Write the verdict into FILE.onnx.")
    ] = False,
    repro: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Where they differ: write the piece that does, to run by itself."
        ),
    ] = None,
    key_file: KeyFile = None,
    report: ReportFile = None,
    as_json: Json = False,
) -> int:
    """Compare an ONNX file with the network it should equal, or with its record.

    Where the file differs from the network, the first module that does is told.

    verify FILE.onnx alone runs nothing: it says whether graph, weights and external data are still
    those of the verdict that export, or verify --record, wrote into the file.

    Exit code 1: they differ, or the file was changed.

    Example: dropsurgery verify torchvision:resnet50 r50.onnx --weights r50.safetensors
    """
    key = read_key(key_file)
    cli_report.checked(report)
    if file is None:
        other = {"weights": weights, "model_arg": model_arg, "surgery": surgery, "record": record}
        other |= {"input_file": input_file, "stochastic": stochastic, "figures": figures}
        return cli_report.of_record(model, key, report, as_json, repro=repro, **other)
    cli_report.checked_case(repro, model, stochastic)
    with working(f"verifying {file}") as tell:
        loaded = reference_of(model, weights, model_arg, surgery)
        options: dict[str, Any] = {"provider": provider, "seeds": range(seeds), "progress": tell}
        reference = cli_report.compared(loaded)
        verdict = ds.verify(reference, file, input_file, stochastic=stochastic, **options)
        place = None
        if not verdict.ok and not stochastic and isinstance(reference, nn.Module):
            place = cli_report.place_of(reference, file, input_file, repro, **options)
        if record:
            ds.record(file, reference, verdict, key=key)
        if report is not None:
            story = cli_report.of_verify(loaded, file, input_file, verdict, place)
            cli_report.save(report, story)
    if as_json:
        told = place.to_json() if place is not None else None
        return print_json({**verdict.to_json(), "place": told}, verdict_code(verdict))
    echo(verdict.table(width(), figures=figures))
    if place is not None:
        echo(f"\n{place.table(width())}")
    if case := cli_report.case_text(repro, verdict):
        echo(case)
    if record:
        echo(f"recorded in {file}")
    tell_report(report)
    return verdict_code(verdict)


app.command()(cli_report.report)


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
        report, ok = run_demo(out, epochs=epochs, depth=depth, seed=seed, console=stderr())
    code = DONE if ok else DIFFERENT
    if as_json:
        return print_json(report.to_json(), code)
    echo(report.text(min(width(), 100)))
    echo(f"\nLeft in {out}: model.onnx, report.md, report.json")
    return code


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
