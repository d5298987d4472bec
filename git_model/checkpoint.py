"""Save and load: the only way a trained model comes back.

`model-000.pt` (after epoch 0), `model_best.pt` and `model_latest.pt` hold the trained tensors, the whole config, the
tokenizer where it was trained here, and names and fingerprints of the frozen parts that can be fetched again. They
are read with `weights_only=True`: no code in them runs. Each ends with the SHA-256 of everything before it, so a
changed byte is told wherever the file was copied to (`torch.load` reads past it). What going on with a run needs is
kept elsewhere: resume.py.
"""

from __future__ import annotations

import hashlib
import io
import logging
import pickle
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from git_model.config import Config
from git_model.datasets.files import write_all
from git_model.errors import EXIT_NO_CHECKPOINT, UserError
from git_model.models.build import build_model, build_regressor
from git_model.models.git import GitModel
from git_model.models.native import read_native
from git_model.models.parts import PartedModel
from git_model.models.regressor import EnsembleRegressor, PromptRegressor
from git_model.schema import from_dict, to_dict
from git_model.tokens import tokenizer_from_json
from git_model.weights import fetched_parts, held_tensors, identify, load_part, parts_of

log = logging.getLogger(__name__)

FORMAT = 2
SEAL = b"\nsha256:"  # then 64 digits, at the very end of a file
LATEST = "model_latest.pt"
BEST = "model_best.pt"


@dataclass
class Loaded:
    """A checkpoint that came back.

    Args:
        model: on the CPU, in evaluation mode.
        config: the run's.
        metrics: the scores noted when it was saved.
        step: optimiser steps done.
        trained_bits: of the language model's weights in training, where `config` now says otherwise.
    """

    model: GitModel
    config: Config
    metrics: dict[str, float] = field(default_factory=dict)
    step: int = 0
    trained_bits: int = 16


def sealed(content: Mapping[str, Any]) -> bytes:
    """Return tensors and plain values as the bytes of a file that tells when it was changed."""
    buffer = io.BytesIO()
    torch.save(dict(content), buffer)
    digest = hashlib.sha256(buffer.getbuffer()).hexdigest()
    buffer.write(SEAL + digest.encode())
    return buffer.getvalue()


def is_sealed(path: Path) -> bool:
    """Tell whether a file ends with a seal, and hold it against the bytes before.

    Raises:
        UserError: they were changed (exit code 76).
    """
    length = len(SEAL) + 64
    with path.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(max(0, size - length))
        mark, told = (tail := file.read())[: len(SEAL)], tail[len(SEAL) :]
        if mark != SEAL:
            return False
        file.seek(0)
        digest, left = hashlib.sha256(), size - length
        while left and (part := file.read(min(left, 1 << 22))):
            digest.update(part)
            left -= len(part)
    if digest.hexdigest().encode() != told:
        raise UserError(f"{path} was damaged after it was written: its checksum does not fit", EXIT_NO_CHECKPOINT)
    return True


def model_file(
    model: PartedModel,
    config: Config,
    *,
    step: int,
    epoch: int,
    metrics: Mapping[str, float] | None = None,
    world: int = 1,
    tensors: Mapping[str, Tensor] | None = None,
) -> bytes:
    """Return the bytes of a model file; see the module's docstring.

    Args:
        model: unwrapped.
        config: the run's.
        step: optimiser steps done.
        epoch: the one the next step is in.
        metrics: the last validation's.
        world: number of processes.
        tensors: `held_tensors` of the model, where they were gathered before.
    """
    names = {"vision": config.vision.name, "mapper": config.mapper.type, "language": config.language.name}
    known = model.fingerprints or identify(model)
    frozen = {part: {"name": names[part], "fingerprint": known[part]} for part in fetched_parts(model)}
    small = isinstance(model, GitModel) and config.language.name == "small"
    content = {
        "format": FORMAT,
        "config": to_dict(config),
        "tensors": dict(held_tensors(model) if tensors is None else tensors),
        "frozen": frozen,
        "tokenizer": model.codec.tokenizer.backend_tokenizer.to_str() if small else None,
        "metrics": dict(metrics or {}),
        "step": step,
        "epoch": epoch,
        "samples_a_step": config.train.batch_size * config.train.accumulation * world,
    }
    return sealed(content)


def save_checkpoint(path: Path, model: PartedModel, config: Config, **where: Any) -> None:
    """Write a model file, whole or not at all; `where` as in `model_file`.

    Raises:
        OSError: disk full, read-only; the old file is untouched.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    write_all([(path, [model_file(model, config, **where)])])


def read_content(path: Path) -> dict[str, Any]:
    """Read a checkpoint's plain content without running any code in it.

    Raises:
        UserError: missing, truncated, foreign, or a pickle that wants to run code (exit code 76).
    """
    if not path.is_file():
        raise UserError(f"no checkpoint at {path}")
    whole = is_sealed(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for a bad file; each means the same to the user
        reason = " ".join(str(error).split())[:160]
        if isinstance(error, pickle.UnpicklingError):  # torch's own words advise to run what is in the file
            reason = "it is none of torch's files, or one that wants to run code"
        raise UserError(f"{path} is no checkpoint that can be read: {reason}", EXIT_NO_CHECKPOINT) from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}, not a checkpoint", EXIT_NO_CHECKPOINT)
    if "format" in content and content["format"] != FORMAT:
        raise UserError(f"{path} has format {content['format']}, this program reads {FORMAT}", EXIT_NO_CHECKPOINT)
    if "format" in content and not whole:
        raise UserError(f"{path} was damaged after it was written: its end is not there", EXIT_NO_CHECKPOINT)
    return content


def load_checkpoint(
    path: str | Path,
    bare_config: Config | None = None,
    *,
    bits: int | None = None,
    device: torch.device | str = "cpu",
) -> Loaded:
    """Rebuild a model from its file.

    Args:
        path: a file this module wrote, a bare state dict with the same tensor names, or a native folder of the
            task 'export'.
        bare_config: the architecture, for a bare state dict only.
        bits: of the language model's weights, where other than it was trained with: 16 to merge its adapters.
        device: where the model is going; see `build_model`.

    Raises:
        UserError: no such file; not a checkpoint; tensors missing or too many (up to five are named).
    """
    path = Path(path)
    if path.is_dir():
        model, config, told = read_native(path)
        return Loaded(model, config, dict(told.get("metrics", {})), int(told.get("step", 0)))
    content: dict[str, Any] = read_content(path)
    if "format" not in content:
        if bare_config is None or not all(isinstance(v, Tensor) for v in content.values()):
            raise UserError(
                f"{path} carries no architecture: it is no checkpoint of this program. For a bare state dict give "
                "image_encoder_type, language_model, mapping_type and output_grid",
                EXIT_NO_CHECKPOINT,
            )
        held = parts_of(content)
        names = {"vision": bare_config.vision.name, "language": bare_config.language.name}
        frozen = {part: {"name": name} for part, name in names.items() if part not in held and name != "small"}
        content = {"tensors": content, "config": to_dict(bare_config), "frozen": frozen}
    config = from_dict(Config, content["config"])
    if config.regressor.type != "none":
        told = "a regressor, which gives vectors and no text; the task embed_prompt takes it"
        raise UserError(f"{path} is {told}")
    text = content.get("tokenizer")
    held = _held(path, content, config.parts)
    frozen = content.get("frozen", {})
    trained_bits = config.language.bits
    requantised = bits is not None and bits != trained_bits
    if bits is not None:
        config = replace(config, language=replace(config.language, bits=bits))
    model = build_model(config, tokenizer_from_json(text) if text else None, held - set(frozen), device)
    _fill(path, model, content, held, {"language"} if requantised else set())
    return Loaded(model.eval(), config, dict(content.get("metrics", {})), int(content.get("step", 0)), trained_bits)


def load_regressor(path: str | Path) -> tuple[PromptRegressor | EnsembleRegressor, Config]:
    """Rebuild a regressor from its file, on the CPU, in evaluation mode; and its run's config.

    Raises:
        UserError: as `load_checkpoint`; or a model that writes text.
    """
    path = Path(path)
    content = read_content(path)
    if "format" not in content:
        raise UserError(f"{path} is no checkpoint of this program", EXIT_NO_CHECKPOINT)
    config = from_dict(Config, content["config"])
    if config.regressor.type == "none":
        raise UserError(f"{path} is a model that writes text, no regressor (train.py --regressor head or ensemble)")
    held = _held(path, content, config.parts)
    model = build_regressor(config, held - set(content["frozen"]))
    _fill(path, model, content, held, set())
    return model.eval(), config


def _fill(path: Path, model: PartedModel, content: Mapping[str, Any], held: set[str], other: set[str]) -> None:
    """Give a model the parts that a checkpoint holds; warn of fetched ones that are not the same (but for `other`)."""
    own = identify(model)
    for part in held:
        load_part(path, model, part, content["tensors"])
    for part, known in content.get("frozen", {}).items():
        if part not in other and "fingerprint" in known and own.get(part) != known["fingerprint"]:
            log.warning("the %s weights of '%s' are not those this model was trained on", part, known["name"])


def _held(path: Path, content: Mapping[str, Any], parts: tuple[str, ...]) -> set[str]:
    """Return the parts whose tensors a checkpoint holds; every part is either held or named as frozen."""
    held = parts_of(content["tensors"])
    if foreign := sorted(held - set(parts)):
        raise UserError(
            f"{path} holds tensors of {', '.join(foreign[:5])}; this program knows {', '.join(parts)}",
            EXIT_NO_CHECKPOINT,
        )
    if missing := [part for part in parts if part not in held and part not in content.get("frozen", {})]:
        raise UserError(f"{path} lacks the weights of: {', '.join(missing)}", EXIT_NO_CHECKPOINT)
    return held
