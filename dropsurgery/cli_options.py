"""The options that commands share, and how their values are read."""

from __future__ import annotations

import ast
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer

from dropsurgery import survival
from dropsurgery.errors import ArgumentError
from dropsurgery.layers.drop_path import Mode
from dropsurgery.models import LoadedModel, load_model
from dropsurgery.passes.drop_path import InsertDropPath, Unit
from dropsurgery.store import load
from dropsurgery.verify.onnx_reference import OnnxModule

Model = Annotated[
    str,
    typer.Argument(metavar="MODEL", help="torchvision:NAME, timm:NAME or FILE.py:FACTORY."),
]
Weights = Annotated[
    str | None,
    typer.Option(
        metavar="FILE|NAME",
        help="A .safetensors or state-dict file, or the hub's own name for the weights, such as "
        "IMAGENET1K_V1, a1_in1k or DEFAULT. Without it: random, but the same in every run.",
    ),
]
ModelArgs = Annotated[
    list[str] | None,
    typer.Option(
        "--model-arg",
        metavar="KEY=VALUE",
        help="For the model's constructor, such as drop_path_rate=0.2. Repeatable.",
    ),
]
Surgery = Annotated[
    Path | None,
    typer.Option(metavar="DIR", help="Apply a saved surgery, with the weights saved in it, first."),
]
Json = Annotated[
    bool, typer.Option("--json", help="Print one JSON document on stdout and nothing else.")
]
RuleName = Annotated[
    Literal["linear", "linspace", "efficientnet", "constant", "per_stage"],
    typer.Option(help="How survival falls from the first block to the last."),
]
Depths = Annotated[
    str | None,
    typer.Option(metavar="3,4,6,3", help="Blocks in each stage, for --rule per_stage."),
]
Final = Annotated[
    float, typer.Option(min=0.0, max=1.0, help="Survival probability of the last block.")
]
UnitName = Annotated[
    Literal["block", "add", "position"],
    typer.Option(
        help="What the rule counts: residual blocks, whose adds share a probability; every add; "
        "or every block of the network, with residual or not."
    ),
]
Count = Annotated[
    Literal["all", "chosen"],
    typer.Option(help="Whether the rule counts all sites, or only those that --where chooses."),
]
Single = Annotated[
    bool,
    typer.Option(
        "--single",
        help="Round the rates of linspace and per_stage to float32, as most of timm does.",
    ),
]
Wheres = Annotated[
    list[str] | None,
    typer.Option(
        "--where",
        metavar="PATTERN",
        help="Only sites whose module path matches: 'layer4.*'. Repeatable.",
    ),
]
Include = Annotated[
    str | None,
    typer.Option(
        metavar="linear,nested",
        help="Count these as sites too: adds of a linear branch, long skips around blocks.",
    ),
]
ModeName = Annotated[
    Literal["row", "subset", "batch"],
    typer.Option(
        help="What dropping does: mask samples (no time saved), compute a branch for the surviving "
        "samples only, or run it or not for a whole mini-batch."
    ),
]
Batch = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        min=1,
        help="Count what each branch costs, and what --mode saves of it, at this batch size.",
    ),
]
Slim = Annotated[
    bool,
    typer.Option(
        "--slim",
        help="Tell instead what slim makes of the network: nodes, BatchNorms, parameters, FLOPs "
        "and memory traffic before and after, and why each BatchNorm that is left is left.",
    ),
]
Every = Annotated[bool, typer.Option("--all", help="List each thing left alone, not by reason.")]
ChannelMaps = Annotated[
    str,
    typer.Option(
        metavar="WAY",
        help="How shifts that are left between convolutions are written: conv or elementwise.",
    ),
]
Inputs = Annotated[
    list[str] | None,
    typer.Option(
        "--input",
        metavar="3x224x224",
        help="Shape of an input without the batch. Repeatable, in the order of forward(). "
        "Hub models know theirs.",
    ),
]
ReportFile = Annotated[
    Path | None,
    typer.Option(
        "--report",
        metavar="FILE.html",
        help="Write all of it as one page; .md and .json give it as Markdown and JSON.",
    ),
]
KeyFile = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        envvar="DROPSURGERY_KEY_FILE",
        help="A file of 16 bytes or more that the record in the ONNX file is signed with "
        "(HMAC-SHA256).",
    ),
]
Directory = Annotated[
    Path, typer.Option("--output", "-o", metavar="DIR", help="Folder for the surgery.")
]


def load_network(
    name: str, weights: str | None, model_args: list[str] | None, surgery: Path | None
) -> LoadedModel:
    """Load the model that the options describe, with its saved surgery applied."""
    loaded = load_model(name, weights=weights, arguments=keyword_arguments(model_args or []))
    if surgery is None:
        return loaded
    return LoadedModel(name, load(surgery, loaded.module).eval(), loaded.input_shape)


def reference_of(
    name: str, weights: str | None, model_args: list[str] | None, surgery: Path | None
) -> LoadedModel:
    """Load the model that the options describe, or an ONNX file that is to stand for it."""
    if not name.endswith(".onnx"):
        return load_network(name, weights, model_args, surgery)
    if weights or model_args or surgery:
        raise ArgumentError(
            f"{name} is an ONNX file, which holds its own weights",
            fix="leave --weights, --model-arg and --surgery out",
        )
    return LoadedModel(name, OnnxModule(name), None)


def keyword_arguments(pairs: Sequence[str]) -> dict[str, Any]:
    """Read KEY=VALUE pairs; a value is a Python literal, else the text itself."""
    options: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key.isidentifier():
            raise ArgumentError(f"'{pair}' is not KEY=VALUE", fix="--model-arg num_classes=10")
        try:
            options[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            options[key] = {"true": True, "false": False, "none": None}.get(value, value)
    return options


def insertion(
    rule: survival.Rule,
    unit: Unit,
    wheres: list[str] | None,
    include: str | None,
    count: Literal["all", "chosen"],
    mode: Mode = "row",
) -> InsertDropPath:
    """Build the pass that the options describe."""
    return InsertDropPath(
        rule,
        mode=mode,
        unit=unit,
        where=wheres[0] if wheres and len(wheres) == 1 else tuple(wheres or ()) or None,
        include=tuple(name.strip() for name in include.split(",")) if include else (),
        count=count,
    )


def survival_rule(rule: str, final: float, depths: str | None, single: bool) -> survival.Rule:
    """Build the rule that the options describe."""
    if rule != "per_stage":
        if depths is not None:
            raise ArgumentError("--depths says nothing without stages", fix="--rule per_stage")
        if rule == "linspace":
            return survival.linspace(final, single=single)
        if single:
            raise ArgumentError(
                f"--single says nothing to the rule {rule}", fix="--rule linspace or per_stage"
            )
        return survival.by_name(rule, final)
    if depths is None:
        raise ArgumentError(
            "--rule per_stage needs the number of blocks in each stage", fix="--depths 3,4,6,3"
        )
    if not re.fullmatch(r"\d+(,\d+)*", depths):
        raise ArgumentError(f"'{depths}' are not depths", fix="--depths 3,4,6,3")
    return survival.per_stage(final, tuple(map(int, depths.split(","))), single=single)


def example_inputs(
    loaded: LoadedModel, shapes: list[str] | None, batch: int = 1
) -> tuple[torch.Tensor, ...]:
    """Draw random samples for every shape; a model that knows its input needs no shapes."""
    if shapes:
        wanted = [_shape(text) for text in shapes]
    elif loaded.input_shape is not None:
        wanted = [loaded.input_shape]
    else:
        raise ArgumentError(
            f"the shape of the input of {loaded.name} is not known", fix="--input 3x224x224"
        )
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(batch, *shape, generator=generator) for shape in wanted)


def _shape(text: str) -> tuple[int, ...]:
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", text):
        raise ArgumentError(
            f"'{text}' is not a shape", fix="sizes joined by x, without the batch: 3x224x224"
        )
    return tuple(int(size) for size in text.split("x"))


def read_key(path: Path | None) -> bytes | None:
    """Read a key, all of its bytes."""
    if path is None:
        return None
    try:
        return path.read_bytes()
    except OSError as error:
        raise ArgumentError(
            f"the key cannot be read: {error.strerror or error}", where=str(path)
        ) from error
