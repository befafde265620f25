from __future__ import annotations

import json
from pathlib import Path

import pytest

from dropsurgery import page
from tests.test_cli import Cli, run
from tests.test_page import check

__all__ = ["run"]  # the fixture
INPUT = ("--input", "3x8x8")


def read(name: str = "report.html") -> str:
    """Return the words of a page, after the checks that every page passes."""
    return check(Path(name).read_text()).text


def test_retrofit_writes_a_report(run: Cli) -> None:
    words = ("retrofit", "net.py:Net", "-o", "surgery", "--final-survival", "0.5", *INPUT)
    done = run(*words, "--mode", "subset", "--report", "report.html")
    assert done.code == 0
    assert done.out.endswith("report in report.html\n")
    text = read()
    for told in (
        "2 changes",
        "blocks.1.drop_path",
        "Survival falls from 0.75",
        "Residual skeleton",
    ):
        assert told in text
    assert "A forward of batch 32 takes" in text
    quiet = run(*words, "--report", "report.json", "--json")
    assert quiet.document["changes"]  # nothing but JSON on stdout
    document = json.loads(Path("report.json").read_text())
    assert [point["survival"] for point in document["survival"]] == [0.75, 0.5]
    assert document["compute"]["batch"] == 32


def test_slim_writes_a_report(run: Cli) -> None:
    assert run("slim", "net.py:Net", "--report", "report.html").code == 0
    text = read()
    for told in ("by FoldAffine", "BatchNorm2d 4 to 0", "Nodes by type"):
        assert told in text
    assert "nothing was timed" not in text  # its sizes are known


def test_export_and_verify_write_reports(run: Cli) -> None:
    done = run("export", "net.py:Net", "-o", "net.onnx", *INPUT, "--report", "report.html")
    assert done.code == 0
    text = read()
    for told in ("EQUIVALENT", "Operators of net.onnx", "INTACT", "median ms", "sha256"):
        assert told in text
    done = run(
        "verify", "net.py:Net", "net.onnx", "--report", "verify.md", "--model-arg", "depth=1"
    )
    assert done.code == 1
    markdown = Path("verify.md").read_text()
    assert "**NOT EQUIVALENT**" in markdown
    assert "## Record in the file" in markdown
    assert run("verify", "net.onnx", "--report", "alone.html").code == 0
    assert "INTACT, recorded as EQUIVALENT" in read("alone.html")


def test_a_report_on_a_model(run: Cli) -> None:
    done = run("report", "net.py:Net", *INPUT, "--final-survival", "0.6")
    assert (done.code, done.out) == (0, "report in report.html\n")
    text = read()
    for told in ("What slim does", "5 changes by slim", "final 0.6", "times as fast", "subset"):
        assert told in text
    assert run("report", "net.py:Plain", "-o", "plain.md").code == 0
    assert "nothing to change by slim" in Path("plain.md").read_text()


def test_a_report_on_a_file(run: Cli) -> None:
    assert run("export", "net.py:Net", "-o", "net.onnx", *INPUT, "--no-verify").code == 0
    assert run("report", "net.onnx").code == 0
    assert "no record of a verdict" in read()
    assert run("report", "net.py:Net", "net.onnx", *INPUT).code == 0
    text = read()
    assert "EQUIVALENT" in text
    assert "net.onnx against Net" in text
    assert run("report", "net.py:Net", "net.onnx", "--model-arg", "depth=1", *INPUT).code == 1
    assert run("report", "net.onnx", "net.onnx").code == 2
    assert "there is no such file" in run("report", "none.onnx").err


@pytest.mark.parametrize(
    "words",
    [
        "retrofit net.py:Net -o surgery",
        "slim net.py:Net -o surgery",
        "export net.py:Net --input 3x8x8 -o net.onnx",
        "verify net.py:Net net.onnx",
        "verify net.onnx",
    ],
)
def test_a_report_that_cannot_be_is_told_before_the_work(run: Cli, words: str) -> None:
    done = run(*words.split(), "--report", "report.pdf")
    assert (done.code, done.out) == (2, "")
    assert "report.pdf is no report" in done.err
    assert not Path("surgery").exists()
    assert not Path("net.onnx").exists()
    assert "no such folder" in run(*words.split(), "--report", "no/report.html").err


def test_a_missing_package_is_named(run: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page.write, "find_spec", lambda name: None)
    done = run("report", "net.py:Net")
    assert (done.code, done.out) == (2, "")
    assert "pip install 'dropsurgery[report]'" in done.err
    assert not Path("report.html").exists()
