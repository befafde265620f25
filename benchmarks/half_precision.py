"""The error of a slimmed network in half precision, beside that of the network as it was.

Two ways, each in float16 and bfloat16:

- half, then slim: the network has half-precision parameters, and what it computes with them in
  float64 is right; `ds.slim` of it rounds the folded weights to half precision. It measures on its
  example inputs, other ones than those measured on here, and folds nothing where the network would
  err more. Beside it stands what folding all the same would give (half_precision="fold")
- slim, then half: the network is trained in float32, and what it computes in float64 is right;
  `ds.slim` of it is converted, beside the network itself converted

Networks have random weights, no parameter that is left at 0 or 1, and BatchNorm statistics taken
from the data (as training leaves them), so that activations keep their size. Each model has several
seeds of weights, and several batches for each; its figure is the geometric mean over all of the
ratio of root-mean-square errors, slimmed over original, with its standard error over the seeds.

    python -m benchmarks.half_precision [--models NAME ...]
    python -m benchmarks.half_precision --page      docs/half_precision.md from the results

Each model is written to docs/half_precision.json when it is done; models that stand there are left
out.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import platform
import statistics
import warnings
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor, nn

import dropsurgery as ds
from benchmarks.markdown import table
from dropsurgery.half_precision import Growth
from dropsurgery.models import import_timm

MODELS = {
    "resnet18": 64, "resnet50": 64, "res2net50d": 64, "regnety_002": 64, "densenet121": 64,
    "resnetv2_50": 64, "mobilenetv2_050": 64, "mobilenetv3_small_050": 64, "efficientnet_b0": 64,
    "repvgg_a0": 64, "mobileone_s0": 64, "fastvit_t8": 128, "levit_128s": 224,
    "visformer_tiny": 224, "xception41p": 96, "convmixer_768_32": 56, "hrnet_w18_small": 64,
    "ghostnet_050": 64, "dla34": 64, "convnext_atto": 64,
}  # fmt: skip
DTYPES = (torch.float16, torch.bfloat16)
RESULTS = Path("docs/half_precision.json")
SEEDS = (0, 1, 2)
QUANTILE = 4.30  # of Student's t at 97.5 % for as many seeds
WAYS = ("half, then slim", "half, then fold", "slim, then half")
# Samples in a batch for images of up to 128 pixels, and for larger ones, which take long in half
# precision on a CPU; and batches a seed.
SAMPLES = (8, 2)
BATCHES = 4


def images(size: int) -> Tensor:
    """Return a batch of inputs."""
    return torch.randn(SAMPLES[size > 128], 3, size, size)


def calibrated(name: str, size: int, seed: int) -> nn.Module:
    """Return a network whose BatchNorms have the statistics of data."""
    torch.manual_seed(seed)
    model: nn.Module = import_timm().create_model(name)
    for parameter in model.parameters():
        if bool((parameter == parameter.flatten()[0]).all()):
            _vary(parameter)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.reset_running_stats()
            module.momentum = None  # a plain average of what it sees
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.2, 0.2)
    with torch.no_grad():
        model.train()
        for _ in range(2):
            model(torch.randn(SAMPLES[0], 3, size, size))
    return model.eval()


def _vary(parameter: nn.Parameter) -> None:
    """Give a parameter that starts at one value different ones, as training does."""
    start = float(parameter.detach().flatten()[0])
    with torch.no_grad():
        if start == 0.0:
            nn.init.normal_(parameter, std=0.02)
        elif abs(start) < 1e-2:  # a layer scale, whose branch does not count yet
            nn.init.uniform_(parameter, 0.1, 0.5)
        else:
            parameter.mul_(torch.empty_like(parameter).uniform_(0.5, 1.5))


def rmse(model: nn.Module, x: Tensor, expected: Tensor) -> float:
    """Return the root-mean-square error of a network's output."""
    with torch.no_grad():
        return float((model(x).double() - expected).square().mean().sqrt())


def ratios(name: str, size: int, dtype: torch.dtype, seed: int) -> tuple[float, ...]:
    """Return the error of the slimmed network over the original's, for each of `WAYS`."""
    model = calibrated(name, size, seed)
    half = copy.deepcopy(model).to(dtype)
    example = images(size)
    early = ds.slim(half, example_inputs=example.to(dtype))
    folded = ds.slim(half, example_inputs=example.to(dtype), half_precision="fold")
    late = ds.slim(model, example_inputs=example).to(dtype)
    of_half, of_model = (copy.deepcopy(net).double() for net in (half, model))
    logs: list[list[float]] = [[] for _ in WAYS]
    for _ in range(BATCHES):
        x = images(size).to(dtype)
        with torch.no_grad():
            given, trained = of_half(x.double()), of_model(x.double())
        own = rmse(half, x, given)
        logs[0].append(math.log(rmse(early, x, given) / own))
        logs[1].append(math.log(rmse(folded, x, given) / own))
        logs[2].append(math.log(rmse(late, x, trained) / rmse(half, x, trained)))
    return tuple(math.exp(statistics.fmean(way)) for way in logs)


class Figure(Growth):
    """A ratio of errors over seeds; what counts as worse is told by an interval of its own."""

    @property
    def is_worse(self) -> bool:
        """Whether one is below the 95 % interval around the ratio."""
        return math.log(self.ratio) > QUANTILE * self.spread

    def __str__(self) -> str:
        return f"{self.ratio:.3f} ± {self.ratio * self.spread:.3f}"


def figures_of(name: str) -> list[Figure]:
    """Return the figures of a model: for each dtype all ways."""
    found = []
    for dtype in DTYPES:
        measured = [ratios(name, MODELS[name], dtype, seed) for seed in SEEDS]
        found += [Figure.of(values) for values in zip(*measured, strict=True)]
    return found


def main() -> None:
    """Measure what is not measured yet, or write the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="*", choices=MODELS, default=list(MODELS), metavar="NAME")
    parser.add_argument("--page", action="store_true", help="write docs/half_precision.md")
    options = parser.parse_args()
    found = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    if options.page:
        rows = {name: [Figure(**f) for f in found[name]] for name in MODELS if name in found}
        RESULTS.with_suffix(".md").write_text(page(rows))
        return
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    for name in options.models:
        if name not in found:
            figures = figures_of(name)
            print(name, *figures, sep="  ", flush=True)
            found[name] = [asdict(figure) for figure in figures]
            RESULTS.write_text(json.dumps(found, indent=1) + "\n")


def page(found: dict[str, list[Figure]]) -> str:
    """Return docs/half_precision.md."""
    names = [str(dtype).removeprefix("torch.") for dtype in DTYPES]
    columns = [f"{dtype}: {way}" for dtype in names for way in WAYS]
    lines = []
    for column, values in zip(columns, zip(*found.values(), strict=True), strict=True):
        geometric = math.exp(statistics.fmean(math.log(value.ratio) for value in values))
        worse = [name for name, value in zip(found, values, strict=True) if value.is_worse]
        lines.append(
            f"- {column}: geometric mean {geometric:.3f}, largest "
            f"{max(value.ratio for value in values):.3f}; at most 1 for "
            f"{sum(value.ratio <= 1 for value in values)} of {len(values)}; above 1 beyond the "
            f"95 % interval: {', '.join(worse) or 'none'}"
        )
    about = (__doc__ or "").partition("    python")[0].split("\n\n", 1)[1].strip()
    return "\n\n".join((
        "# Slimmed networks in half precision",
        "`python -m benchmarks.half_precision`, then `--page`. The error of the slimmed network "
        f"over that of the network as it was, in half precision. {about} "
        f"{len(SEEDS)} seeds; {len(found)} of {len(MODELS)} networks are measured. "
        f"torch {torch.__version__}, {platform.machine()}, CPU.",
        "\n".join(lines),
        table(("model", *columns), [(name, *map(str, v)) for name, v in found.items()]),
    )) + "\n"  # fmt: skip


if __name__ == "__main__":
    main()
