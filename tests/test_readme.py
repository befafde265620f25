"""Every snippet and command of the README runs, and prints what the README says it prints."""

from __future__ import annotations

import re
import subprocess
import warnings
from pathlib import Path

import onnx
import pytest
import timm
import torch
import torchvision
from torch import nn

import dropsurgery as ds
from tests.pages import blocks, run_page

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"


def test_what_the_page_says_is_printed(tmp_path: Path) -> None:
    torch.manual_seed(0)
    told = [language for language, _ in blocks(README, "text", "console")]
    assert told.count("text") >= 2
    assert run_page(README, tmp_path) >= len(told)


def test_make_targets_exist() -> None:
    for target in re.findall(r"`make (\w+)`", README.read_text()):
        done = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, check=False)
        assert done.returncode == 0


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README.read_text()):
        assert (ROOT / target).exists(), target


# --- what it says of others ----------------------------------------------------------------------


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
        nn.init.uniform_(self.bn.running_mean, 1, 2)
        nn.init.uniform_(self.bn.running_var, 2, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.bn(self.conv(self.bn(self.conv(x))))


def fuse(model: nn.Module) -> nn.Module:
    with warnings.catch_warnings():  # its import uses what torch has deprecated
        warnings.simplefilter("ignore", DeprecationWarning)
        from torch.fx.experimental import optimization
    return optimization.fuse(model)


def test_fuse_folds_a_pair_that_is_called_twice_twice() -> None:
    model, x = Twice().eval(), torch.randn(2, 3, 4, 4)
    assert not torch.allclose(fuse(model)(x), model(x), atol=1e-2)


def test_the_exporter_leaves_a_pair_that_is_called_twice_and_slim_does_not(tmp_path: Path) -> None:
    model, x = Twice().eval(), torch.randn(2, 3, 4, 4)
    left = []
    for network in (model, ds.slim(model)):
        path = ds.export_onnx(network, tmp_path / "twice.onnx", x)
        left.append(
            [node.op_type for node in onnx.load(path).graph.node].count("BatchNormalization")
        )
    assert left == [2, 0]
    ds.testing.assert_equivalent(model, tmp_path / "twice.onnx")


def test_fuse_leaves_batch_norms_of_timm() -> None:
    graph = fuse(timm.create_model("efficientnet_b0").eval()).graph
    assert sum(node.target is nn.functional.batch_norm for node in graph.nodes) == 49


@pytest.mark.parametrize("name", ["densenet121", "hrnet_w18_small"])
def test_models_of_timm_without_drop_path(name: str) -> None:
    with pytest.raises(TypeError, match="drop_path_rate"):
        timm.create_model(name, drop_path_rate=0.1)


def test_torchvision_resnets_have_no_drop_path() -> None:
    with pytest.raises(TypeError, match="stochastic_depth_prob"):
        torchvision.models.resnet18(stochastic_depth_prob=0.1)
