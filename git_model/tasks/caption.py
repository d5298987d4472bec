"""Tasks on one picture or several, or boxes in them: caption it, answer a question about it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from git_model.batch import IMG_SLOT, Box, Region, Target
from git_model.errors import ImageError, UserError
from git_model.tasks.options import ModelOptions, SamplingOptions


def caption_image(
    *,
    image_path: str | list[str],
    prompt: str = "",
    bbox: tuple[float, float, float, float] | list[tuple[float, float, float, float] | None] | None = None,
    history: list[tuple[str, str]] | None = None,
    model: ModelOptions,
    search: SamplingOptions,
) -> dict[str, Any]:
    """Caption a picture or boxes in it, or answer `prompt`, whose [IMG] slots several pictures or boxes fill.

    bbox: two corners x, y, x, y in pixels, -1 = that side of the picture; or one, or null, for each picture.
    history: earlier questions with their answers; their [IMG] slots come before the prompt's.
    """
    paths = [image_path] if isinstance(image_path, str) else image_path
    if not paths:
        raise UserError("image_path is an empty list; give one path or several")
    distinct = list(dict.fromkeys(paths))
    turns = [f"{question} {answer.replace(IMG_SLOT, '')}" for question, answer in history or ()]
    targets = asked_about(" ".join([*turns, prompt]), [distinct.index(path) for path in paths], bbox)
    model.check()
    from git_model.tasks.captioner import GitCaptioner
    from git_model.tasks.picture import read_picture

    pictures = [read_picture(path) for path in distinct]  # before the model: a wrong path answers at once
    search.answers()  # a list that cannot be read is told before the model is loaded
    captioner = model.open()
    decoding = search.decoding_of(captioner, bool(prompt))
    if isinstance(captioner, GitCaptioner):
        if bbox is not None and captioner.region_mode == "none":
            raise UserError(f"bbox: {model.model_path} reads whole pictures only, it was trained without --region")
        if turns:
            targets = tuple(
                captioner.shortened([*turns, prompt], target.regions, decoding.longest) for target in targets
            )
        try:
            texts = captioner.ask([captioner.see(pictures, targets)], decoding)
        except ImageError as error:
            raise UserError(f"bbox: {error}") from error
    elif len(paths) > 1:
        raise UserError(f"{model.model_path} is asked about {len(paths)} pictures; a Hugging Face model takes one here")
    elif history:
        raise UserError(f"{model.model_path} is given a history; a Hugging Face model answers single questions here")
    elif bbox is not None:
        raise UserError(f"{model.model_path} is asked about a box; a Hugging Face model takes whole pictures here")
    else:
        texts = captioner.answer(pictures, [prompt], decoding)
    several = isinstance(bbox, list) and len(targets) == len(bbox) and len(paths) == 1
    said = {"image_path": image_path, "prompt": prompt, "text": texts if several else texts[0]}
    return said if bbox is None else {**said, "bbox": bbox}


def asked_about(prompt: str, pictures: Sequence[int], bbox: Box | Sequence[Box | None] | None) -> tuple[Target, ...]:
    """Return what is asked: one thing about all pictures, or, of several boxes in a picture, one about each.

    Args:
        prompt: with a slot for each picture or box, or none.
        pictures: number of the picture in each place.
        bbox: of the picture, or of each.

    Raises:
        UserError: numbers of boxes, pictures and slots that do not agree.
    """
    slots = prompt.count(IMG_SLOT)
    boxes: Sequence[Any] = bbox if isinstance(bbox, list) else [bbox] * (1 if bbox is not None else len(pictures))
    if not boxes:
        raise UserError("bbox is an empty list; give one box, one for each picture, or leave it null")
    if len(pictures) == 1 and len(boxes) > 1:
        pictures = [pictures[0]] * len(boxes)
        if slots != len(boxes) and slots <= 1:
            return tuple(Target(prompt=prompt, regions=(Region(pictures[0], box),)) for box in boxes)
    if len(boxes) != len(pictures):
        raise UserError(f"bbox has {len(boxes)} boxes for {len(pictures)} pictures; give one or null for each")
    if slots and slots != len(pictures):
        raise UserError(f"the prompt has {slots} {IMG_SLOT} slots for {len(pictures)} images")
    return (Target(prompt=prompt, regions=tuple(map(Region, pictures, boxes))),)
