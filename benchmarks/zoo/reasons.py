"""Why single models differ from their authors' choice, or fail: found by reading their sources.

Every entry is a pattern for a model's label and one sentence or two. An entry is shown only where
the sweep finds the difference, so that one that is out of date does no harm.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping

_SITES: Mapping[str, str] = {
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
    "timm:swiftformer*": (
        "The last block of a stage begins with a local representation that is built without a "
        "rate; its other two branches share the block's."
    ),
    "timm:csatv2*": (
        "The transformer blocks at the ends of the last two stages are built without a rate; those "
        "of the third stage stand among the blocks that are counted."
    ),
    "timm:mobilevit_*": (
        "timm also drops the whole output of bottlenecks without a skip, and draws for every row "
        "of a sample's patches in the transformers, where no axis is the batch: dropsurgery leaves "
        "these branches alone unless asked for mode 'batch'."
    ),
    "timm:mobilevitv2_*": (
        "timm also drops the whole output of bottlenecks without a skip, which no residual site is."
    ),
    "timm:vitamin*": (
        "The rates start after the convolutional stem, whose residual blocks are at 0."
    ),
    "timm:volo*": (
        "The outlook blocks of the first stage are built without a rate, the others go on counting "
        "from their end."
    ),
    "timm:lowformer*": (
        "The rates count every block, also the strided ones, which have no skip; the three "
        "branches of a block are modules inside it and share its rate."
    ),
    "timm:cpubone*": (
        "The rates count every block, also the strided ones, which have no skip; the three "
        "branches of a block are modules inside it and share its rate."
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
