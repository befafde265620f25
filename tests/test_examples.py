from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torchvision
from safetensors.torch import save_file

EXAMPLES = Path(__file__).parent.parent / "examples"


def run(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *words],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "COLUMNS": "120"},
    )


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("weights") / "resnet18.safetensors"
    save_file(torchvision.models.resnet18().state_dict(), path)
    return str(path)


def test_retrofit_pretrained_resnet(weights: str, tmp_path: Path) -> None:
    done = run(
        str(EXAMPLES / "retrofit_pretrained_resnet.py"),
        *("--model", "torchvision:resnet18", "--weights", weights),
        *("--size", "32", "--steps", "1", "--out", str(tmp_path / "surgery")),
    )
    assert done.returncode == 0, done.stderr
    assert "8 residual sites in 8 blocks" in done.stdout
    assert "eval output bit-identical: True" in done.stdout
    assert "same state-dict keys: True" in done.stdout
    assert "loaded again, bit-identical: True" in done.stdout
    assert any((tmp_path / "surgery").iterdir())


def test_export_slim_graph(weights: str, tmp_path: Path) -> None:
    done = run(
        str(EXAMPLES / "export_slim_graph.py"),
        *("--model", "torchvision:resnet18", "--weights", weights),
        *("--size", "64", "--out", str(tmp_path / "resnet18.onnx")),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "20 Conv" in done.stdout
    assert "BatchNormalization" not in done.stdout
    assert (tmp_path / "resnet18.onnx").is_file()


def test_check_equivalence_in_pytest() -> None:
    path = EXAMPLES / "check_equivalence_in_pytest.py"
    done = run("-m", "pytest", "-q", "-p", "no:cacheprovider", str(path))
    assert done.returncode == 0, done.stdout
    assert "3 passed" in done.stdout


def test_test_release() -> None:
    path = EXAMPLES / "test_release.py"
    done = run("-m", "pytest", "-q", "-p", "no:cacheprovider", str(path))
    assert done.returncode == 0, done.stdout
    assert "6 passed" in done.stdout


def test_every_example_is_run_here() -> None:
    names = {path.stem for path in EXAMPLES.glob("*.py")}
    assert names == {name.removeprefix("test_") for name in globals() if name[5:] in names}


def test_train_ddp(tmp_path: Path) -> None:
    script = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    small = ("--steps", "2", "--batch", "8", "--checkpoint", str(tmp_path / "run.pt"))
    for epoch in (0, 1):
        done = run(*script, str(EXAMPLES / "train_ddp.py"), *small, "--epochs", str(epoch + 1))
        assert done.returncode == 0, done.stderr
        progress, end = done.stdout.strip().splitlines()
        assert progress.startswith(f"epoch {epoch}: loss ")
        assert end.startswith(f"step {2 * epoch + 2}, weights ")
