"""PhraseBank: the phrases of a list that are nearest to a picture, by any CLIP-like model with both towers."""

from __future__ import annotations

import hashlib
import io
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from git_model.datasets.files import write_all
from git_model.errors import UserError
from git_model.models.hub import check_name, quiet_transformers

log = logging.getLogger(__name__)

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
        cache: folder that keeps vectors between runs, by list and model; None keeps nothing.

    Raises:
        UserError: an empty list.
    """

    def __init__(self, phrases: Sequence[str], towers: TwoTowers, cache: Path | None = None) -> None:
        self.phrases, self.towers = list(dict.fromkeys(phrases)), towers
        if not self.phrases:
            raise UserError("a list of phrases is empty")
        self.vectors = self._cached(cache)  # (n,F)

    def nearest(self, vectors: np.ndarray, most: int = 1) -> list[list[str]]:
        """Return the `most` nearest phrases of each vector (q,F), best first; equal ones in the list's order."""
        scores = np.round(vectors @ self.vectors.T, 6)  # (q,n)
        order = np.argsort(-scores, axis=1, kind="stable")[:, :most]  # (q,most)
        return [[self.phrases[i] for i in row] for row in order]

    def _cached(self, cache: Path | None) -> np.ndarray:
        if cache is None:
            return self.towers.texts(self.phrases)
        told = "\0".join([self.towers.name, str(_version(self.towers)), *self.phrases])
        path = cache / f"{hashlib.sha256(told.encode(errors='surrogatepass')).hexdigest()[:32]}.npy"
        try:
            found = np.load(path, allow_pickle=False)
            if found.ndim == 2 and len(found) == len(self.phrases):
                return found
        except (OSError, ValueError):
            pass
        vectors = self.towers.texts(self.phrases)
        try:
            cache.mkdir(parents=True, exist_ok=True)
            file = io.BytesIO()
            np.save(file, vectors)
            write_all([(path, [file.getvalue()])])
        except OSError as error:
            log.warning("the vectors of %d phrases are not kept: %s", len(self.phrases), error)
        return vectors


def _version(towers: TwoTowers) -> tuple[Any, ...]:
    """Return what changes with a folder's weights, and the revision of a hub's model."""
    folder = Path(towers.name)
    if folder.is_dir():
        files = sorted(folder.glob("*.safetensors")) + sorted(folder.glob("*.bin"))
        return tuple((file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files)
    return (getattr(towers.model.config, "_commit_hash", None),)


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
