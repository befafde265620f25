"""slim_report: counts that can be checked by hand, and what is left with its reason."""

from __future__ import annotations

import json

import torch
from torch import Tensor, nn

import dropsurgery as ds
from tests.fold_helpers import Chain, ready


def test_counts_by_hand() -> None:
    model = ready(Chain(conv=nn.Conv2d(2, 4, 3, bias=False), bn=nn.BatchNorm2d(4), act=nn.ReLU()))
    found = ds.slim_report(model, torch.zeros(1, 2, 6, 6, dtype=torch.float64))
    image, weight, out = 2 * 36, 72, 4 * 16
    assert found.before.nodes == 3
    assert found.before.batch_norms == 1
    assert found.before.parameters == weight + 16
    assert found.before.flops == 2 * 16 * weight
    moved = (image + weight + out) + (out + 16 + out) + (out + out)
    assert found.before.traffic == 8 * moved + 8  # the integer that counts batches
    assert found.after.nodes == 2
    assert found.after.batch_norms == 0
    assert found.after.parameters == weight + 4
    assert found.after.traffic == 8 * (image + weight + 4 + out + out + out)
    assert found.left == ()


def test_views_and_writes_in_place_move_nothing_new() -> None:
    class Net(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.flatten(1).unsqueeze(1)

    assert ds.slim_report(Net(), torch.zeros(2, 3, 4)).before.traffic == 0


def test_what_is_left_and_why() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.act, self.bn = nn.GELU(), nn.BatchNorm2d(4)
            self.pool = nn.MaxPool2d(3)

        def forward(self, x: Tensor) -> Tensor:
            return self.pool(self.bn(self.act(x)))

    found = ds.slim_report(ready(Net()), torch.zeros(1, 4, 6, 6, dtype=torch.float64))
    (left,) = found.left
    assert left.node == "bn"
    assert left.reason
    assert left.reason != "no pass says why"
    text = found.text(80, title="a network")
    assert text.startswith("a network")
    assert "1 BatchNorm left" in text
    document = json.loads(json.dumps(found.to_json()))
    assert document["batch_norms_left"][0]["node"] == "bn"
    assert document["after"]["batch_norms"] == 1


def test_branches_and_dead_weights_are_counted() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(self.a(x) + self.b(x) + x)

    model = Net().eval()
    before = model.state_dict()
    found = ds.slim_report(model, torch.zeros(1, 4, 5, 5))
    assert (found.before.nodes, found.after.nodes) == (5, 2)
    assert found.after.flops == 2 * 25 * 144
    assert found.after.traffic < 0.5 * found.before.traffic
    assert list(model.state_dict()) == list(before)
    assert found.changes["MergeLinearBranches"] == 1
