from __future__ import annotations

import json
import math
from pathlib import Path

import onnx
import pytest
import torch
from onnx import TensorProto, helper
from torch import nn
from torch.nn import functional as F

import dropsurgery as ds
from dropsurgery.errors import DropsurgeryError
from dropsurgery.graph.module import Skip
from dropsurgery.report import (
    Census,
    Report,
    Table,
    census,
    json_text,
    medians_in_turns,
    onnx_census,
    skips_text,
    write_whole,
)


class Everything(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.drop, self.unused = nn.Dropout2d(0.1), nn.Dropout(0.5)
        self.attention = nn.MultiheadAttention(4, 1, dropout=0.1, batch_first=True)
        self.calm = nn.MultiheadAttention(4, 1, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.drop(self.bn(self.conv(x)))
        y = F.batch_norm(y, self.bn.running_mean, self.bn.running_var, training=self.training)
        y = F.dropout(y, 0.2, self.training) + x
        t = y.flatten(2).transpose(1, 2)
        t = self.attention(t, t, t)[0] + self.calm(t, t, t)[0]
        return F.scaled_dot_product_attention(t, t, t, dropout_p=0.1 if self.training else 0.0)


def test_census_counts_calls_and_not_modules() -> None:
    counts = census(ds.trace(Everything().eval()))
    # Dropout2d, F.dropout, the first attention and the last one; not the unused, nor the calm
    assert (counts.batch_norms, counts.dropouts, counts.drop_paths) == (2, 4, 0)
    assert census(ds.retrofit(Everything().eval())).drop_paths == 1
    slim = census(ds.slim(Everything()))
    assert (slim.dropouts, slim.drop_paths) == (0, 0)


def test_a_census_in_words() -> None:
    assert str(Census(9, 2, 4, 1)) == "9 nodes, 2 BatchNorms, 4 dropouts, 1 drop paths"


def test_skips_are_told_one_by_one_or_by_reason() -> None:
    few = [Skip("a.b", "add", "'x' is no skip", "Pass"), Skip("", "add_1", "a gate", "Pass")]
    told = skips_text(few, 80, title="2 left alone").splitlines()
    assert told[0] == "2 left alone"
    assert told[1].split() == ["pass", "module", "node", "reason"]
    assert told[-1].split() == ["Pass", "(root)", "add_1", "a", "gate"]
    many = [*few, *(Skip("m", f"add_{index}", f"'{index}' is no skip") for index in range(20))]
    assert skips_text(many, 60, title="22 left alone").splitlines() == [
        "22 left alone",
        "   20  '…' is no skip",
        "       m add_0; m add_1; m add_2; …",
        "    1  Pass: 'x' is no skip",
        "       a.b add",
        "    1  Pass: a gate",
        "       (root) add_1",
        "--all lists each",
    ]
    assert skips_text(many, 60, title="all", every=True).count("is no skip") == 21


def test_census_of_an_onnx_file(tmp_path: Path) -> None:
    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])
    other = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])
    nodes = [
        helper.make_node("Dropout", ["x"], ["d"]),
        helper.make_node("Relu", ["d"], ["r"]),
        helper.make_node("Dropout", ["r"], ["y"]),
    ]
    graph = helper.make_graph(nodes, "g", [value], [other])
    onnx.save(helper.make_model(graph), tmp_path / "g.onnx")
    assert onnx_census(tmp_path / "g.onnx") == Census(3, 0, 2, 0)


def test_json_has_no_infinities() -> None:
    document = {"a": [1.0, math.inf, (math.nan, 2)], "b": {"c": -math.inf}}
    assert json.loads(json_text(document)) == {"a": [1.0, None, [None, 2]], "b": {"c": None}}


def test_a_report_as_text_markdown_and_json(tmp_path: Path) -> None:
    table = Table("Sizes", ("name", "n"), (("a|b", 1), ("c", 22)), "in bytes")
    report = Report("Title", "One paragraph.", (table,), {"n": 22}, appendix="as | it is")
    assert "Sizes" in report.text(60)
    assert "as | it is" not in report.text(60)
    report.write(tmp_path)
    assert json.loads((tmp_path / "report.json").read_text()) == {
        "title": "Title",
        "summary": "One paragraph.",
        "n": 22,
    }
    assert (tmp_path / "report.md").read_text().splitlines() == [
        *("# Title", "", "One paragraph.", ""),
        *("## Sizes", "", "| name | n |", "| --- | --- |", "| a\\|b | 1 |", "| c | 22 |", ""),
        *("in bytes", "", "```text", "as | it is", "```"),
    ]


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "report.md"
    path.write_text("old")
    with pytest.raises(UnicodeEncodeError):
        write_whole(path, "half \ud800")
    assert [file.name for file in tmp_path.iterdir()] == ["report.md"]
    assert path.read_text() == "old"
    write_whole(path, "new")
    assert path.read_text() == "new"
    with pytest.raises(DropsurgeryError, match=r"nowhere/report\.md cannot be written"):
        write_whole(tmp_path / "nowhere" / "report.md", "")


def test_medians_in_turns_calls_both_equally_often() -> None:
    calls: list[str] = []
    times = medians_in_turns(lambda: calls.append("a"), lambda: calls.append("b"), 3, warm_up=2)
    assert calls == ["a", "b"] * 5
    assert all(time > 0 for time in times)
