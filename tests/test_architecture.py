"""The rules of the house: imports point one way, and importing the package is light."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

import dropsurgery as ds

PACKAGE = Path(ds.__file__).parent

# Each may import what stands before it, and its own siblings.
LAYERS = [
    {"errors", "tables"},
    {"survival", "ramps"},
    {"layers"},
    {"graph"},
    {"passes"},
    {"compute", "distributed", "monte_carlo", "rates", "recalibrate", "scale"},
    {"schedule", "store"},
    {"variance_shift"},
    {"export", "onnx_channel_maps", "onnx_random", "onnx_reader", "onnx_structure", "onnx_writer"},
    {"verify"},
    {"half_precision", "testing"},
    {"surgery"},
    {"digits", "models", "report", "inspection", "provenance", "skeleton", "slimming"},
    {"demo", "page"},
    {"cli", "cli_options", "cli_output", "cli_report", "__main__"},
]


def imports(path: Path) -> set[str]:
    """Return the parts of dropsurgery that a file imports, at the top or inside functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module:
            if node.module == "dropsurgery":
                names = [f"dropsurgery.{alias.name}" for alias in node.names]
            else:
                names = [node.module]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        found |= {name.split(".")[1] for name in names if name.startswith("dropsurgery.")}
    return found


def test_imports_point_one_way() -> None:
    level = {name: index for index, names in enumerate(LAYERS) for name in names}
    files = [path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py"]
    assert len(files) > 20
    for path in files:
        part = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        assert part in level, f"{part} has no place in the order of imports"
        for other in imports(path) - {"__version__"}:
            assert level[other] <= level[part], f"{path} imports {other}"


def test_importing_the_package_is_light() -> None:
    heavy = [
        "onnx",
        "onnxruntime",
        "onnxscript",
        "torchvision",
        "timm",
        "rich",
        "typer",
        "matplotlib",
        "jinja2",
    ]
    code = f"import sys, dropsurgery; print([m for m in {heavy} if m in sys.modules])"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"


def test_public_names_are_documented() -> None:
    for name in ds.__all__:
        assert getattr(ds, name).__doc__, name


def test_the_before_and_after_in_the_package_docstring_is_what_happens() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(8, 8, 3, padding=1)
            self.norm = nn.BatchNorm2d(8)

        def forward(self, x: Tensor) -> Tensor:
            return x + torch.relu(self.norm(self.conv(x)))

    text = ds.__doc__ or ""
    net = ds.retrofit(Block(), final_survival=0.5)
    for module in (ds.trace(Block()), net, ds.slim(net)):
        code = "\n".join(f"    {line}".rstrip() for line in module.code.strip().splitlines())
        assert code in text
