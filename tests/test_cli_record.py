from __future__ import annotations

import json
from pathlib import Path

import onnx
import pytest

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
