"""Tasks on one picture or several: caption it, answer a question about it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from git_model.errors import UserError
from git_model.tasks.options import ModelOptions, SamplingOptions


def caption_image(
    *,
    image_path: str | list[str],
    prompt: str = "",
    bbox: list[float] | None = None,
    model: ModelOptions,
    search: SamplingOptions,
) -> dict[str, Any]:
    """Caption a picture, or answer `prompt` about it; several pictures fill the prompt's [IMG] slots."""
    paths = [image_path] if isinstance(image_path, str) else image_path
    if not paths:
        raise UserError("image_path is an empty list; give one path or several")
    if bbox is not None:
        raise UserError("bbox is for region captioning, which this version cannot do yet; leave it null")
    model.check()
    from git_model.datasets.images import ImageError, read_image
    from git_model.tasks.captioner import GitCaptioner

    files = [read_image(path) for path in paths]  # before the model: a wrong path answers at once
    answers, decoding = search.answers(), search.decoding()
    captioner = model.open()
    if answers:
        decoding = replace(decoding, answers=captioner.trie(answers, bool(prompt)))
    pictures = []
    for path, data in zip(paths, files, strict=True):
        try:
            pictures.append(captioner.prepare(data))
        except ImageError as error:
            raise UserError(f"{path} is no usable picture: {error.reason}") from error
    if isinstance(captioner, GitCaptioner):
        (text,) = captioner.say([tuple(captioner.encode(pictures))], [prompt], decoding)
    elif len(paths) > 1:
        raise UserError(f"{model.model_path} is asked about {len(paths)} pictures; a Hugging Face model takes one here")
    else:
        (text,) = captioner.answer(pictures, [prompt], decoding)
    return {"image_path": image_path, "prompt": prompt, "text": text}
