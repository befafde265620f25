"""Whether a site's work can be saved, and why not."""

from __future__ import annotations

from torch import fx

from dropsurgery.graph.module import graphs
from dropsurgery.graph.region import NoRegion, Regions
from dropsurgery.graph.residual import Site
from dropsurgery.layers.drop_path import Mode


class SavedWork:
    """Judges, site by site, which mode the drop path of a training graph can have.

    Args:
        module: the traced module; it is not changed.
        mode: the mode that is asked for.
        break_even: the drop probability below which "subset" does not pay.
    """

    def __init__(self, module: fx.GraphModule, mode: Mode, break_even: float) -> None:
        graph = graphs(module)[-1]
        self.mode = mode
        self.break_even = break_even
        self.nodes = {node.name: node for node in graph.nodes}
        self.regions = None if mode == "row" else Regions(module, graph)

    def judge(self, site: Site, drop_prob: float) -> tuple[Mode, str]:
        """Return the mode that a site of the training graph gets, and a remark where it masks."""
        if self.regions is None:
            return self.mode, ""
        try:
            self._find(site)
        except NoRegion as error:
            # A whole mini-batch can be masked as one; "subset" without its saving is "row".
            mode: Mode = "row" if self.mode == "subset" else self.mode
            return mode, f" (computed and masked: {error})"
        if self.mode == "subset" and drop_prob < self.break_even:
            return self.mode, f" (masked: it drops less than the break-even {self.break_even:.4g})"
        return self.mode, ""

    def _find(self, site: Site) -> None:
        assert self.regions is not None
        add, branch, via = self.nodes[site.add], self.nodes[site.branch], None
        if site.native is not None:
            via = self.nodes[site.native]
            before = via.args[0]
            if via is not branch or not isinstance(before, fx.Node):
                raise NoRegion(f"'{via.name}' is followed by more than the add")
            branch = before
        region = self.regions.find(branch, add, via)
        if self.mode == "batch":
            self.regions.check_move(region)
