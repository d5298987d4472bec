"""What the models of a paragraph say of a picture: its caption, its regions, what the largest of them are."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from git_model.errors import UserError
from git_model.tasks.dense import FourNumbers, Said, best, describe, shown_boxes
from git_model.tasks.levels import Levels, Thing
from git_model.tasks.options import ModelOptions
from git_model.tasks.values import Range
from git_model.tasks.writers import PROMPT, Paragraph, compose, template

if TYPE_CHECKING:
    from PIL.Image import Image

    from git_model.models.decoding import Decoding
    from git_model.models.phrases import PhraseBank
    from git_model.models.proposals import Proposed, RegionProposer
    from git_model.tasks.captioner import GitCaptioner, PublishedCaptioner


@dataclass(frozen=True, kw_only=True)
class RegionOptions:
    """Which regions are told of, and by whom."""

    proposals: Literal["grid", "graph", "sam"] = "grid"
    sam_model: str = "facebook/sam-vit-base"
    top_k: Annotated[int, Range(0, 1000)] = 8
    overlap: Annotated[float, Range(0, 1)] = 0.5
    caption_model: str | None = None
    region_model: str | None = None
    whole: bool = True
    largest: Annotated[int, Range(0, 100)] = 5
    phrases: str | None = None
    towers: str = "ViT-L/14"


@dataclass(frozen=True, kw_only=True)
class WriterOptions:
    """Who writes the paragraph."""

    writer: Literal["template", "decoder", "openai"] = "template"
    writer_prompt: str | None = None
    language: str = "English"
    base_url: str = "https://api.openai.com/v1"
    writer_model: str = "gpt-4o-mini"
    key_env: str = "OPENAI_API_KEY"
    timeout: Annotated[float, Range(0.01, 3600)] = 30.0
    retries: Annotated[int, Range(0, 20)] = 2

    def form(self) -> str:
        """Return the prompt's form: the file's, where one is named; raises UserError where it cannot be read."""
        if self.writer_prompt is None:
            return PROMPT
        try:
            return Path(self.writer_prompt).read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise UserError(f"cannot read writer_prompt '{self.writer_prompt}': {error}") from error


@dataclass(frozen=True)
class Told:
    """What is known of a picture, and its paragraph."""

    levels: Levels
    paragraph: Paragraph
    scores: tuple[float | None, ...]

    def record(self) -> dict[str, Any]:
        """Return it as JSON can hold it: boxes in pixels of the upright picture."""
        listed = zip(self.levels.regions, self.scores, strict=True)
        said: dict[str, Any] = {"paragraph": self.paragraph.text, "writer": self.paragraph.writer}
        if self.paragraph.why:
            said["why"] = self.paragraph.why
        said |= {"size": list(self.levels.size), "global": self.levels.caption}
        said["regions"] = [{"rect": list(t.box), "caption": t.text, "conf": score} for t, score in listed]
        said["semantics"] = [{"rect": list(t.box), "caption": t.text} for t in self.levels.semantics]
        return said


class Teller:
    """The models of a task, and what they say of a picture; see `image_to_paragraph` for the arguments."""

    def __init__(
        self,
        model: ModelOptions,
        regions: RegionOptions,
        writing: WriterOptions,
        form: str,
        decoding: Decoding,
        batch_size: int = 32,
        opened: dict[str, GitCaptioner | PublishedCaptioner] | None = None,
    ) -> None:
        self.options, self.batch_size = regions, batch_size
        self.settings, self.until = decoding, math.inf  # max_time is a picture's, of all its texts
        self.writer_name, self.language, self.writer = writing.writer, writing.language, template
        if writing.writer == "openai":  # before any model: a missing key is told at once
            from git_model.tasks.writers import Endpoint

            self.writer = Endpoint(
                writing.base_url, writing.writer_model, writing.key_env, writing.timeout, writing.retries, form,
                writing.language,
            )  # fmt: skip
        from git_model.datasets.kept import cache_folder
        from git_model.models.phrases import TwoTowers, read_phrases
        from git_model.tasks.bank import kept_bank
        from git_model.tasks.opening import pick_device

        names = read_phrases(regions.phrases) if regions.phrases else None
        opened = dict(opened or {})  # by path

        def captioner(name: str | None) -> GitCaptioner | PublishedCaptioner:
            chosen = ModelOptions(model_path=name, device=model.device) if name else model
            if chosen.model_path not in opened:
                opened[chosen.model_path] = chosen.open()
            return opened[chosen.model_path]

        self.of_regions, self.device = captioner(regions.region_model), pick_device(model.device)
        self.of_whole = captioner(regions.caption_model) if regions.whole else None
        if writing.writer == "decoder":
            from git_model.tasks.writers import Itself

            self.writer = Itself(captioner(None), self.decoding, form, writing.language)
        self.bank: PhraseBank | None = None
        if names:
            self.bank = kept_bank(names, TwoTowers(regions.towers, self.device), cache_folder() / "phrases")
        self.proposer: RegionProposer | None = None

    def decoding(self) -> Decoding:
        """Return how texts are searched for, in the time that is left for this picture."""
        left = None if self.settings.max_time is None else max(0.0, self.until - time.monotonic())
        return replace(self.settings, max_time=left)

    def told(self, picture: Image, boxes: Sequence[FourNumbers] | None = None) -> Told:
        """Return a picture's levels and paragraph.

        Args:
            picture: upright, RGB.
            boxes: of its regions; None = proposed ones.

        Raises:
            ImageError, UserError: a box that is none of this picture.
        """
        size = (picture.width, picture.height)
        self.until = time.monotonic() + (math.inf if self.settings.max_time is None else self.settings.max_time)
        if boxes is None:
            proposed = self._proposed(picture)
            if reader := self._region_reader():
                shown = set(shown_boxes(reader, picture, [box for box, _ in proposed]))
                proposed = [(box, mask) for box, mask in proposed if box in shown]
            said = best(self.of_boxes(picture, [box for box, _ in proposed]), self.options.top_k, self.options.overlap)
        else:
            from git_model.datasets.regions import in_picture

            wanted = [in_picture(box, *size) for box in boxes]
            proposed = [(_whole_pixels(box), None) for box in wanted]
            said = self.of_boxes(picture, wanted)
        caption = self._said(self.of_whole, [picture])[0] if self.of_whole else ""
        things = tuple(Thing(s.box, s.text) for s in said)
        levels = Levels(size, caption, things, self._semantics(picture, proposed))
        scores = tuple(None if s.score is None else round(s.score, 6) for s in said)
        return Told(levels, compose(levels, picture, self.writer_name, self.writer, self.language), scores)

    def of_boxes(self, picture: Image, boxes: Sequence[FourNumbers]) -> list[Said]:
        """Return a text for each box, by the region model: what is in the box alone, where it knows of no boxes."""
        if reader := self._region_reader():
            return describe(reader, picture, boxes, self.decoding(), batch_size=self.batch_size)
        texts = self._said(self.of_regions, [picture.crop(_whole_pixels(box)) for box in boxes])
        return [Said(box, text, None) for box, text in zip(boxes, texts, strict=True)]

    def _region_reader(self) -> GitCaptioner | None:
        """Return the region model if it reads boxes."""
        from git_model.tasks.captioner import GitCaptioner

        captioner = self.of_regions
        return captioner if isinstance(captioner, GitCaptioner) and captioner.region_mode != "none" else None

    def _proposed(self, picture: Image) -> list[Proposed]:
        from git_model.models.proposals import RegionProposer

        if self.proposer is None:
            self.proposer = RegionProposer(self.options.proposals, self.options.sam_model, self.device)
        return self.proposer.regions(picture)

    def _semantics(self, picture: Image, proposed: Sequence[Proposed]) -> tuple[Thing, ...]:
        """Return what the largest regions are: the nearest phrase, else a caption of what belongs to the region."""
        from git_model.models.proposals import area_of, masked

        largest = sorted(proposed, key=lambda found: -area_of(found[0]))[: self.options.largest]
        if not largest:
            return ()
        parts = [masked(picture, box, mask) for box, mask in largest]
        if self.bank is not None:
            texts = [names[0] for names in self.bank.nearest(self.bank.towers.pictures(parts))]
        else:
            texts = self._said(self.of_regions, parts)
        return tuple(
            Thing((float(a), float(b), float(c), float(d)), text)
            for ((a, b, c, d), _), text in zip(largest, texts, strict=True)
        )

    def _said(self, captioner: GitCaptioner | PublishedCaptioner, pictures: Sequence[Image]) -> list[str]:
        """Return a caption of each picture."""
        texts: list[str] = []
        for start in range(0, len(pictures), self.batch_size):
            some = [captioner.prepare(picture) for picture in pictures[start : start + self.batch_size]]
            texts += captioner.answer(captioner.encode(some), [""] * len(some), self.decoding())
        return texts


def _whole_pixels(box: Sequence[float]) -> tuple[int, int, int, int]:
    left, top = int(box[0]), int(box[1])
    return left, top, max(round(box[2]), left + 1), max(round(box[3]), top + 1)
