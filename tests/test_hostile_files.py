from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch

import dropsurgery as ds
from dropsurgery.errors import OnnxFileError, UnsafeFileError
from dropsurgery.onnx_reader import read_onnx
from tests.hostile_files import external_tricks, model, network, node, outside, value

FUZZED = 100
KINDS = {"OnnxFileError", "UnsafeFileError", "VerifyError", "StochasticError"}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Read every hostile file in a process of its own, whose memory and time are limited."""
    if not sys.platform.startswith("linux"):
        pytest.skip("needs Linux's inotify and address space limits")
    folder = tmp_path_factory.mktemp("hostile")
    done = subprocess.run(
        [sys.executable, "-m", "tests.hostile_files", str(folder), str(FUZZED)],
        capture_output=True,
        text=True,
        timeout=900,
        cwd=Path(__file__).parent.parent,
    )
    told = [json.loads(line) for line in done.stdout.splitlines()]
    last = told[-1].get("name", "the end") if told else "the start"
    assert done.returncode == 0, f"stopped after {last}: {done.stderr[-2000:]}"
    assert told[-1]["seen"].count("canary.bin") >= 1, "the watch over the canary sees nothing"
    return told[:-1]


def test_every_file_is_refused_with_a_typed_error_or_read(outcomes: list[dict[str, Any]]) -> None:
    assert len(outcomes) >= 200
    for told in outcomes:
        for reader in ("verify", "census", "record"):
            outcome = told[reader]
            assert outcome["kind"] in ("refused", "read"), (told["name"], reader, outcome)
            assert outcome["kind"] == "read" or outcome["type"] in KINDS, (told["name"], outcome)
            if outcome["kind"] == "refused":
                assert "\n  where: " in outcome["message"], (told["name"], outcome["message"])


def test_every_trick_is_refused_for_what_it_is(outcomes: list[dict[str, Any]]) -> None:
    tricks = [told for told in outcomes if told["says"] is not None]
    assert len(tricks) > 110
    for told in tricks:
        assert told["verify"]["kind"] == "refused", told["name"]
        assert told["says"] in told["verify"]["message"], (told["name"], told["verify"]["message"])


def test_nothing_outside_the_folder_is_opened_and_nothing_is_written(
    outcomes: list[dict[str, Any]],
) -> None:
    for told in outcomes:
        assert told["touched"] == [], told["name"]
        assert told["left"] == [], told["name"]


def test_some_fuzzed_files_are_read_and_some_refused(outcomes: list[dict[str, Any]]) -> None:
    fuzzed = [told["verify"]["kind"] for told in outcomes if told["name"].startswith("fuzzed")]
    assert len(fuzzed) == FUZZED
    assert {"refused", "read"} == set(fuzzed)


def test_what_leaves_the_folder_has_a_type_of_its_own(tmp_path: Path) -> None:
    case = next(case for case in external_tricks() if case.name == "external parent")
    folder = tmp_path / "cases" / "0"
    folder.mkdir(parents=True)
    outside(folder).mkdir()
    (outside(folder) / "canary.bin").write_bytes(bytes(8))
    case.write(folder)
    with pytest.raises(UnsafeFileError, match="plain path below the model's folder") as caught:
        read_onnx(folder / "model.onnx")
    assert "initializer 'w': '../../outside/canary.bin'" in str(caught.value)
    assert issubclass(UnsafeFileError, OnnxFileError)


# --- and what is sound is read -------------------------------------------------------------------


def test_exports_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    net = network()
    path = ds.export_onnx(net, tmp_path / "plain.onnx", torch.randn(1, 3, 8, 8))
    assert read_onnx(path).sidecars == {}
    monkeypatch.setattr("dropsurgery.onnx_writer.ONE_FILE_LIMIT", 100)
    path = ds.export_onnx(net, tmp_path / "m.onnx", torch.randn(1, 3, 8, 8))
    file = read_onnx(path)
    assert file.sidecars == {"m.onnx.data": (tmp_path / "m.onnx.data").resolve()}
    assert json.loads(file.metadata["dropsurgery.outputs"]) == ["output"]
    # Where the model is a link, its data lie beside what it points to.
    (tmp_path / "elsewhere").mkdir()
    link = tmp_path / "elsewhere" / "link.onnx"
    link.symlink_to(path)
    assert read_onnx(link).sidecars == file.sidecars
    assert ds.verify(net, link, seeds=(0,), batch_sizes=(1,)).ok


def test_data_in_a_folder_below_is_read(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "w.data").write_bytes(bytes(12))
    weight = onnx.TensorProto(name="w", data_type=1, dims=(2,), data_location=1)
    for key, text in (("location", "sub/w.data"), ("offset", "4"), ("length", "8")):
        weight.external_data.add(key=key, value=text)
    onnx.save(model(weights=(weight,)), tmp_path / "m.onnx")
    assert list(read_onnx(tmp_path / "m.onnx").sidecars) == ["sub/w.data"]


def test_nodes_may_stand_in_any_order_that_can_be_run(tmp_path: Path) -> None:
    nodes = [node("Relu", ["a"], ["y"]), node("Tanh", ["x"], ["a"])]
    onnx.save(model(nodes, inputs=[value("x", 2)]), tmp_path / "m.onnx")
    assert len(read_onnx(tmp_path / "m.onnx").model.graph.node) == 2


@pytest.mark.parametrize("kind", [1, 6, 7, 9, 10, 11, 16, 2, 22])
def test_tensors_of_every_kind_in_typed_fields(tmp_path: Path, kind: int) -> None:
    weight = onnx.helper.make_tensor("w", kind, (3, 2), [1] * 6)
    raw = onnx.helper.make_tensor("v", 1, (1,), bytes(4), raw=True)
    onnx.save(model([node("Relu", ["x"], ["y"])], (weight, raw)), tmp_path / "m.onnx")
    assert len(read_onnx(tmp_path / "m.onnx").model.graph.initializer) == 2


def test_a_sparse_weight_that_is_sound_is_read(tmp_path: Path) -> None:
    values = onnx.numpy_helper.from_array(torch.ones(2).numpy(), "w")
    for indices in (torch.tensor([0, 3]), torch.tensor([[0, 0], [1, 1]])):
        made = onnx.SparseTensorProto(dims=(2, 2), values=values)
        made.indices.CopyFrom(onnx.numpy_helper.from_array(indices.numpy(), "i"))
        onnx.save(model(sparse_weights=(made,)), tmp_path / "m.onnx")
        assert len(read_onnx(tmp_path / "m.onnx").model.graph.sparse_initializer) == 1
