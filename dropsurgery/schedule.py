"""Drop paths while training goes on: other rates, and draws that can be repeated."""

from __future__ import annotations

import zlib

import torch.distributed as dist
from torch import fx, nn

from dropsurgery import survival as rules
from dropsurgery.errors import ArgumentTypeError, PassError
from dropsurgery.graph.drops import is_drop_path, set_rate
from dropsurgery.graph.module import HISTORY, graphs, history
from dropsurgery.graph.residual import analyse
from dropsurgery.layers.draws import Draws
from dropsurgery.layers.drop_path import DropPath
from dropsurgery.passes.drop_path import InsertDropPath
from dropsurgery.ramps import Ramp
from dropsurgery.rates import RateSchedule


def set_survival(module: nn.Module, rule: rules.Rule) -> None:
    """Set the survival probabilities of a network's drop paths anew, in place.

    Blocks are counted as the last `InsertDropPath` counted them (unit, count, include). Sites
    without drop path stay without. Works in every mode, and on a module that is compiled.

    Args:
        module: a module with drop path that dropsurgery returned, or what `torch.compile`,
            DistributedDataParallel or `fully_shard` made of it.
        rule: rule(l, L) → survival probability of block l of L, in [0, 1]; see `ds.survival`.

    Raises:
        ArgumentTypeError: `module` does not come from dropsurgery, or `rule` is no rule.
        ArgumentError: the rule gives something outside [0, 1].
        PassError: there is no drop path; or one layer serves blocks that would get other rates.
    """
    traced = _traced(module)
    done = [entry for entry in history(traced)["passes"] if entry["pass"] == "InsertDropPath"]
    parameters = {k: v for k, v in done[-1].items() if k != "pass"} if done else {}
    insertion = (
        InsertDropPath.from_json({**parameters, "survival": rules.to_json(rules.constant(1.0))})
        if done
        else InsertDropPath(rule)
    )
    residuals = analyse(traced, graphs(traced)[0], insertion.include)
    nodes = {node.name: node for node in traced.graph.nodes}
    depths, total = insertion.depths(residuals)
    wanted: dict[str, float] = {}
    for site, l in depths.items():
        if site.native is None:
            continue
        path = str(nodes[site.native].target)
        drop_prob = 1.0 - rules.survival_of(rule, l, total)
        if wanted.setdefault(path, drop_prob) != drop_prob:
            raise PassError(
                f"'{path}' serves blocks that would get different rates: {wanted[path]:.4g} and "
                f"{drop_prob:.4g}",
                where=site.module,
                fix="ds.InsertDropPath gives each block a layer of its own",
            )
    if not wanted:
        raise PassError("the network has no drop path", fix="ds.retrofit(model) puts it in")
    for path, drop_prob in wanted.items():
        set_rate(traced.get_submodule(path), drop_prob)


class SurvivalSchedule(RateSchedule):
    """Lets the drop probabilities of a network's drop paths grow, or end, over training.

    At step t every drop path has its final rate times `ramp(t)`. The first step's rates are set at
    once; call `step()` after each training step, as with a learning-rate scheduler.

    Args:
        module: a module with drop path that dropsurgery returned, or a wrapper of one.
        ramp: ramp(step) → share of the final drop probability, in [0, 1]; see `ds.ramps`.
        survival: the final rule; without, the rates that the layers have now are the final ones.

    Raises:
        ArgumentError: the ramp gives something outside [0, 1].
        ArgumentTypeError, PassError: as `set_survival`.
    """

    def __init__(
        self, module: nn.Module, ramp: Ramp, *, survival: rules.Rule | None = None
    ) -> None:
        if survival is not None:
            set_survival(module, survival)
        super().__init__(module, ramp)

    def _find(self, module: nn.Module, where: str | tuple[str, ...] | None) -> dict[str, nn.Module]:
        layers = drop_paths(module)
        if not layers:
            raise PassError("the network has no drop path", fix="ds.retrofit(model) puts it in")
        return layers


def seed_drop_paths(module: nn.Module, seed: int, *, per_rank: bool = False) -> Draws:
    """Let the drop paths of a network draw from (seed, step) in place of the global generator.

    What is dropped is then the same on every rank (or differs by rank, if asked), the same after a
    restart from a checkpoint, and the same when activation checkpointing runs a forward again. The
    caller counts the steps: `draws.advance()` after each; forwards of one step draw the same.
    A layer that is called twice in a forward draws the same both times.

    Args:
        module: a module with `DropPath` in it, or a wrapper of one. Layers of timm and
            torchvision that are still there keep the global generator.
        seed: any integer.
        per_rank: mix the rank of this process into the seed, so that ranks draw differently.

    Returns:
        The draws: `advance()`, `state_dict()` and `load_state_dict()`.

    Raises:
        ArgumentError: `seed` is no integer.
        PassError: there is no `DropPath` in the network.
    """
    layers = {p: m for p, m in drop_paths(module).items() if isinstance(m, DropPath)}
    if not layers:
        raise PassError("the network has no ds.DropPath", fix="ds.retrofit(model) puts it in")
    known = dist.is_available() and dist.is_initialized()
    draws = Draws(seed, (dist.get_rank() if known else 0) if per_rank else None)
    for path, layer in layers.items():
        layer.draws = draws
        layer.site = zlib.crc32(path.encode())
    return draws


def drop_paths(module: nn.Module) -> dict[str, nn.Module]:
    """Return the drop-path layers of a network by path, behind any wrapper."""
    return {path: m for path, m in _unwrap(module).named_modules() if is_drop_path(m)}


def _traced(module: nn.Module) -> fx.GraphModule:
    inner = _unwrap(module)
    if not isinstance(inner, fx.GraphModule) or HISTORY not in inner.meta:
        raise ArgumentTypeError(
            f"expected a module that dropsurgery returned, got {type(module).__name__}",
            fix="ds.retrofit(model)",
        )
    return inner


def _unwrap(module: nn.Module) -> nn.Module:
    """Return the network inside torch.compile's and DistributedDataParallel's wrappers."""
    if not isinstance(module, nn.Module):
        raise ArgumentTypeError(f"expected a module, got {type(module).__name__}")
    while not isinstance(module, fx.GraphModule):
        inner = getattr(module, "_orig_mod", None)
        if inner is None and type(module).__name__ in ("DistributedDataParallel", "DataParallel"):
            inner = module.module
        if not isinstance(inner, nn.Module):
            break
        module = inner
    return module
