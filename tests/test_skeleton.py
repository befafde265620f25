"""What the picture of a residual skeleton shows, read back from its artists and its SVG."""

from __future__ import annotations

import io
import itertools
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection, PathCollection
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image
from torch import Tensor, nn

import dropsurgery as ds
from dropsurgery import skeleton
from dropsurgery.errors import DropsurgeryError
from dropsurgery.inspection import Inspection, inspect, stage_of
from dropsurgery.models import load_model

SVG = "{http://www.w3.org/2000/svg}"


class Block(nn.Module):
    def __init__(self, adds: int = 1, project: bool = False) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(2, 2, 1) for _ in range(adds))
        self.skip = nn.Conv2d(2, 2, 1) if project else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = self.skip(x) + torch.relu(self.convs[0](x))
        for conv in self.convs[1:]:
            x = x + torch.relu(conv(x))
        return x


class Staged(nn.Module):
    """Stages of blocks, the first block of each with a projected skip."""

    def __init__(self, *depths: int, adds: int = 1, name: str = "stage") -> None:
        super().__init__()
        self.names = [f"{name}{index}" for index in range(len(depths))]
        for stage, depth in zip(self.names, depths, strict=True):
            blocks = (Block(adds, project=turn == 0) for turn in range(depth))
            setattr(self, stage, nn.Sequential(*blocks))

    def forward(self, x: Tensor) -> Tensor:
        for stage in self.names:
            x = getattr(self, stage)(x)
        return x


class Hourglass(nn.Module):
    """Long skips, one in the other, around single blocks."""

    def __init__(self, levels: int) -> None:
        super().__init__()
        self.before, self.after = Block(), Block()
        self.inner = Hourglass(levels - 1) if levels > 1 else Block()

    def forward(self, x: Tensor) -> Tensor:
        x = self.before(x)
        return self.after(x + torch.tanh(self.inner(torch.relu(x))))


def look(model: nn.Module, rule: Any = None, **options: Any) -> Inspection:
    rule = rule or ds.survival.linear(0.8)
    return inspect("net", model.eval(), ds.InsertDropPath(rule, **options))


def artists(figure: Figure) -> dict[str, list[Any]]:
    found: dict[str, list[Any]] = {}
    for artist in figure.findobj(lambda artist: artist.get_gid() is not None):
        found.setdefault(artist.get_gid(), []).append(artist)
    return found


def count(drawn: dict[str, list[Any]], gid: str) -> int:
    return sum(
        len(artist.get_offsets() if isinstance(artist, PathCollection) else artist.get_paths())
        for artist in drawn.get(gid, [])
    )


def texts(figure: Figure) -> list[Text]:
    return [text for text in figure.findobj(Text) if text.get_text() and text.get_visible()]


# --- the content ---------------------------------------------------------------------------------


def test_every_site_is_drawn_by_its_kind() -> None:
    figure = skeleton.draw(look(Staged(2, 3, adds=2)))
    drawn = artists(figure)
    assert {gid: count(drawn, gid) for gid in drawn if gid.endswith(("-skips", "-adds"))} == {
        "identity-skips": 8, "identity-adds": 8, "projection-skips": 2, "projection-adds": 2
    }  # fmt: skip
    assert count(drawn, "branches") == 10
    assert [text.get_text() for text in drawn["stage"]] == ["stage0", "stage1"]
    (curve,) = drawn["survival"]
    expected = [1 - 0.2 * block / 5 for block in (1, 2, 3, 4, 5) for _ in range(2)]
    assert list(curve.get_ydata()) == pytest.approx(expected)
    assert list(curve.get_xdata()) == pytest.approx(
        [0.75 + step / 2 for step in range(10)], abs=0.05
    )
    axes = curve.axes
    assert axes.get_xlabel() == "residual block (2 adds each)"
    bars = [patch for container in axes.containers for patch in container]
    assert [-bar.get_height() for bar in bars] == pytest.approx([1 - p for p in expected])
    assert {bar.get_y() for bar in bars} == {1}


def test_kinds_differ_in_line_and_marker_and_not_in_colour_alone() -> None:
    model = nn.Sequential(Staged(2), Hourglass(1))
    drawn = artists(skeleton.draw(look(model, include=("nested",))))
    lines, markers, shapes = set(), set(), set()
    for kind in ("identity", "projection", "nested"):
        (skips,), (adds,) = drawn[f"{kind}-skips"], drawn[f"{kind}-adds"]
        assert isinstance(skips, LineCollection)
        lines.add(str(skips.get_linestyles()))
        markers.add(adds.get_paths()[0].vertices.tobytes())
        shapes.add(len(skips.get_paths()[0].vertices) > 4)
    assert (len(lines), len(markers), len(shapes)) == (3, 3, 2)


def test_nested_skips_span_what_they_go_around_and_do_not_cross() -> None:
    found = look(Hourglass(3), include=("nested",))
    assert [rate.over for rate in found.sites if rate.over] == [(3, 3), (2, 5), (1, 7)]
    (skips,) = artists(skeleton.draw(found))["nested-skips"]
    boxes = [path.get_extents() for path in skips.get_paths()]
    for inner, outer in itertools.pairwise(boxes):
        assert outer.x0 < inner.x0 < inner.x1 < outer.x1
        assert outer.y1 > inner.y1


def test_linear_sites_have_hollow_adds() -> None:
    class Linear(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block, self.conv = Block(), nn.Conv2d(2, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.block(x)
            return x + self.conv(x)

    drawn = artists(skeleton.draw(look(Linear(), include=("linear",))))
    assert count(drawn, "identity-adds") == count(drawn, "identity-adds-linear") == 1
    (hollow,) = drawn["identity-adds-linear"]
    assert hollow.get_facecolor()[0][:3].tolist() == [1, 1, 1]
    assert count(drawn, "identity-skips") == 2


def test_sites_that_are_left_alone_are_pale_and_have_no_rate() -> None:
    drawn = artists(skeleton.draw(look(Staged(2, 2, 2), where="stage1.*")))
    assert count(drawn, "projection-skips-left-alone") == 2
    assert count(drawn, "projection-skips") == count(drawn, "identity-skips") == 1
    rates = drawn["survival"][0].get_ydata()
    assert [math.isnan(p) for p in rates] == [True, True, False, False, True, True]
    assert "left alone" in [
        text.get_text() for text in drawn["survival"][0].figure.legends[0].texts
    ]


def test_native_rates_are_drawn_beside_the_rule() -> None:
    model = load_model("timm:resnet10t", arguments={"drop_path_rate": 0.3}).module
    drawn = artists(skeleton.draw(look(model)))
    (native,) = drawn["native-survival"]
    assert list(native.get_ydata()) == pytest.approx([0.9, 0.8, 0.7])
    assert list(native.get_xdata()) == pytest.approx([2, 3, 4])


def test_a_network_without_sites_says_so() -> None:
    found = look(nn.Sequential(nn.Linear(2, 2)))
    figure = skeleton.draw(found)
    assert [text.get_text() for text in artists(figure)["nothing"]] == [
        "no residual sites, so there is nothing to drop"
    ]
    assert b"no residual sites" in skeleton.picture(found, "svg")


def test_a_network_whose_every_site_is_left_alone_is_drawn() -> None:
    class Aliased(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            y = torch.relu(self.linear(x))
            y.view(-1, 3).add_(x)
            return y

    found = look(Aliased())
    assert [rate.survival for rate in found.sites] == [None]
    assert "in place" in found.skipped[0].reason
    assert count(artists(skeleton.draw(found)), "identity-skips-left-alone") == 1
    assert skeleton.picture(found, "png")


def test_a_rule_that_drops_nothing_is_drawn() -> None:
    drawn = artists(skeleton.draw(look(Staged(2), rule=ds.survival.constant(1.0))))
    assert list(drawn["survival"][0].get_ydata()) == [1, 1]


# --- that it can be read -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "model",
    [
        Staged(2, 2, 2, 2),
        Staged(3, 8, 36, 3),
        Staged(20, 60, 100, 20),
        Staged(6, 6, adds=2),
        Staged(*[1] * 30, name="a_rather_long_name_for_a_stage_"),
        Staged(1, 100, *[1] * 9),
        Hourglass(5),
        Block(),
    ],
    ids=["8", "50", "200", "adds", "stages", "uneven", "nested", "one"],
)
def test_no_text_touches_another_or_leaves_the_picture(model: nn.Module) -> None:
    figure = skeleton.draw(look(model, include=("nested",)))
    FigureCanvasAgg(figure).draw()
    boxes = [(text.get_text(), text.get_window_extent()) for text in texts(figure)]
    assert len(boxes) > 8
    for text, box in boxes:
        assert box.x0 >= 0, text
        assert box.y0 >= 0, text
        assert box.x1 <= figure.bbox.x1, text
        assert box.y1 <= figure.bbox.y1, text
    for (one, first), (other, second) in itertools.combinations(boxes, 2):
        assert not first.overlaps(second), f"{one!r} touches {other!r}"


def test_pictures_grow_with_the_network_up_to_a_limit() -> None:
    widths = [skeleton.draw(look(Staged(depth))).get_figwidth() for depth in (4, 60, 90, 150)]
    assert widths[0] == 8
    assert widths[0] < widths[1] < widths[2] == widths[3] == 18


# --- the files -----------------------------------------------------------------------------------


def test_svg_holds_text_a_title_and_a_description() -> None:
    found = look(Staged(2, 3))
    content = skeleton.picture(found, "svg")
    root = ElementTree.fromstring(content)
    assert root.get("role") == "img"
    title, described = root.find(f"{SVG}title"), root.find(f"{SVG}desc")
    assert title is not None
    assert title.text == "Residual skeleton of net"
    assert described is not None
    assert described.text == (
        "5 residual sites in 5 blocks, rule linear, final 0.8, counted by block (L = 5). Blocks by "
        "stage: stage0 2, stage1 3. Survival from 0.96 at the first to 0.8 at the last, 0.8 at "
        "least."
    )
    told = [text.text for text in root.iter(f"{SVG}text")]
    assert {"stage0", "stage1", "0.96", "0.8", "identity skip", "projection skip"} <= {*told}
    (skips,) = [g for g in root.iter(f"{SVG}g") if g.get("id") == "identity-skips"]
    assert len(list(skips.iter(f"{SVG}path"))) == 3
    assert skeleton.picture(found, "svg") == content


def test_names_that_mean_something_to_others_are_text() -> None:
    found = inspect("$a_b$ <&>", Block().eval(), ds.InsertDropPath(ds.survival.constant(0.5)))
    root = ElementTree.fromstring(skeleton.picture(found, "svg"))
    assert "$a_b$ <&>" in [text.text for text in root.iter(f"{SVG}text")]


def test_png_is_a_picture_of_the_figures_size() -> None:
    found = look(Staged(2, 2))
    image = Image.open(io.BytesIO(skeleton.picture(found, "png")))
    assert image.size == (1152, int(skeleton.draw(found).get_figheight() * 144))
    assert len(image.convert("RGB").getcolors(1 << 20) or ()) > 20


def test_the_users_settings_are_neither_used_nor_changed() -> None:
    import matplotlib

    found = look(Block())
    plain = skeleton.picture(found, "svg")
    with matplotlib.rc_context({"font.size": 30, "svg.fonttype": "path"}):
        assert skeleton.picture(found, "svg") == plain
        assert matplotlib.rcParams["font.size"] == 30


def test_without_matplotlib_the_error_has_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(DropsurgeryError, match=r"pip install 'dropsurgery\[plot\]'"):
        skeleton.picture(look(Block()), "svg")


def test_the_command_writes_both_files_whole_and_needs_no_display(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "dropsurgery", "inspect", "torchvision:resnet18"]
    hidden = {"DISPLAY", "WAYLAND_DISPLAY"}
    done = subprocess.run(
        [*command, "--svg", "r.svg", "--png", "r.png", "--json"],
        cwd=tmp_path,
        env={**{k: v for k, v in os.environ.items() if k not in hidden}, "MPLBACKEND": "TkAgg"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert '"pictures": {\n    "svg": "r.svg",\n    "png": "r.png"\n  }' in done.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["r.png", "r.svg"]
    drawn = ElementTree.parse(tmp_path / "r.svg").getroot()
    told = [text.text for text in drawn.iter(f"{SVG}text")]
    assert {"layer1", "layer2", "layer3", "layer4", "torchvision:resnet18"} <= {*told}


# --- stages --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("module", "stage"),
    [
        ("layer1.0", "layer1"),
        ("stages.2.blocks.5", "stages.2"),
        ("blocks.7", "blocks"),
        ("features.1.0", "features.1"),
        ("layers.0.blocks.1.attn", "layers.0"),
        ("encoder.layers.encoder_layer_0", "encoder.layers"),
        ("trunk_output.block2.block2-1", "trunk_output.block2"),
        ("blocks.0.layers.1.layers.MBconv", "blocks.0"),
        ("stage2.0.branches.1.0", "stage2.0"),
        ("block", "block"),
        ("", "(root)"),
    ],
)
def test_stages_are_read_off_module_paths(module: str, stage: str) -> None:
    assert stage_of(module) == stage
