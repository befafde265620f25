"""The error of a slimmed network in half precision, beside that of the network as it was.

Both in float16 and bfloat16, against the original in float64 with the same half-precision
parameters, which are exact there. Networks have random weights and BatchNorm statistics taken from
the data (as training leaves them), so that activations keep their size. Each model has three seeds
of weights and inputs; its figure is the geometric mean of the three ratios of root-mean-square
errors, slimmed over original.

    python -m benchmarks.half_precision [--models NAME ...] [--markdown docs/half_precision.md]
"""

from __future__ import annotations

import argparse
import copy
import math
import platform
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

import dropsurgery as ds
from benchmarks.markdown import table
from dropsurgery.models import import_timm

MODELS = {
    "resnet18": 64, "resnet50": 64, "res2net50d": 64, "regnety_002": 64, "densenet121": 64,
    "resnetv2_50": 64, "mobilenetv2_050": 64, "mobilenetv3_small_050": 64, "efficientnet_b0": 64,
    "repvgg_a0": 64, "mobileone_s0": 64, "fastvit_t8": 128, "levit_128s": 224,
    "visformer_tiny": 224, "xception41p": 96, "convmixer_768_32": 56, "hrnet_w18_small": 64,
    "ghostnet_050": 64, "dla34": 64, "convnext_atto": 64,
}  # fmt: skip
DTYPES = (torch.float16, torch.bfloat16)
SEEDS = (0, 1, 2)
BATCH = 8


def calibrated(name: str, size: int, seed: int) -> tuple[nn.Module, Tensor]:
    """Return a network whose BatchNorms have the statistics of data, and inputs."""
    torch.manual_seed(seed)
    model: nn.Module = import_timm().create_model(name)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.reset_running_stats()
            module.momentum = None  # a plain average of what it sees
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.2, 0.2)
    with torch.no_grad():
        model.train()
        for _ in range(2):
            model(torch.randn(BATCH, 3, size, size))
    return model.eval(), torch.randn(BATCH, 3, size, size)


def rmse(model: nn.Module, x: Tensor, expected: Tensor) -> float:
    """Return the root-mean-square error of a network's output."""
    with torch.no_grad():
        return float((model(x).double() - expected).square().mean().sqrt())


def errors(name: str, size: int, dtype: torch.dtype, seed: int) -> tuple[float, float, float]:
    """Return the errors of the original and of the slimmed network, and the output's scale."""
    model, x = calibrated(name, size, seed)
    model, x = model.to(dtype), x.to(dtype)
    with torch.no_grad():
        expected = copy.deepcopy(model).double()(x.double())
    slim = ds.slim(model, example_inputs=x)
    scale = float(expected.square().mean().sqrt())
    return rmse(model, x, expected), rmse(slim, x, expected), scale


def ratio_of(name: str, size: int, dtype: torch.dtype) -> tuple[float, float, float]:
    """Return the relative errors (original, slimmed) and the ratio, geometric means over seeds."""
    logs = [0.0, 0.0]
    for seed in SEEDS:
        original, slimmed, scale = errors(name, size, dtype, seed)
        for i, value in enumerate((original, slimmed)):
            logs[i] += math.log(value / scale) / len(SEEDS)
    return math.exp(logs[0]), math.exp(logs[1]), math.exp(logs[1] - logs[0])


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="*", choices=MODELS, default=list(MODELS), metavar="NAME")
    parser.add_argument("--markdown", type=Path, help="also write the page to this file")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    rows, ratios = [], []
    for name in options.models:
        cells = [name]
        for dtype in DTYPES:
            original, slimmed, ratio = ratio_of(name, MODELS[name], dtype)
            cells += [f"{original:.2e}", f"{slimmed:.2e}", f"{ratio:.2f}"]
            ratios.append(ratio)
        print(*cells, flush=True)
        rows.append(cells)
    names = [str(dtype).removeprefix("torch.") for dtype in DTYPES]
    header = ["model", *(f"{d} {what}" for d in names for what in ("original", "slim", "ratio"))]
    held = sum(ratio <= 1.0 for ratio in ratios)
    geometric = math.exp(sum(map(math.log, ratios)) / len(ratios))
    text = "\n\n".join((
        "# Slimmed networks in half precision",
        f"`python -m benchmarks.half_precision --markdown docs/half_precision.md`. {_about()}",
        f"No worse than the original: {held} of {len(ratios)}; geometric mean of the ratios "
        f"{geometric:.2f}, largest {max(ratios):.2f}.",
        table(header, rows),
    ))  # fmt: skip
    print(text)
    if options.markdown:
        options.markdown.write_text(text + "\n")


def _about() -> str:
    text = (__doc__ or "").split("\n\n")[1].replace("\n", " ")
    return f"{text} torch {torch.__version__}, {platform.machine()}, CPU."


if __name__ == "__main__":
    main()
