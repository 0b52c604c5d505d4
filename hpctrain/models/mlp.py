"""A multilayer perceptron."""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Sequence

from torch import Tensor, nn

from hpctrain.errors import ConfigError
from hpctrain.models.initialization import he_init


class MLP(nn.Module):
    """Linear layers with ReLU between them."""

    def __init__(
        self, in_features: int, out_features: int, hidden_features: Sequence[int] = (64,)
    ) -> None:
        """Build the network with random weights.

        Args:
            in_features: numbers per sample; inputs of more than one dimension are flattened.
            out_features: numbers per sample that come out.
            hidden_features: width of each hidden layer; none: a linear model.

        Raises:
            ConfigError: if a width is not positive.
        """
        super().__init__()
        widths = [in_features, *hidden_features, out_features]
        if min(widths) < 1:
            raise ConfigError(f"model: layers of {widths} features: every width starts at 1")
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        for number, (before, after) in enumerate(itertools.pairwise(widths), start=1):
            layers[f"fc{number}"] = nn.Linear(before, after)
            if number < len(widths) - 1:
                layers[f"relu{number}"] = nn.ReLU(inplace=True)
        self.layers = nn.Sequential(layers)
        he_init(self)

    def forward(self, features: Tensor) -> Tensor:
        """Apply the layers.

        Args:
            features: (samples, ...), float, in_features numbers per sample.

        Returns:
            (samples, out_features), float.
        """
        output: Tensor = self.layers(features.flatten(1))
        return output
