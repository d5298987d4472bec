"""PhraseBank: the phrases of a list that are nearest to a picture, by any CLIP-like model with both towers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from git_model.errors import UserError
from git_model.models.hub import check_name, quiet_transformers

# OpenAI's names -> where Hugging Face has the same weights with their text tower
OPENAI_IDS = {
    "ViT-B/32": "openai/clip-vit-base-patch32",
    "ViT-B/16": "openai/clip-vit-base-patch16",
    "ViT-L/14": "openai/clip-vit-large-patch14",
    "ViT-L/14@336px": "openai/clip-vit-large-patch14-336",
}


class TwoTowers:
    """A model that puts pictures and texts into one space: CLIP, SigLIP and their kin.

    Args:
        name: Hugging Face id or folder, or OpenAI's name of a ViT.
        device: where it runs.

    Raises:
        UserError: there is no such model, or it has no text tower.
    """

    def __init__(self, name: str, device: str = "cpu") -> None:
        from transformers import AutoModel, AutoProcessor

        self.name, self.device = OPENAI_IDS.get(name, name), device
        check_name(self.name, "model of pictures and texts")
        with quiet_transformers():
            try:
                self.model: Any = AutoModel.from_pretrained(self.name, trust_remote_code=False).eval().to(device)
                self.processor: Any = AutoProcessor.from_pretrained(self.name, trust_remote_code=False)
            except Exception as error:  # whatever the readers of model files say of a bad one
                raise UserError(f"cannot load '{name}': {str(error).splitlines()[0]}") from error
        if not hasattr(self.model, "get_text_features") or not hasattr(self.model, "get_image_features"):
            raise UserError(f"'{name}' is no model of pictures and texts: it has not both towers")

    def pictures(self, pictures: Sequence[Image.Image], batch_size: int = 32) -> np.ndarray:
        """Return (n,F) float32 unit vectors of RGB pictures."""
        return self._features(pictures, batch_size, "get_image_features", images=True)

    def texts(self, texts: Sequence[str], batch_size: int = 256) -> np.ndarray:
        """Return (n,F) float32 unit vectors of texts; what is longer than the tower reads is cut off."""
        return self._features(texts, batch_size, "get_text_features", images=False)

    def _features(self, given: Sequence[Any], batch_size: int, verb: str, images: bool) -> np.ndarray:
        import torch

        found = []
        for start in range(0, len(given), batch_size):
            some = list(given[start : start + batch_size])
            if images:
                inputs = self.processor(images=some, return_tensors="pt")
            else:
                long = self.model.config.text_config.max_position_embeddings
                filled: dict[str, Any] = {"padding": "max_length", "truncation": True, "max_length": long}
                inputs = self.processor(text=some, return_tensors="pt", **filled)
            with torch.inference_mode():
                out = getattr(self.model, verb)(**inputs.to(self.device))
            vectors = getattr(out, "pooler_output", out)  # transformers 5 returns the tower's whole output
            found.append(torch.nn.functional.normalize(vectors.float(), dim=-1).cpu().numpy())
        return np.concatenate(found) if found else np.zeros((0, 0), np.float32)


class PhraseBank:
    """A list of phrases with their vectors.

    Args:
        phrases: any number; each once.
        towers: what makes the vectors.
        vectors: (n,F) of the distinct phrases in their order, if they were made before (tasks/bank.py keeps them).

    Raises:
        UserError: an empty list.
    """

    def __init__(self, phrases: Sequence[str], towers: TwoTowers, vectors: np.ndarray | None = None) -> None:
        self.phrases, self.towers = list(dict.fromkeys(phrases)), towers
        if not self.phrases:
            raise UserError("a list of phrases is empty")
        self.vectors = towers.texts(self.phrases) if vectors is None else vectors  # (n,F)

    def nearest(self, vectors: np.ndarray, most: int = 1) -> list[list[str]]:
        """Return the `most` nearest phrases of each vector (q,F), best first; equal ones in the list's order."""
        scores = np.round(vectors @ self.vectors.T, 6)  # (q,n)
        order = np.argsort(-scores, axis=1, kind="stable")[:, :most]  # (q,most)
        return [[self.phrases[i] for i in row] for row in order]


def read_phrases(path: str) -> list[str]:
    """Return the phrases of a file, one a line.

    Raises:
        UserError: no such file, no text, or nothing in it.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read the phrases of '{path}': {error}") from error
    phrases = [line.strip() for line in lines if line.strip()]
    if not phrases:
        raise UserError(f"'{path}' holds no phrase")
    return phrases
