"""How a box in a picture becomes features that a mapper can read: roi, query, prefix. A whole picture is a box, too.

    features (I,N,D), boxes (Q,4), box_image (Q,) -> reader -> (Q,N',D') -> mapper -> (Q,K,E)

The picture's features are made once for all its boxes. The fourth way, 'crop', needs none of this: the box is cut out
of the picture and encoded by itself (`datasets/images.py`).
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from git_model.architecture import RegionConfig
from git_model.errors import UserError

SAMPLES = 2  # points a side of a cell that are averaged, as RoIAlign does (He et al. 2017)


class FourierPositions(nn.Module):
    """Positions as sines and cosines of random projections (Tancik et al. 2020; the code of SAM and Click4Caption).

    Args:
        width: F, of a code; even.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("gaussian", torch.randn(2, width // 2))  # (2,F/2), saved: what was learned depends on it

    def forward(self, points: Tensor) -> Tensor:
        """Return the codes (...,F) of points (...,2) in fractions of the picture."""
        angles = 2 * math.pi * ((2 * points - 1) @ self.get_buffer("gaussian"))  # (...,F/2)
        return torch.cat([angles.sin(), angles.cos()], dim=-1)


class BoxEncoder(nn.Module):
    """A box as two tokens, its top left and its bottom right corner: code of the place plus what corner it is.

    Args:
        width: of a token; even.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.positions = FourierPositions(width)
        self.corner = nn.Parameter(torch.randn(2, width) * 0.02)

    def forward(self, boxes: Tensor) -> Tensor:
        """(Q,4) -> (Q,2,width)."""
        return self.positions(boxes.unflatten(1, (2, 2))) + self.corner  # (Q,2,width)


class RoiReader(nn.Module):
    """The grid's features under a box, pooled to n x n cells, then the box's two corners.

    Args:
        dim: D of the features.
        cells: n.
    """

    def __init__(self, dim: int, cells: int) -> None:
        super().__init__()
        self.dim, self.num_tokens, self.cells = dim, cells * cells + 2, cells
        self.corners = BoxEncoder(dim + dim % 2)
        self.enter = nn.Linear(dim + dim % 2, dim)

    def forward(self, features: Tensor, boxes: Tensor, box_image: Tensor) -> Tensor:
        """Return (Q,n*n+2,D); see `RegionMapper`."""
        side = math.isqrt(features.shape[1])
        maps = features.transpose(1, 2).unflatten(2, (side, side))[box_image]  # (Q,D,side,side)
        points = self.cells * SAMPLES
        at = (torch.arange(points, device=boxes.device) + 0.5) / points  # (n*s,)
        low, high = boxes[:, :2, None], boxes[:, 2:, None]  # (Q,2,1)
        x, y = (low + (high - low) * at).mul(2).sub(1).to(maps.dtype).unbind(1)  # (Q,n*s) each, -1..1
        where = torch.stack(torch.broadcast_tensors(x[:, None, :], y[:, :, None]), dim=-1)  # (Q,n*s,n*s,2)
        sampled = F.grid_sample(maps, where, mode="bilinear", padding_mode="border", align_corners=False)
        pooled = F.avg_pool2d(sampled, SAMPLES).flatten(2).transpose(1, 2)  # (Q,n*n,D)
        return torch.cat([pooled, self.enter(self.corners(boxes.to(maps.dtype)))], dim=1)


class PrefixReader(nn.Module):
    """All of the grid, then the box's two corners: the language model has to look at the right place by itself."""

    def __init__(self, dim: int, num_in: int) -> None:
        super().__init__()
        self.dim, self.num_tokens = dim, num_in + 2
        self.corners = BoxEncoder(dim + dim % 2)
        self.enter = nn.Linear(dim + dim % 2, dim)

    def forward(self, features: Tensor, boxes: Tensor, box_image: Tensor) -> Tensor:
        """Return (Q,N+2,D); see `RegionMapper`."""
        corners = self.enter(self.corners(boxes.to(features.dtype)))  # (Q,2,D)
        return torch.cat([features[box_image], corners], dim=1)


class QueryReader(nn.Module):
    """Click4Caption's: learned queries and two corners ask the grid, whose cells are told again where they are.

    A Q-Former (BLIP-2; transformers' own) in which every second layer attends to the grid; the corners' outputs are
    dropped.

    Args:
        dim: D of the features.
        config: of the queries.
    """

    def __init__(self, dim: int, config: RegionConfig) -> None:
        super().__init__()
        from transformers import Blip2QFormerConfig, Blip2QFormerModel

        self.dim, self.num_tokens = config.width, config.queries
        self.corners = BoxEncoder(config.width)
        self.place = nn.Linear(config.width, dim)
        self.queries = nn.Parameter(torch.randn(config.queries, config.width) * 0.02)
        settings: Any = Blip2QFormerConfig(
            hidden_size=config.width,
            num_hidden_layers=config.depth,
            num_attention_heads=config.heads,
            intermediate_size=4 * config.width,
            encoder_hidden_size=dim,
            cross_attention_frequency=2,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
        self.former: Any = Blip2QFormerModel(settings)

    def forward(self, features: Tensor, boxes: Tensor, box_image: Tensor) -> Tensor:
        """Return (Q,queries,width); see `RegionMapper`."""
        side = math.isqrt(features.shape[1])
        middle = (torch.arange(side, device=features.device) + 0.5) / side  # (side,)
        y, x = torch.meshgrid(middle, middle, indexing="ij")
        cells = torch.stack([x, y], dim=-1).flatten(0, 1).to(features.dtype)  # (N,2)
        told = features + self.place(self.corners.positions(cells))  # (I,N,D)
        asking = self.queries.expand(len(boxes), -1, -1)  # (Q,queries,width)
        asking = torch.cat([asking, self.corners(boxes.to(features.dtype))], dim=1)
        answers = self.former(query_embeds=asking, encoder_hidden_states=told[box_image]).last_hidden_state
        return answers[:, : self.num_tokens]

    def warm_start(self, path: str) -> list[str]:
        """Take what fits of a BLIP-2 or BERT model in Hugging Face's layout; return the names that stayed as they were.

        Args:
            path: a folder with `*.safetensors` or `pytorch_model*.bin`, or such a file.

        Raises:
            UserError: nothing there, or nothing in it fits.
        """
        own = self.state_dict()
        found: dict[str, Tensor] = {}
        for name, tensor in _weights(Path(path)):
            to = _our_name(name)
            if to in own and own[to].shape == tensor.squeeze(0).shape:
                found[to] = tensor.squeeze(0)
        if not any(name.startswith("former.") for name in found):
            wanted = f"Q-Former layers of width {self.dim}"
            raise UserError(f"region.warm_start {path}: no {wanted} in it; give a BLIP-2 or BERT folder of that width")
        self.load_state_dict({**own, **found})
        return sorted(own.keys() - found.keys())


class RegionMapper(nn.Module):
    """A mapper behind what comes between it and the encoder: a norm of averaged layers, a reader of boxes, or both.

    Args:
        mapper: (I,N,D) -> (I,K,E).
        reader: of boxes; None where the mapper takes whole pictures.
        norm: of the features' last axis; None = as they are.
    """

    def __init__(self, mapper: Any, reader: Any = None, norm: nn.Module | None = None) -> None:
        super().__init__()
        self.norm, self.reader, self.mapper = norm, reader, mapper
        self.num_tokens: int = mapper.num_tokens

    @property
    def reads_regions(self) -> bool:
        """Whether it takes boxes."""
        return self.reader is not None

    def forward(self, features: Tensor, boxes: Tensor | None = None, box_image: Tensor | None = None) -> Tensor:
        """Return the image tokens.

        Args:
            features: (I,N,D), N a square number.
            boxes: (Q,4) left, top, right, bottom in fractions of the picture.
            box_image: (Q,) the image each lies in.

        Returns:
            (Q,K,E), or (I,K,E) without a reader.
        """
        features = features if self.norm is None else self.norm(features)
        return self.mapper(features if self.reader is None else self.reader(features, boxes, box_image))


def build_reader(config: RegionConfig, dim: int, num_in: int) -> Any:
    """Return the reader of `config.mode`; None where boxes are cut out before the encoder, or not read at all.

    Args:
        config: how boxes are read.
        dim: D of the features.
        num_in: N of the features.

    Raises:
        UserError: the features are no square grid.
    """
    if config.mode not in ("roi", "query", "prefix"):
        return None
    if math.isqrt(num_in) ** 2 != num_in:
        raise UserError(f"--region {config.mode} needs a square grid of features, the encoder gives {num_in} tokens")
    if config.mode == "roi":
        return RoiReader(dim, config.cells)
    return PrefixReader(dim, num_in) if config.mode == "prefix" else QueryReader(dim, config)


def _weights(path: Path) -> list[tuple[str, Tensor]]:
    files = [path] if path.is_file() else sorted(path.glob("*.safetensors")) or sorted(path.glob("pytorch_model*.bin"))
    if not files:
        raise UserError(f"region.warm_start {path}: no *.safetensors or pytorch_model*.bin there")
    from safetensors.torch import load_file

    found: list[tuple[str, Tensor]] = []
    for file in files:
        try:
            state = load_file(file) if file.suffix == ".safetensors" else torch.load(file, "cpu", weights_only=True)
        except Exception as error:  # whatever the readers of weight files say of a bad one
            raise UserError(f"region.warm_start {file} cannot be read: {type(error).__name__}") from error
        found += state.items()
    return found


def _our_name(name: str) -> str:
    """Return the name here of a tensor of BLIP-2 (`qformer...`, `query_tokens`) or BERT (`bert.encoder...`)."""
    if name == "query_tokens":
        return "queries"
    if "qformer." in name:
        return "former." + name.split("qformer.", 1)[1]
    name = name.removeprefix("bert.")
    for bert, ours in (
        ("embeddings.LayerNorm.gamma", "layernorm.weight"),
        ("embeddings.LayerNorm.beta", "layernorm.bias"),
        ("embeddings.LayerNorm.", "layernorm."),
        (".attention.self.", ".attention.attention."),
        (".intermediate.", ".intermediate_query."),
    ):
        name = name.replace(bert, ours)
    if ".attention." not in name:
        name = name.replace(".output.", ".output_query.")
    return "former." + name.replace(".gamma", ".weight").replace(".beta", ".bias")
