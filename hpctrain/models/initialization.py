"""Initial weights as in the literature."""

from __future__ import annotations

from torch import nn


def he_init(model: nn.Module) -> None:
    """Draw weights that keep the variance of activations through layers with ReLU.

    Biases are 0. Normalisations keep torch's scale of 1 and shift of 0.

    Source: He et al., "Delving Deep into Rectifiers" (2015), equation 10.
    """
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
