"""Whether find_drops finds everything: 30 networks, random in training before and not after.

Each network of timm or torchvision is built with the rates that its constructor takes, at a small
image size. BatchNorm is frozen. Before `ConvertDropout("identity")` its training-mode outputs for
one input differ from pass to pass; afterwards 20 passes must be bit-identical, and eval must be
what it was.

    python -m benchmarks.find_drops [--only NAME] [--markdown docs/find_drops.md]
"""

from __future__ import annotations

import argparse
import copy
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import dropsurgery as ds
from benchmarks.verify_gate import randomize
from dropsurgery.models import import_torchvision
from dropsurgery.report import environment

PASSES = 20
_ALL = {"drop_rate": 0.1, "drop_path_rate": 0.1}
_VIT = {**_ALL, "attn_drop_rate": 0.1, "proj_drop_rate": 0.1, "pos_drop_rate": 0.1}

# library:model → image size and arguments of its constructor.
NETWORKS: dict[str, tuple[int, dict[str, Any]]] = {
    "torchvision:alexnet": (64, {}),
    "torchvision:vgg11_bn": (32, {}),
    "torchvision:densenet121": (32, {"drop_rate": 0.1}),
    "torchvision:googlenet": (64, {"init_weights": False}),
    "torchvision:inception_v3": (299, {"init_weights": False}),
    "torchvision:mobilenet_v2": (32, {}),
    "torchvision:mobilenet_v3_small": (32, {}),
    "torchvision:mnasnet0_5": (32, {}),
    "torchvision:squeezenet1_1": (64, {}),
    "torchvision:efficientnet_b0": (32, {}),
    "torchvision:convnext_tiny": (32, {}),
    "torchvision:swin_t": (32, {"dropout": 0.1, "attention_dropout": 0.1}),
    "torchvision:swin_v2_t": (32, {"dropout": 0.1, "attention_dropout": 0.1}),
    "torchvision:vit_b_32": (32, {"image_size": 32, "dropout": 0.1, "attention_dropout": 0.1}),
    "torchvision:maxvit_t": (224, {"mlp_dropout": 0.1, "attention_dropout": 0.1}),
    "timm:resnet18": (32, {**_ALL, "drop_block_rate": 0.1}),
    "timm:densenet121": (32, {"drop_rate": 0.1}),
    "timm:vit_tiny_patch16_224": (32, {**_VIT, "img_size": 32, "patch_drop_rate": 0.25}),
    "timm:deit_tiny_distilled_patch16_224": (32, {**_VIT, "img_size": 32}),
    "timm:swin_tiny_patch4_window7_224": (
        32, {**_ALL, "attn_drop_rate": 0.1, "proj_drop_rate": 0.1, "img_size": 32,
             "window_size": 4},
    ),
    "timm:convnext_atto": (32, _ALL),
    "timm:efficientnet_b0": (32, _ALL),
    "timm:mixer_s32_224": (32, {**_ALL, "proj_drop_rate": 0.1, "img_size": 32}),
    "timm:nfnet_l0": (32, _ALL),
    "timm:regnety_002": (32, _ALL),
    "timm:levit_128s": (224, {**_ALL}),
    "timm:pit_ti_224": (224, {**_ALL, "attn_drop_rate": 0.1, "proj_drop_rate": 0.1}),
    "timm:cait_xxs24_224": (
        32, {**_ALL, "attn_drop_rate": 0.1, "proj_drop_rate": 0.1, "img_size": 32},
    ),
    "timm:eva02_tiny_patch14_224": (
        28, {**_ALL, "attn_drop_rate": 0.1, "proj_drop_rate": 0.1, "img_size": 28},
    ),
    "timm:poolformer_s12": (64, {**_ALL, "proj_drop_rate": 0.1}),
    "timm:xcit_nano_12_p16_224": (
        64, {**_ALL, "attn_drop_rate": 0.1, "proj_drop_rate": 0.1, "img_size": 64},
    ),
    "timm:tiny_vit_5m_224": (64, _ALL),
}  # fmt: skip


@dataclass(frozen=True)
class Found:
    """What was found in one network, and whether that was all.

    Attributes:
        name: library and model.
        size: side of the images.
        forms: how many sources of each form.
        random_before: whether two passes in training differed.
        identical: whether all passes afterwards were bit-identical.
        eval_same: whether the eval outputs are bit for bit what they were.
        restored: whether "original" gives the code, and the outputs of a seed, that were.
        seconds: for all of it.
    """

    name: str
    size: int
    forms: tuple[tuple[str, int], ...]
    random_before: bool
    identical: bool
    eval_same: bool
    restored: bool
    seconds: float

    @property
    def ok(self) -> bool:
        """Whether everything is as it must be."""
        return self.random_before and self.identical and self.eval_same and self.restored


def build(name: str) -> tuple[nn.Module, Tensor]:
    """Return a network and an input for it."""
    library, _, model = name.partition(":")
    size, options = NETWORKS[name]
    torch.manual_seed(0)
    if library == "timm":
        import_torchvision()
        import timm

        network: nn.Module = timm.create_model(model, num_classes=10, **options)
    else:
        network = import_torchvision().models.get_model(model, num_classes=10, **options)
    # Heads that start at zero, and layer scale near it, would hide what is random before them.
    randomize(network, 0)
    return network, torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))


def training(network: nn.Module) -> nn.Module:
    """Put a network into training mode with BatchNorm frozen."""
    network.train()
    for layer in network.modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            layer.eval()
    return network


def tensors(network: nn.Module, x: Tensor) -> list[Tensor]:
    """Return all tensors of a network's output."""
    with torch.no_grad():
        return [leaf for leaf in pytree.tree_leaves(network(x)) if isinstance(leaf, Tensor)]


def same(left: list[Tensor], right: list[Tensor]) -> bool:
    """Say whether two outputs are bit-identical; NaN equals NaN."""
    pairs = zip(left, right, strict=True)
    return all(torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0)) for a, b in pairs)


def examine(name: str, passes: int = PASSES) -> Found:
    """Find the drops of one network, convert them, look, and take it back."""
    began = time.perf_counter()
    network, x = build(name)
    forms = Counter(drop.form for drop in ds.find_drops(network))
    expected = tensors(network.eval(), x)
    before = [tensors(training(network), x) for _ in range(2)]
    converted = ds.apply(network, ds.ConvertDropout("identity")).module
    eval_same = same(expected, tensors(copy.deepcopy(converted).eval(), x))
    after = [tensors(training(converted), x) for _ in range(passes)]
    original = ds.apply(converted, ds.ConvertDropout("original")).module
    outputs = []
    for each in (training(ds.trace(network)), training(original)):
        torch.manual_seed(5)
        outputs.append(tensors(each, x))
    return Found(
        name,
        x.shape[-1],
        tuple(forms.items()),
        not same(*before),
        all(same(after[0], other) for other in after[1:]),
        eval_same,
        original.code == ds.trace(network).code and same(*outputs),
        time.perf_counter() - began,
    )


def main() -> None:
    """Examine every network, and print or write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="")
    parser.add_argument("--markdown", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = []
    for name in NETWORKS:
        if options.only in name:
            found.append(examine(name))
            print(found[-1], flush=True)
    text = page(found)
    if options.markdown:
        options.markdown.write_text(text)
    else:
        print(text)


def page(found: list[Found]) -> str:
    """Return the page."""
    good = sum(one.ok for one in found)
    lines = [
        "# find_drops, against the networks themselves",
        "",
        f"{len(found)} networks of timm and torchvision with the drop rates that their "
        "constructors take (0.1 where there is a choice), BatchNorm frozen, a batch of two small "
        "images. *Random before*: two training-mode passes differ. *Identical after*: after "
        f'`ConvertDropout("identity")`, {PASSES} training-mode passes are bit-identical. *Eval '
        "same*: eval outputs are bit for bit what they were. *Restored*: `ConvertDropout("
        '"original")` gives back the code, and from one seed the same training-mode outputs. '
        f"All four hold for {good} of {len(found)}. Written by "
        "`python -m benchmarks.find_drops --markdown docs/find_drops.md`.",
        "",
        "| network | image | sources of randomness | random before | identical after | eval same "
        "| restored | seconds |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for one in found:
        forms = ", ".join(f"{count} {form}" for form, count in one.forms)
        marks = (one.random_before, one.identical, one.eval_same, one.restored)
        told = " | ".join("yes" if mark else "**no**" for mark in marks)
        lines.append(f"| {one.name} | {one.size} | {forms} | {told} | {one.seconds:.1f} |")
    packages = ("dropsurgery", "torch", "torchvision", "timm")
    made = ", ".join(f"{key} {value}" for key, value in environment(packages).items())
    return "\n".join([*lines, "", f"Measured with {made}.", ""])


if __name__ == "__main__":
    main()
