"""Tasks on one picture or several: caption it, answer a question about it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

from git_model.errors import UserError
from git_model.tasks.params import Range

if TYPE_CHECKING:
    from git_model.checkpoint import Loaded
    from git_model.config import Config


def caption_image(
    *,
    image_path: str | list[str],
    model_path: str,
    prompt: str = "",
    bbox: list[float] | None = None,
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
    from git_model.batch import Target
    from git_model.datasets.collate import Collator, Loaded
    from git_model.datasets.images import ImageError, Transform, read_image
    from git_model.models.language import Decoding

    files = [read_image(path) for path in paths]  # before the model: a wrong path answers at once
    architecture = {
        "image_encoder_type": image_encoder_type,
        "language_model": language_model,
        "mapping_type": mapping_type,
        "output_grid": output_grid,
        "input_resolution": input_resolution,
    }
    decoding = Decoding(beams, max_new_tokens, min_new_tokens, length_penalty, sample, temperature, top_p, seed)
    loaded = open_model(model_path, architecture)
    model, where = loaded.model, pick_device(device)
    transform = Transform(model.vision.resolution, loaded.config.data.resize)
    pictures = []
    for path, data in zip(paths, files, strict=True):
        try:
            pictures.append(transform(data))
        except ImageError as error:
            raise UserError(f"{path} is no usable picture: {error.reason}") from error
    model.codec.prompt(prompt)  # a prompt that is too long is an error here, not a skipped sample
    collator = Collator(model.codec, model.num_image_tokens, generate=True)
    batch = collator([Loaded(paths[0], tuple(pictures), (Target(prompt=prompt, question_id=0),))])
    if batch.skipped:
        raise UserError(batch.skipped[0].reason)
    (text,) = model.to(where).generate(batch.to(where), decoding)
    return {"image_path": image_path, "prompt": prompt, "text": text}


def open_model(model_path: str, architecture: dict[str, Any]) -> Loaded:
    """Load a checkpoint and hold the caller's architecture keys against what it carries.

    Args:
        model_path: a checkpoint, or a bare state dict.
        architecture: the original's five keys; None where not given.

    Raises:
        UserError: no such file, no checkpoint, or a key that disagrees with it (names both values).
    """
    from git_model.checkpoint import load_checkpoint

    given = {key: value for key, value in architecture.items() if value is not None}
    loaded = load_checkpoint(model_path, _bare_config(given))
    carried = _architecture_of(loaded.config)
    carried["input_resolution"] = loaded.model.vision.resolution
    for key, value in given.items():
        if value != carried[key]:
            raise UserError(f"{key} is {value!r}, but the checkpoint {model_path} was trained with {carried[key]!r}")
    return loaded


def _architecture_of(config: Config) -> dict[str, Any]:
    return {
        "image_encoder_type": config.vision.name,
        "language_model": config.language.name,
        "mapping_type": config.mapper.type,
        "output_grid": config.vision.features == "grid",
    }


def _bare_config(given: dict[str, Any]) -> Config | None:
    """Return the architecture for a bare state dict, when the caller named it."""
    from git_model.config import Config
    from git_model.schema import from_dict

    if not {"image_encoder_type", "language_model", "mapping_type"} <= given.keys():
        return None
    vision = {
        "name": given["image_encoder_type"],
        "features": "grid" if given.get("output_grid") else "pooled",
        "resolution": given.get("input_resolution"),
    }
    parts = {"mapper": {"type": given["mapping_type"]}, "language": {"name": given["language_model"]}}
    return from_dict(Config, {"vision": vision, **parts})


def pick_device(name: str) -> str:
    """Return the device to run on; 'auto' is the GPU where there is one.

    Raises:
        UserError: a device this machine does not have.
    """
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1, device=name)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device '{name}' cannot be used here; one of: auto, cpu, cuda, cuda:0, ...") from error
    return name
