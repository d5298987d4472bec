"""Vectors of prompts from several sources: EnsembleRegressor, and the published one that fuses nothing."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from git_model.errors import UserError

log = logging.getLogger(__name__)


class EnsembleRegressor(nn.Module):
    """Any number of sources of any width, each a token, fused by a transformer into one unit vector.

    Each source: LayerNorm -> Linear -> + a learned embedding of the source. A class token sees them all; a source that
    is missing is masked. Pre-norm, batch first: nothing of another row of the batch has an effect.

    Args:
        widths: of the sources, by name, in a fixed order.
        out: F, of the vector.
        width: of the tokens.
        depth: layers.
        heads: of attention.
        dropout: in training.

    Raises:
        UserError: no source, or heads that do not divide the width.
    """

    def __init__(
        self,
        widths: Mapping[str, int],
        out: int = 384,
        width: int = 512,
        depth: int = 3,
        heads: int = 8,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        if not widths:
            raise UserError("an ensemble needs at least one source")
        if width % heads:
            raise UserError(f"width {width} cannot be shared by {heads} heads")
        self.widths = dict(widths)
        self.norms = nn.ModuleList(nn.LayerNorm(w) for w in widths.values())
        self.projections = nn.ModuleList(nn.Linear(w, width) for w in widths.values())
        self.sources = nn.Parameter(torch.randn(len(widths), width) * 0.02)  # (S,W)
        self.start = nn.Parameter(torch.randn(width) * 0.02)  # (W,)
        layer = nn.TransformerEncoderLayer(
            width, heads, 4 * width, dropout, activation="gelu", batch_first=True, norm_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, depth, nn.LayerNorm(width), enable_nested_tensor=False)
        self.head = nn.Linear(width, out)

    def forward(self, features: Sequence[Tensor], missing: Tensor | None = None) -> Tensor:
        """Return unit vectors (B,F).

        Args:
            features: (B,D) of each source, in the order of `widths`; what stands for a missing one does not matter.
            missing: (B,S) bool; None = all are there.
        """
        if len(features) != len(self.widths):
            raise ValueError(f"{len(features)} sources; wanted {', '.join(self.widths)}")
        tokens = []
        for index, (given, norm, project) in enumerate(zip(features, self.norms, self.projections, strict=True)):
            x = given if missing is None else torch.where(missing[:, index, None], 0.0, given)  # (B,D); no nan gets in
            tokens.append(project(norm(x)) + self.sources[index])  # (B,W)
        start = self.start.expand(len(features[0]), -1)
        x = torch.stack([start, *tokens], dim=1)  # (B,1+S,W)
        hidden = None if missing is None else F.pad(missing, (1, 0))  # (B,1+S)
        return F.normalize(self.head(self.encoder(x, src_key_padding_mask=hidden)[:, 0]), dim=-1)  # (B,F)


class PublishedEnsemble(nn.Module):
    """The ensemble of Gateway2745/Image-to-Prompts as its checkpoints need it: for them only, and for comparisons.

    Its encoder takes the sources for the batch and the batch for the sequence, so that the first source alone has an
    effect, and the answer depends on what else is in the batch. `fused=True` turns the axes right (for training anew;
    a checkpoint trained the other way does not get better by it).

    Args:
        fused: with the axes as they were meant.
    """

    def __init__(self, fused: bool = False) -> None:
        super().__init__()
        self.linear1 = nn.Linear(512, 512)  # in the files, of no effect
        self.linear2 = nn.Linear(768, 512)
        self.linear3 = nn.Linear(384, 512)
        # in the files twice: the layer that the encoder's are copies of
        self.encoder_layer = nn.TransformerEncoderLayer(512, 8, batch_first=fused)
        self.encoder = nn.TransformerEncoder(self.encoder_layer, 3, enable_nested_tensor=False)
        self.final = nn.Linear(512, 384)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """Return vectors (B,384), not of length 1, of (B,512), (B,768) and (B,384) features."""
        clip, convnext, interrogated = features
        x = torch.stack([clip, F.elu(self.linear2(convnext)), F.elu(self.linear3(interrogated))], dim=1)  # (B,3,512)
        return self.final(self.encoder(x)[:, 0])


def load_published(state: Mapping[str, Any]) -> PublishedEnsemble:
    """Return the published ensemble with the weights of one of its checkpoints, and say what is wrong with it.

    Args:
        state: the state dict, with or without Lightning's `model.` before each name.

    Raises:
        UserError: names or shapes that are not its.
    """
    found = {name.removeprefix("model."): value for name, value in state.items() if isinstance(value, Tensor)}
    model = PublishedEnsemble().eval()
    own = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    given = {name: tuple(value.shape) for name, value in found.items()}
    if own != given:
        wrong = sorted(name for name in own.keys() | given.keys() if own.get(name) != given.get(name))
        raise UserError(f"these are no weights of the published ensemble: {', '.join(wrong[:5])}")
    model.load_state_dict(found)
    log.warning(
        "the published ensemble's attention runs across the batch: of its three sources the first alone has an effect, "
        "and its answers depend on the other rows of the batch; give it one row at a time, or train EnsembleRegressor"
    )
    return model


def cosine_loss(predicted: Tensor, wanted: Tensor) -> Tensor:
    """Return the mean of 1 - cosine of (B,F) and (B,F)."""
    return 1 - F.cosine_similarity(predicted, wanted, dim=-1).mean()
