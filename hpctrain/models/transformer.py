"""A decoder-only transformer: a language model."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hpctrain.errors import ConfigError


class Transformer(nn.Module):
    """Embeddings, blocks of causal attention and a perceptron, and the embeddings again.

    Normalisations come before, the output shares its matrix with the token embedding, and layers
    that add to the residual stream begin smaller the more of them there are.

    Source: Vaswani et al., "Attention Is All You Need" (2017); Radford et al., "Language Models are
    Unsupervised Multitask Learners" (2019).
    """

    def __init__(
        self,
        vocabulary: int,
        context: int,
        depth: int = 6,
        width: int = 384,
        heads: int = 6,
        dropout: float = 0.0,
    ) -> None:
        """Build the network with random weights.

        Args:
            vocabulary: number of different tokens.
            context: the most tokens that it sees at once.
            depth: number of blocks.
            width: numbers that stand for a token; a multiple of `heads`.
            heads: of the attention.
            dropout: part of the activations that is dropped in training, 0 to 1.

        Raises:
            ConfigError: if the sizes make no network.
        """
        super().__init__()
        if min(vocabulary, context, depth, width, heads) < 1 or width % heads:
            raise ConfigError(
                f"model: vocabulary, context, depth, width and heads start at 1, and width = "
                f"{width} has to be a multiple of heads = {heads}"
            )
        if not 0 <= dropout < 1:
            raise ConfigError(f"model.dropout = {dropout}: expected 0 to below 1")
        self.context = context
        self.token_embedding = nn.Embedding(vocabulary, width)
        self.position_embedding = nn.Embedding(context, width)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(_Block(width, heads, dropout) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.token_embedding.weight
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        for name, parameter in self.named_parameters():
            if name.endswith(("attention.output.weight", "mlp.output.weight")):
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * depth))

    def forward(self, tokens: Tensor) -> Tensor:
        """Predict, at every place, the token after it.

        Args:
            tokens: (samples, length), int64, at most `context` of them.

        Returns:
            Logits, (samples, length, vocabulary), float.

        Raises:
            ConfigError: if there are more tokens than `context`.
        """
        length = tokens.shape[1]
        if length > self.context:
            raise ConfigError(
                f"model.context = {self.context}, but the samples have {length} tokens"
            )
        positions = torch.arange(length, device=tokens.device)
        hidden = self.dropout(self.token_embedding(tokens) + self.position_embedding(positions))
        for block in self.blocks:
            hidden = block(hidden)
        logits: Tensor = self.head(self.norm(hidden))
        return logits


class _Block(nn.Module):
    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width)
        self.attention = _Attention(width, heads, dropout)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp = _Perceptron(width, dropout)

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = hidden + self.attention(self.attention_norm(hidden))
        output: Tensor = hidden + self.mlp(self.mlp_norm(hidden))
        return output


class _Attention(nn.Module):
    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.output = nn.Linear(width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, hidden: Tensor) -> Tensor:
        samples, length, width = hidden.shape
        # (samples, length, 3 width) to three of (samples, heads, length, width / heads)
        parts = self.qkv(hidden).view(samples, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        query, key, value = parts.unbind()
        rate = self.dropout.p if self.training else 0.0
        mixed = F.scaled_dot_product_attention(query, key, value, dropout_p=rate, is_causal=True)
        joined = mixed.transpose(1, 2).reshape(samples, length, width)
        output: Tensor = self.dropout(self.output(joined))
        return output


class _Perceptron(nn.Module):
    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.input = nn.Linear(width, 4 * width)
        self.output = nn.Linear(4 * width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, hidden: Tensor) -> Tensor:
        wide = F.gelu(self.input(hidden), approximate="tanh")
        output: Tensor = self.dropout(self.output(wide))
        return output
