"""Whether a Hugging Face model can be had, asked once and shortly: the library itself tries for most of a minute."""

from __future__ import annotations

from pathlib import Path

from git_model.errors import UserError

PATIENCE = 8.0  # seconds


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
