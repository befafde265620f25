"""A case that runs by itself, a picture of the errors, and the command line that makes them."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import nn

import dropsurgery as ds
from dropsurgery.errors import ArgumentError, ArgumentTypeError, DropsurgeryError, VerifyError
from tests.helpers import randomize
from tests.test_locate import (
    Net,
    Two,
    convolution_weight,
    norm_epsilon,
    skipped_residual,
    softmax_axis,
)
from tests.verify_helpers import edited, vit


@pytest.fixture(scope="module")
def net(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Path]:
    torch.manual_seed(0)
    model = randomize(Net()).eval()
    path = tmp_path_factory.mktemp("net") / "net.onnx"
    return model, ds.export_onnx(
        ds.apply(model, ds.FoldBatchNorm()).module, path, torch.randn(1, 3, 16, 16)
    )


def run(folder: Path) -> str:
    """Run the script with nothing of ours on the path, as whoever gets the folder would."""
    done = subprocess.run(
        [sys.executable, "-I", "run.py"], cwd=folder, capture_output=True, text=True, check=True
    )
    return done.stdout


def errors(text: str) -> dict[str, float]:
    lines = [line for line in text.splitlines() if line.startswith("largest error")]
    return {line.split()[3]: float(line.split()[-1]) for line in lines}


@pytest.mark.parametrize("edit", [convolution_weight, norm_epsilon, skipped_residual])
def test_the_script_shows_the_mismatch(
    net: tuple[nn.Module, Path], tmp_path: Path, edit: object
) -> None:
    model, path = net
    location = ds.write_repro(model, edited(path, edit), tmp_path / "case")  # type: ignore[arg-type]
    folder = tmp_path / "case"
    names = {"data.npz", "piece.onnx", "reference.pt2", "run.py"}
    assert {file.name for file in folder.iterdir()} == names
    piece = onnx.load(str(folder / "piece.onnx"))
    onnx.checker.check_model(piece)
    assert len(piece.graph.node) <= 2
    found = errors(run(folder))
    assert found["the"] > 100 * found["torch"]
    assert location.conclusion.splitlines()[0] in (folder / "run.py").read_text()
    # The network's piece gives what the file holds, without the network's code.
    data = np.load(folder / "data.npz")
    program = torch.export.load(folder / "reference.pt2")
    value = program.module()(*program.example_inputs[0])
    assert torch.equal(value, torch.from_numpy(data["torch"]))
    assert data["float64"].dtype == np.float64


def test_a_piece_of_many_nodes(tmp_path: Path) -> None:
    model = vit()
    path = ds.export_onnx(model, tmp_path / "vit.onnx", torch.randn(1, 3, 32, 32))
    ds.write_repro(model, edited(path, softmax_axis), tmp_path / "case")
    found = errors(run(tmp_path / "case"))
    assert found["the"] > 100 * found["torch"]
    # The attention alone, not the network.
    whole = onnx.load(str(path))
    piece = onnx.load(str(tmp_path / "case" / "piece.onnx"))
    assert len(piece.graph.node) < len(whole.graph.node) / 5


def test_an_empty_folder_is_filled_and_a_full_one_is_not(
    net: tuple[nn.Module, Path], tmp_path: Path
) -> None:
    model, path = net
    changed = edited(path, norm_epsilon)
    (tmp_path / "empty").mkdir()
    ds.write_repro(model, changed, tmp_path / "empty")
    assert (tmp_path / "empty" / "run.py").exists()
    with pytest.raises(ArgumentError, match="is there already and is no empty folder"):
        ds.write_repro(model, changed, tmp_path / "empty")
    (tmp_path / "file").write_text("kept")
    with pytest.raises(ArgumentError, match="is there already"):
        ds.write_repro(model, changed, tmp_path / "file")
    assert (tmp_path / "file").read_text() == "kept"
    with pytest.raises(ArgumentError, match="there is no folder"):
        ds.write_repro(model, changed, tmp_path / "none" / "case")
    with pytest.raises(ArgumentTypeError, match="folder is a int"):
        ds.write_repro(model, changed, 3)  # type: ignore[arg-type]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_nothing_is_left_half_written(
    net: tuple[nn.Module, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
) -> None:
    model, path = net

    def fail(*args: object, **kwargs: object) -> None:
        raise error

    monkeypatch.setattr(np, "savez", fail)
    with pytest.raises((ArgumentError, KeyboardInterrupt)):
        ds.write_repro(model, edited(path, norm_epsilon), tmp_path / "case")
    assert not list(tmp_path.iterdir())


def test_where_there_is_no_piece(net: tuple[nn.Module, Path], tmp_path: Path) -> None:
    model, path = net
    with pytest.raises(VerifyError, match="nothing to write: no place"):
        ds.write_repro(model, path, tmp_path / "case", seeds=(0,))
    torch.manual_seed(0)
    two = Two().eval()
    file = ds.export_onnx(two, tmp_path / "two.onnx", torch.randn(1, 8))

    def leave_out(model: onnx.ModelProto) -> None:
        del model.graph.output[-1]

    with pytest.raises(VerifyError, match="no piece shows it"):
        ds.write_repro(two, edited(file, leave_out), tmp_path / "case")
    assert not (tmp_path / "case").exists()


def test_the_picture(net: tuple[nn.Module, Path], tmp_path: Path) -> None:
    model, path = net
    location = ds.locate(model, edited(path, convolution_weight))
    for name in ("depth.svg", "depth.png"):
        location.plot(tmp_path / name)
        assert (tmp_path / name).stat().st_size > 5000
    stream = io.BytesIO()
    location.plot(stream)
    text = stream.getvalue().decode()
    assert text.startswith("<?xml")
    assert "first differs at blocks.1.conv1" in text
    with pytest.raises(DropsurgeryError, match="cannot be written"):
        location.plot(tmp_path / "none" / "depth.svg")
    with pytest.raises(DropsurgeryError, match="cannot be written"):
        location.plot(tmp_path / "depth.what")
