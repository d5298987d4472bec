"""GitModel = VisionEncoder + Mapper + LanguageModel. `forward` is the diagram."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from git_model.architecture import PARTS
from git_model.batch import IGNORE_INDEX, WHOLE, CaptionBatch
from git_model.models.language import Decoding, LanguageModel
from git_model.models.parts import PartedModel
from git_model.tokens import TextCodec

if TYPE_CHECKING:
    from git_model.models.vision import VisionEncoder


class GitModel(PartedModel):
    """Pictures and a prompt in, a loss or text out.

    Args:
        vision: (I,3,H,W) -> (I,N,D).
        mapper: (I,N,D) -> (I,K,E).
        language: the decoder.
        codec: the tokenizer's rules.
    """

    parts = PARTS

    def __init__(self, vision: VisionEncoder, mapper: Any, language: LanguageModel, codec: TextCodec) -> None:
        super().__init__()
        self.vision = vision
        self.mapper = mapper
        self.language = language
        self.codec = codec

    @property
    def num_image_tokens(self) -> int:
        """K, tokens of the language model an image takes."""
        return int(self.mapper.num_tokens)

    def checkpoint_activations(self) -> None:
        """Recompute the decoder's activations in the backward pass: less memory, more time.

        Hugging Face does so only in training mode, which a frozen decoder is not in; it then trains in all but its
        dropout.
        """
        decoder = self.language.model
        decoder.activation_checkpointing_enable({"use_reentrant": False})
        if "language" in self.frozen:
            for name in ("attention_dropout", "attn_pdrop", "resid_pdrop", "embd_pdrop", "dropout"):
                if hasattr(decoder.config, name):
                    setattr(decoder.config, name, 0.0)
            for module in decoder.modules():
                if isinstance(module, nn.Dropout):
                    module.p = 0.0
                for name in ("attention_dropout", "dropout"):  # functional dropout reads a number
                    if isinstance(getattr(module, name, None), float):
                        setattr(module, name, 0.0)
            self.checkpointing = True
            self.train(self.training)

    @property
    def reads_regions(self) -> bool:
        """Whether a box can be given beside a picture's features."""
        return bool(getattr(self.mapper, "reads_regions", False))

    def encode(self, images: Tensor, boxes: Tensor | None = None, box_image: Tensor | None = None) -> Tensor:
        """Return image tokens.

        Args:
            images: pictures (I,3,H,W) uint8, or their features (I,N,D).
            boxes: (Q,4) in fractions of the encoder's input, for a model that `reads_regions`; None = whole pictures.
            box_image: (Q,) the image each box lies in.

        Returns:
            (I,K,E), or (Q,K,E) where there are boxes: a picture's features are made once for all of its own.
        """
        features = images if images.is_floating_point() else self.features(images)  # (I,N,D)
        features = features.to(next(self.mapper.parameters(), features).dtype)
        if not self.reads_regions:
            return self.mapper(features)  # (I,K,E)
        if boxes is None or box_image is None:
            boxes = features.new_tensor([WHOLE]).expand(len(features), -1)  # (I,4)
            box_image = torch.arange(len(features), device=features.device)
        return self.mapper(features, boxes, box_image)  # (Q,K,E)

    def features(self, images: Tensor) -> Tensor:
        """Return the encoder's features: (I,3,H,W) uint8 -> (I,N,D)."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and "vision" not in self.frozen):
            return self.vision(self.vision.normalise(images))  # (I,N,D)

    def forward(self, batch: CaptionBatch) -> Tensor:
        """Return the mean loss over the batch's target tokens.

        An empty batch gives 0, through every part all the same: other processes wait for this one's share of the work.
        """
        empty = len(batch.input_ids) == 0
        if empty:
            batch = self._blank(batch.input_ids.device)
        batch = batch.without_last_column()
        embeds = self.language.embed(batch, self.encode(batch.images, batch.boxes, batch.box_image))  # (R,T,E)
        loss = self.language.loss(embeds, batch)
        return loss * 0.0 if empty else loss

    def _blank(self, device: torch.device) -> CaptionBatch:
        """Return a batch of a black picture, or of features that are 0, and the end of text."""
        size, side = self.num_image_tokens, self.vision.resolution
        image = torch.arange(size + 1, device=device)[None] < size  # (1,T)
        ids = torch.full((1, size + 1), self.codec.pad_id, device=device).masked_fill(
            ~image, self.codec.eos_id
        )  # (1,T)
        picture = torch.zeros(1, 3, side, side, dtype=torch.uint8, device=device)
        features = torch.zeros(1, self.vision.num_tokens, self.vision.dim, device=device)
        return CaptionBatch(
            images=features if self.reads_features else picture,
            image_index=torch.zeros(1, dtype=torch.long, device=device),
            input_ids=ids,
            image_mask=image,
            attention_mask=torch.ones_like(image),
            segments=(~image).long(),
            positions=torch.arange(size + 1, device=device)[None],
            labels=ids.masked_fill(image, IGNORE_INDEX),
            sources=torch.arange(size + 1, device=device)[None] - 1,
        )

    def generate(
        self, batch: CaptionBatch, decoding: Decoding | None = None, tokens: Tensor | None = None
    ) -> list[str]:
        """Return a text for every prompt of a batch; see `generate_scored`."""
        return self.generate_scored(batch, decoding, tokens, scored=False)[0]

    @torch.no_grad()  # no inference_mode: a later step could not use what FSDP gathers in it
    def generate_scored(
        self,
        batch: CaptionBatch,
        decoding: Decoding | None = None,
        tokens: Tensor | None = None,
        scored: bool = True,
    ) -> tuple[list[str], list[float]]:
        """Return a text for every prompt of a batch (`Collator(generate=True)`), row by row, and how sure it is.

        Args:
            batch: what is asked; several prompts a row where the language model `branches`.
            decoding: how.
            tokens: (I,K,E) image tokens, (Q,K,E) of regions, if they were made before: the batch's images are not
                looked at then.
            scored: whether the scores are needed.

        Returns:
            the texts, and the mean log-probability of the tokens of each.
        """
        if len(batch.input_ids) == 0:
            return [], []
        tokens = self.encode(batch.images, batch.boxes, batch.box_image) if tokens is None else tokens
        embeds = self.language.embed(batch, tokens)  # (R,T,E)
        decoding, codec = decoding or Decoding(), self.codec
        ids, scores = self.language.generate(embeds, batch, decoding, codec.eos_id, codec.pad_id, scored)  # (G,new)
        read = decoding.answers.text if decoding.answers else codec.decode
        return [read(row) for row in ids.tolist()], [] if scores is None else scores.tolist()
