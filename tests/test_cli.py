from __future__ import annotations

import copy
import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

import dropsurgery as ds
from dropsurgery import cli, inspection
from dropsurgery.models import load_model
from dropsurgery.passes.base import Result

NETWORK = '''
import os, time, torch
from torch import nn

print("a model file may print")

class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return self.relu(y + x)

class Net(nn.Module):
    def __init__(self, width=4, depth=2):
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.blocks = nn.Sequential(*(Block(width) for _ in range(depth)))
        self.dropout = nn.Dropout(0.3)
        self.head = nn.Linear(width, 5)
        for m in self.modules():
            if isinstance(m, nn.BatchNorm2d):
                nn.init.uniform_(m.running_mean, -0.3, 0.3)
                nn.init.uniform_(m.running_var, 0.5, 1.5)

    def forward(self, x):
        y = self.blocks(self.stem(x))
        return self.head(self.dropout(y.mean((2, 3))))

class Slow(Net):
    """Tells that the export has begun and then takes its time over it."""

    def forward(self, x):
        if marker := os.environ.get("MARKER"):
            open(marker, "w").close()
            time.sleep(30)
        return super().forward(x)

class Untraceable(Net):
    def forward(self, x):
        if x.sum() > 0:
            x = x + 1
        return super().forward(x)

class Unet(nn.Module):
    """Two blocks, and a long skip around a third."""

    def __init__(self):
        super().__init__()
        self.before, self.inner, self.after = Block(3), Block(3), Block(3)

    def forward(self, x):
        x = self.before(x)
        return self.after(x + torch.tanh(self.inner(torch.relu(x))))

class Mixed(nn.Module):
    """A residual block and twelve adds of linear branches, of which one is an identity's."""

    def __init__(self):
        super().__init__()
        self.block = Block(3)
        self.mix = nn.ModuleList(nn.Conv2d(3, 3, 3, padding=1) for _ in range(12))

    def forward(self, x):
        x = self.block(x)
        for conv in self.mix:
            x = x + conv(x)
        return x + 1

class Tokens(nn.Module):
    """Blocks that see their tokens first, and windows beside the batch."""

    def __init__(self):
        super().__init__()
        self.conv, self.a, self.b = nn.Conv2d(3, 6, 1), nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x):
        x = self.conv(x).flatten(2).permute(2, 0, 1)
        x = x + torch.relu(self.a(x))
        rows = x.flatten(0, 1)
        return rows + torch.relu(self.b(rows))

class Sized(Net):
    def forward(self, x):
        return super().forward(x if x.shape[2] > 4 else 2 * x)

class Deep(nn.Sequential):
    def __init__(self):
        super().__init__()
        self.a_stage_of_a_long_name = nn.Sequential()
        self.a_stage_of_a_long_name.another_of_a_long_name = Block(3)

class Plain(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(4, 3))

def two_inputs():
    class Two(nn.Module):
        def forward(self, image, mask):
            return image * mask.mean(1, keepdim=True)
    return Two()
'''


@dataclass
class Outcome:
    code: int
    out: str
    err: str

    @property
    def document(self) -> Any:
        return json.loads(self.out)


Cli = Callable[..., Outcome]


@pytest.fixture
def run(
    capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Cli]:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "net.py").write_text(NETWORK)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def call(*words: str) -> Outcome:
        capfd.readouterr()
        with pytest.raises(SystemExit) as exit_:
            cli.main(words)
        out, err = capfd.readouterr()
        return Outcome(int(exit_.value.code or 0), out, err)

    yield call
    for number, handler in handlers.items():
        signal.signal(number, handler)


def network() -> torch.nn.Module:
    return load_model("net.py:Net").module


# --- inspect -------------------------------------------------------------------------------------


def test_inspect_lists_sites_and_counts(run: Cli) -> None:
    done = run("inspect", "net.py:Net", "--final-survival", "0.5")
    assert done.code == 0
    assert done.err == "a model file may print\n"
    assert re.search(r"net\.py:Net: 2 residual sites in 2 blocks", done.out)
    assert re.search(r"1\s+blocks\.0\s+add\s+identity\s+0\.75", done.out)
    assert re.search(r"2\s+blocks\.1\s+add_1\s+identity\s+0\.5", done.out)
    assert re.search(r"\d+ nodes, 4 BatchNorms, 1 dropouts, 0 drop paths", done.out)


def test_inspect_as_json_prints_nothing_else(run: Cli) -> None:
    done = run("inspect", "net.py:Net", "--rule", "linspace", "--json")
    sites = done.document["sites"]
    assert [(s["block"], s["module"], s["survival"]) for s in sites] == [
        (1, "blocks.0", 1.0),
        (2, "blocks.1", pytest.approx(0.8)),
    ]
    assert done.document["batch_norms"] == 4
    assert "may print" in done.err


def test_inspect_gives_reasons_for_other_adds(run: Cli) -> None:
    done = run("inspect", "timm:repvgg_a0", "--json")
    assert done.code == 0
    assert done.document["sites"] == []
    assert len(done.document["skipped"]) > 10
    assert all(skip["reason"] for skip in done.document["skipped"])


def test_inspect_shows_native_drops(run: Cli) -> None:
    words = ("inspect", "timm:resnet10t", "--final-survival", "0.7")
    plain = run(*words)
    native = run(*words, "--model-arg", "drop_path_rate=0.2")
    assert "native" not in plain.out
    assert re.search(r"survival +drop +native\n", native.out)
    assert re.search(r"layer1\.0 .* 0\.925 +0\.075 +-\n", native.out)  # the author drops none here
    assert re.search(r"layer4\.0 .* 0\.7 +0\.3 +0\.2\n", native.out)


def test_the_rule_may_count_the_chosen_sites_alone(run: Cli) -> None:
    words = ("--where", "blocks.1", "--rule", "linspace", "--final-survival", "0.6")
    drops = []
    for count in ("all", "chosen"):
        document = run("inspect", "net.py:Net", *words, "--count", count, "--json").document
        drops.append([site["drop"] for site in document["sites"]])
        assert ("over the chosen sites" in document["rule"]) == (count == "chosen")
    assert drops == [[None, pytest.approx(0.4)], [None, 0.0]]
    made = run("retrofit", "net.py:Net", *words, "--count", "chosen", "-o", "surgery", "--json")
    assert "survival 1," in made.document["changes"][0]["what"]


def test_single_rounds_the_rates(run: Cli) -> None:
    words = ("--model-arg", "depth=4", "--rule", "linspace", "--final-survival", "0.9", "--single")
    document = run("inspect", "net.py:Net", *words, "--json").document
    expected = torch.linspace(0, 0.1, len(document["sites"]))
    assert "single True" in document["rule"]
    assert [site["drop"] for site in document["sites"]] == pytest.approx(expected.tolist(), abs=0)


def test_inspect_shows_where_the_batch_is_if_not_in_front(run: Cli) -> None:
    assert "batch axis" not in run("inspect", "net.py:Net").out
    told = run("inspect", "net.py:Tokens").out
    assert re.search(r"survival +drop +batch axis\n", told)
    assert re.search(r"^ *1 .* 1\n *2 .* shared\n", told, re.MULTILINE)
    assert "batch axis shared: no axis of the branch holds the samples alone" in told
    sites = run("inspect", "net.py:Tokens", "--json").document["sites"]
    assert [site["batch_axis"] for site in sites] == [1, None]


def test_inputs_answer_questions_about_sizes(run: Cli) -> None:
    assert "pass example_inputs" in run("inspect", "net.py:Sized").err
    words = ("net.py:Sized", "--input", "3x8x8", "--json")
    assert len(run("inspect", *words).document["sites"]) == 2
    assert run("retrofit", *words, "-o", "surgery").code == 0


def test_inspect_tells_rule_and_stages(run: Cli) -> None:
    words = ("--rule", "per_stage", "--depths", "1,1,1,1", "--final-survival", "0.7")
    done = run("inspect", "timm:resnet10t", *words)
    assert "rule per_stage, final 0.7, depths 1,1,1,1, counted by block (L = 4)" in done.out
    assert "blocks by stage: layer1 1, layer2 1, layer3 1, layer4 1" in done.out
    assert re.findall(r"^ +\d .* ([\d.]+) +[\d.]+$", done.out, re.MULTILINE) == [
        "1", "0.9", "0.8", "0.7"
    ]  # fmt: skip


def test_inspect_and_retrofit_choose_the_same_sites(run: Cli) -> None:
    words = ("--where", "blocks.1", "--where", "blocks.3", "--model-arg", "depth=5")
    done = run("inspect", "net.py:Net", *words, "--json")
    sites = done.document["sites"]
    assert [s["survival"] for s in sites] == [
        None,
        pytest.approx(0.92),
        None,
        pytest.approx(0.84),
        None,
    ]
    assert done.document["skipped"] == []
    told = run("inspect", "net.py:Net", *words)
    assert len(re.findall(r"blocks\.[024] .* - +-\n", told.out)) == 3
    made = run("retrofit", "net.py:Net", *words, "-o", "surgery", "--json")
    assert [c["module"] for c in made.document["changes"]] == ["blocks.1", "blocks.3"]
    net = ds.load("surgery", load_model("net.py:Net", arguments={"depth": 5}).module)
    rates = [m.drop_prob for m in net.modules() if isinstance(m, ds.DropPath)]
    assert rates == pytest.approx([0.08, 0.16])


def test_include_brings_nested_and_linear_sites(run: Cli) -> None:
    kinds = [s["kind"] for s in run("inspect", "net.py:Unet", "--json").document["sites"]]
    assert kinds == ["identity"] * 3
    done = run("inspect", "net.py:Unet", "--include", "linear,nested")
    assert re.search(r"3 +\(root\) +add_2 +nested", done.out)
    assert "with linear,nested" in done.out
    made = run("retrofit", "net.py:Unet", "-o", "surgery", "--include", "nested", "--json")
    assert len(made.document["changes"]) == 4
    linear = run("inspect", "net.py:Mixed", "--include", "linear")
    assert len(re.findall(r" linear +0\.", linear.out)) == 12


def test_many_reasons_are_grouped(run: Cli) -> None:
    done = run("inspect", "net.py:Mixed")
    assert "13 left alone\n   12  linear branch: '…' is affine in '…'\n" in done.out
    assert re.search(r"\n +\(root\) add_1; \(root\) add_2; \(root\) add_3; …\n", done.out)
    assert re.search(r"\n    1  adds a number, not a branch\n +\(root\) add_13\n", done.out)
    every = run("inspect", "net.py:Mixed", "--all")
    assert every.out.count("linear branch: 'conv2d") == 0
    assert every.out.count("linear branch: 'mix_") == 12
    made = run("retrofit", "net.py:Mixed", "-o", "surgery")
    assert "12  InsertDropPath: linear branch: '…'" in made.out


@pytest.mark.parametrize(
    "words",
    [
        "inspect timm:vit_tiny_patch16_224 --model-arg depth=2",
        "inspect torchvision:swin_t --rule linspace --unit add",
        "inspect net.py:Mixed",
        "inspect net.py:Mixed --all",
        "retrofit net.py:Net -o surgery --where blocks.0",
        "slim net.py:Net",
        "export net.py:Net -o net.onnx --input 3x8x8",
    ],
)
def test_text_fits_the_terminal(run: Cli, monkeypatch: pytest.MonkeyPatch, words: str) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    done = run(*words.split())
    assert done.code == 0, done.err
    assert max(map(len, done.out.splitlines())) <= 80


def test_long_module_paths_are_folded_after_a_dot(
    run: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "64")
    done = run("inspect", "net.py:Deep")
    lines = done.out.splitlines()
    assert max(map(len, lines)) <= 64
    first = next(index for index, line in enumerate(lines) if line.startswith("    1"))
    assert lines[first].split()[1] == "a_stage_of_a_long_name."
    assert lines[first + 1].strip() == "another_of_a_long_name"


@pytest.mark.parametrize(("unit", "last"), [("block", 0.9), ("add", 0.95), ("position", 0.9)])
def test_inspect_counts_what_retrofit_counts(run: Cli, unit: str, last: float) -> None:
    options = ("--model-arg", "depth=1", "--model-arg", "img_size=32", "--final-survival", "0.9")
    done = run("inspect", "timm:vit_tiny_patch16_224", *options, "--unit", unit, "--json")
    first = done.document["sites"][0]
    assert first["survival"] == pytest.approx(last)


# --- retrofit, slim ------------------------------------------------------------------------------


def test_retrofit_saves_what_load_reads(run: Cli) -> None:
    done = run("retrofit", "net.py:Net", "-o", "surgery", "--final-survival", "0.6")
    assert done.code == 0
    assert "2 changes" in done.out
    assert "2 drop paths" in done.out
    model = network()
    net = ds.load("surgery", model)
    rates = [m.drop_prob for m in net.modules() if isinstance(m, ds.DropPath)]
    assert rates == pytest.approx([0.2, 0.4])
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(net.eval()(x), model(x))


def test_retrofit_options_reach_the_pass(run: Cli) -> None:
    done = run(
        *("retrofit", "net.py:Net", "-o", "surgery", "--where", "blocks.1"),
        *("--rule", "constant", "--final-survival", "0.9", "--mode", "batch", "--json"),
    )
    assert [c["module"] for c in done.document["changes"]] == ["blocks.1"]
    assert done.document["drop_paths"] == 1
    (layer,) = [m for m in ds.load("surgery", network()).modules() if isinstance(m, ds.DropPath)]
    assert (layer.mode, layer.drop_prob) == ("batch", pytest.approx(0.1))


def test_a_surgery_is_replaced_by_a_new_one(run: Cli) -> None:
    assert run("retrofit", "net.py:Net", "-o", "surgery", "--final-survival", "0.9").code == 0
    assert run("retrofit", "net.py:Net", "-o", "surgery", "--final-survival", "0.6").code == 0
    net = ds.load("surgery", network())
    assert max(m.drop_prob for m in net.modules() if isinstance(m, ds.DropPath)) == pytest.approx(
        0.4
    )


def test_slim_reports_and_saves_only_when_asked(run: Cli, tmp_path: Path) -> None:
    before = sorted(tmp_path.iterdir())
    done = run("slim", "net.py:Net", "--json")
    assert [path for path in sorted(tmp_path.iterdir()) if path.name != "__pycache__"] == before
    assert (done.document["batch_norms"], done.document["dropouts"]) == (0, 0)
    assert done.document["directory"] is None
    assert {c["pass"] for c in done.document["changes"]} == {"ConvertDropout", "FoldAffine"}
    assert run("slim", "net.py:Net", "-o", "slim").code == 0
    x = torch.randn(2, 3, 8, 8)
    model = network()
    torch.testing.assert_close(ds.load("slim", model)(x), model(x))


def test_inspect_slim_tells_what_slimming_brings(run: Cli) -> None:
    done = run("inspect", "net.py:Net", "--slim", "--input", "3x8x8", "--json")
    before, after = done.document["before"], done.document["after"]
    assert (before["batch_norms"], after["batch_norms"]) == (4, 0)
    assert after["nodes"] < before["nodes"]
    assert done.document["batch_norms_left"] == []
    text = run("inspect", "net.py:Net", "--slim", "--input", "3x8x8", "--batch", "2").out
    assert re.search(r"BatchNorms +4 +0 +0.000", text)


# --- export, verify ------------------------------------------------------------------------------


def test_export_and_verify(run: Cli, tmp_path: Path) -> None:
    done = run("export", "net.py:Net", "-o", "net.onnx", "--input", "3x8x8")
    assert done.code == 0, done.err
    assert "0 BatchNorms, 0 dropouts" in done.out
    shape = onnx.load("net.onnx").graph.input[0].type.tensor_type.shape.dim
    assert shape[0].dim_param
    assert not shape[0].dim_value
    assert run("verify", "net.py:Net", "net.onnx").code == 0
    other = run("verify", "net.py:Net", "net.onnx", "--json", "--model-arg", "depth=1")
    assert other.code == 1
    assert other.document["ok"] is False
    leftovers = {path.name for path in tmp_path.iterdir()} - {"net.py", "net.onnx", "__pycache__"}
    assert not leftovers


def test_export_options(run: Cli) -> None:
    done = run(
        *("export", "net.py:Net", "-o", "net.onnx", "--input", "3x8x8", "--static-batch"),
        *("--opset", "19", "--no-slim", "--no-verify", "--json"),
    )
    assert done.document["verdict"] is None
    assert done.document["bytes"] == Path("net.onnx").stat().st_size
    model = onnx.load("net.onnx")
    assert model.opset_import[0].version == 19
    assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_value == 1


@pytest.mark.parametrize("broken", ["surgery", "export"])
def test_export_says_when_the_file_is_not_the_network_and_where(
    run: Cli, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    real, export = cli.slimmed, ds.export_onnx

    def bent(net: torch.nn.Module) -> torch.nn.Module:
        net = copy.deepcopy(net)
        net.head.bias = torch.nn.Parameter(net.head.bias + 1e-3)
        return net

    def wrong_surgery(model: torch.nn.Module, **options: Any) -> Result:
        result = real(model, **options)
        return dataclasses.replace(result, module=bent(result.module))

    def wrong_export(net: torch.nn.Module, *args: Any, **options: Any) -> Path:
        return export(bent(net), *args, **options)

    if broken == "surgery":
        monkeypatch.setattr(cli, "slimmed", wrong_surgery)
    else:
        monkeypatch.setattr(ds, "export_onnx", wrong_export)
    words = ("export", "net.py:Net", "-o", "net.onnx", "--input", "3x8x8")
    done = run(*words, "--json")
    assert done.code == 1
    verdict, place = done.document["verdict"], done.document["place"]
    assert verdict["ok"] is False
    output = verdict["outputs"][0]
    algebra = output["algebra"]
    assert (algebra["error"] > algebra["limit"]) == (broken == "surgery")
    assert place["module"] == "head"
    done = run(*words)
    assert done.code == 1
    assert "first differs at head (" in done.out


def test_export_has_two_budgets_where_there_was_surgery(run: Cli) -> None:
    words = ("export", "net.py:Net", "-o", "net.onnx", "--input", "3x8x8")
    assert "algebra of output" in run(*words).out
    assert "algebra of output" not in run(*words, "--no-slim").out


def test_export_of_several_inputs(run: Cli) -> None:
    done = run(
        *("export", "net.py:two_inputs", "-o", "two.onnx"),
        *("--input", "3x8x8", "--input", "2x8x8"),
    )
    assert done.code == 0, done.err + done.out


def test_surgery_goes_through_export_and_verify(run: Cli) -> None:
    net = ds.retrofit(network(), final_survival=0.5)
    with torch.no_grad():
        net.head.weight.add_(1.0)  # "fine-tuned"
    ds.save(net, "surgery")
    words = ("net.py:Net", "--surgery", "surgery")
    done = run("export", *words, "-o", "net.onnx", "--input", "3x8x8", "--json")
    assert done.code == 0, done.err
    assert done.document["drop_paths"] == 0
    assert run("verify", "net.py:Net", "net.onnx", "--surgery", "surgery").code == 0
    assert run("verify", "net.py:Net", "net.onnx").code == 1
    assert "2 drop paths" in run("inspect", *words).out


def test_verify_on_inputs_of_the_user(run: Cli) -> None:
    assert run("export", "net.py:Net", "-o", "net.onnx", "--input", "3x8x8").code == 0
    x = np.random.default_rng(0).normal(size=(3, 3, 8, 8)).astype(np.float32)
    np.save("x.npy", x)
    np.savez("x.npz", x=x)
    for name in ("x.npy", "x.npz"):
        assert run("verify", "net.py:Net", "net.onnx", "--input-file", name).code == 0
    Path("folder").mkdir()
    np.save("folder/one.npy", x)
    done = run("verify", "net.py:Net", "net.onnx", "--input-file", "folder", "--figures")
    assert done.code == 0
    assert "yours one.npy" in done.out
    assert "SQNR dB" in done.out
    np.save("wrong.npy", x[:, :2])
    wrong = run("verify", "net.py:Net", "net.onnx", "--input-file", "wrong.npy")
    assert wrong.code == 2
    assert "Traceback" not in wrong.err


def test_verify_says_what_it_could_not_do(run: Cli) -> None:
    import onnxruntime

    assert run("export", "net.py:Net", "-o", "net.onnx", "--input", "3x8x8").code == 0
    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        missing = run("verify", "net.py:Net", "net.onnx", "--provider", "cuda")
        assert missing.code == 2
        assert "this onnxruntime has no CUDAExecutionProvider" in missing.err
    # Nothing draws: the moments are those of single runs, and must be the same but for rounding.
    done = run("verify", "net.py:Net", "net.onnx", "--stochastic", "--seeds", "1")
    assert done.code == 0, done.err
    assert "standard errors" in done.out
    model = onnx.load("net.onnx")
    noise = onnx.helper.make_node("RandomNormalLike", ["x"], ["noise"], name="here")
    model.graph.node.append(noise)
    onnx.save(model, "net.onnx")
    refused = run("verify", "net.py:Net", "net.onnx")
    assert refused.code == 2
    assert "the file draws random numbers, in 1 node" in refused.err
    assert "here (RandomNormalLike)" in refused.err


def test_hub_models_know_their_input(run: Cli) -> None:
    done = run("export", "torchvision:resnet18", "-o", "r18.onnx", "--no-verify", "--json")
    assert done.code == 0, done.err
    shape = onnx.load("r18.onnx").graph.input[0].type.tensor_type.shape.dim
    assert [d.dim_value for d in shape][1:] == [3, 224, 224]


# --- wrong use -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("inspect nowhere.py:make", "there is no file nowhere.py"),
        ("inspect torchvision:resnet51", "did you mean resnet50"),
        ("inspect net.py:Nte", "has no 'Nte'; did you mean Net"),
        ("inspect net.py:Net --weights none.pt", "there is no weights file none.pt"),
        ("inspect net.py:Net --weights net.py", "holds more than tensors|cannot be read"),
        ("inspect net.py:Net --surgery nowhere", "nowhere"),
        ("inspect net.py:Net --model-arg depth", "'depth' is not KEY=VALUE"),
        ("inspect net.py:Net --model-arg deep=2", "cannot be built: TypeError"),
        (
            "inspect net.py:Net --rule per_stage",
            "number of blocks in each stage(.|\n)*--depths 3,4",
        ),
        ("inspect net.py:Net --single", "--single says nothing(.|\n)*--rule linspace"),
        ("inspect net.py:Net --depths 1,1", "--depths says nothing(.|\n)*--rule per_stage"),
        ("inspect net.py:Net --rule per_stage --depths 1;1", "'1;1' are not depths"),
        ("inspect net.py:Net --rule per_stage --depths 2,3", "5 blocks and the network has 2"),
        ("retrofit net.py:Net -o out --rule per_stage --depths 0,2", "numbers of blocks"),
        ("inspect net.py:Net --include nesting", "include names 'nesting'"),
        ("inspect net.py:Net --where layer9.*", "matches none of the 2 residual sites"),
        ("inspect net.py:Net --svg nowhere/net.svg", "nowhere/net.svg cannot be written"),
        ("inspect net.py:Net --png .", "cannot be written"),
        ("inspect net.py:Net --rule cubic", "'--rule': 'cubic' is not one of 'linear', "),
        (
            "inspect net.py:Net --final-survival 1.5",
            r"'--final-survival': .*less than or equal to 1\n",
        ),
        ("inspect net.py:Net --final-survival much", "'--final-survival': .*valid number"),
        ("inspect net.py:Untraceable", "Untraceable|x.sum|net.py"),
        ("inspect", "Missing argument 'MODEL'(.|\n)*dropsurgery inspect --help"),
        ("inspect net.py:Net --jsn", "No such option: --jsn"),
        ("dissect net.py:Net", "No such command 'dissect'"),
        ("retrofit net.py:Net", "Missing option '--output'"),
        ("retrofit net.py:Net -o out --where layer9.*", "matches none of the 2 residual sites"),
        ("retrofit net.py:Net -o net.py", "net.py"),
        ("retrofit net.py:Net -o net.py/sub", "net.py"),
        ("slim net.py:Net -o net.py", "net.py"),
        ("export net.py:Net -o net.onnx", "shape of the input of net.py:Net is not known"),
        ("export net.py:Net -o net.onnx --input 3,8,8", "'3,8,8' is not a shape"),
        ("export net.py:Net -o net.onnx --input 0x8", "'0x8' is not a shape"),
        ("export net.py:Net -o net.onnx --input 4x8x8", "example inputs do not fit the network"),
        (
            "export net.py:Net -o net.onnx --input 3x8x8 --input 3",
            "does not accept the example|takes",
        ),
        ("export net.py:Net -o nowhere/net.onnx --input 3x8x8", "folder does not exist"),
        ("export net.py:Net -o . --input 3x8x8", "path is a folder"),
        ("export net.py:Net -o net.onnx --input 3x8x8 --opset 99", "opset"),
        ("export net.py:Net -o net.onnx --input 3x8x8 --channel-maps bn", "channel_maps"),
        ("verify net.py:Net none.onnx", "none.onnx"),
        ("verify net.py:Net net.py", "net.py"),
        ("verify net.py:Net none.onnx --seeds 0", "greater than or equal to 1"),
        ("verify net.py:Net none.onnx --provider tpu", "tpu"),
        ("verify net.py:Net none.onnx --input-file none.npy", "none.npy"),
        ("demo --epochs 0", "greater than or equal to 1"),
        ("demo --out net.py", "net.py cannot be written"),
    ],
)
def test_wrong_use_is_one_clear_paragraph(
    run: Cli, tmp_path: Path, words: str, message: str
) -> None:
    before = {path.name for path in tmp_path.iterdir()}
    done = run(*words.split())
    assert done.code == 2, done.out
    assert done.out == ""
    text = done.err.removeprefix("a model file may print\n")
    assert re.search(message, text), text
    assert text.startswith("dropsurgery: ")
    assert "Traceback" not in text
    assert len(text.splitlines()) <= 4
    after = {path.name for path in tmp_path.iterdir()} - {"__pycache__"}
    assert after == before
    assert (tmp_path / "net.py").read_text() == NETWORK


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize(
    "words",
    [
        "export net.py:Net --input 3x8x8 -o /proc/net.onnx",  # not even root may write there
        "retrofit net.py:Net -o /proc/surgery",
        "slim net.py:Net -o /proc/surgery",
        "demo --out /proc/demo",
    ],
)
def test_a_folder_that_cannot_be_written(run: Cli, words: str) -> None:
    done = run(*words.split())
    assert (done.code, done.out) == (2, "")
    assert re.search(r"cannot be written: .*(.|\n)*/proc|/proc/demo cannot be written", done.err)


def test_pickled_inputs_are_refused(run: Cli) -> None:
    assert run("export", "net.py:Net", "-o", "net.onnx", "--input", "3x8x8").code == 0
    np.save("x.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    done = run("verify", "net.py:Net", "net.onnx", "--input-file", "x.npy")
    assert done.code == 2
    assert "the inputs cannot be read" in done.err


def test_a_failed_export_leaves_the_old_file(run: Cli) -> None:
    Path("net.onnx").write_bytes(b"precious")
    assert run("export", "net.py:Net", "-o", "net.onnx", "--input", "4x8x8").code == 2
    assert Path("net.onnx").read_bytes() == b"precious"


def test_an_unexpected_error_is_told_in_one_paragraph(
    run: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object, **__: object) -> None:
        raise ZeroDivisionError("division by zero")

    monkeypatch.setattr(inspection, "find_residuals", fails)
    done = run("inspect", "net.py:Net")
    assert done.code == 2
    assert "ZeroDivisionError: division by zero" in done.err
    assert "Traceback" not in done.err
    monkeypatch.setenv("DROPSURGERY_TRACEBACK", "1")
    assert "Traceback" in run("inspect", "net.py:Net").err


def test_an_interrupt_that_someone_turned_into_an_error(
    run: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    def swallows(*_: object, **__: object) -> None:
        try:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
        except KeyboardInterrupt:
            raise RuntimeError("a callback failed") from None

    monkeypatch.setattr(inspection, "find_residuals", swallows)
    done = run("inspect", "net.py:Net")
    assert done.code == 130
    assert "interrupted" in done.err
    assert "callback" not in done.err


def test_an_interrupt_during_verification_says_what_is_there(
    run: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stops(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(ds, "verify", stops)
    done = run("export", "net.py:Net", "-o", "net.onnx", "--input", "3x8x8")
    assert (done.code, done.out) == (130, "")
    assert done.err.endswith("dropsurgery: interrupted; net.onnx was written and not verified\n")
    assert Path("net.onnx").exists()


# --- as a program --------------------------------------------------------------------------------


def program(*words: str, **options: Any) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "dropsurgery", *words]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, **{**pipes, **options})


def test_version_and_help(run: Cli) -> None:
    assert re.match(r"dropsurgery \d+\.\d+\.\d+, torch \d", run("--version").out)
    overview = run("--help")
    assert overview.code == 0
    for command in ("inspect", "retrofit", "slim", "export", "verify", "demo"):
        assert command in overview.out
        assert f"Example: dropsurgery {command}" in " ".join(run(command, "--help").out.split())


def test_the_module_runs_as_a_program() -> None:
    process = program("inspect", "torchvision:resnet51")
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (2, "")
    assert err.startswith("dropsurgery: torchvision has no model 'resnet51'; did you mean resnet50")


@pytest.mark.parametrize("old", [None, b"precious"])
@pytest.mark.parametrize(
    ("number", "code", "says"),
    [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "")],
)
def test_an_interrupt_during_export(
    tmp_path: Path, number: int, code: int, says: str, old: bytes | None
) -> None:
    (tmp_path / "net.py").write_text(NETWORK)
    if old is not None:
        (tmp_path / "slow.onnx").write_bytes(old)
    marker = tmp_path / "marker"
    process = program(
        *("export", "net.py:Slow", "-o", "slow.onnx", "--input", "3x8x8", "--no-slim"),
        cwd=tmp_path,
        env={**os.environ, "MARKER": str(marker)},
    )
    deadline = time.monotonic() + 60
    while not marker.exists() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.05)
    time.sleep(0.2)
    process.send_signal(number)
    out, err = process.communicate(timeout=30)
    assert process.returncode == code, err
    assert out == ""
    assert "Traceback" not in err
    assert says in err
    left = {path.name for path in tmp_path.iterdir()} - {"net.py", "marker", "__pycache__"}
    assert left == (set() if old is None else {"slow.onnx"})
    if old is not None:
        assert (tmp_path / "slow.onnx").read_bytes() == old


def test_a_reader_that_stops_early_is_no_error() -> None:
    process = program("inspect", "torchvision:resnet18")
    assert process.stdout is not None
    process.stdout.close()
    process.wait(timeout=60)
    assert process.stderr is not None
    assert process.stderr.read() == ""
    process.stderr.close()
    assert process.returncode == 0


def test_what_dropping_saves_is_told(run: Cli) -> None:
    shared = ("net.py:Net", "--mode", "subset", "--batch", "16", "--input", "3x8x8")
    done = run("inspect", *shared, "--final-survival", "0.5", "--json")
    found = done.document["compute"]
    assert found["batch"] == 16
    assert [site["run"] for site in found["sites"]] == [0.75, 0.5]
    assert 0.6 < found["expected"] / found["total"] < 0.75
    text = run("retrofit", *shared, "-o", "surgery").out
    assert "2 branches, batch 16" in text
    assert "% saved)" in text
    assert Path("surgery/surgery.json").exists()
    assert "the shape of the input of net.py:Net is not known" in run("inspect", *shared[:5]).err
