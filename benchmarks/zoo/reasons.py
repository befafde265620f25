"""Why single models differ from their authors' choice, or fail: found by reading their sources.

Every entry is a pattern for a model's label and one sentence or two. An entry is shown only where
the sweep finds the difference, so that one that is out of date does no harm.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping

_SITES: Mapping[str, str] = {
    "timm:mobilevit_*": (
        "timm registers MobileVitBlock as not traceable (its unfolding asks for the size of the "
        "feature map), so it stays whole and its transformer layers are told as a skip."
    ),
    "timm:mobilevitv2_*": (
        "timm registers MobileVitV2Block as not traceable (its unfolding asks for the size of the "
        "feature map), so it stays whole and its transformer layers are told as a skip."
    ),
    "timm:tiny_vit_*": (
        "timm registers TinyVitBlock as not traceable (it branches on the size of the feature "
        "map), so it stays whole and is told as a skip."
    ),
    "timm:csatv2*": (
        "The block's spatial gate holds a small transformer of its own (one channel, 7 by 7 "
        "positions), whose MLP is a residual branch that the authors do not drop."
    ),
    "timm:swiftformer*": (
        "EfficientAdditiveAttention adds its query to what it attended to, which is a skip inside "
        "the attention that the authors do not drop."
    ),
    "timm:efficientvim*": (
        "The depthwise branches are linear, so that they are sites only on request; the same "
        "request brings the depthwise branches of PatchMerging, which the authors do not drop."
    ),
}

_RATES: Mapping[str, str] = {
    "timm:crossvit*": (
        "Two towers run side by side, block i of both at one rate, and the fusion after them at "
        "the rate of their last block: no single count of blocks gives that."
    ),
    "timm:nextvit*": (
        "A mixed block splits its rate over its two attentions, 3/4 and 1/4, and gives its MLP "
        "all of it."
    ),
    "timm:vitamin*": (
        "The rates start after the convolutional stem, whose residual blocks are at 0."
    ),
    "timm:gcvit*": (
        "The rates count the attention blocks alone, without the residual blocks that where= "
        "leaves out."
    ),
    "timm:efficientformerv2*": (
        "The rates count the blocks alone, without the attention downsample that where= leaves out."
    ),
    "timm:volo*": (
        "The outlook blocks of the first stage are built without a rate, the others go on counting "
        "from their end, and the class-attention blocks that where= leaves out are not counted."
    ),
    "timm:lowformer*": (
        "The rates count every block, also the strided ones, which have no skip; the three "
        "branches of a block are modules inside it and share its rate."
    ),
    "timm:cpubone*": (
        "The rates count every block, also the strided ones, which have no skip; the three "
        "branches of a block are modules inside it and share its rate."
    ),
    "timm:davit*": (
        "A spatial and a channel block are a pair at one rate, which per_stage gives; timm rounds "
        "it to float32."
    ),
    "timm:poolformer*": (
        "timm drops the branch before its layer scale, dropsurgery after it: equal up to rounding."
    ),
    "timm:rexnet*": (
        "timm drops the block's whole output, also the channels that no skip is added to."
    ),
}

_PATHS: Mapping[str, str] = {
    "timm:resnest*": (
        "timm drops the block's input on its way to the projected skip, and where the skip is not "
        "projected nobody reads the result."
    ),
    "timm:rdnet*": "The dropped features are concatenated: a dense network has no residual branch.",
    "timm:ese_vovnet*": "The block's output is dropped; these variants have no residual.",
    "timm:mobilevit*": "Bottlenecks without a skip drop their whole output.",
    "timm:rexnet*": "The whole output is dropped; a part of its channels gets the skip added.",
}

_PROMISES: Mapping[str, str] = {}


def sites(label: str) -> str:
    """Return why a model's sites differ from the native ones."""
    return _look_up(_SITES, label)


def rates(label: str) -> str:
    """Return why no rule gives a model's native rates, or its native training output."""
    return _look_up(_RATES, label)


def paths(label: str) -> str:
    """Return what native drop-path calls do that drop no residual branch."""
    return _look_up(_PATHS, label)


def promises(label: str) -> str:
    """Return why a promise of the retrofit does not hold for a model."""
    return _look_up(_PROMISES, label)


def _look_up(table: Mapping[str, str], label: str) -> str:
    return next(
        (text for pattern, text in table.items() if fnmatch.fnmatchcase(label, pattern)), ""
    )
