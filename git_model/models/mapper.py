"""MAPPERS: image features (I,N,D) -> tokens of the language model (I,K,E).

Every mapper has `num_tokens` (K) and takes `(dim_in, dim_out, num_in, config)`; which features each can read
is checked when the config is read (`architecture.MAPPER_FEATURES`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from git_model.architecture import MapperConfig
from git_model.errors import UserError

Builder = Callable[[int, int, int, MapperConfig], nn.Module]


class PerToken(nn.Module):
    """Maps each vision token to one token of the language model.

    Args:
        num_in: N, vision tokens; K = N.
        layers: applied to the last axis, D -> E.
    """

    def __init__(self, num_in: int, *layers: nn.Module) -> None:
        super().__init__()
        self.num_tokens = num_in
        self.net = nn.Sequential(*layers)

    def forward(self, features: Tensor) -> Tensor:
        """(I,N,D) -> (I,N,E)."""
        return self.net(features)  # (I,N,E)


class PooledMlp(nn.Module):
    """One pooled vector to K tokens: two linear layers with a Tanh, D -> K*E/2 -> K*E (ClipCap, the original)."""

    def __init__(self, dim_in: int, dim_out: int, num_tokens: int) -> None:
        super().__init__()
        self.num_tokens = num_tokens
        hidden = num_tokens * dim_out // 2
        self.net = nn.Sequential(nn.Linear(dim_in, hidden), nn.Tanh(), nn.Linear(hidden, num_tokens * dim_out))

    def forward(self, features: Tensor) -> Tensor:
        """(I,1,D) -> (I,K,E)."""
        return self.net(features[:, 0]).unflatten(-1, (self.num_tokens, -1))  # (I,K,E)


class Grid(nn.Module):
    """Every cell to one token, told where it is: LayerNorm, linear, plus a learned embedding of the cell.

    A ResNet's map carries no position of its own; without the embedding the language model could not tell left
    from right.
    """

    def __init__(self, dim_in: int, dim_out: int, num_in: int) -> None:
        super().__init__()
        self.num_tokens = num_in
        self.norm = nn.LayerNorm(dim_in)
        self.linear = nn.Linear(dim_in, dim_out)
        self.position = nn.Parameter(torch.randn(num_in, dim_out) * 0.3)  # (N,E), half as strong as what it is added to

    def forward(self, features: Tensor) -> Tensor:
        """(I,N,D) -> (I,N,E)."""
        return self.linear(self.norm(features)) + self.position  # (I,N,E)


class Transformer(nn.Module):
    """ClipCap's mapper: features and K learned constants through an encoder; the constants' outputs are the tokens.

    A pooled vector is first unfolded to K tokens (ClipCap), a grid gives one per cell. Batch-first: images never
    see each other. Projected to the LM width.
    """

    def __init__(self, dim_in: int, dim_out: int, num_in: int, config: MapperConfig) -> None:
        super().__init__()
        width = max(config.heads, round(min(dim_in, dim_out) / config.heads) * config.heads)
        self.num_tokens = config.tokens
        self.unfold = config.tokens if num_in == 1 else 1
        self.enter = nn.Linear(dim_in, width * self.unfold)
        self.constants = nn.Parameter(torch.randn(config.tokens, width) * width**-0.5)  # (K,width)
        layer = nn.TransformerEncoderLayer(
            width, config.heads, 2 * width, config.dropout, "gelu", batch_first=True, norm_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, config.depth, norm=nn.LayerNorm(width), enable_nested_tensor=False)
        self.leave = nn.Linear(width, dim_out)

    def forward(self, features: Tensor) -> Tensor:
        """(I,N,D) -> (I,K,E)."""
        tokens = self.enter(features)  # (I,N,width*unfold)
        tokens = tokens.unflatten(-1, (self.unfold, -1)).flatten(1, 2)  # (I,N*unfold,width)
        constants = self.constants.expand(len(tokens), -1, -1)  # (I,K,width)
        mixed = self.encoder(torch.cat([tokens, constants], dim=1))  # (I,N*unfold+K,width)
        return self.leave(mixed[:, -self.num_tokens :])  # (I,K,E)


def _none(dim_in: int, dim_out: int, num_in: int, config: MapperConfig) -> nn.Module:
    if dim_in != dim_out:
        raise UserError(
            f"mapper 'none' hands the features over as they are, but the encoder is {dim_in} wide and the language "
            f"model {dim_out}; choose 'linear' or 'linearLn'"
        )
    return PerToken(num_in, nn.Identity())


MAPPERS: dict[str, Builder] = {
    "none": _none,
    "linear": lambda d, e, n, c: PerToken(n, nn.Linear(d, e)),
    "linearLn": lambda d, e, n, c: PerToken(n, nn.Linear(d, e), nn.LayerNorm(e)),  # GIT
    "mlp": lambda d, e, n, c: PooledMlp(d, e, c.tokens),
    "grid": lambda d, e, n, c: Grid(d, e, n),
    "transformer": Transformer,
    "mlp2x_gelu": lambda d, e, n, c: PerToken(n, nn.Linear(d, e), nn.GELU(), nn.Linear(e, e)),  # LLaVA 1.5
}


def build_mapper(config: MapperConfig, dim_in: int, dim_out: int, num_in: int) -> Any:
    """Return the mapper of `config`.

    Args:
        config: which one, and its sizes.
        dim_in: D, width of the vision features.
        dim_out: E, width of the language model.
        num_in: N, vision tokens an image.

    Raises:
        UserError: 'none' between different widths.
    """
    return MAPPERS[config.type](dim_in, dim_out, num_in, config)
