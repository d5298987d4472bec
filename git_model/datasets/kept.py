"""Vectors that take long to make, kept between runs in this user's cache, by all that they depend on."""

from __future__ import annotations

import hashlib
import io
import logging
import os
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from git_model.datasets.files import write_all

log = logging.getLogger(__name__)


def cache_folder() -> Path:
    """Return where this user keeps what can be made again."""
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "git_model"


def kept(folder: Path, made_of: Iterable[str], rows: int, make: Callable[[], np.ndarray]) -> np.ndarray:
    """Return an array (rows,F) that was made before of the same, mapped from its file; else it is made and kept.

    Args:
        folder: made if need be; where it cannot be written, nothing is kept, and a warning says so.
        made_of: all that decides what is in the array.
        rows: how many it must have: another number is a damaged file's, which is made anew.
        make: makes it.
    """
    digest = hashlib.sha256()
    for word in made_of:
        digest.update(word.encode(errors="surrogatepass") + b"\0")
    path = folder / f"{digest.hexdigest()[:32]}.npy"
    try:
        found = np.load(path, mmap_mode="r", allow_pickle=False)
        if found.ndim == 2 and len(found) == rows:
            return found
    except (OSError, ValueError, EOFError, zipfile.BadZipFile):
        pass  # not made yet, or damaged: made anew
    array, head = np.ascontiguousarray(make()), io.BytesIO()
    np.lib.format.write_array_header_1_0(head, np.lib.format.header_data_from_array_1_0(array))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_all([(path, [head.getvalue(), array.reshape(-1).view(np.uint8).data])])
    except OSError as error:
        log.warning("%d vectors are not kept: %s", len(array), error)
    return array


def version_of(name: str, config: Any) -> str:
    """Return what changes with a model's weights: files of a folder with sizes and times, or the hub's revision.

    Args:
        name: folder, or id of the hub.
        config: of transformers, which knows the revision.
    """
    folder = Path(name)
    if folder.is_dir():
        files = sorted(folder.glob("*.safetensors")) + sorted(folder.glob("*.bin"))
        return str([(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files])
    return str(getattr(config, "_commit_hash", None))
