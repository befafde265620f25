"""What can take an affine map into its weights: layers, normalisations' affine parts, tables."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import fx, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from dropsurgery.graph.affine import Refused, argument, stored_tensor
from dropsurgery.graph.channels import Shapes, channel_axis
from dropsurgery.graph.leaves import forward_owner, has_hooks
from dropsurgery.graph.stored import read_stored
from dropsurgery.graph.uses import Uses
from dropsurgery.graph.weighted import Weighted, read_weighted

# By the class that defines forward, or the function: position of the weight; the bias follows it.
_NORM_CLASSES = frozenset(
    {
        "torch.nn.modules.normalization.LayerNorm",
        "torch.nn.modules.normalization.GroupNorm",
        "torch.nn.modules.instancenorm._InstanceNorm",
        "torch.nn.modules.instancenorm.InstanceNorm1d",
    }
)
_NORM_FUNCTIONS: Mapping[Any, int] = {F.layer_norm: 2, F.group_norm: 2, F.instance_norm: 3}


def is_norm_carrier(node: fx.Node, called: nn.Module | None) -> bool:
    """Say whether a node is a LayerNorm, GroupNorm or InstanceNorm."""
    if called is not None:
        return isinstance(
            called, nn.LayerNorm | nn.GroupNorm | nn.modules.instancenorm._InstanceNorm
        )
    return node.op == "call_function" and node.target in _NORM_FUNCTIONS


def read_carrier(root: nn.Module, node: fx.Node, called: nn.Module | None) -> Weighted | None:
    """Read what can take affine maps into its weights; None where a node is nothing of the kind.

    Raises:
        Refused: its weights are not simply its parameters.
    """
    if not is_norm_carrier(node, called):
        return read_weighted(root, node, called) or read_stored(root, node, called)
    if called is None:
        label = f"{getattr(node.target, '__name__', '')} '{node.name}'"
        first = _NORM_FUNCTIONS[node.target]
        operands = (argument(node, first, "weight"), argument(node, first + 1, "bias"))
        if None in operands:
            raise Refused(f"{label} has no weight or no bias")
        (weight_node, weight), (bias_node, bias) = (stored_tensor(root, o) for o in operands)
        found = Weighted(label, weight, bias, None, operands=(weight_node, bias_node))
    else:
        label = f"{type(called).__name__} '{node.target}'"
        stored = [called._parameters.get(name) for name in ("weight", "bias")]
        known = forward_owner(called) in _NORM_CLASSES and not has_hooks(called)
        if not known or parametrize.is_parametrized(called):
            raise Refused(f"{label} has a forward of its own")
        if type(stored[0]) is not nn.Parameter:
            raise Refused(f"{label} has no weight")
        found = Weighted(label, stored[0], stored[1], None, module=called)
    if found.weight.ndim != 1:
        raise Refused(f"{found.label} normalises more than one axis")
    if found.weight.is_meta or not found.weight.is_floating_point():
        raise Refused(f"{found.label} has parameters without values")
    return found


def output_axis(shapes: Shapes, node: fx.Node, carrier: Weighted) -> int | None:
    """Return the axis of a carrier's output that its weights scale; None where it is not proved."""
    if carrier.weight.ndim > 1:
        return channel_axis(shapes, node, carrier)
    if carrier.module is not None:
        last = isinstance(carrier.module, nn.LayerNorm)
    else:
        last = node.target is F.layer_norm
    rank = shapes.rank(node)
    if last:
        return None if rank is None else rank - 1
    groups = isinstance(carrier.module, nn.GroupNorm) or node.target is F.group_norm
    if groups or rank is None:
        return 1 if groups else None
    batched = carrier.module is None or rank == carrier.module._get_no_batch_dim() + 1  # type: ignore[operator]
    return 1 if batched else 0


def input_axis(shapes: Shapes, node: fx.Node, carrier: Weighted, data: fx.Node) -> int | None:
    """Return the axis of a layer's input over which it sums; None where it is not proved."""
    rank = shapes.rank(data)
    if carrier.spatial is None:
        return None if rank is None else rank - 1
    return channel_axis(shapes, node, carrier)


def is_padded(node: fx.Node, called: Any) -> bool:
    """Say whether a convolution's windows reach over the border, where zeros stand."""
    if called is None:
        padding, kernel = argument(node, 4, "padding", 0), None
    else:
        if called.padding_mode != "zeros":
            return False
        padding, kernel = called.padding, called.kernel_size
        if forward_owner(called).startswith("timm."):  # pads as much as "same" does
            padding = "same"
    if padding == "same" and kernel is not None:
        return any(size != 1 for size in kernel)
    if isinstance(padding, int):
        return padding != 0
    if isinstance(padding, tuple | list):
        return any(size != 0 for size in padding)
    return bool(padding != "valid")


def is_plain_conv(node: fx.Node, called: nn.Module | None) -> bool:
    """Say whether a node is a convolution with torch's own forward, or one that pads as "same"."""
    if called is None:
        return node.target in (F.conv1d, F.conv2d, F.conv3d)
    owner = forward_owner(called)
    return owner.startswith("torch.nn.modules.conv.Conv") or owner.endswith(".Conv2dSame")


def conv_options(node: fx.Node) -> tuple[Any, ...]:
    """Return stride, padding, dilation and groups of a call of F.conv1d, F.conv2d or F.conv3d."""
    names = ("stride", "padding", "dilation", "groups")
    defaults = (1, 0, 1, 1)
    found = zip(range(3, 7), names, defaults, strict=True)
    return tuple(argument(node, index, name, default) for index, name, default in found)


def check_alone(
    uses: Uses, modules: Mapping[str, nn.Module], node: fx.Node, carrier: Weighted
) -> None:
    """Raise Refused where something beside `node` reads the weights that it has."""
    for tensor in carrier.tensors:
        others = [reader.name for reader in uses.readers(tensor) if reader is not node]
        if others:
            raise Refused(
                f"the weight or bias of {carrier.label} is also read by {', '.join(others)}"
            )
    for operand in carrier.operands:
        owner = "" if operand is None else str(operand.target).rpartition(".")[0]
        if operand is not None and uses.is_run(modules[owner]):
            raise Refused(f"the module '{owner}', which is called too, owns the weight")
