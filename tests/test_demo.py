from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from rich.console import Console

from dropsurgery import demo
from dropsurgery.errors import ArgumentError, DropsurgeryError
from dropsurgery.report import Report


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Report, bool]:
    folder = tmp_path_factory.mktemp("demo") / "new" / "out"
    report, ok = demo.run_demo(folder, epochs=2, depth=1)
    return folder, report, ok


def test_the_demo_leaves_a_model_and_a_report(ran: tuple[Path, Report, bool]) -> None:
    folder, report, ok = ran
    assert ok
    assert {path.name for path in folder.iterdir()} == {"model.onnx", "report.md", "report.json"}
    document = json.loads((folder / "report.json").read_text())
    assert document["ok"] is True
    assert document["bit_identical_after_retrofit"] is True
    assert (folder / "report.md").read_text() == report.markdown()


def test_the_numbers_of_the_report(ran: tuple[Path, Report, bool]) -> None:
    facts = json.loads((ran[0] / "report.json").read_text())
    stages = {stage["step"]: stage for stage in facts["stages"]}
    assert list(stages) == ["original", "retrofitted", "fine-tuned", "slim", "model.onnx"]
    # stem, two in each of three blocks, two projections
    assert [s["batch_norms"] for s in stages.values()] == [9, 9, 9, 0, 0]
    assert [s["dropouts"] for s in stages.values()] == [1, 1, 1, 0, 0]
    assert [s["drop_paths"] for s in stages.values()] == [0, 3, 3, 0, 0]
    assert stages["retrofitted"]["correct"] == stages["original"]["correct"]
    # the BatchNorms, the dropout, and the identity of the first block's shortcut
    assert stages["slim"]["nodes"] == stages["original"]["nodes"] - 11
    assert all(value > 0 for value in [*facts["cost"]["torch_ms"], *facts["cost"]["file_bytes"]])


def test_the_exported_network_has_the_accuracy_it_claims(
    ran: tuple[Path, Report, bool],
) -> None:
    folder = ran[0]
    test = demo.load_digits().test
    session = onnxruntime.InferenceSession(
        folder / "model.onnx", providers=["CPUExecutionProvider"]
    )
    (scores,) = session.run(None, {session.get_inputs()[0].name: test.images.numpy()})
    right = int(np.sum(scores.argmax(1) == test.labels.numpy()))
    claimed = json.loads((folder / "report.json").read_text())["stages"][-1]["correct"]
    assert right == claimed
    assert right > 150  # two epochs: far above the 40 of chance


def test_the_report_reads_on_a_narrow_terminal(ran: tuple[Path, Report, bool]) -> None:
    text = ran[1].text(80)
    assert max(map(len, text.splitlines())) <= 80
    assert "bit-identical" in text


def test_the_split_is_disjoint_complete_and_stratified() -> None:
    data = demo.load_digits(3)
    sizes = [len(part.labels) for part in (data.train, data.validation, data.test)]
    assert sizes == [1097, 300, 400]
    rows = torch.cat([p.images.flatten(1) for p in (data.train, data.validation, data.test)])
    assert len(torch.unique(rows, dim=0)) == 1797
    assert torch.bincount(data.test.labels).min() >= 38
    assert data.train.images.shape[1:] == (1, 16, 16)
    assert abs(float(data.train.images.mean())) < 1e-5


def test_fit_stops_early_and_keeps_the_best_epoch() -> None:
    data = demo.load_digits()
    torch.manual_seed(0)
    model = demo.DigitsResNet(depth=1, width=4)
    seen: list[float] = []
    kept: dict[int, dict[str, torch.Tensor]] = {}

    def tick(epoch: int, accuracy: float) -> None:
        seen.append(accuracy)
        kept[epoch] = copy.deepcopy(model.state_dict())

    done = demo.fit(model, data, epochs=40, rate=0.2, patience=1, tick=tick)
    assert done.epochs == len(seen) == done.best + 1 < 40  # no loss falls forty times in a row
    state = model.state_dict()
    assert all(torch.equal(state[key], kept[done.best][key]) for key in state)
    assert not model.training


def test_an_interrupt_restores_the_generator_and_makes_no_folders(tmp_path: Path) -> None:
    state = torch.get_rng_state()
    with pytest.raises(KeyboardInterrupt):
        _interrupted(tmp_path / "out" / "deep")
    assert torch.equal(torch.get_rng_state(), state)
    assert list(tmp_path.iterdir()) == []


def _interrupted(folder: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:

        def stop(*_: object, **__: object) -> None:
            raise KeyboardInterrupt

        patch.setattr(demo.ds, "slim", stop)
        demo.run_demo(folder, epochs=1, depth=1)


@pytest.mark.parametrize("old", [False, True])
def test_an_interrupted_demo_leaves_nothing_behind(tmp_path: Path, old: bool) -> None:
    folder = tmp_path / "out"
    if old:
        folder.mkdir()
        (folder / "model.onnx").write_bytes(b"precious")
    with pytest.raises(KeyboardInterrupt):
        _interrupted(folder)
    assert [path.name for path in tmp_path.iterdir()] == (["out"] if old else [])
    if old:
        assert [path.read_bytes() for path in folder.iterdir()] == [b"precious"]


def test_bad_arguments(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="epochs and depth are at least 1, got 0 and 1"):
        demo.run_demo(tmp_path / "out", epochs=0, depth=1)
    (tmp_path / "file").write_text("")
    with pytest.raises(DropsurgeryError, match="file cannot be written"):
        demo.run_demo(tmp_path / "file", epochs=1)
    assert not (tmp_path / "out").exists()


def test_without_scikit_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "sklearn", None)
    with pytest.raises(DropsurgeryError, match=r"needs scikit-learn(.|\n)*dropsurgery\[demo\]"):
        demo.load_digits()


def test_progress_goes_to_the_console_given(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    with open(tmp_path / "log", "w") as file:
        demo.run_demo(tmp_path / "out", epochs=1, depth=1, console=Console(file=file))
    log = (tmp_path / "log").read_text()
    for step in ("train", "retrofit", "fine-tune", "slim", "export", "verify", "measure"):
        assert step in log
    assert capsys.readouterr().out == ""
