"""Whether a Hugging Face model can be had, asked once and shortly: the library itself tries for most of a minute.

And weights by name brought here beforehand, for machines without internet.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from git_model.errors import UserError, nearest

PATIENCE = 8.0  # seconds

# what transformers reads of a repository: no other framework's weights, no variants, no code
_SMALL_FILES = re.compile(r"[^/]+\.(json|txt|model|jinja|tiktoken)")
_SAFE_WEIGHTS = re.compile(r"(adapter_)?model(-\d+-of-\d+)?\.safetensors")
_OTHER_WEIGHTS = re.compile(r"(pytorch|adapter)_model(-\d+-of-\d+)?\.bin")


def check_name(name: str, what: str) -> None:
    """Say what is wrong with a model's name before anything is loaded.

    Args:
        name: an id, or a folder.
        what: the kind of model, for the message.

    Raises:
        UserError: no such folder; neither in the cache nor to be reached; no such model.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        return
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise UserError(f"cannot load the {what} '{name}': no such folder")
    import httpx
    from huggingface_hub import constants, try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import build_hf_headers

    try:
        if isinstance(try_to_load_from_cache(name, "config.json"), str):
            return
    except HFValidationError as error:
        raise UserError(f"cannot load the {what} '{name}': neither a folder nor an id such as org/model") from error
    advice = f"give a folder, or fetch it where there is internet (hf download {name}) and bring the cache along"
    if constants.HF_HUB_OFFLINE:
        raise UserError(f"cannot load the {what} '{name}': HF_HUB_OFFLINE is set and it is not in the cache; {advice}")
    try:
        url = f"{constants.ENDPOINT}/{name}/resolve/main/config.json"
        answer = httpx.head(url, timeout=PATIENCE, follow_redirects=True, headers=build_hf_headers())
    except httpx.HTTPError as error:
        told = f"it is not in the cache, and {constants.ENDPOINT} cannot be reached"
        raise UserError(f"cannot load the {what} '{name}': {told}; {advice}") from error
    if answer.status_code in (401, 403, 404):
        told = f"{constants.ENDPOINT} has no such model, or keeps it for those who log in (HF_TOKEN)"
        raise UserError(f"cannot load the {what} '{name}': {told}")


def fetch_weights(name: str) -> Path:
    """Bring weights into their usual cache and return where they lie; what is there already is kept.

    Args:
        name: OpenAI CLIP weights such as ViT-B/32 (see `openai_clip.fetch`), a Hugging Face id, a folder or a file.

    Raises:
        UserError: no such weights, or they cannot be reached; said within seconds.
    """
    from git_model.models import openai_clip

    known = openai_clip.weight_urls()
    if name in known:
        return openai_clip.fetch(name)
    if Path(name).expanduser().exists():
        return Path(name).expanduser()
    try:
        check_name(name, "weights")
        return _fetch_repository(name)
    except UserError as error:
        raise UserError(f"{error}{nearest(name, known)}") from error


def _fetch_repository(name: str) -> Path:
    from huggingface_hub import HfApi, constants, snapshot_download

    if constants.HF_HUB_OFFLINE:
        raise UserError(f"cannot fetch '{name}': HF_HUB_OFFLINE is set")
    try:
        info = HfApi().model_info(name, timeout=PATIENCE)
        wanted = repository_files([file.rfilename for file in info.siblings or ()])
        if not wanted:
            raise UserError(f"'{name}' holds no weights that can be read: neither safetensors nor pytorch_model.bin")
        # not by info.sha: only a branch's name leaves the note by which the cache finds it again
        return Path(snapshot_download(name, allow_patterns=wanted))
    except UserError:
        raise
    except Exception as error:  # of httpx or of httpx2, by the library's version
        told = " ".join(str(error).split())[:300] or type(error).__name__
        raise UserError(f"cannot fetch '{name}' from {constants.ENDPOINT}: {told}") from error


def repository_files(names: Sequence[str]) -> list[str]:
    """Return those of a repository's files that a model is loaded from; none where there are no weights.

    Args:
        names: all its files, folders with slashes.
    """
    weights = [name for name in names if _SAFE_WEIGHTS.fullmatch(name)]
    weights = weights or [name for name in names if _OTHER_WEIGHTS.fullmatch(name)]
    return weights + [name for name in names if _SMALL_FILES.fullmatch(name)] if weights else []


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep transformers' load reports and progress bars to itself; what matters is raised here."""
    from transformers.utils import logging as hf_logging

    level, bars = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        hf_logging.set_verbosity(level)
        if bars:
            hf_logging.enable_progress_bar()
