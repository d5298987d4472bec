"""Small real parts for the tests: byte tokenizer, random decoders, a whole random GitModel."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from git_model.architecture import LanguageConfig, SmallLanguageConfig
from git_model.batch import Target
from git_model.config import Config
from git_model.datasets.collate import Collator, Loaded
from git_model.models.decoders import build_decoder
from git_model.models.git import GitModel
from git_model.models.language import LanguageModel
from git_model.schema import from_dict
from git_model.tokens import TextCodec, train_tokenizer

DECODERS = ("gpt2", "opt", "llama")


def byte_tokenizer() -> Any:
    """One token a byte: ids can be written down by hand."""
    return train_tokenizer([], 257)


def language_model(architecture: str, prefix_attention: str = "causal", seed: int = 0) -> LanguageModel:
    """A random decoder of a real architecture, in evaluation mode."""
    torch.manual_seed(seed)
    small = SmallLanguageConfig(architecture=architecture, width=32, depth=2, heads=4, positions=128)
    config = LanguageConfig(name="small", prefix_attention=prefix_attention, small=small)
    model = build_decoder(config, byte_tokenizer())
    for parameter in model.parameters():  # the library's initial weights are too small to tell anything apart
        if parameter.ndim >= 2:
            parameter.data.normal_(0, 0.25)
    return LanguageModel(model, "small", prefix_attention).eval()


def config(**changes: Any) -> Config:
    """A configuration of tiny parts; `changes` are whole sections' keys, e.g. mapper={'type': 'mlp'}."""
    values: dict[str, dict[str, Any]] = {
        "vision": {
            "name": "small",
            "features": "grid",
            "resolution": 32,
            "small": {"stem": [8, 16, 16], "width": 16, "depth": 1, "heads": 2},
        },
        "mapper": {"type": "grid", "heads": 2, "depth": 2},
        "language": {"name": "small", "small": {"width": 32, "depth": 2, "heads": 4, "positions": 256}},
        "data": {"max_text_tokens": 24, "workers": 0},
        "train": {"freeze": ["nothing"], "warmup": 2},
    }
    for section, keys in changes.items():
        values[section] = {**values.get(section, {}), **keys}
    return from_dict(Config, values)


def git_model(**changes: Any) -> GitModel:
    """A whole random model, in evaluation mode."""
    from git_model.models.build import build_model

    model = build_model(config(**changes), byte_tokenizer()).eval()
    for parameter in model.language.parameters():
        if parameter.ndim >= 2:
            parameter.data.normal_(0, 0.25)
    return model


def picture(seed: int, side: int = 32) -> Tensor:
    """A random uint8 picture (3,side,side)."""
    return torch.randint(0, 256, (3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def png(seed: int, side: int = 32) -> bytes:
    """The same picture as a PNG file."""
    file = io.BytesIO()
    Image.fromarray(np.asarray(picture(seed, side).permute(1, 2, 0))).save(file, "PNG")
    return file.getvalue()


def captions(*texts: str, key: str = "a", seed: int = 0) -> Loaded:
    """One picture with captions."""
    return Loaded(key, (picture(seed),), tuple(map(Target, texts)))


def collator(model: GitModel, **options: bool) -> Collator:
    """The collator of a model."""
    return Collator(model.codec, model.num_image_tokens, **options)


def codec(max_target: int = 64) -> TextCodec:
    """The rules over the byte tokenizer."""
    return TextCodec(byte_tokenizer(), 257, max_target)


def byte_ids(text: str) -> Sequence[int]:
    """The byte tokenizer's ids of a text."""
    return byte_tokenizer()(text)["input_ids"]
