"""Vectors of prompts: PromptRegressor from pictures, EnsembleRegressor from sources; the published, faulty one."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from git_model.architecture import REGRESSORS
from git_model.batch import RegressionBatch
from git_model.errors import UserError
from git_model.models.parts import PartedModel

if TYPE_CHECKING:
    from git_model.models.vision import VisionEncoder

log = logging.getLogger(__name__)


class PromptRegressor(PartedModel):
    """A head on an image encoder: picture -> the vector of the text that it was made from.

    Args:
        vision: (I,3,H,W) -> (I,N,D); several tokens are averaged.
        out: F, of the vector.
        hidden: width of a layer between; 0 = the head is linear.
    """

    parts = REGRESSORS["head"]

    def __init__(self, vision: VisionEncoder, out: int = 384, hidden: int = 0) -> None:
        super().__init__()
        self.vision = vision
        between = [nn.Linear(vision.dim, hidden), nn.GELU()] if hidden else []
        self.head = nn.Sequential(nn.LayerNorm(vision.dim), *between, nn.Linear(hidden or vision.dim, out))

    def features(self, images: Tensor) -> Tensor:
        """Return the encoder's features: (I,3,H,W) uint8 -> (I,N,D)."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and "vision" not in self.frozen):
            return self.vision(self.vision.normalise(images))  # (I,N,D)

    def vectors(self, images: Tensor) -> Tensor:
        """Return unit vectors (I,F) of pictures (I,3,H,W) uint8, or of their features (I,N,D)."""
        features = images if images.is_floating_point() else self.features(images)  # (I,N,D)
        pooled = features.mean(dim=1).to(next(self.head.parameters()).dtype)  # (I,D)
        return F.normalize(self.head(pooled).float(), dim=-1)  # (I,F)

    def forward(self, batch: RegressionBatch) -> Tensor:
        """Return the mean of 1 - cosine; 0 of an empty batch, through every part all the same."""
        if len(batch.wanted):
            return cosine_loss(self.vectors(batch.images)[batch.which], batch.wanted)
        side, device = self.vision.resolution, batch.wanted.device
        blank = torch.zeros(1, 3, side, side, dtype=torch.uint8, device=device)
        if self.reads_features:
            blank = torch.zeros(1, self.vision.num_tokens, self.vision.dim, device=device)
        return self.vectors(blank).sum() * 0.0


class Fusion(nn.Module):
    """Sources as tokens, with a class token before them, through a transformer: S x (B,D) -> (B,W).

    Each source: LayerNorm -> Linear -> + a learned embedding of the source; see `EnsembleRegressor`.
    """

    def __init__(self, widths: Mapping[str, int], width: int, depth: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(w) for w in widths.values())
        self.projections = nn.ModuleList(nn.Linear(w, width) for w in widths.values())
        self.sources = nn.Parameter(torch.randn(len(widths), width) * 0.02)  # (S,W)
        self.start = nn.Parameter(torch.randn(width) * 0.02)  # (W,)
        layer = nn.TransformerEncoderLayer(
            width, heads, 4 * width, dropout, activation="gelu", batch_first=True, norm_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, depth, nn.LayerNorm(width), enable_nested_tensor=False)

    def forward(self, features: Sequence[Tensor], missing: Tensor | None) -> Tensor:
        """Return (B,W) of S features (B,D); `missing` (B,S) are masked."""
        tokens = []
        for index, (given, norm, project) in enumerate(zip(features, self.norms, self.projections, strict=True)):
            x = given if missing is None else torch.where(missing[:, index, None], 0.0, given)  # (B,D); no nan gets in
            tokens.append(project(norm(x)) + self.sources[index])  # (B,W)
        start = self.start.expand(len(features[0]), -1)
        x = torch.stack([start, *tokens], dim=1)  # (B,1+S,W)
        hidden = None if missing is None else F.pad(missing, (1, 0))  # (B,1+S)
        return self.encoder(x, src_key_padding_mask=hidden)[:, 0]  # (B,W)


class EnsembleRegressor(PartedModel):
    """Any number of sources of any width, each a token, fused by a transformer into one unit vector.

    A class token sees them all; a source that is missing is masked. Pre-norm, batch first: nothing of another row of
    the batch has an effect.

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

    parts = REGRESSORS["ensemble"]

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
        self.fusion = Fusion(widths, width, depth, heads, dropout)
        self.head = nn.Linear(width, out)

    def vectors(self, features: Sequence[Tensor], missing: Tensor | None = None) -> Tensor:
        """Return unit vectors (B,F).

        Args:
            features: (B,D) of each source, in the order of `widths`; what stands for a missing one does not matter.
            missing: (B,S) bool; None = all are there.
        """
        if len(features) != len(self.widths):
            raise ValueError(f"{len(features)} sources; wanted {', '.join(self.widths)}")
        return F.normalize(self.head(self.fusion(features, missing)).float(), dim=-1)  # (B,F)

    def forward(self, batch: RegressionBatch) -> Tensor:
        """Return the mean of 1 - cosine; 0 of an empty batch, through every part all the same."""
        if len(batch.wanted):
            return cosine_loss(self.vectors(batch.inputs, batch.missing)[batch.which], batch.wanted)
        return self.vectors([batch.wanted.new_zeros(1, width) for width in self.widths.values()]).sum() * 0.0


class PublishedEnsemble(nn.Module):
    """The ensemble of Gateway2745/Image-to-Prompts as its checkpoints need it: for them only, and for comparisons.

    Its encoder takes the sources for the batch and the batch for the sequence, so that the first source alone has an
    effect, and the answer depends on what else is in the batch. `fused=True` turns the axes right (for training anew;
    a checkpoint trained the other way does not get better by it).

    Args:
        fused: with the axes as they were meant.
    """

    widths: ClassVar[Mapping[str, int]] = {"clip": 512, "convnext": 768, "interrogated": 384}

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
