"""A small convolutional network for images."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from hpctrain.errors import ConfigError
from hpctrain.models.initialization import he_init

CHANNELS_PER_GROUP = 8


class ConvNet(nn.Module):
    """Stages of two 3x3 convolutions and a pooling, then a linear classifier.

    It has neither batch statistics nor dropout: the output for a sample depends on that sample
    alone, so training takes the same course however a global batch is cut over ranks.

    Source: He et al., "Delving Deep into Rectifiers" (2015), for the initial weights; Wu and He,
    "Group Normalization" (2018).
    """

    def __init__(
        self, in_channels: int, num_classes: int, widths: Sequence[int] = (32, 64)
    ) -> None:
        """Build the network with random weights.

        Args:
            in_channels: channels of the images.
            num_classes: logits per image.
            widths: channels of each stage, multiples of 8. Every stage but the last halves the
                height and width of the images.

        Raises:
            ConfigError: if the sizes make no network.
        """
        super().__init__()
        if min(in_channels, num_classes) < 1 or not widths:
            raise ConfigError("model: in_channels, num_classes and the number of widths start at 1")
        if any(width < 1 or width % CHANNELS_PER_GROUP for width in widths):
            raise ConfigError(
                f"model.widths = {list(widths)}: expected multiples of {CHANNELS_PER_GROUP}"
            )
        stages: list[nn.Module] = []
        for width in widths:
            if stages:
                stages.append(nn.MaxPool2d(2))
            stages += [_block(in_channels, width), _block(width, width)]
            in_channels = width
        self.features = nn.Sequential(*stages)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(in_channels, num_classes)
        he_init(self)

    def forward(self, image: Tensor) -> Tensor:
        """Classify images.

        Args:
            image: (samples, in_channels, height, width), float.

        Returns:
            Logits, (samples, num_classes), float.
        """
        features = self.pool(self.features(image)).flatten(1)
        logits: Tensor = self.classifier(features)
        return logits


def _block(in_channels: int, out_channels: int) -> nn.Sequential:
    return nn.Sequential(
        # Without a bias: the normalisation would take it away again.
        nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1, bias=False),
        nn.GroupNorm(out_channels // CHANNELS_PER_GROUP, out_channels),
        nn.ReLU(inplace=True),
    )
