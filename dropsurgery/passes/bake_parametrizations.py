"""Weights that are computed of other tensors, computed once."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from dropsurgery.errors import PassError
from dropsurgery.graph.module import Skip
from dropsurgery.passes.base import Change, Pass, Plan


@dataclass(frozen=True)
class BakeParametrizations(Pass):
    """Make plain parameters of weights that are computed of other tensors at each call.

    Covered are `torch.nn.utils.parametrize` (with it `parametrizations.weight_norm`,
    `spectral_norm` and `orthogonal`), and the hooks of `torch.nn.utils.weight_norm`,
    `spectral_norm` and `prune`. The weight becomes what the layer computes in eval mode, bit for
    bit; what it was computed of goes, and the layer is what it was before, which other passes can
    read. The caller's model keeps its parametrizations.

    Left alone, with the reason: layers in training mode (spectral norm would go on iterating).

    Args:
        tensors: paths of the weights to bake, as a saved surgery lists them. None bakes all.

    Raises:
        PassError: `tensors` names a weight that is not computed.
    """

    keeps_state_dict_keys: ClassVar[bool] = False
    tensors: tuple[str, ...] | None = None

    def plan(self, module: fx.GraphModule) -> Plan:
        """Return the weights that are computed."""
        changes: list[Change] = []
        skipped: list[Skip] = []
        steps: list[str] = []
        seen: set[int] = set()
        for path, layer in module.named_modules(remove_duplicate=False):
            if id(layer) in seen:
                continue
            seen.add(id(layer))
            for name, kind in _computed(layer):
                target = f"{path}.{name}" if path else name
                if self.tensors is not None and target not in self.tensors:
                    continue
                if layer.training:
                    reason = f"'{target}' is computed by {kind}, in training mode: call .eval()"
                    skipped.append(Skip(path, "", reason))
                    continue
                steps.append(target)
                changes.append(
                    Change(path, "", f"'{target}', computed by {kind}, made a parameter")
                )
        missing = sorted(set(self.tensors or ()) - set(steps))
        if missing:
            raise PassError(
                f"BakeParametrizations is to bake {', '.join(missing)}, which is not computed",
                fix="the network that the surgery was saved from, in eval mode",
            )
        return Plan(tuple(changes), tuple(skipped), tuple(steps))

    def perform(self, module: fx.GraphModule, plan: Plan) -> None:
        """Compute the weights, and take away what computes them."""
        for target in plan.steps:
            path, _, name = str(target).rpartition(".")
            with torch.no_grad():
                _bake(module.get_submodule(path), name)

    def to_json(self, plan: Plan) -> dict[str, Any]:
        """Return the weights that were baked."""
        return {"pass": self.name, "tensors": list(plan.steps)}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> BakeParametrizations:
        """Build the pass again from what `to_json` wrote."""
        return cls(tuple(map(str, data["tensors"])))


def _computed(layer: nn.Module) -> Iterator[tuple[str, str]]:
    """Yield (name, what computes it) for each weight of a layer that is no parameter of it."""
    if parametrize.is_parametrized(layer):
        parametrizations: Any = layer.parametrizations
        for name, steps in parametrizations.items():
            yield name, " and ".join(type(step).__name__.strip("_") for step in steps)
    for hook in layer._forward_pre_hooks.values():
        name = _hook_name(hook)
        if name is not None:
            yield name, type(hook).__name__


def _hook_name(hook: Any) -> str | None:
    """Return the name of the weight that a hook computes, where it is one of torch's."""
    if isinstance(hook, WeightNorm | SpectralNorm):
        return str(hook.name)
    return str(hook._tensor_name) if isinstance(hook, BasePruningMethod) else None


def _bake(layer: nn.Module, name: str) -> None:
    if parametrize.is_parametrized(layer, name):
        parametrizations: Any = layer.parametrizations
        value = getattr(layer, name)
        trains = any(p.requires_grad for p in parametrizations[name].parameters())
        # torch's own removal takes the property off the class, which the caller's layer has, too.
        kept = nn.ModuleDict({key: v for key, v in parametrizations.items() if key != name})
        if len(kept):
            layer._modules["parametrizations"] = kept
            _replace_class(layer, name)
        else:
            del layer._modules["parametrizations"]
            layer.__class__ = type(layer).__bases__[0]
    else:
        key = next(k for k, h in layer._forward_pre_hooks.items() if _hook_name(h) == name)
        value, trains = _unhook(layer, name, layer._forward_pre_hooks.pop(key))
    layer.__dict__.pop(name, None)
    layer.register_parameter(name, nn.Parameter(value.detach().clone(), trains))


def _replace_class(layer: nn.Module, name: str) -> None:
    """Give a layer a class of its own without one computed property."""
    cls = type(layer)
    body = {key: value for key, value in vars(cls).items() if key != name}
    layer.__class__ = type(cls.__name__, cls.__bases__, body)


def _unhook(layer: nn.Module, name: str, hook: Any) -> tuple[Tensor, bool]:
    """Return what a hook computes in eval mode, and take away what it computes with."""
    if isinstance(hook, WeightNorm):
        value = hook.compute_weight(layer)
    elif isinstance(hook, SpectralNorm):
        value = hook.compute_weight(layer, do_power_iteration=False)
    else:
        value = hook.apply_mask(layer)
    parts = [p for p in layer._parameters if p.startswith(f"{name}_")]
    own = {f"{name}_{part}" for part in ("g", "v", "orig", "u", "mask")}
    used = [layer._parameters[p] for p in parts if p in own]
    for part in own:
        layer._parameters.pop(part, None)
        layer._buffers.pop(part, None)
        layer._non_persistent_buffers_set.discard(part)
    for hooks in (layer._state_dict_hooks, layer._load_state_dict_pre_hooks):
        for key, other in list(hooks.items()):
            inner = getattr(other, "hook", other)
            if getattr(inner, "fn", None) is hook:
                del hooks[key]
    return value, any(p is not None and p.requires_grad for p in used)
