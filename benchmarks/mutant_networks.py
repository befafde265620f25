"""Twelve small networks of the usual kinds, each with an example of its inputs."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dropsurgery.models import import_torchvision

SIZE = 32


def randomized(model: nn.Module) -> nn.Module:
    """Draw what a fresh model leaves constant: statistics, affine terms, scales, zero heads."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if not tensor.is_floating_point():
                continue
            if "running_var" in name:
                tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
            elif "running_mean" in name:
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.3)
            elif tensor.ndim == 1 or bool((tensor == tensor.flatten()[0]).all()):
                tensor.add_(torch.randn(tensor.shape, generator=generator) * 0.2)
    return model.eval()


def _resnet() -> nn.Module:
    models = import_torchvision().models
    return models.resnet.ResNet(models.resnet.BasicBlock, [1, 1, 1, 1], num_classes=10)


def _vit() -> nn.Module:
    return import_torchvision().models.VisionTransformer(SIZE, 8, 2, 2, 32, 64, num_classes=10)


def _swin() -> nn.Module:
    return import_torchvision().models.SwinTransformer(
        [4, 4], 16, [2, 2], [2, 4], [4, 4], num_classes=10, stochastic_depth_prob=0.0
    )


def _convnext() -> nn.Module:
    convnext = import_torchvision().models.convnext
    settings = [convnext.CNBlockConfig(16, 32, 1), convnext.CNBlockConfig(32, None, 2)]
    return convnext.ConvNeXt(settings, layer_scale=0.1, num_classes=10)


def _efficientnet() -> nn.Module:
    efficientnet = import_torchvision().models.efficientnet
    config = partial(efficientnet.MBConvConfig, width_mult=1.0, depth_mult=1.0)
    settings = [config(1, 3, 1, 16, 8, 1), config(4, 3, 2, 8, 12, 2), config(4, 5, 2, 12, 16, 1)]
    return efficientnet.EfficientNet(settings, 0.0, 0.0, num_classes=10, last_channel=32)


def _mobilenet() -> nn.Module:
    mobilenet = import_torchvision().models.mobilenetv3
    config = partial(mobilenet.InvertedResidualConfig, width_mult=1.0)
    settings = [
        config(16, 3, 16, 16, True, "RE", 2, 1),
        config(16, 3, 24, 16, False, "RE", 1, 1),
        config(16, 5, 32, 24, True, "HS", 2, 1),
        config(24, 5, 32, 24, True, "HS", 1, 2),
    ]
    return mobilenet.MobileNetV3(settings, 48, num_classes=10)


def _regnet() -> nn.Module:
    regnet = import_torchvision().models.regnet
    parameters = regnet.BlockParams([1, 1, 2], [16, 24, 32], [8, 8, 16], [1.0] * 3, [2, 2, 2], 0.25)
    return regnet.RegNet(parameters, num_classes=10, stem_width=8)


def _densenet() -> nn.Module:
    return import_torchvision().models.DenseNet(8, (2, 3), 16, num_classes=10)


class UNet(nn.Module):
    """Two levels, one upsampled by interpolation and one by a transposed convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.one = self._pair(3, 8)
        self.two = self._pair(8, 16)
        self.bottom = self._pair(16, 16)
        self.pool = nn.MaxPool2d(3, 2, padding=1)
        self.shrink = nn.AvgPool2d(3, 2, padding=1)
        self.up_two = self._pair(32, 8)
        self.up = nn.ConvTranspose2d(8, 8, 2, stride=2)
        self.up_one = self._pair(16, 8)
        self.head = nn.Conv2d(8, 2, 1)

    def _pair(self, inputs: int, outputs: int) -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.LeakyReLU(0.1),
            nn.Conv2d(outputs, outputs, 3, padding=1),
            nn.GroupNorm(2, outputs),
            nn.ELU(),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return a map of two classes of the input's size."""
        one = self.one(x)
        two = self.two(self.pool(one))
        low = self.bottom(self.shrink(two))
        low = F.interpolate(low, scale_factor=2, mode="bilinear", align_corners=False)
        two = self.up_two(torch.cat([two, low], 1))
        return torch.softmax(self.head(self.up_one(torch.cat([one, self.up(two)], 1))), 1)


class Recurrent(nn.Module):
    """A bidirectional LSTM of two layers over word embeddings."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 16)
        self.lstm = nn.LSTM(16, 12, 2, batch_first=True, bidirectional=True)
        self.norm = nn.LayerNorm(24)
        self.head = nn.Linear(24, 5)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return five logits for each sentence."""
        states = self.norm(self.lstm(self.embedding(tokens))[0])
        return self.head(torch.tanh(states.mean(1) - states[:, 0]))


class Detector(nn.Module):
    """A residual backbone with a feature pyramid, boxes and scores."""

    def __init__(self) -> None:
        super().__init__()
        self.body = _resnet()
        self.body.fc = nn.Identity()
        self.lateral = nn.ModuleList([nn.Conv2d(n, 16, 1) for n in (64, 128, 256)])
        self.smooth = nn.ModuleList([nn.Conv2d(16, 16, 3, padding=1) for _ in range(3)])
        self.boxes = nn.Conv2d(16, 4, 3, padding=1)
        self.scores = nn.Conv2d(16, 4, 3, padding=1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Return boxes and scores of all cells, and the coarsest features."""
        body = self.body
        x = body.maxpool(body.relu(body.bn1(body.conv1(x))))
        features = [body.layer1(x)]
        features.append(body.layer2(features[0]))
        features.append(body.layer3(features[1]))
        maps = [layer(y) for layer, y in zip(self.lateral, features, strict=True)]
        for level in (1, 0):
            maps[level] = maps[level] + F.interpolate(
                maps[level + 1], scale_factor=2, mode="nearest"
            )
        maps = [layer(y) for layer, y in zip(self.smooth, maps, strict=True)]
        boxes = torch.cat([self.boxes(y).flatten(2) for y in maps], 2)
        scores = torch.cat([self.scores(y).flatten(2) for y in maps], 2)
        return {"boxes": boxes.exp().clamp(max=50.0), "scores": scores.sigmoid(), "top": maps[2]}


class Encoder(nn.Module):
    """Token and position embeddings, two encoder layers, two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(50, 32)
        self.positions = nn.Parameter(torch.randn(12, 32) * 0.3)
        layer = nn.TransformerEncoderLayer(32, 2, 64, activation="gelu", batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.pool = nn.Linear(32, 32)
        self.head = nn.Linear(32, 32)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits of the sentence, and the pooled features that they come from."""
        states = self.encoder(self.tokens(tokens) + self.positions)
        pooled = torch.tanh(self.pool(states[:, 0]))
        return torch.log_softmax(self.head(pooled), -1), pooled


def _image() -> Tensor:
    return torch.randn(1, 3, SIZE, SIZE)


def _words(length: int) -> Tensor:
    return torch.randint(50, (1, length))


NETWORKS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "ResNet": (_resnet, _image),
    "ViT": (_vit, _image),
    "Swin": (_swin, _image),
    "ConvNeXt": (_convnext, _image),
    "EfficientNet": (_efficientnet, _image),
    "MobileNet": (_mobilenet, _image),
    "RegNet": (_regnet, _image),
    "DenseNet": (_densenet, _image),
    "U-Net": (UNet, _image),
    "LSTM": (Recurrent, partial(_words, 10)),
    "detector": (Detector, _image),
    "encoder": (Encoder, partial(_words, 12)),
}


def build(name: str) -> tuple[nn.Module, Tensor]:
    """Return a network in eval mode with seeded random weights and statistics, and an input."""
    make, example = NETWORKS[name]
    torch.manual_seed(0)
    model = randomized(make())
    return model, example()
