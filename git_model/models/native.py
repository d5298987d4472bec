"""A model as a folder that needs nothing else: config.json, model.safetensors with every weight, the tokenizer.

For whatever no LLaVA can hold. No code in the folder is run; `config.json` holds the SHA-256 of the weights, so that a
changed byte is told. Encoders and decoders of Hugging Face keep their configuration in `vision/` and `language/`.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from git_model.architecture import PARTS
from git_model.config import Config
from git_model.errors import EXIT_NO_CHECKPOINT, UserError
from git_model.models import openai_clip
from git_model.models.build import build_model
from git_model.models.git import GitModel
from git_model.models.processing import image_processor, plain_tokenizer
from git_model.models.small_vision import VisionFacts, brief, layer_numbers
from git_model.models.vision import CLIP_STATS, HFTower, VisionEncoder, build_vision
from git_model.schema import from_dict, to_dict
from git_model.tokens import load_tokenizer, tokenizer_from_json

MODEL_TYPE = "git_model"
FORMAT = 1
WEIGHTS = "model.safetensors"


def is_native(folder: str | Path) -> bool:
    """Tell whether a folder is one that `write_native` wrote, judged by its config.json."""
    try:
        content = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and content.get("model_type") == MODEL_TYPE


def write_native(
    folder: Path, model: GitModel, config: Config, dtype: torch.dtype | None, told: Mapping[str, Any]
) -> None:
    """Write a model's files into an empty folder.

    Args:
        folder: where.
        model: unwrapped, adapters merged, not quantised.
        config: the run's.
        dtype: of the weights in the file; None leaves each as it is.
        told: plain values to keep beside them (step, metrics).

    Raises:
        OSError: disk full, read-only.
    """
    from safetensors.torch import save_file

    tensors, tied = _untied(model.state_dict())
    if dtype is not None:
        tensors = {name: t.to(dtype) if t.is_floating_point() else t for name, t in tensors.items()}
    save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, folder / WEIGHTS, {"format": "pt"})
    if hasattr(model.codec.tokenizer, "backend_tokenizer"):  # else its own files in language/ have to do
        plain_tokenizer(model.codec).save_pretrained(folder)
    processor = image_processor(model.vision, config.data.resize)
    if processor is not None:  # 'pad' has none: git_model.datasets.images.Transform does it
        processor.save_pretrained(folder)
    if model.language.name != "small":
        decoder_config = copy.deepcopy(model.language.model.config)
        decoder_config.architectures = [type(model.language.model).__name__]
        decoder_config.save_pretrained(folder / "language")
        model.codec.tokenizer.save_pretrained(folder / "language")  # under its own class, for the same ids
    content = {
        "model_type": MODEL_TYPE,
        "architectures": ["GitModelForCaptioning"],
        "format": FORMAT,
        "run": to_dict(config),
        "encoder": _describe_encoder(folder, model.vision),
        "tied": tied,
        "weights_sha256": _sha256(folder / WEIGHTS),
        "git_model_export": dict(told),
    }
    (folder / "config.json").write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _untied(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return each tensor once, and which names stand for which others (a head tied to the embedding table)."""
    seen: dict[tuple[int, torch.Size], str] = {}
    kept, tied = dict(state), {}
    for name, tensor in state.items():
        place = (tensor.data_ptr(), tensor.shape)
        if tensor.numel() and place in seen:
            tied[name] = seen[place]
            del kept[name]
        seen.setdefault(place, name)
    return kept, tied


def _describe_encoder(folder: Path, vision: VisionEncoder) -> dict[str, Any]:
    """Return what rebuilds the encoder without the place its weights came from."""
    tower = vision.tower
    if isinstance(tower, openai_clip.OpenAITower):
        return {"kind": "openai", **asdict(tower.arch)}
    if not isinstance(tower, HFTower):
        return {"kind": "small"}
    config = copy.deepcopy(tower.model.config)
    config.architectures = [type(tower.model).__name__]
    config.save_pretrained(folder / "vision")
    image_processor(vision, "squash").save_pretrained(folder / "vision")  # for resolution and statistics
    return {"kind": "hugging_face"}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_native(folder: Path) -> tuple[GitModel, Config, dict[str, Any]]:
    """Rebuild a model from its folder; nothing else is read or fetched.

    Args:
        folder: one that `write_native` wrote.

    Returns:
        the model (CPU, evaluation mode), the run's config, and what was told beside the weights.

    Raises:
        UserError: not such a folder; damaged (exit code 76).
    """
    if not is_native(folder):
        inside = sorted(path.name for path in folder.glob("model*.pt"))
        hint = f"; give a checkpoint in it, such as {folder / inside[0]}" if inside else ""
        raise UserError(f"{folder} is no folder that the task 'export' wrote in its native format{hint}")
    try:
        content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if content["format"] != FORMAT:
            raise UserError(f"{folder} has format {content['format']}, this program reads {FORMAT}", EXIT_NO_CHECKPOINT)
        model, config = _build(folder, content)
        _fill(folder, model, content)
    except (KeyError, TypeError, ValueError, OSError, RuntimeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"{folder} cannot be read: {type(error).__name__}: {brief(error)}", EXIT_NO_CHECKPOINT
        ) from error
    return model.eval(), config, dict(content.get("git_model_export", {}))


def _build(folder: Path, content: Mapping[str, Any]) -> tuple[GitModel, Config]:
    config = from_dict(Config, content["run"])
    inside = config
    if config.language.name == "small":
        tokenizer = tokenizer_from_json((folder / "tokenizer.json").read_text(encoding="utf-8"))
    else:
        inside = replace(config, language=replace(config.language, name=str(folder / "language")))
        tokenizer = load_tokenizer(str(folder / "language"))
    vision = _encoder(folder, config, content["encoder"])
    model = build_model(inside, tokenizer, PARTS, vision=vision)
    model.vision.name, model.language.name = config.vision.name, config.language.name
    return model, config


def _encoder(folder: Path, config: Config, told: Mapping[str, Any]) -> VisionEncoder:
    if told["kind"] == "small":
        return build_vision(config.vision, load_weights=False)
    if told["kind"] == "hugging_face":
        return build_vision(replace(config.vision, name=str(folder / "vision")), load_weights=False)
    sizes: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value for key, value in told.items() if key != "kind"
    }
    arch = openai_clip.Architecture(**sizes)
    side = config.vision.resolution or arch.resolution
    layers = layer_numbers(config.vision, arch.num_layers)
    tower = openai_clip.OpenAITower(arch, side, config.vision.features, layers)
    facts = VisionFacts(*arch.features(side, config.vision.features, layers), side)
    return VisionEncoder(tower, config.vision, facts, CLIP_STATS, pretrained=False).eval()


def _fill(folder: Path, model: GitModel, content: Mapping[str, Any]) -> None:
    """Give a model its weights: all of them and nothing else.

    Raises:
        UserError: the file is not the one that was written, or does not fit (exit code 76).
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if _sha256(folder / WEIGHTS) != content["weights_sha256"]:
        raise UserError(
            f"{folder / WEIGHTS} was damaged after it was written: its checksum does not fit", EXIT_NO_CHECKPOINT
        )
    try:
        tensors = load_file(folder / WEIGHTS)
    except SafetensorError as error:
        raise UserError(f"{folder / WEIGHTS} cannot be read: {brief(error)}", EXIT_NO_CHECKPOINT) from error
    report = model.load_state_dict(tensors, strict=False)
    wrong = {*report.missing_keys} - {*content["tied"]} | {*report.unexpected_keys}
    if wrong:
        raise UserError(
            f"{folder} does not fit its architecture ({len(wrong)} tensors): {', '.join(sorted(wrong)[:5])}",
            EXIT_NO_CHECKPOINT,
        )
