from __future__ import annotations

import json
from pathlib import Path

import onnx
import pytest

import dropsurgery as ds
from dropsurgery.errors import VerifyError
from tests.test_cli import Cli, run

__all__ = ["run"]  # the fixture


def exported(run: Cli, *words: str) -> None:
    base = ("export", "net.py:Net", "-o", "net.onnx", "--input", "3x8x8")
    assert run(*base, *words).code == 0


def tampered() -> None:
    model = onnx.load("net.onnx")
    model.graph.node[0].name = "other"
    onnx.save(model, "net.onnx")


def test_a_file_alone_is_checked_against_its_record(run: Cli) -> None:
    exported(run)
    done = run("verify", "net.onnx")
    assert done.code == 0
    assert "the record says:\n  net.onnx against Net by way of the surgered Net on CPU" in done.out
    assert done.out.endswith("INTACT, recorded as EQUIVALENT\n")
    document = run("verify", "net.onnx", "--json").document
    assert (document["intact"], document["equivalent"]) == (True, True)
    tampered()
    done = run("verify", "net.onnx")
    assert done.code == 1
    assert done.out.endswith("CHANGED since it was verified: graph\n")


def test_verify_records_only_when_asked(run: Cli) -> None:
    exported(run, "--no-verify")
    alone = run("verify", "net.onnx")
    assert (alone.code, alone.out) == (2, "")
    assert "carries no record of a verdict" in alone.err
    before = Path("net.onnx").read_bytes()
    assert run("verify", "net.py:Net", "net.onnx").code == 0
    assert Path("net.onnx").read_bytes() == before
    assert "recorded in net.onnx" in run("verify", "net.py:Net", "net.onnx", "--record").out
    assert run("verify", "net.onnx").code == 0


def test_a_verdict_that_they_differ_is_recorded(run: Cli) -> None:
    exported(run)
    words = ("verify", "net.py:Net", "net.onnx", "--model-arg", "depth=1", "--record")
    assert run(*words).code == 1
    done = run("verify", "net.onnx")
    assert done.code == 1
    assert done.out.endswith("INTACT, recorded as NOT EQUIVALENT\n")


def test_a_record_is_signed_with_a_key(run: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("key").write_bytes(b"k" * 32)
    Path("wrong").write_bytes(b"w" * 32)
    exported(run, "--key-file", "key")
    assert run("verify", "net.onnx").code == 0
    assert run("verify", "net.onnx", "--key-file", "key").code == 0
    assert (
        "CHANGED since it was verified: signature"
        in run("verify", "net.onnx", "--key-file", "wrong").out
    )
    monkeypatch.setenv("DROPSURGERY_KEY_FILE", "wrong")
    assert run("verify", "net.onnx").code == 1
    assert "the key cannot be read" in run("verify", "net.onnx", "--key-file", "none").err


def test_one_argument_that_is_no_file(run: Cli) -> None:
    done = run("verify", "net.py:Net")
    assert (done.code, done.out) == (2, "")
    assert "there is no file to compare net.py:Net with" in done.err
    assert "there is no such file" in run("verify", "none.onnx").err


def test_json_of_a_recorded_verdict_is_json(run: Cli) -> None:
    exported(run)
    document = run("verify", "net.onnx", "--json").document
    assert json.dumps(document["record"]["verdict"]["outputs"])


def test_a_file_against_a_file(run: Cli) -> None:
    exported(run)
    assert run("export", "net.py:Net", "-o", "fat.onnx", "--input", "3x8x8", "--no-slim").code == 0
    done = run("verify", "fat.onnx", "net.onnx", "--record", "--report", "files.html")
    assert done.code == 0
    assert "net.onnx against fat.onnx on CPU" in done.out
    assert "net.onnx against fat.onnx" in Path("files.html").read_text()
    told = run("verify", "net.onnx", "--json").document["record"]["reference"]
    assert told["name"] == "fat.onnx"
    refused = run("verify", "fat.onnx", "net.onnx", "--model-arg", "depth=1")
    assert (refused.code, refused.out) == (2, "")
    assert "holds its own weights" in refused.err


# --- a case of what differs ----------------------------------------------------------------------

WRONG = ("verify", "net.py:Net", "net.onnx", "--model-arg", "depth=1", "--repro")


def test_a_case_is_written_where_something_differs(run: Cli) -> None:
    exported(run, "--no-verify", "--no-slim")

    model = onnx.load("net.onnx")
    relu = next(node for node in model.graph.node if node.op_type == "Relu")
    relu.op_type = "Neg"
    onnx.save(model, "bad.onnx")
    done = run("verify", "net.py:Net", "bad.onnx", "--repro", "case")
    assert done.code == 1
    assert done.out.endswith("In case: run.py shows the mismatch of this piece alone\n")
    assert Path("case/run.py").is_file()
    done = run("verify", "net.py:Net", "net.onnx", "--repro", "none")
    assert done.code == 0
    assert done.out.endswith("none was not written: nothing differs\n")
    assert not Path("none").exists()


def test_a_case_that_no_piece_shows(run: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    exported(run, "--no-verify")

    def none(*args: object, **options: object) -> None:
        raise VerifyError("no piece shows it")

    monkeypatch.setattr(ds, "write_repro", none)
    done = run(*WRONG, "case")
    assert done.code == 1
    assert "note: no case was written: no piece shows it" in done.out
    assert "first differs at" in done.out
    assert "run.py" not in done.out


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("verify net.py:Net net.onnx --repro full", "full is there already and is no empty folder"),
        ("verify net.py:Net net.onnx --repro none/case", "there is no folder none"),
        ("verify net.py:Net net.onnx --repro case --stochastic", "--repro is about the values"),
        ("verify net.onnx net.onnx --repro case", "--repro is about the values inside a network"),
        ("verify net.onnx --record", "--record: a file alone is checked against its record"),
        ("verify net.onnx --repro case --input-file x.npy", "--repro, --input-file: a file alone"),
        ("verify net.onnx --weights w.pt --model-arg a=1", "--weights, --model-arg: a file alone"),
    ],
)
def test_what_cannot_be_is_said_before_the_work(run: Cli, words: str, told: str) -> None:
    exported(run)
    Path("full").mkdir()
    Path("full/file").write_text("kept")
    before = Path("net.onnx").read_bytes()
    done = run(*words.split())
    assert (done.code, done.out) == (2, "")
    assert told in done.err
    assert Path("net.onnx").read_bytes() == before


UNTRACEABLE = """
import torch
from torch import nn

class Branch(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)
        nn.init.eye_(self.fc.weight)
        nn.init.zeros_(self.fc.bias)

    def forward(self, x):
        return self.fc(x) if x.sum() > 0 else self.fc(2 * x) / 2
"""


def test_a_network_that_cannot_be_traced_is_verified_and_reported(run: Cli) -> None:
    Path("branch.py").write_text(UNTRACEABLE)
    node = onnx.helper.make_node("Identity", ["x"], ["output"])
    ends = [onnx.helper.make_tensor_value_info(name, 1, ["n", 4]) for name in ("x", "output")]
    graph = onnx.helper.make_graph([node], "g", ends[:1], ends[1:])
    opsets = [onnx.helper.make_opsetid("", 20)]
    onnx.save(onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10), "branch.onnx")
    done = run("verify", "branch.py:Branch", "branch.onnx", "--report", "report.json")
    assert done.code == 0, done.err
    document = json.loads(Path("report.json").read_text())
    assert document["status"] == "EQUIVALENT"
    assert document["graphs"] == []
