"""Networks whose output depends on every layer, and edits of ONNX files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnx
import torch
import torchvision
from onnx import numpy_helper
from torch import nn

from tests.helpers import randomize


def tamed(model: nn.Module) -> nn.Module:
    """Give BatchNorms random statistics, and residual branches the small gain of trained ones.

    With random statistics alone the activations of a deep residual network grow by a constant
    factor with each block, until an absolute shift of 1e-3 is less than float32 can hold.
    """
    randomize(model)
    with torch.no_grad():
        for name, module in model.named_modules():
            block, _, leaf = name.rpartition(".")
            last = "bn3" if hasattr(model.get_submodule(block), "bn3") else "bn2"
            if block and leaf == last:
                module.weight.mul_(0.2)
    return model.eval()


def resnet(depth: int) -> nn.Module:
    torch.manual_seed(0)
    return tamed(getattr(torchvision.models, f"resnet{depth}")())


def vit() -> nn.Module:
    """A small vision transformer; torchvision starts its head at zero."""
    torch.manual_seed(0)
    model = torchvision.models.VisionTransformer(32, 8, 2, 2, 32, 64, num_classes=10).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def edited(path: Path, edit: Callable[[onnx.ModelProto], None], name: str = "mutant") -> Path:
    """Write a changed copy of an ONNX file beside it."""
    model = onnx.load(str(path))
    edit(model)
    target = path.with_name(f"{name}.onnx")
    onnx.save(model, str(target))
    return target


def weight(model: onnx.ModelProto, name: str) -> torch.Tensor:
    tensor = next(item for item in model.graph.initializer if item.name == name)
    return torch.from_numpy(numpy_helper.to_array(tensor).copy())


def set_weight(model: onnx.ModelProto, name: str, value: torch.Tensor) -> None:
    tensor = next(item for item in model.graph.initializer if item.name == name)
    tensor.CopyFrom(numpy_helper.from_array(value.numpy(), name))


def nodes(model: onnx.ModelProto, op_type: str) -> list[onnx.NodeProto]:
    return [node for node in model.graph.node if node.op_type == op_type]
