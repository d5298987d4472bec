"""Vectors of phrases, kept between runs: some lists have a hundred thousand phrases."""

from __future__ import annotations

import hashlib
import io
import logging
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from git_model.datasets.files import write_all
from git_model.models.phrases import PhraseBank, TwoTowers

log = logging.getLogger(__name__)


def kept_bank(phrases: Sequence[str], towers: TwoTowers, folder: Path) -> PhraseBank:
    """Return a bank whose vectors come from a folder if they were made before, by list and model; else they go there.

    Args:
        phrases: any number.
        towers: what makes the vectors.
        folder: made if need be; where it cannot be written, nothing is kept, and a warning says so.

    Raises:
        UserError: an empty list.
    """
    distinct = list(dict.fromkeys(phrases))
    told = "\0".join([towers.name, str(_version(towers)), *distinct])
    path = folder / f"{hashlib.sha256(told.encode(errors='surrogatepass')).hexdigest()[:32]}.npy"
    try:
        found = np.load(path, allow_pickle=False)
        if found.ndim == 2 and len(found) == len(distinct):
            return PhraseBank(distinct, towers, found)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile):
        pass  # not made yet, or damaged: made anew
    bank, file = PhraseBank(distinct, towers), io.BytesIO()
    np.save(file, bank.vectors)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_all([(path, [file.getvalue()])])
    except OSError as error:
        log.warning("the vectors of %d phrases are not kept: %s", len(distinct), error)
    return bank


def _version(towers: TwoTowers) -> tuple[Any, ...]:
    """Return what changes with a folder's weights, or the revision of a hub's model."""
    folder = Path(towers.name)
    if folder.is_dir():
        files = sorted(folder.glob("*.safetensors")) + sorted(folder.glob("*.bin"))
        return tuple((file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files)
    return (getattr(towers.model.config, "_commit_hash", None),)
