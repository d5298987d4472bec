"""The small image encoder (convolutions and transformer blocks, trained from nothing on a CPU).

Before it, what all encoders share: the plan of one, its layers and input side, position tables, feature maps.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from git_model.architecture import VisionConfig
from git_model.errors import UserError

# about as strong as the stem's output, beside which ViT's 0.02 is faint
POSITION_STD = 0.5

Stats = tuple[tuple[float, ...], tuple[float, ...]]  # mean and standard deviation of R, G, B in 0..1
HALF_STATS: Stats = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
SMALL_RESOLUTION = 64


@dataclass(frozen=True)
class VisionFacts:
    """What an encoder gives: D, N and the input side in pixels."""

    dim: int
    num_tokens: int
    resolution: int


@dataclass(frozen=True)
class EncoderPlan:
    """An encoder found, its weights not yet loaded."""

    make: Callable[[], nn.Module]  # random weights, on the default device
    load: Callable[[], nn.Module]  # its own weights
    facts: VisionFacts
    stats: Stats
    unread: frozenset[str] = frozenset()  # parameters the features do not depend on


class QuickGELU(nn.Module):
    """CLIP's x * sigmoid(1.702 x), by way of torch's SiLU: it keeps one tensor for the backward pass instead of two."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the activation of any tensor."""
        return nn.functional.silu(1.702 * x) / 1.702


def first(value: Any) -> Any:
    """Return the first of a list (height of a size), a number as it is."""
    return value[0] if isinstance(value, list | tuple) else value


def brief(error: BaseException) -> str:
    """Return an error's words on one line."""
    return " ".join(str(error).split())[:200] or type(error).__name__


def layer_numbers(config: VisionConfig, count: int) -> tuple[int, ...]:
    """Return `config.layers` counted from 1."""
    for layer in config.layers:
        if layer == 0 or abs(layer) > count:
            raise UserError(f"'{config.name}' has no layer {layer}; one of: 1..{count} or -{count}..-1")
    return tuple(layer if layer > 0 else count + 1 + layer for layer in config.layers)


def input_side(config: VisionConfig, own: int, step: int) -> int:
    """Return the input side: the encoder's own, or the configured one if whole cells cover it."""
    side = own if config.resolution is None else config.resolution
    if side != own and side % step:
        near = f"{max(side // step, 1) * step} or {(side // step + 1) * step}"
        raise UserError(f"resolution {side} is no multiple of {step} px, a cell of '{config.name}'; try {near}")
    return side


def resize_positions(table: Tensor, cells: tuple[int, int]) -> Tensor:
    """Return a square position table stretched to another grid, bicubic as transformers does for CLIP.

    Args:
        table: (g*g,D), row-major over a g x g grid.
        cells: rows and columns wanted.

    Returns:
        (rows*columns,D) in the table's dtype; the table itself when the grid is the same.
    """
    side = math.isqrt(len(table))
    if cells == (side, side):
        return table
    grid = table.float().reshape(1, side, side, -1).permute(0, 3, 1, 2)  # (1,D,g,g)
    grid = F.interpolate(grid, size=cells, mode="bicubic", align_corners=False)  # (1,D,rows,columns)
    return grid.flatten(2)[0].T.to(table.dtype)  # (rows*columns,D)


def join_maps(maps: list[Tensor], cells: tuple[int, int]) -> Tensor:
    """Average-pool feature maps [(I,C,h,w)] to one grid and join them along the channel: (I,N,D)."""
    pooled = [F.adaptive_avg_pool2d(m, cells) for m in maps]  # (I,C,rows,columns) each
    return torch.cat(pooled, dim=1).flatten(2).transpose(1, 2)  # (I,N,D)


def _normed(before: int, after: int, stride: int) -> tuple[nn.Conv2d, nn.GroupNorm]:
    """A 3x3 convolution with GroupNorm: no batch statistics, so batch == single."""
    convolution = nn.Conv2d(before, after, kernel_size=3, stride=stride, padding=1)
    return convolution, nn.GroupNorm(math.gcd(8, after), after)


class _Residual(nn.Module):
    """x + two convolutions, which begin as nothing."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        first, last = _normed(channels, channels, 1), _normed(channels, channels, 1)
        self.body = nn.Sequential(*first, nn.GELU(), *last)
        nn.init.zeros_(last[1].weight)

    def forward(self, x: Tensor) -> Tensor:
        """Return (I,C,h,w) as it came in."""
        return F.gelu(x + self.body(x))


def _stem(channels: tuple[int, ...], width: int, residual: int) -> nn.Sequential:
    """Convolutions of stride 2, with residual blocks between them: the wider view tells shapes apart."""
    steps: list[nn.Module] = []
    for number, (before, after) in enumerate(zip((3, *channels), channels, strict=False)):
        steps += [*_normed(before, after, 2), nn.GELU()]
        if number:
            steps += [_Residual(after) for _ in range(residual)]
    if channels[-1] != width:
        steps.append(nn.Conv2d(channels[-1], width, kernel_size=1))
    return nn.Sequential(*steps)


class SmallVision(nn.Module):
    """Convolutional stem, learned 2-D positions, pre-norm transformer blocks, LayerNorm.

    Args:
        width: D, of the blocks.
        depth: number of blocks.
        heads: attention heads of a block.
        stem: output channels of the stride-2 convolutions.
        residual: blocks of two convolutions after each of these but the first.
        dropout: of the blocks.
        resolution: side in pixels the position table is made for; other inputs interpolate it.
        features: 'pooled' (mean over the cells) or 'grid'.
        layers: raw outputs of these blocks (1-based), joined along D, instead of the last, normed one.
    """

    def __init__(
        self,
        width: int,
        depth: int,
        heads: int,
        stem: tuple[int, ...],
        residual: int,
        dropout: float,
        resolution: int,
        features: str,
        layers: tuple[int, ...] = (),
    ) -> None:
        super().__init__()
        self.features, self.layers = features, layers
        side = resolution // 2 ** len(stem)
        self.stem = _stem(stem, width, residual)
        self.positions = nn.Parameter(torch.empty(side * side, width))
        nn.init.normal_(self.positions, std=POSITION_STD)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(
                width, heads, 4 * width, dropout, activation="gelu", batch_first=True, norm_first=True
            )
            for _ in range(max(layers, default=depth))  # blocks above the last one read would be dead weight
        )
        self.norm = nn.Identity() if layers else nn.LayerNorm(width)

    def forward(self, images: Tensor) -> Tensor:
        """Return (I,1,D) pooled or (I,N,D) grid features of normalised images (I,3,H,W)."""
        x = self.stem(images)  # (I,D,h,w)
        rows, columns = x.shape[-2:]
        x = x.flatten(2).transpose(1, 2)  # (I,N,D)
        x = x + resize_positions(self.positions, (rows, columns)).to(x.dtype)  # (I,N,D)
        states: dict[int, Tensor] = {}
        for i, block in enumerate(self.blocks, 1):
            x = block(x)  # (I,N,D)
            if i in self.layers:
                states[i] = x
        if self.layers:
            return torch.cat([states[i] for i in self.layers], dim=-1)  # (I,N,D)
        x = self.norm(x)  # (I,N,D)
        return x if self.features == "grid" else x.mean(dim=1, keepdim=True)


def small_plan(config: VisionConfig) -> EncoderPlan:
    """Plan a small encoder."""
    small = config.small
    cell = 2 ** len(small.stem)
    side = input_side(config, max(SMALL_RESOLUTION, cell), cell)
    shape = (small.width, small.depth, small.heads, small.stem, small.residual, small.dropout)
    layers = layer_numbers(config, small.depth)

    def make() -> nn.Module:
        return SmallVision(*shape, side, config.features, layers)

    num_tokens = (side // cell) ** 2 if config.features == "grid" else 1
    facts = VisionFacts(small.width * (len(layers) or 1), num_tokens, side)
    return EncoderPlan(make, make, facts, HALF_STATS)
