"""[Loaded sample] -> CaptionBatch: image slots, EOS, labels by length, packing, padding side.

RegressionBatch, of pictures and vectors, is simpler: collate_vectors.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from git_model.batch import IGNORE_INDEX, IMG_SLOT, WHOLE, BadSample, Box, CaptionBatch, Region, Target
from git_model.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from git_model.tokens import TextCodec


@dataclass(frozen=True, slots=True)
class Loaded:
    """A sample whose pictures are decoded.

    Args:
        key: the record's name.
        images: uint8 (3,H,W), or features (N,D); of an ensemble S of (D,).
        targets: what is said of them; boxes in fractions of the encoder's input.
        wanted: (F,) the vector to learn, where the sample has it.
    """

    key: str
    images: tuple[Tensor, ...]
    targets: tuple[Target, ...]
    wanted: Tensor | None = None


@dataclass(slots=True)
class Row:
    """One sequence under construction; every list has the row's length."""

    ids: list[int] = field(default_factory=list)
    image: list[bool] = field(default_factory=list)
    segments: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    sources: list[int] = field(default_factory=list)
    slots: list[Region] = field(default_factory=list)  # what fills each slot
    key: str = ""
    targets: list[Target] = field(default_factory=list)
    prefix: int = 0  # length of segment 0

    def add(self, ids: Sequence[int], segment: int, image: bool = False, target: bool = False) -> None:
        """Append tokens of one kind."""
        if not ids:
            return
        here, count = len(self.ids), len(ids)
        same = bool(self.segments) and self.segments[-1] == segment
        before = here - 1 if same else self.prefix - 1  # the token that predicts the first of these
        start = self.positions[before] + 1 if before >= 0 else 0
        self.positions += range(start, start + count)
        self.sources += [max(before, 0), *range(here, here + count - 1)]
        self.ids += ids
        self.image += [image] * count
        self.segments += [segment] * count
        self.labels += ids if target else [IGNORE_INDEX] * count
        if segment == 0:
            self.prefix = here + count


class Collator:
    """Builds batches; called in the loader's workers, so it holds no model, only numbers and the codec.

    Args:
        codec: the tokenizer's rules.
        num_image_tokens: K, tokens an image takes.
        pack: several targets of an image in one row.
        generate: prompts without targets; a prompt a row is padded on the left, as transformers' `generate` needs it.
        regions: the model reads boxes; else a target with one is a bad sample.
        longest: positions of the language model; a row that is longer is a bad sample. None = no limit.
    """

    def __init__(
        self,
        codec: TextCodec,
        num_image_tokens: int,
        *,
        pack: bool = False,
        generate: bool = False,
        regions: bool = False,
        longest: int | None = None,
    ) -> None:
        self.codec = codec
        self.num_image_tokens = num_image_tokens
        self.pack = pack
        self.generate = generate
        self.left = generate and not pack
        self.regions = regions
        self.longest = longest

    def __call__(self, items: Sequence[Loaded | BadSample]) -> CaptionBatch:
        """Return the batch of the good items; the bad ones are listed in `skipped`."""
        rows: list[Row] = []
        images: list[Tensor] = []
        slots: list[int] = []
        known: dict[tuple[int, Box | None], int] = {}  # every region of the batch once, by its image
        skipped: list[BadSample] = [item for item in items if isinstance(item, BadSample)]
        truncated = 0
        for item in items:
            if isinstance(item, BadSample):
                continue
            try:
                built, cut = self._rows(item)
                if not built:
                    skipped.append(BadSample(item.key, "no_target"))
                    continue
            except UserError as error:
                skipped.append(BadSample(item.key, f"prompt: {error}"))
                continue
            truncated += cut
            for slot in (slot for row in built for slot in row.slots):
                image = len(images) + slot.image
                slots.append(known.setdefault((image, slot.box), len(known)) if self.regions else image)
            images.extend(item.images)
            rows.extend(built)
        return self._pad(rows, images, slots, list(known) if self.regions else None, tuple(skipped), truncated)

    def _rows(self, item: Loaded) -> tuple[list[Row], int]:
        # a question without an answer is something to ask, not something to train on
        teach = [t for t in item.targets if t.text or t.question_id is None]
        targets = merged(item.targets) if self.generate else teach
        free = [t for t in targets if IMG_SLOT not in t.prompt]
        alike: dict[tuple[Region, ...], list[Target]] = {}  # those of the same regions share a row
        for target in free:
            alike.setdefault(target.regions, []).append(target)
        together = list(alike.values()) if self.pack else [[t] for t in free]
        slotted = [[t] for t in targets if IMG_SLOT in t.prompt]
        built = [self._row(item, targets) for targets in (*together, *slotted)]
        longest = max((max(row.positions, default=-1) + 1 for row, _ in built), default=0)
        if self.longest is not None and longest > self.longest:
            raise UserError(f"{longest} tokens with images and answer, more than {self.longest}")
        return [row for row, _ in built], sum(cut for _, cut in built)

    def _row(self, item: Loaded, targets: list[Target]) -> tuple[Row, int]:
        """Return the row of one or more targets, and how many were cut."""
        row, cut = Row(key=item.key, targets=targets), 0
        row.add(self.codec.bos_ids, 0)
        regions = targets[0].regions or tuple(Region(number) for number in range(len(item.images)))
        if not self.regions and any(region.box for region in regions):
            raise UserError("a box, and the model reads whole pictures only (it was trained without --region)")
        if IMG_SLOT in targets[0].prompt:
            prompts = self._slotted_prefix(row, regions, targets[0].prompt)
        else:
            for region in regions:
                self._image(row, region)
            prompts = [self.codec.prompt(t.prompt) for t in targets]
        for segment, (target, prompt) in enumerate(zip(targets, prompts, strict=True), start=1):
            row.add(prompt, segment)
            if not self.generate:
                ids, was_cut = self.codec.target(target.text, after_prompt=bool(target.prompt))
                row.add(ids, segment, target=True)
                cut += was_cut
        return row, cut

    def _slotted_prefix(self, row: Row, regions: Sequence[Region], prompt: str) -> list[list[int]]:
        """Lay out text and images in the prompt's own order; return the text after the last slot."""
        *before, last = prompt.split(IMG_SLOT)
        if len(before) != len(regions):
            raise UserError(f"{len(before)} {IMG_SLOT} slots for {len(regions)} images")
        for region, text in zip(regions, before, strict=True):
            row.add(self.codec.prompt(text.strip()), 0)
            self._image(row, region)
        return [self.codec.prompt(last.strip())]

    def _image(self, row: Row, region: Region) -> None:
        row.add([self.codec.pad_id] * self.num_image_tokens, 0, image=True)
        row.slots.append(region)

    def _pad(
        self,
        rows: list[Row],
        images: list[Tensor],
        slots: list[int],
        regions: list[tuple[int, Box | None]] | None,
        skipped: tuple[BadSample, ...],
        truncated: int,
    ) -> CaptionBatch:
        import torch

        width = max((len(row.ids) for row in rows), default=0)

        def padded(lists: list[list[int]], fill: int) -> Tensor:
            out = torch.full((len(lists), width), fill, dtype=torch.long)  # (R,T)
            for r, values in enumerate(lists):
                start = width - len(values) if self.left else 0
                out[r, start : start + len(values)] = torch.tensor(values, dtype=torch.long)
            return out

        shift = [width - len(row.ids) if self.left else 0 for row in rows]
        return CaptionBatch(
            images=torch.stack(images) if images else torch.zeros((0, 3, 1, 1), dtype=torch.uint8),  # (I,3,H,W)
            image_index=torch.tensor(slots, dtype=torch.long),  # (S,)
            input_ids=padded([row.ids for row in rows], self.codec.pad_id),  # (R,T)
            image_mask=padded([[int(v) for v in row.image] for row in rows], 0).bool(),  # (R,T)
            attention_mask=padded([[1] * len(row.ids) for row in rows], 0).bool(),  # (R,T)
            segments=padded([row.segments for row in rows], -1),  # (R,T)
            positions=padded([row.positions for row in rows], 0),  # (R,T)
            labels=padded([row.labels for row in rows], IGNORE_INDEX),  # (R,T)
            sources=padded([[s + k for s in row.sources] for row, k in zip(rows, shift, strict=True)], 0),  # (R,T)
            keys=tuple(row.key for row in rows),
            targets=tuple(tuple(row.targets) for row in rows),
            skipped=skipped,
            truncated=truncated,
            boxes=None if regions is None else torch.tensor([box or WHOLE for _, box in regions]).view(-1, 4),  # (Q,4)
            box_image=None if regions is None else torch.tensor([image for image, _ in regions], dtype=torch.long),
        )


def merged(targets: Sequence[Target]) -> list[Target]:
    """Return what there is to ask: each question once, captions of one prompt and region once, with all references."""
    asks: list[Target] = []
    captions: dict[tuple[str, tuple[Region, ...]], list[str]] = {}
    for target in targets:
        if target.question_id is None:
            captions.setdefault((target.prompt, target.regions), []).extend(target.answers or (target.text,))
        else:
            asks.append(target)
    return [Target("", prompt, None, tuple(texts), regions) for (prompt, regions), texts in captions.items()] + asks
