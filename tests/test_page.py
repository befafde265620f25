from __future__ import annotations

import dataclasses
import json
import math
import re
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from onnx import TensorProto, helper
from torch import Tensor, nn

import dropsurgery as ds
from dropsurgery import inspection, page
from dropsurgery.errors import ArgumentError, DropsurgeryError, OnnxFileError
from dropsurgery.graph.module import Skip
from dropsurgery.page import GraphCount, Story, write
from dropsurgery.page.figures import errors_figure, inline_svg, survival_figure, types_figure
from dropsurgery.page.measure import file_bytes, latency_of_file, latency_of_modules, weight_bytes
from dropsurgery.passes.base import Change
from dropsurgery.report import Table
from dropsurgery.surgery import SLIM

SECTIONS = (
    *("verdict", "record", "changes", "skipped", "survival", "graph", "errors", "measured"),
    *("compute", "versions"),
)
HOSTILE = '"><script>alert(1)</script>&$x^2$\x1b[2J\u202e|`]]>{{ 7*7 }}'
VOID = {"meta", "link", "br", "hr", "img", "input", "col", "wbr"}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.relu(self.bn(self.conv(x)))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 1)
        self.blocks = nn.Sequential(Block(), Block(), Block())

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(self.stem(x)).mean((2, 3))


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Story:
    """A story in which everything is known."""
    torch.manual_seed(0)
    net, inputs = Net().eval(), (torch.randn(1, 3, 8, 8),)
    folder = tmp_path_factory.mktemp("story")
    path = ds.export_onnx(ds.slim(net), folder / "net.onnx", inputs)
    verdict = ds.verify(net, path)
    retrofitted = ds.retrofit(net, final_survival=0.5, mode="subset")
    slim = ds.apply(net, *SLIM)
    return Story(
        subject="net.py:Net",
        command="export",
        changes=slim.changes,
        skipped=(Skip("blocks.0", "add", "a reason", "FoldBatchNorm"),),
        graphs=(
            GraphCount("network", page.node_types(ds.trace(net))),
            GraphCount("slim network", page.node_types(slim.module)),
        ),
        operators=GraphCount("net.onnx", page.onnx_types(path)),
        survival=page.survival_along(retrofitted),
        inspection=inspection.inspect("Net", net, ds.InsertDropPath(ds.survival.linear(0.5))),
        compute=ds.expected_compute(retrofitted, torch.randn(8, 3, 8, 8)),
        verdict=verdict,
        errors=tuple((f"blocks.{i}", 1e-7 * (i + 1), 2e-7 * (i + 1)) for i in range(3)),
        latency=latency_of_file(net, path, inputs, ("network", "net.onnx")),
        latency_note="measured here",
        sizes=(("network", weight_bytes(net)), ("net.onnx", file_bytes(path))),
        record=ds.record(path, net, verdict),
    )


class Outline(HTMLParser):
    """A document's elements, with a check that each is closed where it may be."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.stack: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(html)
        self.close()
        assert self.stack == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len({name for name, _ in attrs}) == len(attrs), (tag, attrs)
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert "svg" in self.stack, f"<{tag}/> is none in HTML"
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.stack[-1:] == [tag], f"</{tag}> closes nothing"
        self.stack.pop()

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.elements if name == tag]

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def test_the_outline_sees_what_is_wrong() -> None:
    for broken in ("<p><b>x</p></b>", "<p>", "</p>", '<p id="a" id="b"></p>', "<p/>"):
        with pytest.raises(AssertionError):
            Outline(broken)


def check(html: str) -> Outline:
    """Check what holds for every page."""
    assert html.startswith("<!DOCTYPE html>\n")
    outline = Outline(html)
    elements = outline.elements
    # nothing from elsewhere, nothing that runs
    assert not re.search(r"https?:|//\w|@import|javascript:", html)
    assert {"script", "iframe", "object", "embed", "link", "img"}.isdisjoint(t for t, _ in elements)
    for tag, attrs in elements:
        for name, value in attrs.items():
            assert not name.startswith("on"), (tag, name)
            if name in ("href", "src", "xlink:href"):
                assert str(value).startswith("#"), (tag, value)
        for found in re.findall(r"url\(([^)]*)\)", " ".join(v or "" for v in attrs.values())):
            assert found.startswith("#")
    policy = next(a for a in outline.all("meta") if a.get("http-equiv"))["content"]
    assert policy == "default-src 'none'; style-src 'unsafe-inline'"
    # landmarks, headings, names
    assert [len(outline.all(tag)) for tag in ("header", "nav", "main", "footer", "h1")] == [1] * 5
    assert outline.all("html")[0]["lang"] == "en"
    assert any("width=device-width" in (a.get("content") or "") for a in outline.all("meta"))
    ids = Counter(attrs["id"] for _, attrs in elements if "id" in attrs)
    assert max(ids.values()) == 1, ids.most_common(1)
    references = [a[k] for _, a in elements for k in ("href", "aria-labelledby") if k in a]
    assert {str(reference).lstrip("#") for reference in references} <= set(ids)
    assert elements[next(i for i, (t, _) in enumerate(elements) if t == "a")][1]["class"] == "skip"
    # tables scroll in boxes that the keyboard reaches, pictures have words
    assert html.count("<table>") == html.count("<caption>") == len(outline.all("table"))
    boxes = [a for _, a in elements if "scroll" in (a.get("class") or "").split()]
    assert all(a.get("tabindex") == "0" and a.get("aria-label") for a in boxes)
    assert len(boxes) >= len(outline.all("table")) + len(outline.all("svg"))
    assert all(a.get("role") == "img" for a in outline.all("svg"))
    assert len(outline.all("desc")) == len(outline.all("svg")) == len(outline.all("figcaption"))
    return outline


# --- the page ------------------------------------------------------------------------------------


def test_a_page_has_all_sections_and_needs_nothing_else(story: Story) -> None:
    outline = check(write.html(story.page()))
    assert tuple(a["id"] for a in outline.all("section")) == SECTIONS
    assert len(outline.all("svg")) == 4
    for words in ("EQUIVALENT", "blocks.2", "FoldBatchNorm", "a reason", "GFLOP", "measured here"):
        assert words in outline.text
    assert re.search(r"torch 2\.\d", outline.text)


def test_what_is_not_known_is_named(story: Story) -> None:
    outline = check(write.html(Story("net.py:Net", "slim").page()))
    assert [a["id"] for a in outline.all("section")] == ["versions", "missing"]
    for words in ("no file was compared", "intermediate values were not", "nothing was timed"):
        assert words in outline.text
    assert "nothing to change" in outline.text


@pytest.mark.parametrize("left", SECTIONS[:-1])
def test_each_part_can_be_missing(story: Story, left: str) -> None:
    empty: dict[str, dict[str, Any]] = {
        "verdict": {"verdict": None},
        "record": {"record": None},
        "changes": {"changes": ()},
        "skipped": {"skipped": ()},
        "survival": {"survival": (), "inspection": None},
        "graph": {"graphs": (), "operators": None},
        "errors": {"errors": ()},
        "measured": {"latency": (), "sizes": ()},
        "compute": {"compute": None},
    }
    told = dataclasses.replace(story, **empty[left]).page(figures=False)
    anchors = [section.anchor for section in told.sections]
    assert anchors == [*(name for name in SECTIONS if name != left), "missing"]
    assert len(told.sections[-1].facts) == 1


def test_names_are_text_whatever_they_hold(story: Story) -> None:
    assert story.verdict is not None
    hostile = dataclasses.replace(
        story,
        subject=HOSTILE,
        changes=(Change(HOSTILE, HOSTILE, HOSTILE, HOSTILE),),
        skipped=tuple(Skip(HOSTILE, HOSTILE, HOSTILE, HOSTILE) for _ in range(30)),
        graphs=tuple(GraphCount(HOSTILE, {HOSTILE: n, "Conv2d": 1}) for n in (1, 2)),
        operators=GraphCount(HOSTILE, {HOSTILE: 1}),
        survival=((HOSTILE, 0.5), (HOSTILE, 0.4)),
        inspection=dataclasses.replace(story.inspection, name=HOSTILE),  # type: ignore[type-var]
        errors=((HOSTILE, 0.1, 0.2),),
        sizes=((HOSTILE, 3),),
        latency=((HOSTILE, 1.0),),
        latency_note=HOSTILE,
        verdict=dataclasses.replace(
            story.verdict, candidate=HOSTILE, reference=HOSTILE, notes=(HOSTILE,)
        ),
    )
    html = write.html(hostile.page())
    outline = check(html)
    assert "\x1b" not in html
    assert "\u202e" not in html
    assert "<script>alert(1)</script>" in outline.text  # as text
    assert "{{ 7*7 }}" in outline.text
    assert "$x^2$" in outline.text
    markdown = hostile.page(figures=False).markdown()
    assert "<script>" not in re.sub(r"```.*?```", "", markdown, flags=re.DOTALL)


def test_long_tables_are_folded_and_short_ones_are_not(story: Story) -> None:
    def folded(count: int) -> bool:
        rows = tuple(Change(f"m{index}", "n", "w", "P") for index in range(count))
        html = write.html(Story("x", "slim", changes=rows).page(figures=False))
        return "<summary>Changes by module" in html

    assert not folded(12)
    assert folded(13)


def test_numbers_are_aligned() -> None:
    rows = (("a", "1.5", "-", "12 %", "x" * 40), ("b", "2e-07", "3", "nan", "y"))
    kinds = write.alignments(Table("t", ("n", "a", "b", "c", "d"), rows))
    assert kinds == ["text short", "number", "number", "number", "text long"]
    assert write.alignments(Table("t", ("a",), (("b" * 19,),))) == ["text"]
    assert write.alignments(Table("t", ("a",), ())) == []


def test_colours_can_be_read_in_both_schemes() -> None:
    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        parts = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]

    def contrast(one: str, other: str) -> float:
        first, second = sorted((luminance(one), luminance(other)), reverse=True)
        return (first + 0.05) / (second + 0.05)

    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    style = Path(page.__file__).parent.joinpath("templates", "page.css").read_text()
    schemes = [dict(re.findall(r"--([\w-]+): (#\w{6})", part)) for part in style.split(":root")[1:]]
    assert len(schemes) == 3  # light, dark, print
    for scheme in schemes:
        for ink in ("ink", "quiet", "link", "a", "b"):
            assert contrast(scheme[ink], scheme["ground"]) >= 4.5, (ink, scheme)
        assert contrast(scheme["quiet"], scheme["raised"]) >= 4.5
        for tone in ("good", "bad"):
            assert contrast(scheme[tone], scheme[f"{tone}-ground"]) >= 4.5, tone


# --- as Markdown and JSON ------------------------------------------------------------------------


def test_markdown_and_json_by_suffix(story: Story, tmp_path: Path) -> None:
    page.write_page(tmp_path / "r.md", story)
    markdown = (tmp_path / "r.md").read_text()
    assert markdown.startswith("# net.py:Net\n\n**EQUIVALENT**\n")
    for title in ("## Verdict", "## What was done", "### Nodes by type", "## Expected compute"):
        assert title in markdown
    page.write_page(tmp_path / "r.JSON", story)
    document = json.loads((tmp_path / "r.JSON").read_text())
    assert document["status"] == "EQUIVALENT"
    assert document["survival"][-1] == {"path": "blocks.2.drop_path", "survival": 0.5}
    assert document["graphs"][0]["types"]["BatchNorm2d"] == 3
    assert document["verdict"]["ok"] is True
    assert document["compute"]["batch"] == 8
    assert document["errors"][2]["module"] == "blocks.2"
    assert set(document["latency_ms"]) == {"network", "net.onnx"}
    page.write_page(tmp_path / "r.html", story)
    assert sorted(item.name for item in tmp_path.iterdir()) == ["r.JSON", "r.html", "r.md"]


def test_targets_that_cannot_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ArgumentError, match=r"r\.pdf is no report"):
        page.check_page_target(tmp_path / "r.pdf")
    with pytest.raises(DropsurgeryError, match="no such folder"):
        page.check_page_target(tmp_path / "no" / "r.html")
    monkeypatch.setattr(write, "find_spec", lambda name: None if name == "jinja2" else name)
    with pytest.raises(DropsurgeryError, match=r"needs jinja2\n.*dropsurgery\[report\]"):
        page.check_page_target(tmp_path / "r.html")
    assert page.check_page_target(tmp_path / "r.md") == tmp_path / "r.md"


def test_the_same_story_gives_the_same_page(story: Story) -> None:
    assert write.html(story.page()) == write.html(story.page())


# --- figures -------------------------------------------------------------------------------------


def test_a_figure_says_what_it_shows() -> None:
    falling = survival_figure([("a", 0.9), ("b", 0.5)])
    assert falling.description == "Survival falls from 0.9 at a to 0.5 at b; the least is 0.5."
    assert survival_figure([("a", 1.0)]).description == "Survival is 1 at a."
    types = types_figure({"Conv": 3, "Norm": 2}, {"Conv": 3}, ("x", "y"))
    assert types.description == "From x to y: Norm 2 to 0."
    assert types_figure({"A": 1}, {"A": 1}, ("x", "y")).description.endswith("the same nodes.")
    many = types_figure({f"T{i}": i + 1 for i in range(20)}, {}, ("x", "y"))
    assert many.caption == "Nodes by type; 8 more types are in the table"
    errors = errors_figure([("a", 1e-7, 1e-7), ("b", 1e-2, 2e-2), ("c", 0.0, 3e-2)])
    assert "largest local error is 0.01, at b (module 2 of 3)" in errors.description


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_errors_that_are_no_numbers_are_the_largest(bad: float) -> None:
    figure = errors_figure([("a", 1.0, 1.0), ("b", bad, bad), ("c", 0.5, bad)])
    assert "at b (module 2 of 3)" in figure.description
    assert "NaN" not in figure.svg
    assert "mathdefault" not in figure.svg
    errors_figure([("a", 0.0, 0.0)])


def test_a_drawing_takes_the_page_s_colours_and_keeps_its_letters() -> None:
    svg = survival_figure([("a", 0.9), ("b", 0.5)]).svg
    assert "currentColor" in svg
    assert "var(--a)" in svg
    assert not re.search(r"#0[1-4]0[1-4]0[1-4]", svg)
    assert "survival probability</text>" in svg
    assert "white" not in svg
    assert "#ffffff" not in svg


def test_ids_of_two_drawings_do_not_meet() -> None:
    raw = (
        '<?xml?><!DOCTYPE svg><svg xmlns="u" role="x"><g id="a"><use href="#b"/></g>'
        '<g id="b"/></svg>'
    )
    made = [inline_svg(raw, name, "t", "d") for name in ("one", "two")]
    assert made[0] == (
        '<svg role="img"><title>t</title><desc>d</desc><g><use href="#one-b"/></g>'
        '<g id="one-b"/></svg>'
    )
    assert "two-b" in made[1]


# --- counting and measuring ----------------------------------------------------------------------


def test_types_are_those_of_calls() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.act, self.scale = nn.ReLU(), nn.Parameter(torch.ones(1))

        def forward(self, x: Tensor) -> Tensor:
            return self.act(self.act(x)).flatten() * self.scale + x.flatten()

    assert page.node_types(ds.trace(Mixed())) == {
        "ReLU": 2,
        ".flatten": 2,
        "get_attr": 1,
        "mul": 1,
        "add": 1,
    }


def test_operators_of_a_file(tmp_path: Path) -> None:
    info = helper.make_tensor_value_info
    nodes = [helper.make_node(kind, ["x"], [kind]) for kind in ("Relu", "Tanh", "Exp")]
    graph = helper.make_graph(
        nodes, "g", [info("x", TensorProto.FLOAT, [1])], [info("Exp", TensorProto.FLOAT, [1])]
    )
    onnx.save(helper.make_model(graph), tmp_path / "m.onnx")
    assert page.onnx_types(tmp_path / "m.onnx") == {"Relu": 1, "Tanh": 1, "Exp": 1}
    with pytest.raises(OnnxFileError):
        page.onnx_types(tmp_path / "none.onnx")


def test_sizes_and_times() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    net[1].weight = net[0].weight
    assert weight_bytes(net) == 4 * (16 + 4 + 4)
    times = latency_of_modules(net, net, [torch.zeros(1, 4)], ("a", "b"))
    assert [name for name, _ in times] == ["a", "b"]
    assert all(0 < ms < 1000 for _, ms in times)
