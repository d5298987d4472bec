"""Banks that tasks open: phrases with vectors that are kept between runs; prompts, with what compares them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from git_model.datasets.kept import kept, version_of
from git_model.datasets.neighbours import PromptBank
from git_model.errors import UserError
from git_model.models.phrases import PhraseBank, TwoTowers

BLOCK = 1024  # phrases between two movements of the bar


def kept_bank(phrases: Sequence[str], towers: TwoTowers, folder: Path) -> PhraseBank:
    """Return a bank whose vectors come from a folder if they were made before, by list and model; else they go there.

    Args:
        phrases: any number.
        towers: what makes the vectors.
        folder: see `kept`.

    Raises:
        UserError: an empty list.
    """
    if not (distinct := list(dict.fromkeys(phrases))):
        raise UserError("a list of phrases is empty")
    made_of = [towers.name, version_of(towers.name, towers.model.config), *distinct]

    def make() -> np.ndarray:
        from tqdm import tqdm

        starts = tqdm(range(0, len(distinct), BLOCK), unit="block", desc=f"encoding {len(distinct):,} phrases once")
        return np.concatenate([towers.texts(distinct[start : start + BLOCK]) for start in starts])

    return PhraseBank(distinct, towers, kept(folder, made_of, len(distinct), make))


def open_bank(folder: str, towers: str | None, device: str) -> tuple[PromptBank, TwoTowers]:
    """Return a bank of prompts and the model that its pictures are compared by.

    Args:
        folder: of the bank.
        towers: where that model is now; None = where it was when the bank was made.
        device: where it runs.

    Raises:
        UserError: no such bank or model.
    """
    bank = PromptBank(folder)
    return bank, TwoTowers(towers or bank.keys_of, device)
