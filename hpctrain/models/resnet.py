"""Residual networks for images: those of the paper, named as torchvision names them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import Tensor, nn

from hpctrain.errors import ConfigError

Norm = Literal["batch", "group"]
_CHANNELS_PER_GROUP = 16


class ResNet(nn.Module):
    """A stem, stages of residual blocks, the mean over the image, a linear classifier.

    Source: He et al., "Deep Residual Learning for Image Recognition" (2016). The stride of a
    bottleneck is in its 3x3 convolution, and the last normalisation of a block begins at 0, both
    as in Goyal et al., "Accurate, Large Minibatch SGD" (2017).
    """

    def __init__(
        self,
        num_classes: int,
        *,
        blocks: Sequence[int],
        widths: Sequence[int],
        bottleneck: bool,
        in_channels: int = 3,
        small_images: bool = False,
        norm: Norm = "batch",
    ) -> None:
        """Build the network with random weights.

        Args:
            num_classes: logits per image.
            blocks: in each stage.
            widths: channels in each stage; a bottleneck puts out four times as many.
            bottleneck: blocks of 1x1, 3x3 and 1x1 convolutions in place of two 3x3.
            in_channels: channels of the images.
            small_images: begin with a 3x3 convolution of stride 1, as for images of 32 x 32.
            norm: "batch", or "group", which knows no other samples.

        Raises:
            ConfigError: if the sizes make no network.
        """
        super().__init__()
        if min(num_classes, in_channels, *blocks, *widths) < 1 or len(blocks) != len(widths):
            raise ConfigError("model: classes, channels, blocks and widths start at 1")
        if norm not in ("batch", "group"):
            raise ConfigError(f'model.norm = "{norm}": expected "batch" or "group"')
        width = widths[0]
        if small_images:
            self.conv1 = nn.Conv2d(in_channels, width, 3, padding=1, bias=False)
            self.maxpool: nn.Module = nn.Identity()
        else:
            self.conv1 = nn.Conv2d(in_channels, width, 7, stride=2, padding=3, bias=False)
            self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        self.bn1 = _norm(norm, width)
        self.relu = nn.ReLU(inplace=True)
        expansion = 4 if bottleneck else 1
        self._stages = [f"layer{number}" for number in range(1, len(blocks) + 1)]
        for number, (name, count, inner) in enumerate(
            zip(self._stages, blocks, widths, strict=True)
        ):
            stage = nn.Sequential()
            for index in range(count):
                stride = 2 if number and index == 0 else 1
                stage.append(_Block(width, inner, stride, norm, bottleneck=bottleneck))
                width = inner * expansion
            self.add_module(name, stage)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(width, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if isinstance(module, _Block):
                nn.init.zeros_(module.last_norm.weight)

    def forward(self, image: Tensor) -> Tensor:
        """Classify images.

        Args:
            image: (samples, in_channels, height, width), float.

        Returns:
            Logits, (samples, num_classes), float.
        """
        features = self.maxpool(self.relu(self.bn1(self.conv1(image))))
        for name in self._stages:
            features = getattr(self, name)(features)
        logits: Tensor = self.fc(self.avgpool(features).flatten(1))
        return logits


class _Block(nn.Module):
    """What the input lacks, computed by convolutions, and added to it."""

    def __init__(
        self, in_channels: int, width: int, stride: int, norm: Norm, *, bottleneck: bool
    ) -> None:
        super().__init__()
        out_channels = width * (4 if bottleneck else 1)
        sizes = [1, 3, 1] if bottleneck else [3, 3]
        channels = [in_channels, *[width] * (len(sizes) - 1), out_channels]
        self._count = len(sizes)
        for index, size in enumerate(sizes):
            # The first 3x3 convolution of a block makes the image smaller.
            step = stride if index == sizes.index(3) else 1
            before, after = channels[index : index + 2]
            convolution = nn.Conv2d(before, after, size, stride=step, padding=size // 2, bias=False)
            self.add_module(f"conv{index + 1}", convolution)
            self.add_module(f"bn{index + 1}", _norm(norm, after))
        self.relu = nn.ReLU(inplace=True)
        self.downsample: nn.Module | None = None
        if stride != 1 or in_channels != out_channels:
            self.downsample = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False),
                _norm(norm, out_channels),
            )

    @property
    def last_norm(self) -> nn.BatchNorm2d | nn.GroupNorm:
        found: nn.BatchNorm2d | nn.GroupNorm = getattr(self, f"bn{self._count}")
        return found

    def forward(self, features: Tensor) -> Tensor:
        hidden = features
        for number in range(1, self._count + 1):
            hidden = getattr(self, f"bn{number}")(getattr(self, f"conv{number}")(hidden))
            if number < self._count:
                hidden = self.relu(hidden)
        shortcut = features if self.downsample is None else self.downsample(features)
        output: Tensor = self.relu(hidden + shortcut)
        return output


def _norm(kind: Norm, channels: int) -> nn.BatchNorm2d | nn.GroupNorm:
    if kind == "batch":
        return nn.BatchNorm2d(channels)
    return nn.GroupNorm(max(1, channels // _CHANNELS_PER_GROUP), channels)


def resnet18(
    num_classes: int, in_channels: int = 3, small_images: bool = False, norm: Norm = "batch"
) -> ResNet:
    """Return the network of 18 layers: 11.7 million numbers at 1000 classes."""
    return ResNet(
        num_classes,
        blocks=[2, 2, 2, 2],
        widths=[64, 128, 256, 512],
        bottleneck=False,
        in_channels=in_channels,
        small_images=small_images,
        norm=norm,
    )


def resnet50(
    num_classes: int, in_channels: int = 3, small_images: bool = False, norm: Norm = "batch"
) -> ResNet:
    """Return the network of 50 layers: 25.6 million numbers at 1000 classes."""
    return ResNet(
        num_classes,
        blocks=[3, 4, 6, 3],
        widths=[64, 128, 256, 512],
        bottleneck=True,
        in_channels=in_channels,
        small_images=small_images,
        norm=norm,
    )


def resnet20(num_classes: int, in_channels: int = 3, norm: Norm = "batch") -> ResNet:
    """Return the network of 20 layers for images of 32 x 32: 0.27 million numbers."""
    return ResNet(
        num_classes,
        blocks=[3, 3, 3],
        widths=[16, 32, 64],
        bottleneck=False,
        in_channels=in_channels,
        small_images=True,
        norm=norm,
    )
