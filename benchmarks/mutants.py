"""How many defects `ds.verify` catches, beside other tools, and whether `ds.locate` finds them.

For each of twelve small networks: export, then change one thing at a time (`mutant_kinds.py`,
`mutant_wiring.py`) and ask every judge (`mutant_judges.py`). Whether a mutant is a defect is
decided in float64. Writes docs/mutants.json, network by network; `mutants_page.py` makes tables.

    python -m benchmarks.mutants [NETWORK ...] [--kinds WORD] [--again]
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import random
import tempfile
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import ModelProto
from torch import Tensor, nn

import benchmarks.mutant_wiring  # noqa: F401  (enters its kinds)
import dropsurgery as ds
from benchmarks.mutant_judges import (
    JUDGES,
    Outputs,
    effect,
    float64_runner,
    onnx_runner,
    verdicts,
)
from benchmarks.mutant_kinds import KINDS, OUTPUTS, TORCH_KINDS
from benchmarks.mutant_networks import NETWORKS, build
from dropsurgery.verify.cases import Case
from dropsurgery.verify.compare import comparison_cases
from dropsurgery.verify.run import ModuleRunner

RESULT = Path(__file__).parent.parent / "docs" / "mutants.json"
# A mutant is a defect where it moves an output by this many times the network's own error.
REAL = 4.0


@dataclass
class Subject:
    """One network, its file, and what it returns on the inputs of `verify`."""

    name: str
    model: nn.Module
    example: Tensor
    path: Path
    file: ModelProto
    feeds: list[dict[str, np.ndarray]]
    native: list[Outputs]
    exact: list[Outputs]
    own: list[dict[str, float]]
    faint: list[bool]


def subject(name: str, folder: Path) -> Subject:
    """Build and export one network and run it on all inputs."""
    model, example = build(name)
    path = ds.export_onnx(model, folder / f"{name}.onnx", example)
    file = onnx.load(str(path))
    cases = list(
        comparison_cases(model, path, None, provider="cpu", seeds=(0, 1, 2), batch_sizes=(1, 3))
    )
    runner, exact_file = ModuleRunner(model, "reference"), float64_runner(file)
    feeds = [_feeds(file, case) for case in cases]
    native = [{k: v.numpy() for k, v in runner(case).items()} for case in cases]
    exact = [exact_file(given) for given in feeds]
    own = [
        {k: float(np.sqrt(np.mean(np.square(one[k] - two[k])))) for k in one}
        for one, two in zip(native, exact, strict=True)
    ]
    faint = [case.faint for case in cases]
    return Subject(name, model, example, path, file, feeds, native, exact, own, faint)


def _feeds(file: ModelProto, case: Case) -> dict[str, np.ndarray]:
    tensors = [*case.args, *case.kwargs.values()]
    names = [value.name for value in file.graph.input]
    return {name: tensor.numpy() for name, tensor in zip(names, tensors, strict=True)}


def mutant(of: Subject, kind: str, folder: Path) -> tuple[ModelProto, str] | None:
    """Return a changed file and the path of the module that was changed; None where none can be."""
    choose = random.Random(f"{of.name} {kind}")
    if kind in KINDS:
        file = ModelProto.FromString(of.file.SerializeToString())
        place = KINDS[kind][1](file, choose)
        return None if place is None else (file, place)
    model = copy.deepcopy(of.model)
    place = TORCH_KINDS[kind](model, choose)
    if place is None:
        return None
    path = ds.export_onnx(model, folder / "changed.onnx", of.example)
    return onnx.load(str(path)), place


def examine(of: Subject, kind: str, folder: Path) -> dict[str, Any]:
    """Ask every judge about one mutant."""
    made = mutant(of, kind, folder)
    if made is None:
        return {"applies": False}
    file, place = made
    path = folder / "mutant.onnx"
    onnx.save(file, str(path))
    try:
        exact = float64_runner(file)
        results = [_quietly(exact, feeds) for feeds in of.feeds]
        size = max(map(effect, of.exact, results, of.own))
    except Exception:
        size = math.inf
    run = onnx_runner(str(path))
    usual = [i for i, faint in enumerate(of.faint) if not faint]
    pairs = [(of.native[i], run(of.feeds[i])) for i in usual]
    record: dict[str, Any] = {"applies": True, "module": place, "caught": verdicts(pairs)}
    record["effect"] = size if math.isfinite(size) else None
    start = time.perf_counter()
    caught = _verified(of, path)
    record["caught"]["dropsurgery"] = caught
    record["seconds"] = round(time.perf_counter() - start, 2)
    if caught:
        start = time.perf_counter()
        record.update(_located(of, path, place))
        record["seconds_to_locate"] = round(time.perf_counter() - start, 2)
    return record


def _located(of: Subject, path: Path, place: str) -> dict[str, Any]:
    """Ask for the place, and say whether it is the module that was changed."""
    try:
        location = ds.locate(of.model, path)
    except Exception as error:
        return {"found": None, "right": False, "conclusion": str(error)}
    right = location.found and location.module == place
    if place == OUTPUTS:
        right = "the outputs are" in location.reason
    return {
        "found": location.module if location.found else None,
        "right": right,
        "conclusion": location.conclusion,
    }


def _quietly(run: Any, feeds: dict[str, np.ndarray]) -> Outputs | None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return run(feeds)
    except Exception:
        return None


def _verified(of: Subject, path: Path) -> bool:
    try:
        return not ds.verify(of.model, path).ok
    except ds.DropsurgeryError:
        return True


def run(names: list[str], words: str, again: bool, result: Path) -> None:
    """Examine networks, and write down the results after each."""
    document: dict[str, Any] = {"networks": {}}
    if result.exists():
        document = json.loads(result.read_text())
    kinds = [kind for kind in [*KINDS, *TORCH_KINDS] if words in kind]
    document["groups"] = {kind: KINDS[kind][0] if kind in KINDS else "weights" for kind in kinds}
    document["judges"] = ["dropsurgery", *JUDGES]
    for name in names:
        records = document["networks"].setdefault(name, {})
        missing = [kind for kind in kinds if again or kind not in records]
        if not missing:
            continue
        start = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            of = subject(name, Path(folder))
            for kind in missing:
                records[kind] = examine(of, kind, Path(folder))
                print(f"{name:13} {kind:38} {_line(records[kind])}", flush=True)
        print(f"{name}: {time.perf_counter() - start:.0f} s", flush=True)
        result.write_text(json.dumps(document, indent=1, sort_keys=True) + "\n")


def _line(record: dict[str, Any]) -> str:
    if not record["applies"]:
        return "-"
    size = "inf" if record["effect"] is None else f"{record['effect']:.3g}"
    caught = record["caught"]["dropsurgery"]
    others = sum(record["caught"][name] for name in JUDGES)
    place = ""
    if caught:
        place = "right" if record["right"] else f"{record['module']} -> {record['found']}"
    real = record["effect"] is None or record["effect"] > REAL
    missed = "MISSED" if not caught and real else ""
    word = "caught" if caught else "passed"
    return f"effect {size:>9} {word} others {others} {place} {missed}"


def main() -> None:
    """Parse the arguments and run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("networks", nargs="*", default=list(NETWORKS))
    parser.add_argument("--kinds", default="", help="only kinds whose names hold this")
    parser.add_argument("--again", action="store_true", help="examine what is known already")
    parser.add_argument("--result", type=Path, default=RESULT, help="where the figures go")
    options = parser.parse_args()
    run(options.networks, options.kinds, options.again, options.result)


if __name__ == "__main__":
    main()
