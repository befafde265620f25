"""Marks in node.meta that a pickle keeps, beside those of drop path: plain data and layers."""

from __future__ import annotations

# On the output node: what conversions of dropout did, in order, so that they can be taken back.
CONVERTED = "dropsurgery_converted_drops"
# A number that tells a node from the others of its graph, whatever its name becomes.
TAG = "dropsurgery_tag"
# On a placeholder: {"p": rate, "units": which units share a draw} of the mask that it takes.
MASK = "dropsurgery_mask"

MARKS = frozenset({CONVERTED, TAG, MASK})
