"""What all models that are trained have in common: named parts, of which some are frozen."""

from __future__ import annotations

from typing import ClassVar, Self

from torch import nn


class PartedModel(nn.Module):
    """A model of named parts: `loss = model(batch)`.

    `fingerprints` are those of parts that a checkpoint names but does not hold (see weights.py); `brought` are parts
    with another checkpoint's weights, which no name brings back.
    """

    parts: ClassVar[tuple[str, ...]]

    def __init__(self) -> None:
        super().__init__()
        self.frozen: tuple[str, ...] = ()
        self.fingerprints: dict[str, str] = {}
        self.brought: set[str] = set()
        self.checkpointing = False  # of a frozen decoder
        self.reads_features = False  # batches hold features, from a store, not pictures

    def freeze(self, parts: tuple[str, ...]) -> None:
        """Stop training the named parts: no gradient, evaluation mode (dropout off, batch-norm statistics kept)."""
        self.frozen = parts
        for part in parts:
            getattr(self, part).requires_grad_(False)
        self.train(self.training)

    def train(self, mode: bool = True) -> Self:
        """Switch to training mode, frozen parts and batch-norm statistics excepted."""
        super().train(mode)
        for part in self.frozen:
            getattr(self, part).train(mode and self.checkpointing and part == "language")
        for module in self.modules():  # a ResNet's statistics: batch == single, and no bad batch gets into them
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
        return self
