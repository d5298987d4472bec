"""Tasks on one picture or several: caption it, answer a question about it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

from git_model.errors import UserError
from git_model.tasks.params import Range


def caption_image(
    *,
    image_path: str | list[str],
    model_path: str,
    prompt: str = "",
    bbox: list[float] | None = None,
    answer_list: str | None = None,
    prompt_format: str = "{prompt}",
    image_encoder_type: str | None = None,
    language_model: str | None = None,
    mapping_type: str | None = None,
    output_grid: bool | None = None,
    input_resolution: Annotated[int, Range(16, 4096)] | None = None,
    beams: Annotated[int, Range(1, 64)] = 1,
    max_new_tokens: Annotated[int, Range(1, 1024)] = 40,
    min_new_tokens: Annotated[int, Range(0, 1024)] = 0,
    length_penalty: Annotated[float, Range(-10, 10)] = 1.0,
    sample: bool = False,
    temperature: Annotated[float, Range(0.01, 100)] = 1.0,
    top_p: Annotated[float, Range(0.0001, 1)] = 1.0,
    seed: Annotated[int, Range(0, 2**31)] = 0,
    device: str = "auto",
) -> dict[str, Any]:
    """Caption a picture, or answer `prompt` about it; several pictures fill the prompt's [IMG] slots."""
    paths = [image_path] if isinstance(image_path, str) else image_path
    if not paths:
        raise UserError("image_path is an empty list; give one path or several")
    if bbox is not None:
        raise UserError("bbox is for region captioning, which this version cannot do yet; leave it null")
    from git_model.datasets.images import ImageError, read_image
    from git_model.models.language import Decoding
    from git_model.tasks.captioner import GitCaptioner, open_captioner

    files = [read_image(path) for path in paths]  # before the model: a wrong path answers at once
    architecture = {
        "image_encoder_type": image_encoder_type,
        "language_model": language_model,
        "mapping_type": mapping_type,
        "output_grid": output_grid,
        "input_resolution": input_resolution,
    }
    decoding = Decoding(beams, max_new_tokens, min_new_tokens, length_penalty, sample, temperature, top_p, seed)
    captioner = open_captioner(model_path, architecture, device, prompt_format)
    if answer_list:
        decoding = replace(decoding, answers=captioner.trie(read_answers(answer_list), bool(prompt)))
    pictures = []
    for path, data in zip(paths, files, strict=True):
        try:
            pictures.append(captioner.prepare(data))
        except ImageError as error:
            raise UserError(f"{path} is no usable picture: {error.reason}") from error
    if isinstance(captioner, GitCaptioner):
        (text,) = captioner.say([tuple(captioner.encode(pictures))], [prompt], decoding)
    elif len(paths) > 1:
        raise UserError(f"{model_path} is asked about {len(paths)} pictures; a Hugging Face model takes one here")
    else:
        (text,) = captioner.answer(pictures, [prompt], decoding)
    return {"image_path": image_path, "prompt": prompt, "text": text}


def read_answers(path: str) -> list[str]:
    """Return the answers of a file: one a line, or a JSON list.

    Raises:
        UserError: no such file, or not a list of texts.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
        answers = json.loads(text) if text.lstrip().startswith("[") else text.splitlines()
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read answer_list '{path}': {error}") from error
    if not all(isinstance(answer, str) for answer in answers):
        raise UserError(f"answer_list '{path}' is no list of texts")
    kept = list(dict.fromkeys(answer.strip() for answer in answers if answer.strip()))
    if not kept:
        raise UserError(f"answer_list '{path}' holds no answer")
    return kept
