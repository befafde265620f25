"""Which models the sweep holds, and how one is built with and without its native drop path."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dropsurgery.graph.leaves import DROP_PATHS, is_one_of
from dropsurgery.models import import_timm, import_torchvision

CHOSEN = Path(__file__).with_name("timm_families.json")
RATE = 0.3  # the drop_path_rate that native networks are built with
PER_FAMILY = 2
META_ONLY = 300_000_000  # parameters from which a model is only analysed, not run
# timm's registry holds miniatures for its own tests, too small to show anything here.
MINIATURE = "test_"

# Models that the project's issues name, beside the smallest of each family.
NAMED_TIMM = (
    "resnet18", "resnet50", "resnet101d", "seresnet50", "resnext50_32x4d", "ecaresnet50d",
    "resnetv2_50", "resnetv2_50d_gn", "resnetv2_50x1_bit", "vit_tiny_patch16_224",
    "vit_small_patch16_224", "vit_base_patch16_224", "vit_small_patch14_dinov2",
    "convnext_tiny", "convnext_small", "convnextv2_tiny", "hrnet_w18_small", "res2net50d",
    "mixer_b16_224", "efficientnet_b0", "regnety_004", "dla34", "nf_regnet_b0",
)  # fmt: skip

_TORCHVISION_KINDS = {
    "detection": "detection backbone",
    "segmentation": "segmentation",
    "video": "video",
}
_SIZES = (64, 128, 192, 256)


@dataclass(frozen=True)
class Entry:
    """One model of the sweep.

    Attributes:
        source: "timm" or "torchvision".
        family: timm's registry module, torchvision's kind of model and its module.
        name: the name that the library knows it by.
    """

    source: str
    family: str
    name: str

    @property
    def label(self) -> str:
        """How the command line names it."""
        return f"{self.source}:{self.name}"


def entries() -> list[Entry]:
    """Return all models of the sweep, sorted by source and family."""
    return [*_timm_entries(), *_torchvision_entries()]


def sample() -> set[str]:
    """Return the timm models that stand for their families."""
    families: dict[str, list[str]] = json.loads(CHOSEN.read_text())["families"]
    return {name for names in families.values() for name in names}


def timm_families() -> dict[str, list[str]]:
    """Return timm's registry: the architectures of each module that defines models."""
    import_timm()
    from timm.models._registry import _module_to_models

    return {
        family: sorted(name for name in names if "." not in name)
        for family, names in sorted(_module_to_models.items())
    }


def choose() -> dict[str, Any]:
    """Choose the smallest models of every timm family, by parameters, and write them down."""
    timm = import_timm()
    families = {}
    for family, names in timm_families().items():
        sizes = []
        for name in names:
            if name.startswith(MINIATURE) or not timm.is_model(name):
                continue
            try:
                with torch.device("meta"):
                    model = timm.create_model(name)
            except RuntimeError:  # an architecture under the name of a tag that is gone
                continue
            sizes.append((sum(p.numel() for p in model.parameters()), name))
        families[family] = [name for _, name in sorted(sizes)[:PER_FAMILY]]
    chosen = {"timm": timm.__version__, "families": families}
    CHOSEN.write_text(json.dumps(chosen, indent=1) + "\n")
    return chosen


def _timm_entries() -> Iterator[Entry]:
    families: dict[str, list[str]] = json.loads(CHOSEN.read_text())["families"]
    for family, names in timm_families().items():
        more = [name for name in NAMED_TIMM if name in names and name not in families[family]]
        for name in (*families[family], *more):
            yield Entry("timm", family, name)


def _torchvision_entries() -> Iterator[Entry]:
    import_torchvision()
    from torchvision import models

    for name in models.list_models():
        home = models.get_model_builder(name).__module__.split(".")[2:]
        if home[0] in ("quantization", "optical_flow"):
            continue
        kind = _TORCHVISION_KINDS.get(home[0], "classification")
        yield Entry("torchvision", f"{kind}: {home[-1]}", name)


def build(entry: Entry, *, native: bool, size: int | None = None) -> nn.Module | None:
    """Build a model with its native drop path, or without any; None where it takes none.

    Args:
        entry: the model.
        native: with drop path at `RATE` (torchvision: at the rate that its builder sets).
        size: side of the input for which it is built; None for its own.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        builder = _timm if entry.source == "timm" else _torchvision
        return builder(entry.name, native, {} if size is None else {"size": size})


def _timm(name: str, native: bool, options: dict[str, Any]) -> nn.Module | None:
    create = partial(import_timm().create_model, name)
    if "size" in options:
        create = partial(create, img_size=options["size"])
    try:
        model: nn.Module = create(drop_path_rate=RATE if native else 0.0)
    except TypeError as error:
        if "drop_path_rate" not in str(error):
            raise
        return None if native else without_drop_path(create())
    if native:
        return model if _has_drop_path(model) else None
    return without_drop_path(model)


def _torchvision(name: str, native: bool, options: dict[str, Any]) -> nn.Module | None:
    from torchvision import models

    builder = models.get_model_builder(name)
    given: dict[str, Any] = {"weights": None}
    home = builder.__module__
    if ".detection" in home or ".segmentation" in home:
        given["weights_backbone"] = None
    if "googlenet" in home or home.endswith("inception"):
        given["init_weights"] = False
    if "size" in options:
        if home.endswith("vision_transformer"):
            given["image_size"] = options["size"]
        elif home.endswith("maxvit"):
            given["input_size"] = (options["size"], options["size"])
        else:
            raise TypeError(f"{name} takes inputs of any size")
    model: nn.Module = builder(**given)
    if ".detection" in home:
        model = model.get_submodule("backbone")
    if native:
        return model if _has_drop_path(model) else None
    return without_drop_path(model)


def _has_drop_path(model: nn.Module) -> bool:
    return any(is_one_of(module, DROP_PATHS) for module in model.modules())


def without_drop_path(model: nn.Module) -> nn.Module:
    """Put an Identity in the place of every drop-path layer that is left, in place."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if is_one_of(child, DROP_PATHS):
                setattr(module, name, nn.Identity())
    return model


def default_size(entry: Entry, model: nn.Module) -> tuple[int, ...]:
    """Return the shape of one input, without the batch axis, that a model is meant for."""
    if entry.source == "timm":
        shape: tuple[int, ...] = tuple(model.pretrained_cfg["input_size"])  # type: ignore[index]
        return shape
    if entry.family.startswith("video"):
        side = 112 if entry.family.endswith("resnet") else 224
        return (3, 16, side, side)
    side = {"inception_v3": 299, "ssd300_vgg16": 300}.get(entry.name, 224)
    return (3, side, side)


def input_shapes(entry: Entry, model: nn.Module) -> Iterator[tuple[tuple[int, ...], int | None]]:
    """Yield (input shape, side to build for or None), the smallest first, the model's own last."""
    *rest, height, width = default_size(entry, model)
    for side in (side for side in _SIZES if side < min(height, width)):
        for built in (None, side):
            yield (*rest, side, side), built
    yield (*rest, height, width), None


@contextmanager
def without_init() -> Iterator[None]:
    """Leave parameters as they are allocated: for a network whose state is loaded at once."""
    from timm.layers import weight_init

    names = [n for n in dir(nn.init) if n.endswith("_") and not n.startswith("_")]
    patched = [(nn.init, name) for name in names] + [(weight_init, "_trunc_normal_")]
    saved = [(home, name, getattr(home, name)) for home, name in patched]
    try:
        for home, name in patched:
            setattr(home, name, lambda tensor, *args, **kwargs: tensor)
        yield
    finally:
        for home, name, function in saved:
            setattr(home, name, function)
