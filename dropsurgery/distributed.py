"""Drop paths on several processes: what DistributedDataParallel and FSDP2 must be told."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import fx, nn
from torch.nn.parallel import DistributedDataParallel

from dropsurgery.errors import PassError
from dropsurgery.graph.module import HISTORY, graphs
from dropsurgery.layers.drop_path import DropPath


def ddp_options(module: nn.Module) -> dict[str, Any]:
    """Return the keyword arguments that DistributedDataParallel needs for a network.

    `DistributedDataParallel(net, **ds.ddp_options(net))`. With mode "batch" a branch that is
    dropped does not run, so that its parameters get no gradient on that rank and that step:
    `find_unused_parameters=True`. The modes "row" and "subset" need nothing.

    Args:
        module: a network, or a larger module with one in it.
    """
    return {"find_unused_parameters": True} if _skipping(module) else {}


def check_distributed(module: nn.Module) -> None:
    """Check, before training, that a wrapped network will run and reduce its gradients rightly.

    What it finds would otherwise be an error in the second step, a hang, or wrong gradients:

    - DistributedDataParallel without `find_unused_parameters` (or with `static_graph`) around
      branches with mode "batch";
    - `fully_shard` on a module that a traced network never calls: a graph calls the layers inside
      a block and not the block, so that the block's parameters would stay sharded;
    - `fully_shard` around branches with mode "batch" that ranks do not drop together: some would
      enter a reduction that others skip.

    Args:
        module: what DistributedDataParallel or `fully_shard` (and `torch.compile`) returned, or a
            module that holds it.

    Raises:
        PassError: one of these, with the module path and what to do.
    """
    for child in module.modules():
        if isinstance(child, DistributedDataParallel):
            _check_ddp(child)
    sharded = _sharded(module)
    if not sharded:
        return
    for path, network in _traced(module):
        prefix = f"{path}." if path else ""
        nodes = [node for graph in graphs(network) for node in graph.nodes]
        called = {prefix + str(node.target) for node in nodes if node.op == "call_module"}
        for inner in sharded:
            parts = inner.split(".")
            around = {".".join(parts[: i + 1]) for i in range(len(parts))}
            if inner.startswith(prefix) and inner != path and not around & called:
                raise PassError(
                    "fully_shard was applied to a module that the traced network never calls: its "
                    "graph calls the layers inside",
                    where=inner,
                    fix="fully_shard([layers of the block that hold parameters]), or the network",
                )
    for path, layer in _skipping(module).items():
        if layer.draws is None or layer.draws.rank is not None:
            raise PassError(
                "with fully_shard, mode 'batch' must drop a branch on all ranks together",
                where=path,
                fix="ds.seed_drop_paths(module, seed), with the same seed on every rank",
            )


def _check_ddp(module: DistributedDataParallel) -> None:
    skipping = _skipping(module.module)
    if skipping and (not module.find_unused_parameters or module.static_graph):
        raise PassError(
            "mode 'batch' leaves parameters without gradient where it drops a branch, and "
            "DistributedDataParallel "
            + ("has static_graph=True" if module.static_graph else "is not told to look for them"),
            where=next(iter(skipping)),
            fix="DistributedDataParallel(net, **ds.ddp_options(net)), without static_graph",
        )


def _skipping(module: nn.Module) -> dict[str, DropPath]:
    """Return the layers that may keep a branch from running, by path."""
    layers = {p: m for p, m in module.named_modules() if isinstance(m, DropPath)}
    return {path: layer for path, layer in layers.items() if layer.mode == "batch"}


def _sharded(module: nn.Module) -> list[str]:
    from torch.distributed.fsdp import FSDPModule  # takes a moment to import

    return [path for path, m in module.named_modules() if isinstance(m, FSDPModule)]


def _traced(module: nn.Module) -> Iterator[tuple[str, fx.GraphModule]]:
    for path, child in module.named_modules():
        if isinstance(child, fx.GraphModule) and HISTORY in child.meta:
            yield path, child
