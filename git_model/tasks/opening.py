"""Opening a model for a task: a checkpoint held against what the caller said of it, its identity, where it runs."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from git_model.errors import UserError

if TYPE_CHECKING:
    from git_model.checkpoint import Loaded
    from git_model.config import Config

MODEL_FILES = re.compile(r"(config|generation|preprocessor|processor|token|special|vocab|merges|chat|model|pytorch).*")


def fingerprint(paths: Sequence[str | Path | None]) -> str:
    """Return a hash of names, sizes and times of files; of a folder, those of the model in it; of a name, of itself."""
    digest = hashlib.sha256()
    for path in paths:
        root = Path(path or "none")
        inside = [f for f in sorted(root.iterdir()) if MODEL_FILES.match(f.name)] if root.is_dir() else [root]
        digest.update(f"{path};".encode(errors="surrogateescape"))
        for file in inside:
            if file.is_file() and ".tsv." not in file.name:
                status = file.stat()
                told = f"{file.absolute()}|{status.st_size}|{status.st_mtime_ns};"
                digest.update(told.encode(errors="surrogateescape"))
    return digest.hexdigest()


def job_of(paths: Sequence[str | Path | None], *settings: Any) -> str:
    """Return the identity of a batch task: its files (see `fingerprint`), and settings that JSON can hold."""
    return hashlib.sha256(json.dumps([fingerprint(paths), *settings]).encode()).hexdigest()


def open_checkpoint(model_path: str, architecture: dict[str, Any], device: str = "cpu") -> Loaded:
    """Load a checkpoint and hold the caller's architecture keys against what it carries.

    Args:
        model_path: a checkpoint, or a bare state dict.
        architecture: the original's five keys; None where not given.
        device: where it is going: quantised weights are made there.

    Raises:
        UserError: no such file, no checkpoint, or a key that disagrees with it (names both values).
    """
    from git_model.checkpoint import load_checkpoint

    given = {key: value for key, value in architecture.items() if value is not None}
    loaded = load_checkpoint(model_path, _bare_config(given), device=device)
    carried = _architecture_of(loaded.config)
    carried["input_resolution"] = loaded.model.vision.resolution
    for key, value in given.items():
        if value != carried[key]:
            raise UserError(f"{key} is {value!r}, but the checkpoint {model_path} was trained with {carried[key]!r}")
    return loaded


def _architecture_of(config: Config) -> dict[str, Any]:
    return {
        "image_encoder_type": config.vision.name,
        "language_model": config.language.name,
        "mapping_type": config.mapper.type,
        "output_grid": config.vision.features == "grid",
    }


def _bare_config(given: dict[str, Any]) -> Config | None:
    """Return the architecture for a bare state dict, when the caller named it."""
    from git_model.config import Config
    from git_model.schema import from_dict

    if not {"image_encoder_type", "language_model", "mapping_type"} <= given.keys():
        return None
    vision = {
        "name": given["image_encoder_type"],
        "features": "grid" if given.get("output_grid") else "pooled",
        "resolution": given.get("input_resolution"),
    }
    parts = {"mapper": {"type": given["mapping_type"]}, "language": {"name": given["language_model"]}}
    return from_dict(Config, {"vision": vision, **parts})


def pick_device(name: str) -> str:
    """Return the device to run on; 'auto' is this process's GPU where there is one.

    Raises:
        UserError: a device this machine does not have.
    """
    import torch

    from git_model.hardware import check_card

    if name == "auto":
        if not torch.cuda.is_available():
            return "cpu"
        # torchrun's, or srun's; where each task sees one GPU only, that is number 0
        own = os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0"))
        name = f"cuda:{int(own) % torch.cuda.device_count()}"
    try:
        if name.startswith("cuda"):
            check_card(name)
        torch.zeros(1, device=name)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device '{name}' cannot be used here; one of: auto, cpu, cuda, cuda:0, ...") from error
    return name
