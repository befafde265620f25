from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file, save_model
from torch import nn

from dropsurgery import models
from dropsurgery.errors import ModelLoadError
from dropsurgery.models import load_model, load_weights

FACTORY = """
from __future__ import annotations
from dataclasses import dataclass
import torch
from torch import nn
import neighbour

@dataclass
class Config:
    width: int = 4

def make(width=4, bias=True):
    conv = nn.Conv2d(3, Config(width).width, 3, bias=bias)
    return nn.Sequential(conv, nn.Dropout(neighbour.RATE))

class Net(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(2, 2))

net = nn.Linear(2, 3)
not_callable = 3

def gives_a_tensor():
    return torch.zeros(1)

def raises():
    raise ValueError("no weights today")

def stops():
    raise SystemExit(7)
"""


@pytest.fixture
def factory(tmp_path: Path) -> Path:
    (tmp_path / "neighbour.py").write_text("RATE = 0.5\n")
    path = tmp_path / "net.py"
    path.write_text(FACTORY)
    return path


# --- torchvision's import ------------------------------------------------------------------------


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)


def test_import_declares_only_after_a_failure() -> None:
    done = run(
        "from dropsurgery import models\n"
        "import importlib, types, sys\n"
        "real = importlib.import_module\n"
        "fake = types.ModuleType('torchvision')\n"
        "importlib.import_module = lambda name: fake\n"
        "assert models.import_torchvision() is fake\n"
        "assert models._declared == []\n"
        "print('untouched')"
    )
    assert done.stdout.strip() == "untouched", done.stderr


def test_import_declares_only_what_is_missing() -> None:
    done = run(
        "import torch\n"
        "from dropsurgery import models\n"
        "own = torch.library.Library('torchvision', 'FRAGMENT')\n"
        "own.define(models._SCHEMAS['nms'])\n"
        "a = models.import_torchvision(); b = models.import_torchvision()\n"
        "assert a is b\n"
        "import torchvision; assert torchvision is a\n"
        "print(len(models._declared))"
    )
    assert done.returncode == 0, done.stderr  # a second definition of nms would have raised
    assert done.stdout.strip() in {"0", "1"}


def test_import_after_a_failed_import_by_someone_else() -> None:
    done = run(
        "try:\n    import torchvision\nexcept RuntimeError: pass\n"
        "from dropsurgery import models\n"
        "timm = models.import_timm()\n"
        "print(timm.create_model('resnet18', num_classes=3).fc.out_features)"
    )
    assert done.stdout.strip() == "3", done.stderr


def test_another_failure_is_not_papered_over(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(name: str) -> None:
        raise RuntimeError("operator torchvision::roi_align does not exist")

    monkeypatch.setattr(models.importlib, "import_module", fails)
    with pytest.raises(ModelLoadError, match="torchvision cannot be imported: operator"):
        models.import_torchvision()


def test_a_package_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(name: str) -> None:
        raise ModuleNotFoundError(f"No module named '{name}'", name=name)

    monkeypatch.setattr(models.importlib, "import_module", fails)
    with pytest.raises(ModelLoadError, match=r"torchvision is not installed(.|\n)*pip install"):
        load_model("torchvision:resnet18")


# --- names ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options", "shape"),
    [
        ("torchvision:mnasnet0_5", {}, (3, 224, 224)),
        ("torchvision:inception_v3", {"aux_logits": False}, (3, 299, 299)),
        ("torchvision:vit_b_32", {"image_size": 64}, (3, 64, 64)),
        ("torchvision:r3d_18", {}, (3, 16, 112, 112)),
        ("timm:resnet10t", {}, (3, 176, 176)),
        ("timm:vit_tiny_patch16_224", {"img_size": 64, "in_chans": 1}, (1, 64, 64)),
        ("timm:efficientnet_b1.ft_in1k", {}, (3, 224, 224)),
    ],
)
def test_hub_models_and_their_input(
    name: str, options: dict[str, object], shape: tuple[int, ...]
) -> None:
    loaded = load_model(name, arguments=options)
    assert loaded.input_shape == shape
    assert not any(module.training for module in loaded.module.modules())


def test_the_same_name_gives_the_same_network_and_leaves_the_generator_alone() -> None:
    state = torch.get_rng_state()
    first = load_model("torchvision:resnet18").module.state_dict()
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(1)
    second = load_model("torchvision:resnet18").module.state_dict()
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_constructor_arguments_reach_the_model() -> None:
    module = load_model("timm:resnet18", arguments={"drop_path_rate": 0.2, "num_classes": 5}).module
    assert module.fc.out_features == 5
    assert max(getattr(m, "drop_prob", 0) or 0 for m in module.modules()) == pytest.approx(0.2)
    assert (
        load_model("torchvision:resnet18", arguments={"num_classes": 7}).module.fc.out_features == 7
    )


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("torchvision:resnet51", "torchvision has no model 'resnet51'; did you mean resnet50"),
        ("timm:resnet51", "timm has no model 'resnet51'; did you mean .*resnet50"),
        ("timm:zzzzzzzz", "timm has no model 'zzzzzzzz'\n"),
        ("resnet18", "'resnet18' does not say where.*\n.*did you mean torchvision:resnet18"),
        ("torchvision:", "'torchvision:' does not say where"),
        ("", "'' does not say where"),
        ("hub:resnet18", "'hub:resnet18' does not say where"),
        ("net.py", "'net.py' names no factory\n.*net.py:FACTORY"),
        ("net.py:", "'net.py:' names no factory\n.*net.py:FACTORY"),
        ("nowhere/net.py:make", "there is no file nowhere/net.py"),
    ],
)
def test_unknown_names(name: str, message: str) -> None:
    with pytest.raises(ModelLoadError, match=message):
        load_model(name)


@pytest.mark.parametrize("name", ["torchvision:resnet18", "timm:resnet18"])
def test_arguments_that_the_constructor_refuses(name: str) -> None:
    with pytest.raises(ModelLoadError, match=f"{name} cannot be built: TypeError: .*'widht'"):
        load_model(name, arguments={"widht": 3})


# --- FILE.py:FACTORY -----------------------------------------------------------------------------


def test_factories(factory: Path) -> None:
    assert load_model(f"{factory}:make", arguments={"width": 6}).module[0].out_channels == 6
    assert isinstance(load_model(f"{factory}:Net").module, nn.Sequential)
    assert load_model(f"{factory}:net").module.out_features == 3
    assert load_model(f"{factory}:make").input_shape is None
    assert str(factory.parent) not in sys.path


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("maek", "has no 'maek'; did you mean make"),
        ("not_callable", "is int, which cannot be called"),
        ("gives_a_tensor", r"gave Tensor, not a torch\.nn\.Module"),
        ("raises", "cannot be built: ValueError: no weights today"),
        ("stops", "cannot be built: SystemExit: 7"),
    ],
)
def test_bad_factories(factory: Path, name: str, message: str) -> None:
    with pytest.raises(ModelLoadError, match=message):
        load_model(f"{factory}:{name}")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = 1\nimport no_such_package\n", "ModuleNotFoundError: .*no_such_package(.|\n)*line 2"),
        ("def make(:\n", "SyntaxError: (.|\n)*line 1"),
        ("x = 1\n\nraise SystemExit('bye')\n", "SystemExit: bye(.|\n)*line 3"),
    ],
)
def test_files_that_fail(
    tmp_path: Path, text: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("net.py").write_text(text)
    with pytest.raises(ModelLoadError, match=message):
        load_model("net.py:make")


# --- weights -------------------------------------------------------------------------------------


def small() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2))


@pytest.mark.parametrize("form", ["safetensors", "pt", "pth", "wrapped", "parallel"])
def test_every_form_of_weights_file(tmp_path: Path, form: str) -> None:
    source, target = small(), small()
    state = source.state_dict()
    path = tmp_path / f"weights.{'pt' if form in ('wrapped', 'parallel') else form}"
    if form == "safetensors":
        save_file(state, path)
    elif form == "wrapped":
        torch.save({"epoch": 3, "state_dict": state}, path)
    elif form == "parallel":
        torch.save({f"module.{key}": value for key, value in state.items()}, path)
    else:
        torch.save(state, path)
    load_weights(target, path)
    assert all(torch.equal(target.state_dict()[key], state[key]) for key in state)


def test_tied_weights_are_stored_once(tmp_path: Path) -> None:
    def tied() -> nn.Sequential:
        net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
        net[1].weight = net[0].weight
        return net

    source, target = tied(), tied()
    save_model(source, tmp_path / "tied.safetensors")
    load_weights(target, tmp_path / "tied.safetensors")
    assert torch.equal(target[1].weight, source[0].weight)


def test_weights_through_the_model_name(tmp_path: Path) -> None:
    torch.manual_seed(5)
    source = torchvision.models.resnet18(num_classes=4)
    save_file(source.state_dict(), tmp_path / "w.safetensors")
    loaded = load_model(
        "torchvision:resnet18",
        weights=str(tmp_path / "w.safetensors"),
        arguments={"num_classes": 4},
    )
    assert torch.equal(loaded.module.fc.weight, source.fc.weight)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("3.bias"), "3.bias is missing in the file"),
        (lambda s: s.update(extra=torch.zeros(1)), "extra is not in the model"),
        (
            lambda s: s.update({"0.weight": torch.zeros(4, 1, 3, 3)}),
            r"0.weight is \(4, 1, 3, 3\) in the file and \(4, 3, 3, 3\) in the model",
        ),
        (
            lambda s: s.clear() or s.update({f"k{i}": torch.zeros(1) for i in range(9)}),
            "and 1[0-9] more",
        ),
    ],
)
def test_weights_that_do_not_fit(tmp_path: Path, change: object, message: str) -> None:
    state = dict(small().state_dict())
    change(state)  # type: ignore[operator]
    torch.save(state, tmp_path / "w.pt")
    with pytest.raises(ModelLoadError, match=message):
        load_weights(small(), tmp_path / "w.pt")


def test_a_shape_mismatch_changes_nothing(tmp_path: Path) -> None:
    state = dict(small().state_dict())
    state["3.weight"] = torch.zeros(5, 5)
    torch.save(state, tmp_path / "w.pt")
    net = small()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    with pytest.raises(ModelLoadError):
        load_weights(net, tmp_path / "w.pt")
    assert all(torch.equal(net.state_dict()[key], before[key]) for key in before)


class Trap:
    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (Path("opened"),))


def test_a_pickle_runs_no_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"weight": Trap()}, tmp_path / "w.pt")
    with pytest.raises(ModelLoadError, match="more than tensors, and reading it could run code"):
        load_weights(small(), tmp_path / "w.pt")
    assert not (tmp_path / "opened").exists()


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
@pytest.mark.parametrize("content", [b"", b"not weights at all", b"PK\x03\x04broken"])
def test_garbage_files(tmp_path: Path, suffix: str, content: bytes) -> None:
    path = tmp_path / f"w.{suffix}"
    path.write_bytes(content)
    with pytest.raises(ModelLoadError, match=r"(cannot be read|more than tensors)(.|\n)*w\."):
        load_weights(small(), path)


@pytest.mark.parametrize("content", [{}, [1, 2], {"epoch": 3}, torch.zeros(3)])
def test_files_without_a_state_dict(tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / "w.pt")
    with pytest.raises(ModelLoadError, match="holds no state dict"):
        load_weights(small(), tmp_path / "w.pt")


def test_weights_that_are_not_there(tmp_path: Path, factory: Path) -> None:
    with pytest.raises(ModelLoadError, match=r"there is no weights file .*none\.pt"):
        load_model("torchvision:resnet18", weights=str(tmp_path / "none.pt"))
    with pytest.raises(ModelLoadError, match=r"'DEFAULT' is not a weights file, and .* has no hub"):
        load_model(f"{factory}:make", weights="DEFAULT")
    with pytest.raises(ModelLoadError, match=r"no weights 'V9'(.|\n)*IMAGENET1K_V1"):
        load_model("torchvision:resnet18", weights="V9")
    with pytest.raises(ModelLoadError, match=r"no weights 'nope'(.|\n)*a1_in1k"):
        load_model("timm:resnet18", weights="nope")
    with pytest.raises(ModelLoadError, match=r"no weights 'nope'(.|\n)*a1_in1k"):
        load_model("timm:resnet18.nope")


# --- the hub, without a network ------------------------------------------------------------------


@pytest.mark.parametrize("weights", ["IMAGENET1K_V1", "DEFAULT", "ResNet18_Weights.IMAGENET1K_V1"])
def test_torchvision_weights_come_from_its_enum(
    weights: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(8)
    published = torchvision.models.resnet18().state_dict()
    asked: list[str] = []

    def fetch(url: str, *args: object, **kwargs: object) -> dict[str, torch.Tensor]:
        asked.append(url)
        return published

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", fetch)
    module = load_model("torchvision:resnet18", weights=weights).module
    assert torch.equal(module.fc.weight, published["fc.weight"])
    assert len(asked) == 1
    assert "resnet18" in asked[0]


def test_nothing_is_downloaded_unasked(monkeypatch: pytest.MonkeyPatch) -> None:
    def fetch(*args: object, **kwargs: object) -> None:
        raise OSError("Name or service not known")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", fetch)
    loaded = load_model("torchvision:lraspp_mobilenet_v3_large")  # its backbone has weights
    assert loaded.input_shape == (3, 224, 224)


def test_torchvision_without_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def fetch(*args: object, **kwargs: object) -> None:
        raise OSError("Name or service not known")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", fetch)
    with pytest.raises(ModelLoadError, match="weights DEFAULT of torchvision:resnet18 could not"):
        load_model("torchvision:resnet18", weights="DEFAULT")


@pytest.mark.parametrize(
    ("tag", "full"), [("a1_in1k", "resnet18.a1_in1k"), ("DEFAULT", "resnet18")]
)
def test_timm_weights_are_asked_for_by_tag(
    tag: str, full: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, bool]] = []
    real = timm.create_model

    def create(name: str, *, pretrained: bool, **options: object) -> nn.Module:
        asked.append((name, pretrained))
        return real(name, pretrained=False, **options)

    monkeypatch.setattr(timm, "create_model", create)
    load_model("timm:resnet18", weights=tag)
    assert asked == [(full, True)]


def test_timm_without_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelLoadError, match="weights a1_in1k of timm:resnet18 could not be fetch"):
        load_model("timm:resnet18", weights="a1_in1k")
