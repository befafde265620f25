"""What was done to a network and what was measured, as one page that needs nothing else."""

from __future__ import annotations

from dropsurgery.page.content import Figure, Page, Section
from dropsurgery.page.story import GraphCount, Story, node_types, onnx_types, survival_along
from dropsurgery.page.write import check_page_target, write_page

__all__ = [
    "Figure",
    "GraphCount",
    "Page",
    "Section",
    "Story",
    "check_page_target",
    "node_types",
    "onnx_types",
    "survival_along",
    "write_page",
]
